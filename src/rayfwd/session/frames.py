"""The frames of the session protocol, as bytes and back.

A frame is a header of 20 bytes and a payload::

    0      1                 4                12               20
    +------+-----------------+-----------------+----------------+---------
    | kind | payload length  | stream          | offset         | payload
    +------+-----------------+-----------------+----------------+---------
      u8     u24               u64               u64              0 to 262,144 bytes

All integers are big-endian. What `offset` means depends on the kind, see `Kind`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence, Sized
from enum import IntEnum
from typing import Final, NamedTuple, cast

from rayfwd import codes
from rayfwd.problems import Code

HEADER: Final = struct.Struct(">IQQ")
HEADER_SIZE: Final = HEADER.size
MAX_PAYLOAD: Final = 1 << 18
"""Bytes of payload that a frame may carry."""
MAX_U64: Final = (1 << 64) - 1
MAX_MESSAGE: Final = 1 << 20
"""Bytes of a message on the control stream, at most."""
MESSAGE_LENGTH: Final = struct.Struct(">I")
LONG: Final = 1 << 14
"""Bytes of a DATA frame from which its payload is left where it came in, and not copied."""
LONG_PARTS: Final = 16
"""Parts that it may have come in: many short ones would take more memory than they have bytes."""
MOST_PARTS: Final = 64
"""Parts of an unfinished frame that are kept as they came; more are joined, for the same reason."""
MEMORY_PER_BYTE: Final = 4
"""Bytes of memory that a payload left there may keep for each of its own."""

Chunk = bytes | memoryview
"""Bytes of a stream, never to be changed."""


class Kind(IntEnum):
    """What a frame says; in brackets, what its `offset` is."""

    HELLO = 1
    """[protocol version] First on every lane, from the worker. Payload: JSON."""
    WELCOME = 2
    """[protocol version] The hub's answer. Payload: JSON."""
    REFUSE = 3
    """[protocol version] The hub's other answer; the lane is closed. Payload: JSON."""
    OPEN = 4
    """[0] A new stream. Payload: its target."""
    DATA = 5
    """[of the payload's first byte] Bytes of a stream."""
    END = 6
    """[of the end] No bytes follow in this direction (half-close)."""
    RESET = 7
    """[reason] The stream is given up in both directions. Payload: a sentence."""
    ACK = 8
    """[first one not yet received in order; an END counts one] Payload: limit, u64: the offset
    that the sender of data may send up to."""
    GONE = 9
    """[0] The stream is over here, all of it: answers RESET, and whatever comes late."""
    PING = 10
    """[token] To be answered on the same lane."""
    PONG = 11
    """[the token of the PING]"""
    CLOSE = 12
    """[0] The session ends, in order; every stream is given up. Payload: a sentence."""
    CHECK = 13
    """[protocol version] Instead of HELLO: a question of `rayfwd doctor`'s, or its answer."""
    CHALLENGE = 14
    """[protocol version] The hub's first answer to whoever can prove its key. Payload: JSON."""
    PROOF = 15
    """[protocol version] The answer to that. Payload: JSON."""
    VOUCH = 16
    """[protocol version] Before a HELLO: whose the SSH key is that it came by. Payload: JSON."""


KINDS: Final = {int(kind): kind for kind in Kind}


class ProtocolError(Exception):
    """The peer sent what the protocol does not allow. `code` names the breach."""

    def __init__(self, code: Code, message: str) -> None:
        assert code.breach, f"{code} is no breach of the protocol"
        super().__init__(message)
        self.code = code


class Frame(NamedTuple):
    kind: Kind
    stream: int
    offset: int
    payload: bytes
    chunks: Sequence[Chunk] = ()
    """Instead of `payload`, of a long DATA frame: one after the other, as they came in."""

    @property
    def size(self) -> int:
        """Bytes of payload."""
        return len(self.payload) or sum(map(len, self.chunks))


def frame_header(kind: Kind, stream: int, offset: int, length: int) -> bytes:
    """The 20 bytes before a payload of `length`."""
    return HEADER.pack(kind << 24 | length, stream, offset)


def encode(kind: Kind, stream: int = 0, offset: int = 0, payload: bytes = b"") -> bytes:
    """A whole frame."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a payload of {len(payload)} bytes is over {MAX_PAYLOAD}")
    return HEADER.pack(kind << 24 | len(payload), stream, offset) + payload


class MessageDecoder:
    """Cuts the bytes of the control stream into messages. Holds at most one unfinished message."""

    __slots__ = ("_held",)

    def __init__(self, held: bytes = b"") -> None:
        self._held = bytearray(held)

    @property
    def held(self) -> bytes:
        """The unfinished message, its length first."""
        return bytes(self._held)

    def feed(self, data: Chunk) -> list[bytes]:
        """The messages that `data` completes. Raises ProtocolError."""
        messages: list[bytes] = []
        held = self._held
        held += data
        while len(held) >= MESSAGE_LENGTH.size:
            (length,) = MESSAGE_LENGTH.unpack_from(held)
            if length > MAX_MESSAGE:
                raise ProtocolError(codes.MESSAGE_TOO_LONG, f"a message of {length} bytes")
            stop = MESSAGE_LENGTH.size + length
            if len(held) < stop:
                break
            messages.append(bytes(held[MESSAGE_LENGTH.size : stop]))
            del held[:stop]
        return messages


def encode_message(data: bytes) -> bytes:
    """A message as the bytes of the control stream. Raises ValueError: it is too long."""
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(data)} bytes is over {MAX_MESSAGE}")
    return MESSAGE_LENGTH.pack(len(data)) + data


class FrameDecoder:
    """Cuts a lane's bytes into frames. Holds at most one unfinished frame, and copies a payload
    once, however many chunks it comes in, and a long one of a stream's bytes not at all."""

    __slots__ = ("_header", "_held", "_parts", "_wanted")

    def __init__(self) -> None:
        self._header: tuple[Kind, int, int, int] | None = None
        """Of the unfinished frame, once it is whole; `_parts` are then the payload's."""
        self._parts: list[memoryview] = []
        self._held = 0
        self._wanted = HEADER_SIZE

    @property
    def held(self) -> int:
        """Bytes of the unfinished frame."""
        return self._held + (HEADER_SIZE if self._header else 0)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """The frames that `data` completes. Raises ProtocolError; the lane is then of no use.

        What is passed as `memoryview` must not change any more.
        """
        frames: list[Frame] = []
        view = memoryview(data)
        if not view.readonly:
            view = memoryview(bytes(view))
        position, size = 0, len(view)
        while True:
            if self._held or self._header:
                missing = self._wanted - self._held
                if size - position < missing:
                    break
                self._parts.append(view[position : position + missing])
                position += missing
                parts, head = self._parts, self._header
                self._rest()
                if head is None:
                    head = _read_header(b"".join(parts), 0, MAX_PAYLOAD)
                    parts = []
                    if head[1]:
                        self._header, self._wanted = head, head[1]
                        continue
            else:
                if size - position < HEADER_SIZE:
                    break
                head = _read_header(view, position, MAX_PAYLOAD)
                position += HEADER_SIZE
                stop = position + head[1]
                if stop > size:
                    self._header, self._wanted = head, head[1]
                    break
                parts = [view[position:stop]]
                position = stop
            kind, length, stream, offset = head
            if kind is Kind.DATA and length >= LONG and len(parts) <= LONG_PARTS:
                frames.append(Frame(kind, stream, offset, b"", list(map(_compact, parts))))
            else:
                frames.append(Frame(kind, stream, offset, b"".join(parts)))
        if position < size:
            self._parts.append(view[position:])
            self._held += size - position
            if len(self._parts) > MOST_PARTS:
                self._parts = [memoryview(b"".join(self._parts))]
        return frames

    def _rest(self) -> None:
        """Nothing is unfinished."""
        self._header = None
        self._parts = []
        self._held = 0
        self._wanted = HEADER_SIZE


def _compact(view: memoryview) -> Chunk:
    """The bytes of a view, which may be kept for long: a copy where the view is a small part of
    what it keeps in memory."""
    return view if len(view) * MEMORY_PER_BYTE >= len(cast(Sized, view.obj)) else bytes(view)


def close_frame(why: str) -> bytes:
    """The CLOSE that ends a session."""
    return encode(Kind.CLOSE, payload=why.encode()[:1024])


def skip_bytes(chunks: Sequence[Chunk], skip: int) -> list[Chunk]:
    """The chunks without their first `skip` bytes."""
    out: list[Chunk] = []
    for chunk in chunks:
        if skip < len(chunk):
            out.append(memoryview(chunk)[skip:] if skip else chunk)
        skip = max(0, skip - len(chunk))
    return out


def first_frame(buffer: bytearray, limit: int) -> Frame | None:
    """Take the first frame off `buffer`, if it is whole; what follows stays. Raises ProtocolError.

    For the handshake, whose frames are not the session's.
    """
    if len(buffer) < HEADER_SIZE:
        return None
    kind, length, stream, offset = _read_header(buffer, 0, limit)
    stop = HEADER_SIZE + length
    if len(buffer) < stop:
        return None
    frame = Frame(kind, stream, offset, bytes(buffer[HEADER_SIZE:stop]))
    del buffer[:stop]
    return frame


def _read_header(
    view: bytes | bytearray | memoryview, position: int, limit: int
) -> tuple[Kind, int, int, int]:
    word, stream, offset = HEADER.unpack_from(view, position)
    kind = KINDS.get(word >> 24)
    if kind is None:
        raise ProtocolError(codes.FRAME_UNKNOWN, f"a frame of unknown kind {word >> 24}")
    length = word & 0xFFFFFF
    if length > limit:
        raise ProtocolError(codes.FRAME_TOO_LONG, f"{kind.name} of {length} bytes, over {limit}")
    return kind, length, stream, offset
