"""All direct ways of a worker: those it dials, those by which it is dialled, and which to take."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config, HeadConfig
from rayfwd.direct.dialled import Dialled, direct_lanes, stands
from rayfwd.direct.reserve import LANE_PORT, ThroughHub
from rayfwd.direct.taken import Taken
from rayfwd.hub.ledger import Ledger
from rayfwd.hub.peers import HubPeer
from rayfwd.problems import Problem
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening, Target
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.transport.carrier import Carrier
from rayfwd.transport.linkstats import LinkStats
from rayfwd.transport.mux import Mux, MuxStream, StreamOwner
from rayfwd.transport.refused import RefusedStreams
from rayfwd.transport.relay import SocketRelay
from rayfwd.watch.cluster_view import ClusterView

Way = tuple[str, bool]
"""The other worker, and whether this one dials."""


class WaysOwner(Protocol):
    """The worker's role. Nothing is asked of it before `run` or `take_over`."""

    def view_now(self) -> ClusterView:
        """What is known of the cluster."""

    def hub_mux(self) -> Mux | None:
        """The session with the hub, if it stands and the hub passes lanes on."""

    def accept_opening(self, stream: MuxStream, opening: Opening) -> StreamOwner | None:
        """Take a stream to this machine, or reset it and return None."""

    def direct_changed(self) -> None:
        """How a way stands has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaySeen:
    """One way, as it is now."""

    node: str
    dialled_here: bool
    mux: Mux | None
    link_stats: LinkStats
    cuts: int
    """How often it lost all of its lanes but the one through the hub."""
    why_not: Problem | None
    """What keeps it from standing; None: it stands, or there is no more to say here."""

    @property
    def stands(self) -> bool:
        return stands(self.mux)


class DirectWays:
    """Owner of both kinds."""

    def __init__(
        self,
        config: Config,
        carrier: Callable[[HeadConfig], Carrier],
        owner: WaysOwner,
        refused: RefusedStreams,
    ) -> None:
        self.on = config.network.direct != "off"
        self._own = config.name
        self._owner = owner
        self._costs: dict[str, HubPeer] = {}
        """What those cost that are dialled from here, by name."""
        self._ledger = Ledger(self._peers, self._now)
        self.taken = Taken(
            config.name, config.peers_socket, config.ride_through, self, self._ledger, refused
        )
        self.dialled: dict[str, Dialled] = {}
        self._cuts: Counter[Way] = Counter()
        self._with_lanes: set[Way] = set()
        for direct in config.direct if self.on else ():
            name = direct.node
            self._costs[name] = HubPeer(name)
            self.dialled[name] = made = Dialled(
                config.name,
                direct,
                config.ride_through,
                carrier(direct.way()),
                ThroughHub(name, self._stream_to(name)),
                self,
                self._counted(name),
            )
            made.link.refused = refused

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _peers(self) -> list[HubPeer]:
        for name, each in self.dialled.items():
            self._costs[name].mux = each.link.mux
        return [*self._costs.values(), *self.taken.peers.values()]

    def _counted(self, name: str) -> Callable[[int], None]:
        peer = self._costs[name]

        def count(by: int) -> None:
            peer.mux = self.dialled[name].link.mux
            self._ledger.changed(peer, by)

        return count

    # -- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it is cancelled. Raises ProblemError where the socket cannot be had."""
        if not self.on:
            return
        await self.taken.listen()
        self.news()
        async with asyncio.TaskGroup() as group:
            for name, each in self.dialled.items():
                group.create_task(each.link.run(), name=f"direct way to {name}")

    async def end(self, why: str) -> None:
        """End every session in order."""
        self.taken.close(why)
        await asyncio.gather(*(each.link.close(why) for each in self.dialled.values()))

    def loops(self) -> Iterator[Heartbeat]:
        for each in self.dialled.values():
            yield from (slot.heartbeat for slot in each.link.slots)

    def news(self) -> None:
        """The plan, or the link to the hub, may have changed."""
        view = self._owner.view_now()
        for name, each in self.dialled.items():
            node = view.node_named(name)
            if self._owner.hub_mux() is not None and self._is_walled_in(view, node):
                each.link.may_begin.set()
            else:
                each.link.may_begin.clear()
        if view.nodes:
            self.taken.keep_only(lambda name: view.node_named(name) is not None)

    def _is_walled_in(self, view: ClusterView, node: NodePlan | None) -> bool:
        """It is another worker, and neither it nor this node is reached without rayfwd."""
        own = view.own
        return (
            node is not None
            and node.role == "worker"
            and node.name != self._own
            and own is not None
            and not (own.advertised or node.advertised)
        )

    # -- streams ---------------------------------------------------------------------------------

    def mux_to(self, address: str) -> Mux | None:
        """The session by which a new stream to that address goes directly; None: by the hub."""
        if not self.dialled and not self.taken.peers:
            return None
        node = self._owner.view_now().node_at(address)
        if node is None:
            return None
        for mux in self._muxes_to(node.name):
            if stands(mux) and mux.has_room():
                return mux
        return None

    def _muxes_to(self, name: str) -> Iterator[Mux]:
        dialled, taken = self.dialled.get(name), self.taken.peers.get(name)
        if dialled is not None and dialled.link.mux is not None:
            yield dialled.link.mux
        if taken is not None and taken.mux is not None:
            yield taken.mux

    def _stream_to(self, name: str) -> Callable[[SocketRelay], bool]:
        def open_stream(relay: SocketRelay) -> bool:
            mux, node = self._owner.hub_mux(), self._owner.view_now().node_named(name)
            if mux is None or node is None or not mux.has_room():
                return False
            relay.open_stream(mux, Opening(Target(node.address, LANE_PORT), lane=True))
            return True

        return open_stream

    def take_lane(self, stream: MuxStream, opening: Opening) -> StreamOwner | None:
        """A stream of the hub's that is to be a lane: by its word, of whoever is at the source."""
        node = self._owner.view_now().node_at(opening.source or "")
        if not self.on:
            stream.reset(ResetReason.NOT_IN_PLAN, f"{self._own} takes no direct ways")
            return None
        if node is None:  # it has just joined: the plan with it is on its way
            stream.reset(ResetReason.NODE_AWAY, f"{self._own} does not know that node yet")
            return None
        return self.taken.take_stream(stream, node)

    # -- as the ways' owner ----------------------------------------------------------------------

    def accept(self, stream: MuxStream, target: bytes, node: str) -> StreamOwner | None:
        """A stream that another worker opened: whose it is the session tells."""
        plan = self._owner.view_now().node_named(node)
        try:
            opening = Opening.decode(target)
            if opening.lane or opening.asks or plan is None:
                raise ValueError("a lane within a lane, a question, or of no node")
        except ValueError as exc:
            stream.reset(ResetReason.NOT_IN_PLAN, str(exc))
            return None
        return self._owner.accept_opening(stream, Opening(opening.target, plan.address))

    def direct_changed(self) -> None:
        self._count_cuts()
        self._owner.direct_changed()

    def _count_cuts(self) -> None:
        """A session that ended in order, or began anew, was not cut."""
        muxes = {(way.node, way.dialled_here): way.mux for way in self.seen()}
        before, self._with_lanes = (
            self._with_lanes,
            {way for way, mux in muxes.items() if direct_lanes(mux)},
        )
        for way in before - self._with_lanes:
            mux = muxes.get(way)
            if mux is not None and not mux.ended:
                self._cuts[way] += 1

    # -- how it is -------------------------------------------------------------------------------

    def seen(self) -> list[WaySeen]:
        found = [
            WaySeen(
                node=name,
                dialled_here=True,
                mux=each.link.mux,
                link_stats=each.link.link_stats,
                cuts=self._cuts[name, True],
                why_not=each.link.why_not,
            )
            for name, each in self.dialled.items()
        ]
        found += [
            WaySeen(
                node=peer.name,
                dialled_here=False,
                mux=peer.mux,
                link_stats=peer.link_stats,
                cuts=self._cuts[peer.name, False],
                why_not=None,
            )
            for peer in self.taken.peers.values()
        ]
        return found

    def problems(self) -> Iterator[tuple[str, Problem]]:
        """Ways that are told in the file and do not stand, where the other worker is there."""
        for name, each in self.dialled.items():
            why = each.link.why_not
            if why is not None and why.code is not codes.DIRECT_AWAY and each.link.mux is not None:
                yield name, why

    def muxes(self) -> dict[str, Mux]:
        """Every session, by a name that no peer of the hub has."""
        found = {
            f"direct to {name}": each.link.mux
            for name, each in self.dialled.items()
            if each.link.mux is not None
        }
        found |= {
            f"direct from {peer.name}": peer.mux
            for peer in self.taken.peers.values()
            if peer.mux is not None
        }
        return found

    # -- for a process that comes after this one -------------------------------------------------

    def hand_over(self) -> Tree:
        dialled = [each.hand_over() for each in self.dialled.values()]
        return {"dialled": [tree for tree in dialled if tree], "taken": self.taken.hand_over()}

    def take_over(self, tree: Tree) -> None:
        """Go on with the sessions that there are. One that is not told in the file any more, or
        does not fit, is lost alone."""
        if not self.on:
            return
        for each in tree.get("dialled", ()):
            if each.get("node") in self.dialled:
                with suppress(SnapshotError):
                    self.dialled[each["node"]].take_over(each)
        for each in tree.get("taken", ()):
            with suppress(SnapshotError):
                self.taken.take_over(each)
