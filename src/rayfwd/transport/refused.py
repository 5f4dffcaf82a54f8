"""What was dialled and refused: the last ports, by who dialled them.

The words are the refusing node's, which may be another machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from rayfwd.session.stream import ResetReason

MOST = 50
"""Different refusals that are kept: the last ones."""
MOST_TEXT = 200
"""Characters of the words."""

REFUSALS = frozenset(
    {
        ResetReason.REFUSED,
        ResetReason.UNREACHABLE,
        ResetReason.NOT_IN_PLAN,
        ResetReason.NODE_AWAY,
    }
)
"""Why a port is refused. Every other reason ends a stream that stood, or is a bound's."""


@dataclass(frozen=True, slots=True)
class RefusedDial:
    """A port that somebody dialled in vain. Times are seconds since the epoch."""

    by: str
    """Who dialled; empty: a program of this node."""
    of: str
    """Which node refused; empty: this one."""
    reason: ResetReason
    text: str
    """Names the port, and says why."""
    times: int
    last: float


class RefusedStreams:
    """The last refusals of one node's sessions."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._kept: dict[tuple[str, str, ResetReason, str], RefusedDial] = {}

    def note(self, by: str, of: str, reason: ResetReason, text: str) -> None:
        """A stream was reset for that reason."""
        if reason not in REFUSALS:
            return
        text = text[:MOST_TEXT]
        before = self._kept.pop((by, of, reason, text), None)
        if before is None and len(self._kept) >= MOST:
            del self._kept[next(iter(self._kept))]
        new = before or RefusedDial(by, of, reason, text, 0, 0.0)
        self._kept[by, of, reason, text] = replace(new, times=new.times + 1, last=self._clock())

    def last(self) -> list[RefusedDial]:
        """The newest first."""
        return list(reversed(self._kept.values()))
