"""Whether a link's lanes are full, so that further ones would carry more (pure).

OpenSSH lets its peer send 2 MiB ahead on a channel, and no setting of it changes that: where a
round trip takes 50 ms, a lane carries at most 42 MB/s to the head, however fast the network is.
"""

from __future__ import annotations

import math

CHANNEL_BYTES = 1 << 21
"""What an OpenSSH server takes ahead on a channel (CHAN_TCP_WINDOW_DEFAULT in its channels.h)."""
FULL_PART = 0.6
"""The part of that from which a lane counts as full: the rate is a mean over some moments, and the
round trip the least one that was seen."""


class Saturation:
    """What a link moves, as its owner tells it now and then."""

    def __init__(self, now: float, moved: tuple[int, int]) -> None:
        self._at, self._moved = now, moved
        self.idle = True
        """Less moved between the last two calls than fills a lane once: the next one may wait."""
        self._rtt = float("inf")
        """The least one ever: a lane that came up under load has seen no round trip without it."""

    def saturated(self, now: float, moved: tuple[int, int], rtt: float, lanes: int) -> bool:
        """Whether `lanes` lanes were full since the last call, in either direction.

        `moved`: bytes ever moved in each direction; `rtt`: the least round trip that the present
        lanes have seen, in seconds; infinite where they have seen none.
        """
        seconds = max(now - self._at, 1e-6)
        most = max(after - before for after, before in zip(moved, self._moved, strict=True))
        self._at, self._moved = now, moved
        self._rtt = min(self._rtt, rtt)
        self.idle = most < FULL_PART * CHANNEL_BYTES
        if math.isinf(self._rtt):
            return False
        return most / seconds * self._rtt >= FULL_PART * CHANNEL_BYTES * max(lanes, 1)
