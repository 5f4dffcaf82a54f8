"""The dialling side: a link to one other worker, whose first lane goes through the hub."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from rayfwd import __version__, codes
from rayfwd.config import DirectConfig
from rayfwd.direct.reserve import ThroughHub
from rayfwd.problems import Problem
from rayfwd.session.frames import Frame
from rayfwd.session.handshake import PROOF, Challenge, Hello, Proof, Welcome
from rayfwd.session.lane import Lane, LaneClass
from rayfwd.session.messages import Message
from rayfwd.session.proof import NodeKey, check
from rayfwd.session.session import Limits
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.transport.carrier import Carrier
from rayfwd.transport.link import LaneTask, Link
from rayfwd.transport.link_lane import LinkLane
from rayfwd.transport.mux import Mux, MuxStream, StreamOwner

AWAY_INTERVAL = 2.0
"""Seconds between two looks at whether the other worker is there, at most: a frame each way."""

KEY, SIGNATURE = "key", "signature"
"""In the plan's place in a WELCOME: by which key the other worker is known, and that it is it."""


def stands(mux: Mux | None) -> bool:
    """A lane of the session goes by the direct way, and is well."""
    return any(not lane.sidelined for lane in direct_lanes(mux))


def direct_lanes(mux: Mux | None) -> list[Lane]:
    """Those of the session that go by the direct way."""
    if mux is None or mux.ended:
        return []
    lanes = mux.session.lanes.values()
    return [lane for lane in lanes if lane.lane_class is not LaneClass.RESERVE]


class DirectOwner(Protocol):
    """The worker, as far as a direct way asks it something."""

    def accept(self, stream: MuxStream, target: bytes, node: str) -> StreamOwner | None:
        """Take a stream that this node opened, or reset it and return None."""

    def direct_changed(self) -> None:
        """How a way stands has changed."""


class DirectLink(Link):
    """Holds the lanes; the session begins by the one through the hub."""

    def __init__(
        self,
        owner: Dialled,
        direct: DirectConfig,
        carrier: Carrier,
        reserve: ThroughHub,
        on_memory: Callable[[int], None],
    ) -> None:
        super().__init__(owner, direct.way(), carrier, Limits(), direct.node)
        self._reserve = reserve
        self._first = self.slots[0]
        self._reserve_slot = LaneTask("reserve", LaneClass.RESERVE, reserve)
        self.slots.insert(0, self._reserve_slot)
        self._on_memory = on_memory
        self._node = direct.node
        self.may_begin = asyncio.Event()
        """The hub can be asked for a stream to that node."""
        self._direct = asyncio.Event()
        """A lane of the direct way stands: the others follow it."""
        self.theirs = ""
        """The key by which the other worker is known in this session."""

    @property
    def why_not(self) -> Problem | None:
        """What keeps the direct way from standing."""
        if stands(self.mux):
            return None
        if self.mux is None:
            return self._reserve_slot.problem
        return self._first.problem

    def hand_over(self) -> Tree | None:
        tree = super().hand_over()
        self._reserve.release()
        return tree

    async def _turn(self, slot: LaneTask) -> None:
        slot.heartbeat.idle()
        if slot is self._reserve_slot:
            await self.may_begin.wait()
            return
        await self._established.wait()
        if slot is not self._first:
            await self._direct.wait()

    def understood(self, problem: Problem, failures: int, seconds: float) -> Problem:
        """The lane through the hub says nothing of the way."""
        return super().understood(problem, failures, seconds) if stands(self.mux) else problem

    def _worded(self, slot: LaneTask, problem: Problem) -> Problem:
        if slot is self._reserve_slot:
            return self._reserve.problem(problem)
        return problem

    def _longest(self, slot: LaneTask) -> float:
        longest = super()._longest(slot)
        return min(longest, AWAY_INTERVAL) if slot is self._reserve_slot else longest

    def _say(self, say: Callable[..., object], slot: LaneTask, problem: Problem) -> None:
        if problem.code is not codes.DIRECT_AWAY:
            super()._say(say, slot, problem)

    def _check(self, slot: LaneTask, lane: LinkLane, welcome: Welcome) -> None:
        """By the lane through the hub the other worker says its key, and by every other one shows
        that it has it. Raises ProblemError."""
        if slot is self._reserve_slot:
            self.theirs = str(welcome.node.get(KEY, ""))
            return
        said, challenge = lane.said, lane.challenge
        assert said is not None, "it was answered"
        signature = str(welcome.node.get(SIGNATURE, ""))
        if challenge is None or not check(self.theirs, said, challenge, Proof(signature)):
            raise codes.DIRECT_WRONG.error(
                f"the machine that answers there does not prove that it is {self._node}",
                f"correct ssh or socket of the [[direct]] whose node is {self._node}",
            )

    def _join(self, slot: LaneTask, lane: LinkLane, welcome: Welcome, session: str) -> None:
        super()._join(slot, lane, welcome, session)
        self._note_direct()

    def _lost(self, slot: LaneTask, why: str) -> None:
        super()._lost(slot, why)
        self._note_direct()

    def _note_direct(self) -> None:
        standing = [s for s in self.slots if s.number is not None and s is not self._reserve_slot]
        if standing:
            self._direct.set()
        else:
            self._direct.clear()


class Dialled:
    """One other worker that is dialled from here. Owner of the link to it."""

    def __init__(
        self,
        own: str,
        direct: DirectConfig,
        ride_through: float,
        carrier: Carrier,
        reserve: ThroughHub,
        owner: DirectOwner,
        on_memory: Callable[[int], None],
    ) -> None:
        self.node = direct.node
        self._own = own
        self._ride_through = ride_through
        self._owner = owner
        self._key = NodeKey.make()
        self.link = DirectLink(self, direct, carrier, reserve, on_memory)

    # -- as the link's owner ---------------------------------------------------------------------

    def hello(self) -> Hello:
        return Hello(
            node=self._own,
            key=self._key.public,
            version=__version__,
            worker_ports=0,
            role="peer",
            ride_through=self._ride_through,
            features=frozenset({PROOF}),
        )

    def prove(self, greeting: Frame, challenge: Challenge) -> Proof:
        return self._key.prove(greeting, challenge)

    def accept_stream(self, stream: MuxStream, target: bytes) -> StreamOwner | None:
        return self._owner.accept(stream, target, self.node)

    def welcomed(self, welcome: Welcome) -> None: ...

    def message(self, message: Message) -> None:
        """Workers have nothing to say to each other."""

    def link_changed(self) -> None:
        self._owner.direct_changed()

    # -- for a process that comes after this one -------------------------------------------------

    def hand_over(self) -> Tree | None:
        """The session; None: there is none."""
        theirs = self.link.theirs
        link = self.link.hand_over()
        if link is None:
            return None
        return {"node": self.node, "key": self._key.to_text(), "theirs": theirs, "link": link}

    def take_over(self, tree: Tree) -> None:
        """Raises SnapshotError."""
        try:
            self._key = NodeKey.from_text(tree["key"])
            self.link.theirs = str(tree["theirs"])
            self.link.take_over(tree["link"])
        except (KeyError, TypeError, ValueError) as exc:
            raise SnapshotError(f"a direct way that does not fit: {exc!r}") from exc
