"""Every worker knows the plan of every node: all of them once, and then what changes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayfwd.cluster.plan import NodePlan
from rayfwd.hub.peers import HubNode, HubPeer
from rayfwd.hub.roster import Roster
from rayfwd.hub.telling import Teller
from rayfwd.session import messages
from rayfwd.session.handshake import CHANGES
from rayfwd.transport.mux import Mux, framed

GATHER_SECONDS, GATHER_FOR_EACH = 0.2, 0.002
"""Seconds for which changes of the plan are gathered before the workers are told, and how much
longer for each of these: a message to a thousand nodes, and that it has come, takes a core a tenth
of a second."""
MOST_SHOWN = 1000
"""Plans that a WELCOME holds, or the answer to a doctor: as many as a frame has room for."""


class PlanNews:
    """What has changed, and who is yet to be told."""

    def __init__(self, roster: Roster, nodes: Mapping[str, HubNode], teller: Teller) -> None:
        self._roster = roster
        self._nodes = nodes
        self._teller = teller
        self._changed: dict[str, None] = {}
        """Names of nodes that are new, have changed or are gone, which nobody was told of yet."""
        self._soon: asyncio.TimerHandle | None = None
        self._all: tuple[tuple[NodePlan, ...], messages.Nodes, bytes | None] | None = None
        """All plans, the message of them, and that as it is sent."""

    def changed(self, name: str) -> None:
        """Tell of this node soon: many come together."""
        self._changed[name] = None
        if self._soon is None:
            loop = asyncio.get_running_loop()
            wait = GATHER_SECONDS + GATHER_FOR_EACH * len(self._nodes)
            self._soon = loop.call_later(wait, self.tell_changes)

    def tell_changes(self) -> None:
        """Tell what has changed at once."""
        if self._soon is not None:
            self._soon.cancel()
        self._soon = None
        names, self._changed = self._changed, {}
        if not names:
            return
        plans = {name: self._roster.plan(name) for name in names}
        changed = tuple(plan.to_wire() for plan in plans.values() if plan is not None)
        gone = tuple(name for name, plan in plans.items() if plan is None)
        there = [node for node in self._nodes.values() if node.mux is not None]
        knowing = [node for node in there if node.knows_all is node.mux]
        self._teller.tell(messages.NodesChanged(changed, gone), knowing)
        older = [n for n in there if n.hello is not None and CHANGES not in n.hello.features]
        if older:
            self._teller.tell(self._all_nodes(), older)

    def tell_all(self, node: HubNode, mux: Mux) -> None:
        """Tell a node all plans; what changes from now on, it is told of."""
        node.knows_all = mux
        plans = self._roster.plans()
        if self._all is None or self._all[0] is not plans:
            message = self._all_nodes()
            self._all = plans, message, framed(message)
        _, message, data = self._all
        if data is not None:
            mux.tell(message, data)

    def shown_to(
        self, peer: HubPeer, changes: bool, for_clients: Mapping[str, int]
    ) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
        """Its own plan, and what a WELCOME tells it of the others'. `changes`: messages tell of
        those. `for_clients`: services of the head that are no port of its plan."""
        head = self._roster.own
        if not isinstance(peer, HubNode):
            services = {**head.head_services, **for_clients}
            return {}, (replace(head, head_services=services).to_wire(),)
        nodes = (head, peer.plan) if changes else shown(self._roster.plans(), peer.plan)
        return peer.plan.to_wire(), tuple(node.to_wire() for node in nodes)

    def _all_nodes(self) -> messages.Nodes:
        return messages.Nodes(tuple(plan.to_wire() for plan in self._roster.plans()))


def shown(plans: tuple[NodePlan, ...], own: NodePlan | None) -> tuple[NodePlan, ...]:
    """As many of the plans as a frame has room for: the head's, and the node's own among them."""
    if len(plans) <= MOST_SHOWN:
        return plans
    some = plans[: MOST_SHOWN - 1]
    return some if own is None or own in some else (*some, own)
