"""Finds streams their way through the hub.

From the head's listeners to a worker, from a worker to the head or on to another worker, from a
client to what the head offers it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from rayfwd.hub.ledger import Ledger
from rayfwd.hub.offer import HubOwner
from rayfwd.hub.peers import HubClient, HubNode
from rayfwd.hub.roster import Roster
from rayfwd.hub.stream_relay import StreamRelay
from rayfwd.session.handshake import ASKED, DIRECT, SOURCE
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening, Target
from rayfwd.transport.mux import MuxStream, StreamOwner
from rayfwd.transport.question import Question
from rayfwd.transport.refused import RefusedStreams
from rayfwd.transport.relay import SocketRelay


class Router:
    """Of one hub. After a restart of the hub, connections to a worker that has not come back yet
    wait for it, until `end_waiting`."""

    def __init__(
        self, owner: HubOwner, roster: Roster, nodes: Mapping[str, HubNode], ledger: Ledger
    ) -> None:
        """`nodes` is the hub's own, by their names."""
        self._owner = owner
        self._roster = roster
        self._nodes = nodes
        self._at = {node.plan.address: node for node in nodes.values()}
        """The nodes by their addresses."""
        self._ledger = ledger
        self._grace: asyncio.TimerHandle | None = None
        self.refused = RefusedStreams()
        """Ports that were dialled in vain, of all sessions."""

    # -- which node has which address ------------------------------------------------------

    def add(self, node: HubNode) -> None:
        """From now on it is found at its plan's address."""
        self._at[node.plan.address] = node

    def remove(self, node: HubNode) -> None:
        """Nobody is found there any more."""
        del self._at[node.plan.address]

    # -- what waits for nodes after a restart ----------------------------------------------

    def begin_waiting(self, seconds: float) -> None:
        """For so long, what is for a worker that is away waits for it."""
        self._grace = asyncio.get_running_loop().call_later(seconds, self._grace_is_over)

    def end_waiting(self) -> None:
        """What still waits is refused."""
        if self._grace is not None:
            self._grace.cancel()
            self._grace_is_over()

    def hand_over(self) -> None:
        """What waits is another process's; see `waiting`."""
        if self._grace is not None:
            self._grace.cancel()

    @property
    def waiting(self) -> list[tuple[Target, SocketRelay]]:
        """Connections of listeners that came before the node did."""
        return [each for node in self._nodes.values() for each in node.waiting]

    def serve_waiting(self, node: HubNode) -> None:
        """It has come."""
        waiting, node.waiting = node.waiting, []
        for target, relay in waiting:
            self.open(target, relay)

    def _grace_is_over(self) -> None:
        self._grace = None
        for node in self._nodes.values():
            for _, relay in node.waiting:
                relay.refuse()
            node.waiting.clear()

    # -- streams ---------------------------------------------------------------------------

    def open(self, target: Target, relay: SocketRelay) -> None:
        """A listener of the head was used: find the relay a stream to the worker behind it."""
        node = self._at.get(target.address)
        if node is None:
            relay.refuse()
        elif node.mux is not None and not node.mux.ended:
            relay.open_stream(node.mux, self._opening(node, target, self._roster.own.address))
        elif self._grace is not None:
            node.waiting.append((target, relay))
        else:
            away = f"{target}: {node.plan.name} is away"
            self.refused.note("", node.label, ResetReason.NODE_AWAY, away)
            relay.refuse()

    def ask(self, target: Target, question: Question) -> None:
        """A program of the head dials a port of a worker that is not known to be open."""
        node = self._at.get(target.address)
        if node is None or not _answers(node):
            question.unanswered()
        else:
            opening = self._opening(node, target, self._roster.own.address)
            question.put(node.mux, opening)

    def route(
        self, source: HubNode | HubClient, stream: MuxStream, data: bytes
    ) -> StreamOwner | None:
        """A worker opened a stream: to the head itself, or on to another worker. A client's leads
        to the head only, and there to the ports of the offer.
        """
        try:
            # Whose it is the session tells, not the worker.
            target, _, lane, asks = Opening.decode(data)
            if asks and isinstance(source, HubClient):
                raise ValueError("a client asks nothing")
        except ValueError as exc:
            stream.reset(ResetReason.NOT_IN_PLAN, str(exc))
            return None
        to_head = target.address == self._roster.own.address
        if isinstance(source, HubClient):
            offer = self._owner.offer()
            if to_head and offer.page is not None and target.port == offer.page.port:
                return self._owner.accept(stream, Opening(offer.page))
            allowed = offer.client_ports
            if not (to_head and target.port in allowed):
                ports = ", ".join(map(str, sorted(allowed)))
                stream.reset(
                    ResetReason.NOT_IN_PLAN,
                    f"clients may not connect to {target}; they may use these ports of "
                    f"the head: {ports}",
                )
                return None
        if to_head:
            opening = Opening(target, self._address_of(source), asks=asks)
            return self._owner.accept(stream, opening)
        node = self._at.get(target.address)
        if node is None or node is source:
            stream.reset(ResetReason.NOT_IN_PLAN, f"no node has the address {target.address}")
            return None
        for peer in (source, node):
            if self._ledger.is_crowded(peer):
                stream.reset(
                    ResetReason.TOO_MANY, f"{peer.label} has too many bytes waiting already"
                )
                return None
        if node.mux is None or node.mux.ended:
            away = f"{target}: {node.plan.name} is away"
            stream.reset(ResetReason.NODE_AWAY, away, node.label)
            return None
        if lane and (node.hello is None or DIRECT not in node.hello.features):
            stream.reset(ResetReason.NOT_IN_PLAN, f"{node.plan.name} knows no direct way", "")
            return None
        if asks and not _answers(node):
            stream.reset(ResetReason.ABORTED, f"{node.plan.name} answers no questions", "")
            return None
        if not node.mux.has_room():
            stream.reset(ResetReason.TOO_MANY, f"the node {node.plan.name} has no stream left")
            return None
        near, far = StreamRelay(), StreamRelay()
        near.other, far.other = far, near
        near.stream = stream
        opening = self._opening(node, target, self._address_of(source))
        far.stream = node.mux.open(opening._replace(lane=lane, asks=asks).encode(), far)
        return near

    def _address_of(self, peer: HubNode | HubClient) -> str | None:
        """The address in the plan's network; a client has none, nor one that is advertised."""
        if isinstance(peer, HubClient) or peer.plan.advertised:
            return None
        return peer.plan.address

    def _opening(self, node: HubNode, target: Target, source: str | None) -> Opening:
        """What a worker is told: also whose the stream is, if it understands that."""
        told = node.hello is not None and SOURCE in node.hello.features
        return Opening(target, source if told else None)


def _answers(node: HubNode) -> bool:
    """Whether it says which of its ports are open, port by port; an earlier version does not."""
    return node.hello is not None and ASKED in node.hello.features
