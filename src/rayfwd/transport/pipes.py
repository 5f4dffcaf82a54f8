"""A connection over two descriptors, one to read from and one to write to, as sshd gives a command.

For a protocol it is what asyncio's transport of a socket is. asyncio's own transports of pipes are
two, and copy what must wait.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterable
from typing import Any

from rayfwd.session.frames import Chunk, skip_bytes
from rayfwd.transport.writev import PIECES

READ = 1 << 18
"""Bytes of a read, where nobody says otherwise (`max_size`)."""
WIDE = 1 << 18
"""Bytes that a pipe holds which carries long transfers; the kernel gives it 65,536. With those a
transfer wakes its two ends four times as often. A user's pipes may hold 64 MiB together
(pipe-user-pages-soft), so not every pipe is made wide, and none wider."""


class PipeTransport(asyncio.Transport):
    """Owns both descriptors. `eof_received` and `connection_lost` of its protocol are called as
    for a socket; what came before a write failed is delivered first."""

    def __init__(self, protocol: asyncio.Protocol, reading: int, writing: int) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._in, self._out = reading, writing
        self.max_size = READ
        self._waiting: list[Chunk] = []
        self._size = 0
        self._high, self._low = 1 << 16, 1 << 14
        self._full = False
        self._closing = False
        self._reads = True
        self._lost_soon = False
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        self._loop.add_reader(reading, self._read)

    def widen(self) -> None:
        """Long transfers come. Where the kernel says no, the pipes stay as they are."""
        for descriptor in (self._in, self._out):
            try:
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, WIDE)
            except OSError:
                pass

    # -- asyncio's ---------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return self._reads and not self._closing

    def pause_reading(self) -> None:
        if self.is_reading():
            self._reads = False
            self._loop.remove_reader(self._in)

    def resume_reading(self) -> None:
        if not self._reads and not self._closing:
            self._reads = True
            self._loop.add_reader(self._in, self._read)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 1 << 16 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return self._size

    def can_write_eof(self) -> bool:
        return False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writelines([data])

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Nothing is copied: what must wait is kept as it is, and is not to change."""
        if self._closing:
            return
        chunks: list[Chunk] = [bytes(x) if isinstance(x, bytearray) else x for x in list_of_data]
        if not self._waiting:
            chunks = self._write(chunks)
            if not chunks or self._lost_soon:
                return
            self._loop.add_writer(self._out, self._write_on)
        self._waiting += chunks
        self._size += sum(map(len, chunks))
        if self._size > self._high and not self._full:
            self._full = True
            self._protocol.pause_writing()

    def close(self) -> None:
        """What waits is still sent."""
        if not self._closing:
            self._end_reading()
            if not self._waiting:
                self._lose(None)

    def abort(self) -> None:
        self._lose(None)

    # -- at work -----------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            data = os.read(self._in, self.max_size)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._lose(exc)
            return
        if data:
            self._protocol.data_received(data)
        elif not self._protocol.eof_received():
            self.close()
        else:
            self.pause_reading()

    def _write(self, chunks: list[Chunk]) -> list[Chunk]:
        """What the kernel has not taken of them."""
        try:
            sent = os.writev(self._out, chunks[:PIECES])
        except (BlockingIOError, InterruptedError):
            return chunks
        except OSError as exc:
            self._lose(exc)
            return []
        return skip_bytes(chunks, sent)

    def _write_on(self) -> None:
        self._waiting = self._write(self._waiting)
        self._size = sum(map(len, self._waiting))
        if self._lost_soon:
            return
        if not self._waiting:
            self._loop.remove_writer(self._out)
            if self._closing:
                self._lose(None)
                return
        if self._full and self._size <= self._low:
            self._full = False
            self._protocol.resume_writing()

    def _end_reading(self) -> None:
        self._closing = True
        self._loop.remove_reader(self._in)

    def _lose(self, why: OSError | None) -> None:
        if self._lost_soon:
            return
        self._lost_soon = True
        self._end_reading()
        self._loop.remove_writer(self._out)
        self._waiting, self._size = [], 0
        self._loop.call_soon(self._lost, why)

    def _lost(self, why: OSError | None) -> None:
        try:
            if isinstance(why, BrokenPipeError | ConnectionResetError):
                self._read_last()
            self._protocol.connection_lost(why)
        finally:
            os.close(self._in)
            os.close(self._out)

    def _read_last(self) -> None:
        """What came before the other side closed may be its word why."""
        try:
            while data := os.read(self._in, READ):
                self._protocol.data_received(data)
        except OSError:
            pass
