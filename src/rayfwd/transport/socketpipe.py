"""A pipe that is a socket of this machine, behind which somebody else carries the bytes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

from rayfwd.session.frames import Chunk
from rayfwd.transport.carrier import CLOSED, PipeOwner
from rayfwd.transport.readpacing import pace
from rayfwd.transport.writev import write

WRITE_BUFFER = 1 << 18
"""Bytes that may wait in a lane's transport before the session is asked for no more."""


class SocketPipe(asyncio.Protocol):
    """The protocol of that socket."""

    def __init__(self, owner: PipeOwner | None = None) -> None:
        """`owner`: None while nobody has taken it."""
        self.paused = False
        self._owner = owner
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(WRITE_BUFFER)
        pace.begin(self._transport)

    def data_received(self, data: bytes) -> None:
        if self._owner is not None:
            self._owner.pipe_data(data)
        pace.after_read(self._transport, len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._owner is not None:
            self._owner.pipe_lost(str(exc or CLOSED))

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._owner is not None:
            self._owner.pipe_writable()

    # -- as the lane's pipe --------------------------------------------------------------

    def write(self, chunks: Sequence[Chunk]) -> None:
        if self._transport is not None:
            write(self._transport, chunks)

    def carry(
        self, deliver: Callable[[Sequence[bytes | memoryview]], None], resume: Callable[[], None]
    ) -> None:
        """There is no faster way than this."""

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
