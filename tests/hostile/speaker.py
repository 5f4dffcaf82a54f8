"""Speaks the protocol to a hub as it likes: whole frames, half ones, and what is none."""

from __future__ import annotations

import json
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rayfwd.session.frames import Frame, FrameDecoder, Kind, ProtocolError, encode
from rayfwd.session.handshake import Hello
from rayfwd.session.lane import LaneClass

WINDOW = 1 << 18
"""Bytes that may be sent on a stream before the first ACK (protocol.md)."""
PATIENCE = 20.0
PIECE = 1 << 16


def new_session() -> str:
    return f"{time.time_ns():016x}{secrets.token_hex(4)}"


class Speaker:
    """One lane to a hub. Nothing is sent before `greet`."""

    def __init__(self, hub: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(hub))  # waits for room among those that the hub has not accepted yet
        self.sock.settimeout(PATIENCE)
        self.session = new_session()
        self.takes_messages = True
        """It gives credit for the control messages that it is sent."""
        self.address, self.first_port = "", 0
        """In the plan, once it is welcomed."""
        self._decoder = FrameDecoder()
        self._read: list[Frame] = []
        self._told = 0
        """Bytes sent on the control stream."""
        self._may_tell = WINDOW

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.sock.close()

    def greet(self, name: str, key: str = "", **fields: Any) -> Frame | None:
        """Say HELLO; the answer, None: the hub has closed the connection."""
        fields = {"version": "1", "worker_ports": 8, "session": self.session, **fields}
        self.session = fields["session"]
        hello = Hello(node=name, key=key or name.ljust(32, "k"), **fields)
        self.sock.sendall(hello.encode())
        return self.frame()

    def join(self, name: str, **fields: Any) -> Self:
        """Be welcomed. Raises AssertionError."""
        answer = self.greet(name, **fields)
        assert answer is not None, f"{name}: closed"
        assert answer.kind is Kind.WELCOME, bytes(answer.payload)
        plan = json.loads(bytes(answer.payload))["node"]
        self.address, self.first_port = plan["address"], plan["base"]
        return self

    def another_lane(self, hub: Path, name: str) -> tuple[Speaker, Frame | None]:
        """One more of the same session."""
        lane = Speaker(hub)
        return lane, lane.greet(name, session=self.session, resumes=True, lane=LaneClass.BULK)

    def send(self, kind: Kind, stream: int = 0, offset: int = 0, payload: bytes = b"") -> None:
        """Raises OSError where the hub has closed the connection."""
        self.sock.sendall(encode(kind, stream, offset, payload))

    def tell(self, body: object) -> None:
        """A control message, of an object or of raw bytes, as its credit allows."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.tell_raw(struct.pack(">I", len(raw)) + raw)

    def tell_raw(self, data: bytes) -> None:
        """Bytes of the control stream. Raises ConnectionError where the hub closes it."""
        view = memoryview(data)
        while view:
            size = min(PIECE, len(view), self._may_tell - self._told)
            if size > 0:
                self.send(Kind.DATA, 0, self._told, bytes(view[:size]))
                self._told += size
                view = view[size:]
            elif self.frame() is None:
                raise ConnectionError("closed by the hub")

    def frame(self) -> Frame | None:
        """The next one, PINGs answered and credit taken on the way; None: the connection ended."""
        while not self._read:
            try:
                data = self.sock.recv(1 << 18)
            except ConnectionError:
                data = b""
            if not data:
                return None
            self._read += self._decoder.feed(data)
        frame = self._read.pop(0)
        with suppress(ConnectionError):
            self._answer(frame)
        return frame

    def _answer(self, frame: Frame) -> None:
        if frame.kind is Kind.PING:
            self.send(Kind.PONG, 0, frame.offset)
        elif frame.kind is Kind.RESET:
            self.send(Kind.GONE, frame.stream)
        elif frame.kind is Kind.ACK and frame.stream == 0:
            (self._may_tell,) = struct.unpack(">Q", bytes(frame.payload))
        elif frame.kind is Kind.DATA and frame.stream == 0 and self.takes_messages:
            arrived = frame.offset + len(frame.payload)
            self.send(Kind.ACK, 0, arrived, struct.pack(">Q", arrived + WINDOW))

    def frames(self, seconds: float) -> Iterator[Frame]:
        """What comes within that time, or until the connection ends."""
        end = time.monotonic() + seconds
        try:
            while (left := end - time.monotonic()) > 0:
                self.sock.settimeout(left)
                if (frame := self.frame()) is None:
                    return
                yield frame
        except TimeoutError:
            return
        finally:
            self.sock.settimeout(PATIENCE)

    def is_cut(self, seconds: float = PATIENCE) -> bool:
        """The hub ends this lane within that time."""
        end = time.monotonic() + seconds
        for _ in self.frames(seconds):
            pass
        return time.monotonic() < end


def target(address: str, port: int) -> bytes:
    """What an OPEN says."""
    return socket.inet_aton(address) + struct.pack(">H", port)


def refusal(frame: Frame | None) -> str:
    """The code of a REFUSE; else what came instead."""
    if frame is None:
        return "closed"
    if frame.kind is not Kind.REFUSE:
        return frame.kind.name
    return str(json.loads(bytes(frame.payload))["code"])


__all__ = ["Frame", "Kind", "ProtocolError", "Speaker", "new_session", "refusal", "target"]
