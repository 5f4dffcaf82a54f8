"""How much of something there may be in a while: some at once, then so many a second."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """A token bucket."""

    __slots__ = ("_at", "_clock", "_left", "_most", "_rate")

    def __init__(self, most: float, rate: float, clock: Callable[[], float]) -> None:
        """`most` at once, and `rate` more a second, by `clock`."""
        self._most = most
        self._rate = rate
        self._clock = clock
        self._left = most
        self._at = clock()

    def take(self) -> bool:
        """One, if there is one left."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    @property
    def wait(self) -> float:
        """Seconds until there is one."""
        return max(0.0, (1 - self._left) / self._rate)
