"""What a session tells its driver: the driver does what they say, in order."""

from __future__ import annotations

from typing import NamedTuple

from rayfwd.session.stream import COALESCE_BYTES, ResetReason


class StreamOpened(NamedTuple):
    """The peer opened a stream."""

    stream: int
    target: bytes


class DataReceived(NamedTuple):
    """Bytes of a stream, in order. Call `consumed` when they have been passed on."""

    stream: int
    data: bytes


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


class LaneSilent(NamedTuple):
    """The lane is dead: close its transport, then call `lane_down`."""

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
    | LaneSilent
    | Parked
    | Resumed
    | SessionEnded
)


def joined(events: list[Event]) -> list[Event]:
    """The same events, but short pieces of one stream in one, unless they would overtake an event
    of another kind: who reads the stream is woken once by them, not once a frame."""
    if len(events) < 2:
        return events
    out: list[Event] = []
    runs: list[tuple[int, int, list[bytes]]] = []
    """A place in `out`, and the stream and the pieces of what is to be there."""
    last: dict[int, list[bytes]] = {}
    """The pieces of a stream's last run, by its number."""
    for event in events:
        if not isinstance(event, DataReceived):
            last.clear()
        elif event.stream in last and len(event.data) < COALESCE_BYTES:
            last[event.stream].append(event.data)
            continue
        else:
            last[event.stream] = [event.data]
            runs.append((len(out), event.stream, last[event.stream]))
        out.append(event)
    for place, stream, pieces in runs:
        if len(pieces) > 1:
            out[place] = DataReceived(stream, b"".join(pieces))
    return out
