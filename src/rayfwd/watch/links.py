"""Finds links that are lost again and again, or far slower than they were (time is passed in).

Slow means its round-trip time, or its throughput, against its own past. Throughput is known only
while more waits to be sent than the link takes, so each end finds it for its own direction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from rayfwd import codes
from rayfwd.problems import Problem
from rayfwd.watch.conditions import Finding

LINKS_INTERVAL = 2.0
"""Seconds between two looks."""

FLAPPING_LOSSES = 4
"""Times that lanes were lost within `FLAPPING_SECONDS` seconds; losses of one look are one."""
FLAPPING_SECONDS = 120.0
CALM_SECONDS = 60.0
"""Seconds without a loss after which a lane is well again."""

SLOW_FACTOR = 5.0
SLOW_SECONDS = 0.15
"""A link is slow where its round trip takes so many times as long as it did, and so much longer."""
SLOW_SAMPLES = 3
"""In so many looks without a break: they come some milliseconds early or late, by which so many
seconds would be a look more or less."""
PAST_SECONDS = 3600.0
SAMPLE_INTERVAL = 5.0
"""One round-trip time every so many seconds is kept for so long: what is usual is their median."""
SLOW_INTERVAL = 60.0
"""While it is slow: what lasts becomes usual, within an hour at the most."""
MIN_SAMPLES = 6
"""Samples from which on there is a past."""

THIN_FACTOR = 5.0
THIN_RATE = 2e6
"""A full link is thin where it carries so many times less than it did when it was full, and less
than so many bytes in a second: one that many share, and that is fast all the same, is none."""
THIN_SECONDS = 4.0
"""For so many seconds without a break."""


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """A link at a look."""

    losses: Mapping[str, int]
    """Lanes lost since the daemon began, by lane."""
    round_trip: float | None
    """Seconds that the last one took, on the fastest lane for short messages; None: it is not up,
    or none was measured."""
    last_loss: str = ""
    """Why a lane was lost last."""
    confirmed: int | None = None
    """Bytes of streams that have certainly arrived by the lanes that are there, those for bulk if
    there are any; None: no lane."""
    backlog: bool = False
    """More waits to be sent."""
    confirmed_at: float | None = None
    """When `confirmed` was last heard of, by the clock of the looks, in the mean of the lanes: a
    full queue of seconds makes it rarer than looks. None: now."""


@dataclass(slots=True)
class _Past:
    losses: dict[str, int] = field(default_factory=dict)
    lost_at: dict[str, deque[float]] = field(default_factory=dict)
    flapping: set[str] = field(default_factory=set)
    trips: deque[tuple[float, float]] = field(default_factory=deque)
    slow_looks: int = 0
    confirmed: tuple[float, int] | None = None
    """What had arrived, and when it was known, if the last look found the link full."""
    rates: deque[tuple[float, float]] = field(default_factory=deque)
    """Bytes in a second, between two looks that both found the link full."""
    thin: _Thin | None = None


@dataclass(frozen=True, slots=True)
class _Thin:
    since: float
    last: float
    """Until when it was so, as far as is known."""
    rate: float
    usual: float

    @property
    def counts(self) -> bool:
        return self.last - self.since >= THIN_SECONDS


class LinkRules:
    """Follows the links by their workers' names."""

    def __init__(self) -> None:
        self._past: dict[str, _Past] = {}

    def sample(self, links: Mapping[str, LinkSeen], now: float) -> list[Finding]:
        """One look. `now` is in seconds, of a clock that does not jump."""
        self._past = {name: past for name, past in self._past.items() if name in links}
        found: list[Finding] = []
        for name, link in links.items():
            past = self._past.setdefault(name, _Past(dict(link.losses)))
            for lane, times in _flapping(past, link, now).items():
                found.append(Finding(f"{name}/{lane}", _flaps(lane, name, times, link.last_loss)))
            usual = _slow(past, link, now)
            if usual is not None and link.round_trip is not None:
                found.append(Finding(name, _is_slow(name, link.round_trip, usual)))
            past.thin = _thin(past, link, now)
            if past.thin is not None and past.thin.counts:
                found.append(Finding(name, _is_thin(name, past.thin)))
        return found


def _flapping(past: _Past, link: LinkSeen, now: float) -> dict[str, int]:
    """The lanes that flap, and how often they were lost lately."""
    found = {}
    for lane, count in link.losses.items():
        times = past.lost_at.setdefault(lane, deque())
        if count > past.losses.get(lane, 0):
            times.append(now)
        past.losses[lane] = count
        while times and now - times[0] > FLAPPING_SECONDS:
            times.popleft()
        if not times or now - times[-1] > CALM_SECONDS:
            past.flapping.discard(lane)
        elif len(times) >= FLAPPING_LOSSES:
            past.flapping.add(lane)
        if lane in past.flapping:
            found[lane] = len(times)
    return found


def _slow(past: _Past, link: LinkSeen, now: float) -> float | None:
    """The usual round-trip time, where the present one is far above it and has been for long."""
    trip = link.round_trip
    while past.trips and now - past.trips[0][0] > PAST_SECONDS:
        past.trips.popleft()
    if trip is None:
        past.slow_looks = 0
        return None
    usual = median(t for _, t in past.trips) if len(past.trips) >= MIN_SAMPLES else None
    far_off = usual is not None and trip > max(SLOW_FACTOR * usual, usual + SLOW_SECONDS)
    if not past.trips or now - past.trips[-1][0] >= (SLOW_INTERVAL if far_off else SAMPLE_INTERVAL):
        past.trips.append((now, trip))
    past.slow_looks = past.slow_looks + 1 if far_off else 0
    return usual if past.slow_looks >= SLOW_SAMPLES else None


def _thin(past: _Past, link: LinkSeen, now: float) -> _Thin | None:
    """What `past.thin` is from now on."""
    before = past.confirmed
    heard = now if link.confirmed_at is None else link.confirmed_at
    full = link.backlog and link.confirmed is not None
    past.confirmed = (heard, link.confirmed) if full and link.confirmed is not None else None
    while past.rates and now - past.rates[0][0] > PAST_SECONDS:
        past.rates.popleft()
    thin = past.thin
    # A lane less, and the sum is less, too. One by which nothing arrives is about to be dropped.
    moved = 0 if before is None or past.confirmed is None else past.confirmed[1] - before[1]
    if before is not None and past.confirmed is not None and moved == 0:
        # What arrives is known in steps, which a full queue makes rarer than looks: wait for one.
        past.confirmed = before
        return thin
    if before is None or moved <= 0 or heard <= before[0]:
        stays = thin is not None and now - thin.last <= (CALM_SECONDS if thin.counts else 0.0)
        return thin if stays else None
    rate = moved / (heard - before[0])
    usual = median(r for _, r in past.rates) if len(past.rates) >= MIN_SAMPLES else None
    far_off = usual is not None and rate < min(usual / THIN_FACTOR, THIN_RATE)
    if not far_off or now - past.rates[-1][0] >= SLOW_INTERVAL:
        past.rates.append((now, rate))
    if not far_off or usual is None:
        return None
    return _Thin(before[0] if thin is None else thin.since, heard, rate, usual)


def _flaps(lane: str, node: str, times: int, last_loss: str) -> Problem:
    return codes.LANE_FLAPPING.problem(
        f"lane {lane} of {node}'s link was lost {times} times in the last {FLAPPING_SECONDS:.0f} s"
        + (f", most recently because: {last_loss}" if last_loss else ""),
        "find out what ends SSH connections between the two machines: sshd's log on the head, "
        "ClientAliveInterval, a firewall or NAT that forgets connections, an unstable network",
    )


def _is_slow(node: str, trip: float, usual: float) -> Problem:
    return codes.LINK_SLOW.problem(
        f"a round trip on {node}'s link takes {trip * 1000:.0f} ms; {usual * 1000:.1f} ms are "
        "usual",
        "check what else uses the network between the two machines, and the load of both (`ping` "
        "at the same time shows which of the two it is)",
    )


def _is_thin(node: str, thin: _Thin) -> Problem:
    return codes.LINK_THROUGHPUT_LOW.problem(
        f"{node}'s link is saturated and carries {thin.rate / 1e6:.2g} MB/s from here; "
        f"{thin.usual / 1e6:.3g} MB/s are usual",
        "check what else uses the network between the two machines, and whether something limits "
        "it there (compare with `scp`); small tasks run as before, objects take longer",
    )
