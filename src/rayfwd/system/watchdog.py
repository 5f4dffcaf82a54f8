"""Feeds systemd's watchdog (sd_watchdog_enabled(3)) as long as every loop turns.

That this task runs shows that the event loop does. The other loops say themselves when they are to
be heard of next (`progress.py`), and sessions have a timer that is to be on time. If one of them
is late, systemd gets nothing more, kills the daemon, and starts it again; Ray lives on. A link that
is down is no such fault: the loop that dials it turns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.logs import get_logger
from rayfwd.system.notify import Notifier

DEFAULT_PERIOD = 30.0
"""Seconds within which it would have to be fed, where no service manager says."""

START_EXTENSION = 90.0
"""Seconds more that a start may take each time it asks; the unit's `TimeoutStartSec` is the
first."""

SESSION_GRACE = 60.0
"""Seconds that a session's timer may be late. It is made anew many times a minute."""

_log = get_logger(__name__)

Late = tuple[str, float]
"""A loop's name, and the seconds since it should have turned."""


class Timed(Protocol):
    """What has a timer that is to be on time: a session that runs."""

    def late(self) -> float:
        """Seconds since its timer should have come; 0: it is on time."""


def late_loops(loops: Iterable[Heartbeat], muxes: Iterable[Timed]) -> list[Late]:
    """Those of these loops and sessions that are late."""
    found = [(loop.name, loop.late()) for loop in loops]
    found += [("session", mux.late() - SESSION_GRACE) for mux in muxes]
    return [(name, seconds) for name, seconds in found if seconds > 0]


def period(env: Mapping[str, str], pid: int) -> float:
    """Seconds within which the service manager wants to hear of this process."""
    if env.get("WATCHDOG_PID") not in {None, str(pid)}:
        return DEFAULT_PERIOD
    try:
        return max(int(env["WATCHDOG_USEC"]) / 1e6, 1.0)
    except (KeyError, ValueError):
        return DEFAULT_PERIOD


class Watchdog:
    """`run` is a task of the daemon's, or of the client's."""

    def __init__(
        self,
        look_up: Callable[[], Iterable[Late]],
        ready: Callable[[], bool],
        notifier: Notifier,
        seconds: float | None = None,
    ) -> None:
        """`look_up` gives the loops that are late; `ready`: READY was said, the start is over."""
        self._look_up = look_up
        self._ready = ready
        self._notifier = notifier
        self._seconds = period(os.environ, os.getpid()) if seconds is None else seconds
        self._logged: set[str] = set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.feed()
            await sleep_coalesced(self._seconds / 4)

    def feed(self) -> None:
        """Feed it, or log why not."""
        late = dict(self._look_up())
        for name, seconds in late.items():
            if name not in self._logged:
                _log.error("loop_stuck", loop=name, late_seconds=round(seconds, 1))
        self._logged = set(late)
        if not late:
            further = [] if self._ready() else [f"EXTEND_TIMEOUT_USEC={START_EXTENSION * 1e6:.0f}"]
            self._notifier.send("WATCHDOG=1", *further)
