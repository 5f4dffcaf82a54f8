"""How much is read from one connection at a time: little while short messages are about.

All connections of a daemon take turns on one event loop, and a turn lasts as long as what was read
is on its way: a short message waits for the turns of the long transfers before it. And a process
that always has work waits for its processor when others want it too, a scheduler's slice of some
3 ms: then short messages wait with it. So while there are any, long transfers take small turns and
pause between them. Large reads are cheaper by the byte, and are taken when there is nobody to wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

READ_LARGE = 1 << 18
"""Bytes of a read; asyncio's own number."""
READ_SMALL = 1 << 16
"""Bytes of a read at first, and while short messages are about. A round trip beside a bulk transfer
takes half as long as with large reads, and the transfer a tenth longer; still smaller ones gain
little more. For a short message alone a large read costs some 4 µs more: asyncio has memory made
for all that a read may bring, and so much of it comes from the kernel each time."""
LINGER_SECONDS = 0.01
"""Seconds that short messages are about after each of them. Nodes that do nothing tell each other
so ten times a second: that must not slow a transfer down."""
SHORT_MESSAGE = 1 << 14
"""Bytes of a frame up to which it may be a short message. A longer one begins a burst: transfers
that come in bursts must not slow themselves down."""
LONG_READ = 1 << 12
"""Bytes of a read from which it counts as one of a long transfer."""
BURST_BYTES = 192 << 10
"""Bytes that a long transfer reads between two pauses."""
PAUSE = 0.001
"""Seconds of a pause: the shortest that a loop on epoll knows. With BURST it bounds a transfer to
some 130 MB/s, when its machines could carry more and short messages are about."""


class Pace:
    """Whether short messages are about in this process; its loop's one thread owns it.

    There is one, `pace`, and it is not passed around: what it is about, the turns of the loop and
    the processor, all connections of the process share. A second one would not hear of the short
    messages that the first one is told of, and be wrong.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._short_at = float("-inf")

    def short_message(self) -> None:
        """A message came in on a lane for short ones, and no transfer's answer."""
        self._short_at = self._clock()

    @property
    def latency_sensitive(self) -> bool:
        """Short messages are about."""
        return self._clock() - self._short_at < LINGER_SECONDS

    def begin(self, transport: asyncio.Transport) -> None:
        """A connection is there: its reads are small until one of them is full."""
        _set_read(transport, READ_SMALL)

    def after_read(self, transport: asyncio.Transport | None, size: int) -> None:
        """`size` bytes were read from a connection: choose how much its next read takes."""
        if size >= READ_SMALL and transport is not None:
            _set_read(transport, READ_SMALL if self.latency_sensitive else READ_LARGE)


pace = Pace()


class Reading:
    """The reading of one connection whose bytes begin their way here.

    Its owner stops it when there is no room for them; beside that it pauses.
    """

    __slots__ = ("_pausing", "_read", "_stopped", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        pace.begin(transport)
        self._transport = transport
        self._stopped = False
        self._pausing = False
        self._read = 0
        """Bytes since the last pause."""

    def stop(self) -> None:
        """Read nothing until `resume`."""
        self._stopped = True
        self._transport.pause_reading()

    def resume(self) -> None:
        """There is room again: read on, after the pause if there is one."""
        self._stopped = False
        if not self._pausing:
            self._transport.resume_reading()

    def after_read(self, size: int) -> None:
        """`size` bytes were read."""
        if size < LONG_READ:
            return
        pace.after_read(self._transport, size)
        self._read += size
        if self._read >= BURST_BYTES:
            self._read = 0
            if pace.latency_sensitive:
                self._pausing = True
                self._transport.pause_reading()
                asyncio.get_running_loop().call_later(PAUSE, self._pause_over)

    def _pause_over(self) -> None:
        self._pausing = False
        if not self._stopped:
            self._transport.resume_reading()


def _set_read(transport: asyncio.Transport, size: int) -> None:
    # Not in asyncio's documentation: a loop that has no such attribute reads as it likes.
    if hasattr(transport, "max_size"):
        cast(Any, transport).max_size = size
