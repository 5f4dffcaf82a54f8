"""How many machines are at work at once, and that one which does not answer holds up no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

SLOT_SECONDS = 10.0
"""Seconds that a machine which does not answer keeps its slot from the next one."""


class Slot:
    """Of one machine among those at work."""

    def __init__(self, free: asyncio.Semaphore | None = None) -> None:
        """`free`: the slots that all share; None: there are as many as wanted."""
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
        """While this machine may never answer: after SLOT_SECONDS the slot is the next one's, and
        `tell` is called. What comes after the answer waits for one again."""

        def lend() -> None:
            tell()
            self.leave()

        timer = asyncio.get_running_loop().call_later(SLOT_SECONDS, lend)
        try:
            yield
        finally:
            timer.cancel()
        if not self._held:
            await self.take()
