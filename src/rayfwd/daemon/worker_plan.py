"""What a worker knows of the plan: the hub tells it, this node's Ray and listeners follow it, and a
file keeps it for `rayfwd plan`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rayfwd import __version__
from rayfwd.cluster.plan import NodePlan
from rayfwd.daemon.node import Node
from rayfwd.daemon.worker_ray import WorkerRay
from rayfwd.ray.install import Versions
from rayfwd.session import messages
from rayfwd.session.frames import MAX_PAYLOAD, ProtocolError, first_frame
from rayfwd.session.handshake import CHANGES, OVERLAY, Welcome
from rayfwd.session.snapshot import SnapshotError
from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.system.files import replace_file
from rayfwd.system.logs import get_logger
from rayfwd.watch.cluster_view import ClusterView

log = get_logger(__name__)

CLAIM_INTERVAL = 5.0
"""Seconds between two looks at whether a network that another cluster has here is free."""


class WorkerPlan:
    """Replaces the node's view with each word of the hub's. A message that is malformed raises
    ValueError, and nothing has changed then."""

    def __init__(self, node: Node, ray: WorkerRay, on_change: Callable[[], None]) -> None:
        """`on_change` is called after the view has changed."""
        self._node = node
        self._ray = ray
        self._on_change = on_change
        self._told: tuple[NodePlan, ...] = ()
        """The hub's nodes, whether this one may listen for them or not."""
        self._kept = b""
        self.hub_features: frozenset[str] = frozenset()

    # -- what the hub says ---------------------------------------------------------------

    def welcomed(self, welcome: Welcome) -> None:
        """A session begins."""
        try:
            own = NodePlan.from_wire(welcome.node)
            nodes = plans_of(welcome.nodes)
        except ValueError as exc:
            log.error("plan_malformed", cause=str(exc), remedy="run the same rayfwd on both sides")
            return
        view = self._node.view
        if CHANGES in welcome.features:
            # All are told of in a moment, or were just before.
            nodes = changed(self._told or view.nodes, nodes, ())
        versions, auth = view.head_versions, view.auth
        if welcome.ray is not None and welcome.python is not None:
            versions = Versions(welcome.ray, welcome.python)
        self.hub_features = welcome.features
        try:
            auth = self._ray.take_token(welcome.ray_auth)
        except ValueError as exc:
            log.warning("message_malformed", cause=str(exc))
        if own != view.own:
            log.info(
                "plan_received",
                address=own.address,
                ports=f"{own.base}-{own.last_worker_port}",
                nodes=[node.name for node in nodes],
            )
        network, ride_through = welcome.network, welcome.ride_through
        self._set_view(ClusterView(network, ride_through, own, nodes, auth, versions))

    def hear_nodes(self, message: messages.Nodes) -> None:
        """All of them."""
        nodes = plans_of(message.nodes)
        self._node.announced.keep([node.name for node in nodes])
        self._set_view(replace(self._node.view, nodes=nodes))

    def hear_changes(self, message: messages.NodesChanged) -> None:
        """Some are new, different or gone."""
        nodes = changed(self._told, map(NodePlan.from_wire, message.nodes), message.gone)
        for name in message.gone:
            self._node.announced.drop(name)
        self._set_view(replace(self._node.view, nodes=nodes))

    def hear_versions(self, message: messages.HeadVersions) -> None:
        """Of the head's Ray and Python."""
        if message.ray and message.python:
            versions = Versions(message.ray, message.python)
            self._set_view(replace(self._node.view, head_versions=versions))

    def hear_auth(self, message: messages.Auth) -> None:
        """Ray's token, or that there is none."""
        auth = self._ray.take_token(message.to_wire())
        self._set_view(replace(self._node.view, auth=auth))

    # -- the view ------------------------------------------------------------------------

    def _set_view(self, view: ClusterView) -> None:
        """Where the network is another cluster's on this machine: without the nodes, so that
        nothing listens in it. So it is before the first WELCOME, which says what the network is."""
        if view.nodes:
            self._told = view.nodes
            if view.own is None or not self._node.claim.take(view.network):
                view = replace(view, nodes=())
        if view.own is not None and view.nodes:
            self._node.ray.set_plan(
                view.own,
                view.nodes[0],
                view.head_versions,
                view.ride_through,
                view.network,
                view.auth,
                None if view.own.advertised else self._node.overlay.interface,
            )
        self._keep(view)
        self._node.set_view(view)
        self._on_change()

    async def watch_claim(self) -> None:
        """Whether the other cluster of this machine, whose the network is, has gone."""
        while True:
            await sleep_coalesced(CLAIM_INTERVAL)
            if self._node.claim.problem is not None:
                self._set_view(replace(self._node.view, nodes=self._told))

    def _keep(self, view: ClusterView) -> None:
        """For `rayfwd plan` while the daemon does not run."""
        plan = json.dumps(view.to_wire()).encode() + b"\n"
        if plan == self._kept:
            return
        self._kept = plan
        try:
            replace_file(self._node.config.plan_file, plan)
        except OSError as exc:
            log.warning("plan_not_kept", cause=str(exc))

    # -- for a process that comes after this one -----------------------------------------

    def hand_over(self) -> bytes | None:
        """The WELCOME that says what is known, with the head alone; None: nothing is."""
        view = self._node.view
        if view.own is None:
            return None
        versions = view.head_versions
        return Welcome(
            version=__version__,
            node=view.own.to_wire(),
            nodes=tuple(node.to_wire() for node in view.nodes[:1]),
            network=view.network,
            ride_through=view.ride_through,
            ray=versions.ray if versions else None,
            python=versions.python if versions else None,
            features=self.hub_features,
            ray_auth=view.auth.to_wire() if view.auth else None,
        ).encode()

    def take_over(self, welcome: bytes, nodes: Iterable[Mapping[str, Any]]) -> None:
        """What an earlier process knew, and all of its nodes. Raises SnapshotError."""
        frame = first_frame(bytearray(welcome), MAX_PAYLOAD)
        if frame is None:
            raise SnapshotError("the plan is not whole")
        try:
            self.welcomed(Welcome.decode(frame))
            if all_of_them := tuple(nodes):
                self.hear_nodes(messages.Nodes(all_of_them))
        except (ProtocolError, ValueError) as exc:
            raise SnapshotError(str(exc)) from exc

    def asks_for_another(self) -> bool:
        """By its file, or by the level that it has, this node asks for another plan than the one
        that it had before a restart."""
        own, config = self._node.view.own, self._node.config
        if own is None:
            return False
        # A hub that knows of no levels would give the same plan again.
        level = self._node.overlay.level if OVERLAY in self.hub_features else own.level
        return not own.suits(config.worker_ports, config.ray.advertise, level)


def plans_of(nodes: Iterable[Mapping[str, Any]]) -> tuple[NodePlan, ...]:
    """The plans that a hub tells of. Raises ValueError."""
    plans = tuple(map(NodePlan.from_wire, nodes))
    if not plans or plans[0].role != "head":
        raise ValueError("the first node is not the head")
    return plans


def changed(
    known: Iterable[NodePlan], plans: Iterable[NodePlan], gone: Iterable[str]
) -> tuple[NodePlan, ...]:
    """The nodes of which some are new or different and some are gone, the head first."""
    news = tuple(plans)
    head_too = any(node.role == "head" for node in news)  # it may have another name
    nodes = {node.name: node for node in known if node.role != "head" or not head_too}
    nodes |= {node.name: node for node in news}
    for name in gone:
        nodes.pop(name, None)
    return tuple(sorted(nodes.values(), key=lambda node: node.role != "head"))
