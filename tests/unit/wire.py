"""Two sessions joined by lanes that misbehave on purpose: the model that property tests drive.

Everything is decided by one seeded random number generator and a clock that only the model turns,
so a schedule that fails can be run again exactly.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from rayfwd.session import snapshot
from rayfwd.session.events import (
    DataReceived,
    EndReceived,
    Event,
    LaneDead,
    MessageReceived,
    Parked,
    Resumed,
    SessionEnded,
    StreamFinished,
    StreamOpened,
    StreamReset,
    StreamWritable,
)
from rayfwd.session.lane import LaneClass
from rayfwd.session.session import Limits, Session
from rayfwd.session.states import SessionState
from rayfwd.session.stream import ResetReason


@dataclass
class WireLane:
    """A lane as both ends see it: bytes under way in each direction, and its faults."""

    lane_class: LaneClass
    numbers: dict[str, int] = field(default_factory=dict)
    under_way: dict[str, deque[bytes]] = field(
        default_factory=lambda: {"worker": deque(), "hub": deque()}
    )
    """By receiver."""
    stalled: set[str] = field(default_factory=set)
    """Receivers that get nothing for now."""
    dead: set[str] = field(default_factory=set)
    """Sides that know that it is gone."""


@dataclass
class Half:
    """What one side did and saw on one stream."""

    sent: bytearray = field(default_factory=bytearray)
    got: bytearray = field(default_factory=bytearray)
    unread: int = 0
    ended: bool = False
    saw_end: bool = False
    paused: bool = False
    reset: bool = False
    lost: ResetReason | None = None
    finished: bool = False

    @property
    def over(self) -> bool:
        """Nothing more may be heard of it."""
        return self.reset or self.finished or self.lost is not None


OTHER = {"worker": "hub", "hub": "worker"}
LARGEST = 9000


class Wire:
    """The model. `step` does one random thing; `heal` lets everything arrive; `check` judges."""

    PATIENCE = 20000
    """Rounds of 0.2 s in which everything must come to rest."""

    def __init__(self, seed: int, limits: Limits, ride_through: float = 1e6) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.limits = limits
        self.sides = {
            "worker": Session("worker", ride_through, limits, self.now),
            "hub": Session("hub", ride_through, limits, self.now),
        }
        self.lanes: list[WireLane] = []
        self.halves: dict[str, dict[int, Half]] = {"worker": {}, "hub": {}}
        self.messages: dict[str, list[bytes]] = {"worker": [], "hub": []}
        self.messages_sent: dict[str, list[bytes]] = {"worker": [], "hub": []}
        self.parked = {"worker": 0, "hub": 0}
        self.handovers = 0
        self.ended: dict[str, str] = {}
        self.sizes = (
            (1, 10, 1000, LARGEST) if limits.window < 1 << 16 else (1, 1000, LARGEST, 70_000)
        )
        """Bytes of a write; with roomy limits enough to make a stream bulk."""

    # -- the world -----------------------------------------------------------------------------

    def add_lane(self, lane_class: LaneClass) -> WireLane:
        lane = WireLane(lane_class)
        self.lanes.append(lane)
        for side, session in self.sides.items():
            number, events = session.lane_up(lane_class, self.now)
            lane.numbers[side] = number
            self._take(side, events)
        return lane

    def kill(self, lane: WireLane, first: str) -> None:
        """`first` learns at once that the lane is gone; what was under way to it is lost."""
        lane.dead.add(first)
        lane.under_way[first].clear()
        self._take(first, self.sides[first].lane_down(lane.numbers[first], self.now))

    def hand_over(self, side: str) -> None:
        """`side` is restarted, and the process that comes after it goes on with its session."""
        for lane in self.lanes:
            if side not in lane.dead:
                self.kill(lane, side)
        if self.sides[side].state is not SessionState.PARKED:
            return  # it never had a lane
        data = b"".join(snapshot.dump({"core": self.sides[side].snapshot()}))
        self.sides[side] = Session.from_snapshot(snapshot.load(data)["core"], self.now)
        self._take(side, self.sides[side].drained())
        self.handovers += 1

    def bury(self) -> None:
        """Lanes that both sides know to be gone are no more."""
        self.lanes = [lane for lane in self.lanes if len(lane.dead) < 2]

    def relay(self, lane: WireLane, side: str) -> bool:
        """What `side` wants to send goes under way."""
        if side in lane.dead:
            return False
        chunks = self.sides[side].data_to_send(
            lane.numbers[side], self.random.choice((64, 4096, 1 << 18)), self.now
        )
        self._take(side, self.sides[side].drained())
        data = b"".join(chunks)
        if data and OTHER[side] not in lane.dead:
            lane.under_way[OTHER[side]].append(data)
        return bool(data)

    def deliver(self, lane: WireLane, side: str, whole: bool = False) -> bool:
        """Some of what is under way to `side` arrives, cut anywhere."""
        queue = lane.under_way[side]
        if not queue or side in lane.stalled or side in lane.dead:
            return False
        data = queue.popleft()
        cut = len(data) if whole else self.random.choice((1, 7, 20, 21, 100, len(data)))
        if cut < len(data):
            queue.appendleft(data[cut:])
        self._take(side, self.sides[side].receive(lane.numbers[side], data[:cut], self.now))
        return True

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for side, session in self.sides.items():
            self._take(side, session.tick(self.now))

    # -- the programs at both ends ---------------------------------------------------------------

    def open(self, side: str) -> int:
        number = self.sides[side].open(b"target", self.now)
        self.halves[side][number] = Half()
        return number

    def write(self, side: str, number: int, size: int) -> None:
        half = self.halves[side][number]
        if half.ended or half.reset or half.lost is not None or half.paused:
            return
        data = self.random.randbytes(size)
        half.sent += data
        half.paused = not self.sides[side].send(number, data)

    def end(self, side: str, number: int) -> None:
        half = self.halves[side][number]
        if not half.ended and not half.reset and half.lost is None:
            half.ended = True
            self.sides[side].end(number)

    def reset(self, side: str, number: int) -> None:
        half = self.halves[side][number]
        if not half.finished and not half.reset and half.lost is None:
            half.reset = True
            self.sides[side].reset(number, ResetReason.ABORTED, "as asked")

    def read(self, side: str, number: int) -> None:
        half = self.halves[side][number]
        if half.unread:
            size, half.unread = half.unread, 0
            self.sides[side].consumed(number, size, self.now)

    def message(self, side: str) -> None:
        data = self.random.randbytes(self.random.choice((0, 3, 300)))
        self.messages_sent[side].append(data)
        self.sides[side].send_message(data)

    def _take(self, side: str, events: list[Event]) -> None:
        halves = self.halves[side]
        for event in events:
            match event:
                case StreamOpened(number, target):
                    assert target == b"target"
                    assert number not in halves, "a stream was opened twice"
                    halves[number] = Half()
                case DataReceived(number, data):
                    half = halves[number]
                    assert not half.over, "bytes, after it was over"
                    assert not half.saw_end, "bytes, after the end"
                    half.got += data
                    half.unread += len(data)
                case EndReceived(number):
                    assert not halves[number].saw_end, "an end came twice"
                    halves[number].saw_end = True
                case StreamReset(number, reason, _):
                    half = halves[number]
                    assert not half.over, "lost, after it was over"
                    half.lost = reason
                case StreamFinished(number):
                    half = halves[number]
                    assert not half.over, "finished, after it was over"
                    assert half.ended
                    assert half.saw_end
                    half.finished = True
                case StreamWritable(number):
                    assert not halves[number].over, "writable, after it was over"
                    assert halves[number].paused, "writable, but nobody waited"
                    halves[number].paused = False
                case MessageReceived(data):
                    self.messages[side].append(data)
                case LaneDead(number):
                    # Restored, a session counts lanes anew: a dead one may have this number, too.
                    lane = next(
                        x for x in self.lanes if x.numbers[side] == number and side not in x.dead
                    )
                    self.kill(lane, side)
                case Parked():
                    self.parked[side] += 1
                case SessionEnded(why):
                    self.ended[side] = why
                case Resumed():
                    pass

    # -- a schedule --------------------------------------------------------------------------------

    def step(self) -> None:
        """One random thing happens."""
        rng = self.random
        side = rng.choice(("worker", "hub"))
        live = [n for n, h in self.halves[side].items() if not h.over]
        lane = rng.choice(self.lanes) if self.lanes else None
        roll = rng.random()
        touched: tuple[str, ...] = (side,)
        if roll < 0.07 and len(live) < 12:
            self.open(side)
        elif roll < 0.25 and live:
            self.write(side, rng.choice(live), rng.choice(self.sizes))
        elif roll < 0.29 and live:
            self.end(side, rng.choice(live))
        elif roll < 0.31 and live:
            self.reset(side, rng.choice(live))
        elif roll < 0.41 and live:
            self.read(side, rng.choice(live))
        elif roll < 0.43:
            self.message(side)
        elif roll < 0.62 and lane is not None:
            self.relay(lane, side)
        elif roll < 0.88 and lane is not None:
            self.deliver(lane, side)
        elif roll < 0.92:
            self.tick(rng.choice((0.01, 0.1, 0.3, 1.0, 5.0)))
            touched = ("worker", "hub")
        elif roll < 0.94 and lane is not None:
            lane.stalled ^= {side}
        elif roll < 0.96 and lane is not None and side not in lane.dead:
            self.kill(lane, side)
        elif roll < 0.99 and len(self.lanes) < 4:
            self.add_lane(rng.choice(list(LaneClass)))
            touched = ("worker", "hub")
        elif roll >= 0.99:
            self.hand_over(side)
        self.bury()
        for each in touched:
            self._check_bounds(each)

    def _check_bounds(self, side: str) -> None:
        session = self.sides[side]
        session.check_invariants()
        for number, stream in session.streams.items():
            assert stream.receive.held <= self.limits.window_ceiling
            if number:
                pending = stream.send.pending_bytes
                assert pending <= self.limits.stream_buffer + max(self.sizes)
        control = session.streams[0].send.buffered
        assert session.buffered <= self.limits.session_buffer + 24 * max(self.sizes) + control
        for number, half in self.halves[side].items():
            if not half.over:
                assert half.paused == session.must_wait(number)

    def heal(self) -> None:
        """The network is well again and every program reads on: all that is under way arrives."""
        for lane in self.lanes:
            for side in ("worker", "hub"):
                if lane.dead and side not in lane.dead:
                    self.kill(lane, side)
            lane.stalled.clear()
        self.bury()
        if not self.lanes:
            self.add_lane(LaneClass.INTERACTIVE)
        quiet = 0
        for _ in range(self.PATIENCE):
            for lane in list(self.lanes):
                for side in ("worker", "hub"):
                    self.relay(lane, side)
                    while self.deliver(lane, side, whole=True):
                        pass
            for side, halves in self.halves.items():
                for number in halves:
                    self.read(side, number)
            self.tick(0.2)
            settled = not any(
                s.send.unacked or s.send.pending_bytes or s.lane is not None
                for session in self.sides.values()
                for s in session.streams.values()
            )
            quiet = quiet + 1 if settled else 0
            if quiet > 30:
                return
        raise AssertionError("the session did not come to rest: something hangs")

    def finish(self) -> None:
        """End every direction that is open."""
        for side, halves in self.halves.items():
            for number, half in halves.items():
                if not half.finished:
                    self.end(side, number)

    def check(self) -> None:
        """What went in came out, once, in order; every stream ended as it should."""
        for side in ("worker", "hub"):
            other = OTHER[side]
            assert self.messages[other] == self.messages_sent[side]
            for number, half in self.halves[side].items():
                peer = self.halves[other].get(number)
                if peer is None:
                    assert half.reset, "the peer never heard of the stream, but it was not reset"
                    continue
                assert bytes(half.sent).startswith(bytes(peer.got)), "bytes changed on the way"
                broken = half.reset or peer.reset
                if broken:
                    assert half.reset or half.lost is not None or half.finished
                else:
                    assert half.lost is None, "lost, though nobody reset it"
                    assert bytes(half.sent) == bytes(peer.got)
                    assert peer.saw_end == half.ended
                    assert half.finished == (half.ended and peer.ended)
                if number in self.sides[side].streams:
                    assert not half.paused, "everything arrived, and a writer still waits"
            assert set(self.sides[side].streams) == {0} | {
                n for n, h in self.halves[side].items() if not h.over
            }, "a stream that is over was not forgotten"
