"""Remembers when nodes went by rayfwd's own word: their Ray ended, or their link was lost.

What Ray's node table has of such a node afterwards is no fault: Ray gives it up only later, and
until then it may be there twice. Times are in seconds since the epoch, on the head's clock, as
the table's are (pure: they are passed in).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

MOST_INTERRUPTIONS = 50
"""Interruptions that are kept of a node."""


class Interruptions:
    """`since`: of what was before nothing is known."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._up: set[str] = set()
        self._went: dict[str, deque[float]] = {}

    def sample(self, up: Iterable[str], wall_time: float) -> None:
        """These nodes have their Ray and their link up now."""
        now_up = set(up)
        for name in self._up - now_up:
            self._went.setdefault(name, deque(maxlen=MOST_INTERRUPTIONS)).append(wall_time)
        self._up = now_up

    def keep(self, names: Collection[str]) -> None:
        """There are no other nodes any more."""
        for name in self._went.keys() - set(names):
            del self._went[name]

    def between(self, name: str, begin: float, end: float) -> bool:
        """Whether the node went at that time; so it is taken to have where nothing is known."""
        return end < self._since or any(begin <= at <= end for at in self._went.get(name, ()))
