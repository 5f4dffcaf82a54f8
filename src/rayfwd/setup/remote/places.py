"""How many machines are at work at once, and that one which does not answer holds up no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

PATIENCE = 10.0
"""Seconds that a machine which does not answer keeps its place from the next one."""


class Place:
    """Of one machine among those at work."""

    def __init__(self, free: asyncio.Semaphore | None = None) -> None:
        """`free`: the places that all share; None: there are as many as wanted."""
        self._free = free
        self._held = False

    async def take(self) -> None:
        """Wait for one."""
        if self._free is not None:
            await self._free.acquire()
            self._held = True

    def leave(self) -> None:
        """Give it to the next machine. Nothing happens where it was given already."""
        if self._free is not None and self._held:
            self._held = False
            self._free.release()

    @asynccontextmanager
    async def lent(self, tell: Callable[[], None]) -> AsyncIterator[None]:
        """While this machine may never answer: after PATIENCE the place is the next one's, and
        `tell` is called. What comes after the answer waits for a place again."""

        def lend() -> None:
            tell()
            self.leave()

        timer = asyncio.get_running_loop().call_later(PATIENCE, lend)
        try:
            yield
        finally:
            timer.cancel()
        if not self._held:
            await self.take()
