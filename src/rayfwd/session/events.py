"""What a session tells its driver: the driver does what they say, in order."""

from __future__ import annotations

from typing import NamedTuple

from rayfwd.session.frames import Chunk
from rayfwd.session.stream import ResetReason


class StreamOpened(NamedTuple):
    """The peer opened a stream."""

    stream: int
    target: bytes


class DataReceived(NamedTuple):
    """Bytes of a stream, in order. Call `consumed` when they have been passed on."""

    stream: int
    data: Chunk


class EndReceived(NamedTuple):
    """The peer sends no more bytes on this stream."""

    stream: int


class StreamReset(NamedTuple):
    """The stream was given up; forget it."""

    stream: int
    reason: ResetReason
    text: str


class StreamFinished(NamedTuple):
    """Both directions ended, and all arrived; forget it."""

    stream: int


class StreamWritable(NamedTuple):
    """A writer that had to wait may go on."""

    stream: int


class MessageReceived(NamedTuple):
    """A message on the control stream."""

    data: bytes
    credit: int = 0
    """Bytes of that stream that the peer may send anew when it, and those before it, are done
    with."""


class LaneDead(NamedTuple):
    """Nobody answers on the lane: close its transport, then call `lane_down`."""

    lane: int


class Parked(NamedTuple):
    """The last lane went down; streams are held."""


class Resumed(NamedTuple):
    """A lane is up again."""

    seconds: float


class SessionEnded(NamedTuple):
    """The session is over; its streams were reset before this."""

    why: str


Event = (
    StreamOpened
    | DataReceived
    | EndReceived
    | StreamReset
    | StreamFinished
    | StreamWritable
    | MessageReceived
    | LaneDead
    | Parked
    | Resumed
    | SessionEnded
)


class Gathered(NamedTuple):
    """What several `DataReceived` of one stream say, in order."""

    stream: int
    chunks: list[Chunk]


def gathered(events: list[Event]) -> list[Event | Gathered]:
    """The same events, but the chunks of a stream in one, unless they would overtake an event of
    another kind: who reads the stream is woken once by them, not once a frame."""
    out: list[Event | Gathered] = []
    last: dict[int, Gathered] = {}
    """The chunks of a stream that those to come join, by its number."""
    for event in events:
        if not isinstance(event, DataReceived):
            last.clear()
            out.append(event)
        elif event.stream in last:
            last[event.stream].chunks.append(event.data)
        else:
            last[event.stream] = Gathered(event.stream, [event.data])
            out.append(last[event.stream])
    return out
