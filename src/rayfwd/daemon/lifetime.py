"""How long a daemon that was started for a while is there, and who watches it from the front."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rayfwd.status import Status

NOT_READY = 3
"""The exit code of a daemon that was not ready in time."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Seconds; None: for ever."""

    wait_for: float | None = None
    """In which it is to be ready for the first time."""
    stop_after: float | None = None
    """After which it stops, in order."""

    async def run(self, ready: Callable[[], bool], end: Callable[[str, int], None]) -> None:
        """Until cancelled. `end` is told why, and the exit code."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self.wait_for is not None:
            await asyncio.sleep(self.wait_for)
            if not ready():
                end("--wait-for", NOT_READY)
                return
        if self.stop_after is not None:
            await asyncio.sleep(max(0.0, began + self.stop_after - loop.time()))
            end("--stop-after", 0)
            return
        await asyncio.Event().wait()


class Front(Protocol):
    """Whoever has a daemon in front of them."""

    def shown(self, summary: str) -> None:
        """How it is now, in a line."""

    def ready(self, status: Status) -> None:
        """It is ready, for the first time."""


class Nobody:
    """A daemon that nobody looks at."""

    def shown(self, summary: str) -> None: ...

    def ready(self, status: Status) -> None: ...
