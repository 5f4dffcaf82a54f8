"""Joins a channel of SSH to a connection of this machine's, which is made only then.

Who is at the far end of such a connection may speak first, as an SSH server does: nothing of that
may come before there is somebody to hear it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import asyncssh

Dial = Callable[[Callable[[], asyncio.Protocol]], Awaitable[None]]

BUFFER = 1 << 18
"""Bytes that may wait on either side of a relay before the other is read no more."""


class ChannelRelay(asyncssh.SSHUNIXSession[bytes]):
    """The channel's end."""

    def __init__(self, dial: Dial, tell: Callable[[str], None]) -> None:
        """`dial` joins a protocol to the other side; it raises OSError. `tell`: why not, or an
        empty text."""
        self._connect = dial
        self._tell = tell
        self._channel: Any = None
        self._far: asyncio.Transport | None = None
        self._dialling: asyncio.Task[Any] | None = None
        self._before = bytearray()
        """What came too early for the other side: pausing a channel at its start has no effect."""
        self._ended_before = False
        """So did the end of it."""

    def connection_made(self, chan: Any) -> None:
        self._channel = chan
        chan.set_write_buffer_limits(BUFFER)

    def session_started(self) -> None:
        self._dialling = asyncio.create_task(self._dial(), name="channel relay")

    async def _dial(self) -> None:
        try:
            await self._connect(lambda: FarEnd(self))
        except OSError as exc:
            self._tell(str(exc.strerror or exc))
            self._channel.close()
            return
        self._tell("")

    # -- from who came -------------------------------------------------------------------

    def data_received(self, data: bytes, datatype: int | None) -> None:
        del datatype
        if self._far is not None:
            self._far.write(data)
            return
        self._before += data
        if len(self._before) > BUFFER:
            self._channel.abort()

    def eof_received(self) -> bool:
        if self._far is None:
            self._ended_before = True
        elif not self._far.is_closing():
            self._far.write_eof()
        return True  # the other side may have more to say

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self._dialling is not None:
            self._dialling.cancel()
        if self._far is not None:
            self._far.close()

    def pause_writing(self) -> None:
        if self._far is not None and not self._far.is_closing():
            self._far.pause_reading()

    def resume_writing(self) -> None:
        if self._far is not None and not self._far.is_closing():
            self._far.resume_reading()

    # -- from the other side -----------------------------------------------------------------------

    def joined(self, far: asyncio.Transport) -> None:
        self._far = far
        if self._channel.is_closing():
            far.abort()
            return
        far.set_write_buffer_limits(BUFFER)
        far.write(bytes(self._before))
        self._before.clear()
        if self._ended_before:
            far.write_eof()

    def said(self, data: bytes) -> None:
        if not self._channel.is_closing():
            self._channel.write(data)

    def full(self, is_full: bool) -> None:
        """Whether the other side takes no more for now."""
        if is_full:
            self._channel.pause_reading()
        else:
            self._channel.resume_reading()

    def over(self) -> None:
        self._far = None
        self._channel.close()


class FarEnd(asyncio.Protocol):
    """The connection to the other side, for a relay."""

    def __init__(self, relay: ChannelRelay) -> None:
        self._relay = relay

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._relay.joined(cast(asyncio.Transport, transport))

    def data_received(self, data: bytes) -> None:
        self._relay.said(data)

    def pause_writing(self) -> None:
        self._relay.full(True)

    def resume_writing(self) -> None:
        self._relay.full(False)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._relay.over()
