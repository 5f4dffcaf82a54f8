"""Finds links that are lost again and again, or far slower than they were (time is passed in).

Slow means its round-trip time against its own past. Throughput has no rule of its own: without
load it cannot be known, and under load a link that carries less has its PINGs wait longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from rayfwd.problems import Problem
from rayfwd.watch.conditions import Seen

INTERVAL = 2.0
"""Seconds between two looks."""

LOSSES = 4
"""Times that lanes were lost within `FLAPPING` seconds; losses of one look are one."""
FLAPPING = 120.0
CALM = 60.0
"""Seconds without a loss after which a lane is well again."""

SLOW_FACTOR = 5.0
SLOW_SECONDS = 0.15
"""A link is slow where its round trip takes so many times as long as it did, and so much longer."""
SLOW_FOR = 6.0
"""For so many seconds without a break."""
PAST = 3600.0
SAMPLE = 5.0
"""One round-trip time every so many seconds is kept for so long: what is usual is their median."""
SAMPLE_SLOW = 60.0
"""While it is slow: what lasts becomes usual, within an hour at the most."""
ENOUGH = 6
"""Samples from which on there is a past."""


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """A link at a look."""

    losses: Mapping[str, int]
    """Lanes lost since the daemon began, by lane."""
    round_trip: float | None
    """Seconds, of the fastest lane for short messages; None: it is not up."""
    said: str = ""
    """Why a lane was lost last."""


@dataclass(slots=True)
class _Past:
    losses: dict[str, int] = field(default_factory=dict)
    lost_at: dict[str, deque[float]] = field(default_factory=dict)
    flapping: set[str] = field(default_factory=set)
    trips: deque[tuple[float, float]] = field(default_factory=deque)
    slow_since: float | None = None


class LinkRules:
    """Follows the links by their workers' names."""

    def __init__(self) -> None:
        self._past: dict[str, _Past] = {}

    def look(self, links: Mapping[str, LinkSeen], now: float) -> list[Seen]:
        """One look. `now` is in seconds, of a clock that does not jump."""
        self._past = {name: past for name, past in self._past.items() if name in links}
        found: list[Seen] = []
        for name, link in links.items():
            past = self._past.setdefault(name, _Past(dict(link.losses)))
            for lane, times in _flapping(past, link, now).items():
                found.append(Seen(f"{name}/{lane}", _flaps(lane, name, times, link.said)))
            usual = _slow(past, link, now)
            if usual is not None and link.round_trip is not None:
                found.append(Seen(name, _is_slow(name, link.round_trip, usual)))
        return found


def _flapping(past: _Past, link: LinkSeen, now: float) -> dict[str, int]:
    """The lanes that flap, and how often they were lost lately."""
    found = {}
    for lane, count in link.losses.items():
        times = past.lost_at.setdefault(lane, deque())
        if count > past.losses.get(lane, 0):
            times.append(now)
        past.losses[lane] = count
        while times and now - times[0] > FLAPPING:
            times.popleft()
        if not times or now - times[-1] > CALM:
            past.flapping.discard(lane)
        elif len(times) >= LOSSES:
            past.flapping.add(lane)
        if lane in past.flapping:
            found[lane] = len(times)
    return found


def _slow(past: _Past, link: LinkSeen, now: float) -> float | None:
    """The usual round-trip time, where the present one is far above it and has been for long."""
    trip = link.round_trip
    while past.trips and now - past.trips[0][0] > PAST:
        past.trips.popleft()
    if trip is None:
        past.slow_since = None
        return None
    usual = median(t for _, t in past.trips) if len(past.trips) >= ENOUGH else None
    far_off = usual is not None and trip > max(SLOW_FACTOR * usual, usual + SLOW_SECONDS)
    if not past.trips or now - past.trips[-1][0] >= (SAMPLE_SLOW if far_off else SAMPLE):
        past.trips.append((now, trip))
    if not far_off:
        past.slow_since = None
        return None
    if past.slow_since is None:
        past.slow_since = now
    return usual if now - past.slow_since >= SLOW_FOR else None


def _flaps(lane: str, node: str, times: int, said: str) -> Problem:
    return Problem(
        "lane_flapping",
        f"lane {lane} of {node}'s link was lost {times} times in the last {FLAPPING:.0f} s"
        + (f"; the last time: {said}" if said else ""),
        "look for what ends SSH connections between the two: sshd's log on the head, "
        "ClientAliveInterval, a firewall or NAT that forgets connections, a network that comes and "
        "goes",
    )


def _is_slow(node: str, trip: float, usual: float) -> Problem:
    return Problem(
        "link_slow",
        f"a round trip on {node}'s link takes {trip * 1000:.0f} ms, where {usual * 1000:.1f} ms "
        "are usual",
        "see what else uses the network between the two, and the load of both machines (`ping` "
        "beside it tells the one from the other)",
    )
