"""What a session tells of itself to somebody who traces it: frames, messages, changes of state.

No payload is in it: of frames their headers, of messages their type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from rayfwd.session.frames import HEADER, HEADER_SIZE, KINDS, Chunk, Kind
from rayfwd.session.lane import Lane, LaneClass
from rayfwd.session.states import SessionEvent, SessionState, StreamEvent, StreamState

Direction = Literal["in", "out"]


class FrameTraced(NamedTuple):
    """A frame came or was put on a lane."""

    direction: Direction
    lane: int
    lane_class: LaneClass
    kind: Kind
    stream: int
    offset: int
    length: int
    """Bytes of payload."""


class MessageTraced(NamedTuple):
    """A whole control message came or was given to be sent; its frames are traced as well."""

    direction: Direction
    type: str
    """"?" where it has none that looks like one."""
    length: int


class LaneTraced(NamedTuple):
    """A lane: `up`, `down`, `sidelined`, `dead`."""

    lane: int
    lane_class: LaneClass
    what: str


class StreamTraced(NamedTuple):
    """A stream has changed its state."""

    stream: int
    event: StreamEvent
    before: StreamState
    after: StreamState


class SessionTraced(NamedTuple):
    """The session has changed its state."""

    event: SessionEvent
    before: SessionState
    after: SessionState


Traced = FrameTraced | MessageTraced | LaneTraced | StreamTraced | SessionTraced
Trace = Callable[[Traced], None]
"""Called while the session works: it must not call the session."""

_TYPE = re.compile(r"[a-z_]{1,32}")


def line(traced: Traced) -> str:
    """What was traced, for people. docs/protocol.md says what the offset of a frame means."""
    match traced:
        case FrameTraced():
            return (
                f"lane {traced.lane} {traced.lane_class.value:<11}  {traced.direction:<3}  "
                f"{traced.kind.name:<5}  stream {traced.stream}  offset {traced.offset}  "
                f"length {traced.length}"
            )
        case MessageTraced(direction, name, length):
            return f"message {direction}: {name}  length {length}"
        case LaneTraced(lane, lane_class, what):
            return f"lane {lane} {lane_class.value}: {what}"
        case StreamTraced(stream, event, before, after):
            return f"stream {stream}: {before.value} -> {after.value} ({event.value})"
        case SessionTraced(why, was, now):
            return f"session: {was.value} -> {now.value} ({why.value})"


def frames_out(lane: Lane, chunks: Iterable[Chunk]) -> Iterable[FrameTraced]:
    """The frames in chunks that were made for a lane: each begins a chunk."""
    payload = 0
    for chunk in chunks:
        if payload:
            payload -= len(chunk)
            continue
        word, stream, offset = HEADER.unpack_from(chunk)
        length = word & 0xFFFFFF
        payload = length - (len(chunk) - HEADER_SIZE)
        yield FrameTraced(
            "out", lane.id, lane.lane_class, KINDS[word >> 24], stream, offset, length
        )


def message(direction: Direction, data: bytes) -> MessageTraced:
    """A message, by its type alone."""
    try:
        found = json.loads(data)
        name = found.get("type") if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        name = None
    known = isinstance(name, str) and _TYPE.fullmatch(name)
    return MessageTraced(direction, str(name) if known else "?", len(data))
