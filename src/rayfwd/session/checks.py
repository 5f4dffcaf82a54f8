"""What `rayfwd doctor` asks the hub in place of a HELLO, and what the hub answers (pure).

A kind of frame of its own, so that a hub which does not know it refuses the connection and never
takes a question for a node that joins. The first question is what a HELLO would say, the answer
what would come of it; the others are small, and so are their answers, but for filler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayfwd import codes
from rayfwd.problems import Problem
from rayfwd.session.frames import HEADER_SIZE, Frame, Kind, ProtocolError, encode
from rayfwd.session.handshake import PROTOCOL_VERSION, Hello, Refusal, Welcome

TALK, FILLER = 0, 1
"""Streams of CHECK frames: JSON, and bytes that mean nothing, to see how fast they go."""

FILLER_CHUNK = 1 << 16
"""Bytes of filler in a frame, at most."""
MOST_FILLER = 1 << 24
"""Bytes of filler that one question may be about."""
TOTAL_FILLER = 1 << 26
"""Bytes of filler of one connection, both ways together, at most."""
TOTAL_QUESTIONS = 256
"""Of one connection, at most."""


@dataclass(frozen=True, slots=True)
class CheckReply:
    """What the hub says of itself, and of the node that would join."""

    welcome: Welcome
    """As the node would get it, without Ray's token; `node` is empty where it would be refused."""
    time: float
    """The head's clock: seconds since 1970."""
    refusal: Problem | None = None
    """Why the node would not be let in."""

    def encode(self) -> bytes:
        refusal = (
            None if self.refusal is None else json.loads(_payload(Refusal(self.refusal).encode()))
        )
        body = {
            "welcome": json.loads(_payload(self.welcome.encode())),
            "time": self.time,
            "refusal": refusal,
        }
        return talk(body)

    @classmethod
    def decode(cls, frame: Frame) -> CheckReply:
        """Raises ProtocolError."""
        body = read(frame)
        refusal = body.get("refusal")
        try:
            return cls(
                Welcome.decode(_frame(Kind.WELCOME, body["welcome"])),
                read_time(body),
                None if refusal is None else Refusal.decode(_frame(Kind.REFUSE, refusal)).problem,
            )
        except KeyError as exc:
            raise ProtocolError(codes.CHECK_MALFORMED, f"CHECK: {exc!r}") from exc


def first_question(hello: Hello) -> bytes:
    """What would come of this HELLO?"""
    return encode(Kind.CHECK, TALK, PROTOCOL_VERSION, _payload(hello.encode()))


def read_hello(frame: Frame) -> Hello:
    """The HELLO of a first question. Raises ProtocolError."""
    return Hello.decode(frame._replace(kind=Kind.HELLO))


def talk(body: Mapping[str, Any]) -> bytes:
    """A question, or the answer to one."""
    return encode(Kind.CHECK, TALK, PROTOCOL_VERSION, json.dumps(body).encode())


def filler(chunk: bytes) -> bytes:
    """A frame of filler."""
    return encode(Kind.CHECK, FILLER, PROTOCOL_VERSION, chunk)


def read(frame: Frame) -> dict[str, Any]:
    """The body of a question or an answer. Raises ProtocolError."""
    if frame.kind is not Kind.CHECK or frame.stream != TALK:
        raise ProtocolError(
            codes.CHECK_MALFORMED, f"{frame.kind.name} {frame.stream} instead of CHECK"
        )
    try:
        body = json.loads(frame.payload)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(codes.CHECK_MALFORMED, f"CHECK: {exc}") from exc
    if not isinstance(body, dict):
        raise ProtocolError(codes.CHECK_MALFORMED, "CHECK is no JSON object")
    return body


def read_size(body: Mapping[str, Any]) -> int:
    """How much filler a question is about. Raises ProtocolError."""
    size = body.get("bytes")
    if type(size) is not int or not 0 < size <= MOST_FILLER:
        raise ProtocolError(codes.CHECK_MALFORMED, f"CHECK: bytes must be 1 to {MOST_FILLER}")
    return size


def read_time(body: Mapping[str, Any]) -> float:
    """The clock in an answer. Raises ProtocolError."""
    value = body.get("time")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ProtocolError(codes.CHECK_MALFORMED, "CHECK: time must be a number")
    return float(value)


def _payload(frame: bytes) -> bytes:
    return frame[HEADER_SIZE:]


def _frame(kind: Kind, body: Any) -> Frame:
    return Frame(kind, 0, PROTOCOL_VERSION, json.dumps(body).encode())
