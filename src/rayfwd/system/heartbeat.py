"""Whether a loop still turns: it says when it is to be heard of next, and is late after that.

For the watchdog (`watchdog.py`). Each loop owns its `Heartbeat`, and says so from its own
turns, never from a timer beside it. Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Heartbeat:
    """Of one loop. It is not late before its first turn."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._clock = clock
        self._due: float | None = None

    def beat(self, within: float) -> None:
        """It has turned, and turns again within so many seconds."""
        self._due = self._clock() + within

    def idle(self) -> None:
        """It waits for something that may never come, and somebody else would notice."""
        self._due = None

    def late(self) -> float:
        """Seconds since it should have turned; 0: it is not late."""
        return 0.0 if self._due is None else max(0.0, self._clock() - self._due)
