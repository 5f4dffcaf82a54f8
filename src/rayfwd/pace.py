"""How much is read from one connection at a time: little while short messages are about.

All connections of a daemon take turns on one event loop, and a turn lasts as long as what was read
is on its way: a short message waits for the turns of the long transfers before it. Large reads are
cheaper by the byte, so they are small only while there is somebody to wait.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

READ_LARGE = 1 << 18
"""Bytes of a read; asyncio's own number."""
READ_SMALL = 1 << 16
"""Bytes of a read at first, and while short messages are about. A round trip beside a bulk transfer
takes half as long as with large reads, and the transfer a tenth longer; still smaller ones gain
little more. For a short message alone a large read costs some 4 µs more: asyncio has memory made
for all that a read may bring, and so much of it comes from the kernel each time."""
LINGER = 0.05
"""Seconds that reads stay small after a short message."""


class Pace:
    """The reads of a process; its loop's one thread owns it."""

    def __init__(self) -> None:
        self._short_at = float("-inf")

    def short_message(self) -> None:
        """A message came in on a lane for short ones."""
        self._short_at = time.monotonic()

    def begin(self, transport: asyncio.Transport) -> None:
        """A connection is there: its reads are small until one of them is full."""
        _set_read(transport, READ_SMALL)

    def after_read(self, transport: asyncio.Transport | None, size: int) -> None:
        """`size` bytes were read from a connection: choose how much its next read takes."""
        if size >= READ_SMALL and transport is not None:
            small = time.monotonic() - self._short_at < LINGER
            _set_read(transport, READ_SMALL if small else READ_LARGE)


def _set_read(transport: asyncio.Transport, size: int) -> None:
    # Not in asyncio's documentation: a loop that has no such attribute reads as it likes.
    if hasattr(transport, "max_size"):
        cast(Any, transport).max_size = size


pace = Pace()
