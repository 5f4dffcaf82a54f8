"""What `ray start` writes, for the log.

While it starts, it names commands for whoever has started Ray by hand (`ray start --address=…`,
`ray stop`). Nobody has to type these beside rayfwd, so the log has them at level debug, and again
at level info if that start fails. What Ray writes later is news.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from rayfwd.system.logs import get_logger

KEPT = 200
"""Lines of a start that are told again if it fails."""

SILENCE = 1.0
"""Seconds without a line after which a start whose Ray is up has said all that it says."""

_log = get_logger(__name__)


class OutputLog:
    """Of one `ray start`."""

    def __init__(self, up: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`up`: it has been up before, and an earlier daemon has logged what it said."""
        self._clock = clock
        self._starting: deque[str] | None = None if up else deque(maxlen=KEPT)
        """None: it has said all that it says while it starts."""
        self._last = clock()
        """When a line came."""

    def add(self, lines: Sequence[str], up: bool) -> None:
        """What came since the last call."""
        if self._starting is None:
            for line in lines:
                _log.info("ray_output", line=line)
            return
        now = self._clock()
        if lines:
            self._last = now
            self._starting.extend(lines)
            for line in lines:
                _log.debug("ray_output", line=line)
        elif up and now - self._last >= SILENCE:
            self._starting = None

    def failed(self) -> None:
        """It has ended by itself: whoever reads the log needs what it said."""
        starting, self._starting = self._starting, None
        for line in starting or ():
            _log.info("ray_output", line=line)
