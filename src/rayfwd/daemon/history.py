"""The last hour of every link, for the page: a sample every ten seconds, in memory only.

A sample has the round-trip time and the traffic since the one before. What is kept is bounded: an
hour of samples, and the links that were there first.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.system.turns import gathered

INTERVAL = 10.0
"""Seconds between two samples."""
LENGTH = 360
"""Samples that are kept of a link."""
MOST_LINKS = 512
"""Links that have a history; further ones have none (4.3 KiB each)."""


class LinkNow(NamedTuple):
    """A link at the moment of a sample."""

    rtt: float | None
    """Seconds of the fastest lane; None: no lane, or not measured yet."""
    received: int
    """Bytes since the daemon began; so `sent`."""
    sent: int


@dataclass(slots=True)
class _Series:
    rtt: array[float] = field(default_factory=lambda: array("f"))
    """Milliseconds; NaN: none."""
    received: array[float] = field(default_factory=lambda: array("f"))
    """Bytes a second, in the time before the sample; so `sent`."""
    sent: array[float] = field(default_factory=lambda: array("f"))
    before: LinkNow | None = None

    def add(self, now: LinkNow, seconds: float) -> None:
        before = self.before or now
        self.before = now
        values = {
            "rtt": math.nan if now.rtt is None else now.rtt * 1000,
            "received": max(0, now.received - before.received) / seconds,
            "sent": max(0, now.sent - before.sent) / seconds,
        }
        for name, value in values.items():
            kept = getattr(self, name)
            kept.append(value)
            del kept[:-LENGTH]


class History:
    """Of one daemon's links. `run` takes the samples."""

    def __init__(
        self,
        look: Callable[[], Iterable[tuple[str, LinkNow]]],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """While it is not `wanted`, no sample is taken."""
        self._look = look
        self._wanted = wanted
        self._links: dict[str, _Series] = {}
        self._taken = 0
        self._at: float | None = None

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if self._wanted():
                self.take(await gathered(self._look()), loop.time())
            await sleep_coalesced(INTERVAL)

    def take(self, links: Mapping[str, LinkNow], now: float) -> None:
        """A sample; `now` in seconds of a clock that does not jump."""
        seconds = INTERVAL if self._at is None else max(0.001, now - self._at)
        self._at = now
        self._taken += 1
        self._links = {name: kept for name, kept in self._links.items() if name in links}
        for name, link in links.items():
            if name not in self._links and len(self._links) >= MOST_LINKS:
                continue
            self._links.setdefault(name, _Series()).add(link, seconds)

    def since(self, number: int) -> dict[str, Any]:
        """The samples from that number on, as JSON has it; all where there are not so many. A
        link's lists end with the last sample, and begin when the link was first seen."""
        first = number if 0 <= number <= self._taken else 0
        count = min(self._taken - first, LENGTH)
        return {
            "interval": INTERVAL,
            "length": LENGTH,
            "taken": self._taken,
            "links": {
                name: {
                    "rtt_ms": [None if math.isnan(v) else round(v, 2) for v in _last(s.rtt, count)],
                    "in": [round(value) for value in _last(s.received, count)],
                    "out": [round(value) for value in _last(s.sent, count)],
                }
                for name, s in self._links.items()
            },
        }


def _last(kept: array[float], count: int) -> array[float]:
    return kept[-count:] if count else kept[:0]
