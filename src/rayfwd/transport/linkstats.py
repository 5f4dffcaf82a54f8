"""What a link has been through since the daemon began: its cuts, how long they took, its bytes.

Link, hub and direct ways keep one for each peer; status and metrics read it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Literal

from rayfwd.session.events import Parked, Resumed, SessionEnded
from rayfwd.system.eventlog import EventLog
from rayfwd.transport.mux import Mux

Ending = Literal["lost", "in order", "unsaid"]
"""How the log says that a session ended: as a warning, as news, or not at all."""

BUCKETS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Upper bounds, in seconds, of the classes in which ride-throughs are counted."""


@dataclass(slots=True)
class Cut:
    """A time in which every lane was lost."""

    began: float
    """Wall-clock seconds."""
    seconds: float | None = None
    """How long it took; None: it lasts."""
    ridden_through: bool | None = None
    """Whether the streams outlived it; None: it lasts."""


@dataclass(slots=True)
class LinkStats:
    """A link's past. Times that are passed in are seconds: `wall` since the epoch, `now` of any
    clock that does not jump."""

    cuts: int = 0
    ridden_through: int = 0
    sessions: int = 0
    """Sessions that began."""
    last_cut: Cut | None = None
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    """Ride-throughs by class; the last class has no upper bound."""
    lanes_lost: dict[str, int] = field(default_factory=dict)
    """How often a lane was lost, by its name."""
    lane_loss: str = ""
    """Why the last of them was."""
    ridden_seconds: float = 0.0
    """All ride-throughs together."""
    _given_up_seconds: float = 0.0
    _parked_at: float | None = None
    _bytes: tuple[int, int] = (0, 0)

    def began(self) -> None:
        """A session began."""
        self.sessions += 1

    def lane_lost(self, lane: str, why: str) -> None:
        """A lane was lost, not closed."""
        self.lanes_lost[lane] = self.lanes_lost.get(lane, 0) + 1
        self.lane_loss = why

    def parked(self, wall: float, now: float) -> None:
        """Every lane is lost."""
        self.cuts += 1
        self._parked_at = now
        self.last_cut = Cut(wall)

    def resumed(self, seconds: float) -> None:
        """A lane is back, and the streams with it."""
        self.ridden_through += 1
        self.ridden_seconds += seconds
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self._over(seconds, True)

    def ended(self, now: float, received: int, sent: int) -> None:
        """The session ended, perhaps while it was parked; what it moved is added up."""
        self._bytes = (self._bytes[0] + received, self._bytes[1] + sent)
        if self._parked_at is not None:
            seconds = now - self._parked_at
            self._given_up_seconds += seconds
            self._over(seconds, False)

    def _over(self, seconds: float, ridden: bool) -> None:
        self._parked_at = None
        if self.last_cut is not None:
            self.last_cut.seconds = seconds
            self.last_cut.ridden_through = ridden

    def parked_seconds(self, now: float) -> float:
        """How long the link was parked altogether, what lasts now included."""
        lasting = 0.0 if self._parked_at is None else max(0.0, now - self._parked_at)
        return self.ridden_seconds + self._given_up_seconds + lasting

    def bytes_moved(self, received: int, sent: int) -> tuple[int, int]:
        """Bytes in and out of all sessions; those of the present one are passed in."""
        return self._bytes[0] + received, self._bytes[1] + sent


def record(
    event: Parked | Resumed | SessionEnded,
    past: LinkStats,
    mux: Mux,
    node: str,
    log: EventLog,
    ending: Ending = "lost",
) -> float:
    """Count and log what happened to the session with `node`; the wall-clock time of it."""
    wall = time.time()
    match event:
        case Parked():
            past.parked(wall, mux.now())
            stats = mux.stats()
            log.warning(
                "link_parked", node=node, streams=stats.streams, ride_through=stats.ride_through
            )
        case Resumed(seconds):
            past.resumed(seconds)
            log.info("link_resumed", node=node, parked_seconds=round(seconds, 1))
        case SessionEnded(why):
            stats = mux.stats()
            past.ended(mux.now(), stats.bytes_in, stats.bytes_out)
            if ending == "lost":
                log.warning("session_ended", node=node, cause=why)
            elif ending == "in order":
                log.info("session_ended", node=node, cause=why)
    return wall
