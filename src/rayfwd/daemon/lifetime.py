"""How long a daemon that was started for a while is there, and who watches it from the front."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rayfwd.status import Status
from rayfwd.system.logs import get_logger
from rayfwd.system.steps import Steps

NOT_READY = 3
"""The exit code of a daemon that was not ready in time."""

OWN_END = 1.0
"""Seconds of `stop_timeout` in which the process ends once its loop has nothing more to do."""
CUT_BEFORE = 0.7
"""Seconds before the end of `stop_timeout` at which a stop that is not done is cut short."""
LOG_SECONDS = 0.1
"""For the log to take that; where nobody reads it, it may take none of it."""

log = get_logger(__name__)


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

    def stopping(self, kill: Callable[[], int], steps: Steps, code: int) -> None:
        """It is told to end. `kill` ends at once what is left of its Ray, from any thread, and says
        how many processes that was. `steps`: what its end is about. `code`: the exit code."""


class Nobody:
    """A daemon that nobody looks at."""

    def shown(self, summary: str) -> None: ...

    def ready(self, status: Status) -> None: ...

    def stopping(self, kill: Callable[[], int], steps: Steps, code: int) -> None: ...


def cut_short_after(seconds: float, kill: Callable[[], int], steps: Steps, code: int) -> None:
    """See that this process has ended in `seconds`: whoever stopped it kills it soon after, and its
    Ray with it, or leaves that behind. A thread does it, as the loop may be what does not turn."""
    threading.Thread(
        target=_cut_short, args=(seconds, kill, steps, code), name="stop-timeout", daemon=True
    ).start()


def _cut_short(seconds: float, kill: Callable[[], int], steps: Steps, code: int) -> None:
    time.sleep(seconds - CUT_BEFORE)
    at, took = steps.now, steps.seconds()
    killed = kill()
    told = threading.Thread(
        target=lambda: log.warning(
            "stop_cut_short", seconds=seconds, step=at, steps=took, killed=killed
        ),
        daemon=True,
    )
    told.start()
    told.join(LOG_SECONDS)
    os._exit(code)
