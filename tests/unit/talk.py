"""Two sessions in a conversation: everything arrives at once unless a test holds it back.

Unlike `wire`, nothing is random here: a test says what happens, turns the clock, and reads what
each side saw and which frames went by which lane.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from rayfwd.session.events import (
    DataReceived,
    EndReceived,
    Event,
    LaneDead,
    MessageReceived,
    StreamFinished,
    StreamOpened,
    StreamReset,
)
from rayfwd.session.frames import Frame, FrameDecoder, Kind, encode
from rayfwd.session.lane import Lane, LaneClass
from rayfwd.session.session import Limits, Session
from rayfwd.session.stream import ResetReason

INTERACTIVE, BULK = LaneClass.INTERACTIVE, LaneClass.BULK
STEP = 0.05
"""Seconds of the clock between two looks at both sides."""

AnEvent = TypeVar("AnEvent", bound=tuple[object, ...])


class Seen(NamedTuple):
    """A frame that was put on a lane."""

    lane: int
    frame: Frame


@dataclass
class Side:
    """A session and what it said."""

    name: str
    session: Session
    events: list[Event] = field(default_factory=list)
    frames: list[Seen] = field(default_factory=list)
    """What it has sent."""
    reads: bool = True
    """Its programs take what arrives; else a test calls `consumed`."""

    def seen(self, kind: type[AnEvent]) -> list[AnEvent]:
        return [event for event in self.events if isinstance(event, kind)]

    def bytes_of(self, number: int) -> bytes:
        return b"".join(e.data for e in self.seen(DataReceived) if e.stream == number)

    @property
    def opened(self) -> list[int]:
        return [e.stream for e in self.seen(StreamOpened)]

    @property
    def ended(self) -> list[int]:
        return [e.stream for e in self.seen(EndReceived)]

    @property
    def finished(self) -> list[int]:
        return [e.stream for e in self.seen(StreamFinished)]

    @property
    def lost(self) -> list[tuple[int, ResetReason, str]]:
        return [(e.stream, e.reason, e.text) for e in self.seen(StreamReset)]

    @property
    def messages(self) -> list[bytes]:
        return [e.data for e in self.seen(MessageReceived)]

    @property
    def live(self) -> set[int]:
        """Streams that it still keeps, the control stream apart."""
        return set(self.session.streams) - {0}

    def sent(self, kind: Kind, stream: int | None = None) -> list[Seen]:
        return [
            s
            for s in self.frames
            if s.frame.kind is kind and (stream is None or s.frame.stream == stream)
        ]


@dataclass
class TalkLane:
    """A lane, the same number at both sides; a test may hold either direction back."""

    number: int
    lane_class: LaneClass
    held: set[str] = field(default_factory=set)
    """Names of sides that do not get what is sent to them for now."""
    full: set[str] = field(default_factory=set)
    """Names of sides whose transport takes nothing for now."""
    loses: set[Kind] = field(default_factory=set)
    """Frames that vanish on it, though it lives: as those that went down with a lane which their
    sender took for alive."""
    rate: float | None = None
    """Bytes a second of each direction; None: all at once."""
    under_way: dict[str, bytearray] = field(
        default_factory=lambda: {"worker": bytearray(), "hub": bytearray()}
    )
    """By receiver."""
    decoders: dict[str, FrameDecoder] = field(
        default_factory=lambda: {"worker": FrameDecoder(), "hub": FrameDecoder()}
    )
    """By sender: for the record of frames."""


class Talk:
    """A worker's session and the hub's, and the lanes between them."""

    def __init__(
        self,
        *lanes: LaneClass,
        limits: Limits | None = None,
        ride_through: float = 120.0,
    ) -> None:
        self.now = 1000.0
        self.limits = limits or Limits()
        self.worker = Side("worker", Session("worker", ride_through, self.limits, self.now))
        self.hub = Side("hub", Session("hub", ride_through, self.limits, self.now))
        self.lanes: list[TalkLane] = []
        for lane_class in lanes:
            self.lane(lane_class)

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.worker, self.hub

    def other(self, side: Side) -> Side:
        return self.hub if side is self.worker else self.worker

    def lane(self, lane_class: LaneClass) -> TalkLane:
        """A lane comes up on both sides."""
        numbers = set()
        for side in self.sides:
            number, events = side.session.lane_up(lane_class, self.now)
            numbers.add(number)
            self.take(side, events)
        (number,) = numbers
        lane = TalkLane(number, lane_class)
        self.lanes.append(lane)
        return lane

    def state(self, side: Side, lane: TalkLane) -> Lane:
        return side.session.lanes[lane.number]

    def cut(self, *lanes: TalkLane) -> None:
        """Lanes die; what was under way on them is lost, and both sides know."""
        for lane in lanes or tuple(self.lanes):
            if lane in self.lanes:
                self.lanes.remove(lane)
            for side in self.sides:
                self.take(side, side.session.lane_down(lane.number, self.now))

    def run(self) -> None:
        """Carry bytes until nobody has anything to say. The clock stands still."""
        for _ in range(100_000):
            if not self._round():
                for side in self.sides:
                    side.session.check_invariants()
                return
        raise AssertionError("the two sides never stop talking")

    def _round(self) -> bool:
        moved = False
        for lane in list(self.lanes):
            for side in self.sides:
                if side.name not in lane.full and self._full(lane, side):
                    moved |= self._fetch(lane, side)
            if lane.rate is None:
                for side in self.sides:
                    moved |= self._deliver(lane, side, len(lane.under_way[side.name]))
        return moved

    def _full(self, lane: TalkLane, side: Side) -> bool:
        """A lane of limited rate has a transport that takes 256 KiB ahead."""
        return lane.rate is None or len(lane.under_way[self.other(side).name]) < 1 << 18

    def _fetch(self, lane: TalkLane, side: Side) -> bool:
        data = b"".join(side.session.data_to_send(lane.number, 1 << 18, self.now))
        frames = lane.decoders[side.name].feed(data)
        side.frames += (Seen(lane.number, frame) for frame in frames)
        if lane.loses:
            data = b"".join(_encoded(frame) for frame in frames if frame.kind not in lane.loses)
        lane.under_way[self.other(side).name] += data
        self.take(side, side.session.drained())
        return bool(frames)

    def _deliver(self, lane: TalkLane, side: Side, size: int) -> bool:
        queue = lane.under_way[side.name]
        if not queue or not size or side.name in lane.held:
            return False
        data = bytes(queue[:size])
        del queue[:size]
        self.take(side, side.session.receive(lane.number, data, self.now))
        return True

    def wait(self, seconds: float, until: type[Event] | None = None) -> float:
        """Turn the clock; stop early at an event of kind `until`. Returns the seconds it took."""
        start = self.now
        known = sum(len(side.seen(until)) for side in self.sides) if until else 0
        while self.now - start < seconds - 1e-9:
            self.now += STEP
            for lane in list(self.lanes):
                if lane.rate is not None:
                    for side in self.sides:
                        self._deliver(lane, side, int(lane.rate * STEP))
            for side in self.sides:
                self.take(side, side.session.tick(self.now))
            self.run()
            if until and sum(len(side.seen(until)) for side in self.sides) > known:
                break
        return self.now - start

    def take(self, side: Side, events: list[Event]) -> None:
        """What a side's programs do with events: note them, and read."""
        for event in events:
            side.events.append(event)
            match event:
                case DataReceived(number, data) if side.reads:
                    side.session.consumed(number, len(data), self.now)
                case LaneDead(number):
                    self.take(side, side.session.lane_down(number, self.now))

    def receive(self, side: Side, data: bytes, lane: int = 1) -> None:
        """Bytes that the other side never sent."""
        self.take(side, side.session.receive(lane, data, self.now))


def _encoded(frame: Frame) -> bytes:
    return encode(frame.kind, frame.stream, frame.offset, frame.payload or b"".join(frame.chunks))
