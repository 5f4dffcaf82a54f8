"""What would be logged again and again is logged once in a while."""

from __future__ import annotations

from collections.abc import Hashable


class Seldom:
    """Remembers what was said lately; time is the caller's."""

    __slots__ = ("_most", "_said", "_seconds")

    def __init__(self, seconds: float, most: int = 1) -> None:
        """The same thing is due again after so many `seconds`; in that time `most` things are due,
        and no others."""
        self._seconds = seconds
        self._most = most
        self._said: dict[Hashable, float] = {}
        """When each was, the oldest first."""

    def due(self, now: float, thing: Hashable = None) -> bool:
        """Whether it is time to say it, which is then done. `now`: seconds, of one clock."""
        while self._said and now - next(iter(self._said.values())) >= self._seconds:
            del self._said[next(iter(self._said))]
        if thing in self._said or len(self._said) >= self._most:
            return False
        self._said[thing] = now
        return True
