"""How long to wait between tries that fail: twice as long each time, up to a bound."""

from __future__ import annotations

import random


class Backoff:
    """The waits of one thing that is tried until it works."""

    def __init__(self, first: float, last: float, jitter: float = 0.0) -> None:
        """`first` and `last` in seconds. `jitter` (0 to 1): by what part of itself a wait is longer
        or shorter at random, so that many who lost the same thing do not come back in step."""
        self._first = first
        self._last = last
        self._jitter = jitter
        self._wait = first

    def reset(self) -> None:
        """It has worked: begin with the first wait again."""
        self._wait = self._first

    def next(self, last: float | None = None) -> float:
        """Seconds to wait now; `last`: another bound, from now on."""
        self._last = self._last if last is None else last
        wait = min(self._wait, self._last)
        self._wait = min(2 * wait, self._last)
        return wait * random.uniform(1 - self._jitter, 1 + self._jitter)
