"""Says what the demo does, as it does it: every line with the seconds since the beginning."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TextIO

QUIET_SECONDS = 3.0
"""No wait is silent for longer."""
POLL_SECONDS = 0.2
"""Between two looks at how far the demo is."""


class StepFailedError(Exception):
    """A step of the demo did not come out as it should; the text says what was seen instead."""


class Narrator:
    """Writes to a terminal or a file, a line at a time."""

    def __init__(self, out: TextIO) -> None:
        self.step = "the preparations"
        """What is being done, for whoever reports a failure."""
        self._out = out
        self._began = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def title(self, step: str) -> None:
        """A new step."""
        self.step = step
        self._write(f"\n[{self.seconds:5.1f} s] {step}")

    def say(self, text: str) -> None:
        """One thing about this step."""
        self._write(f"          {text}")

    def plain(self, text: str) -> None:
        """A line without a time."""
        self._write(text)

    async def until(
        self,
        look: Callable[[], Awaitable[bool]],
        how: Callable[[], str],
        seconds: float,
    ) -> float:
        """Wait until `look` is true, saying `how` it stands meanwhile; the seconds it took.

        Raises StepFailedError after `seconds` seconds.
        """
        began = time.monotonic()
        ticker = asyncio.create_task(self._tick(began, how), name="ticker")
        try:
            while not await look():
                if time.monotonic() - began > seconds:
                    raise StepFailedError(f"not within {seconds:.0f} s; {how()}")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            ticker.cancel()
        return time.monotonic() - began

    async def _tick(self, began: float, how: Callable[[], str]) -> None:
        """Break every silence; a look may take its time."""
        while True:
            now = time.monotonic()
            due = self._last + QUIET_SECONDS
            if now >= due:
                self.say(f"… {now - began:.0f} s: {how()}")
            else:
                await asyncio.sleep(due - now)

    def _write(self, line: str) -> None:
        self._last = time.monotonic()
        print(line, file=self._out, flush=True)
