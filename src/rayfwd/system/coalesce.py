"""Pauses that end together.

A daemon that has nothing to do looks after this and that every so often. To wake a process costs
more than most of these looks, since its caches are cold by then: so they are woken by one beat.
"""

from __future__ import annotations

import asyncio

WAKE_INTERVAL = 1.0
"""Seconds."""


def end_of_pause(seconds: float) -> float:
    """When a pause of about so many seconds ends, on the running loop's clock: at the beat nearest
    to it, or exactly then where it is shorter than a beat."""
    due = asyncio.get_running_loop().time() + seconds
    return due if seconds < WAKE_INTERVAL else round(due / WAKE_INTERVAL) * WAKE_INTERVAL


async def sleep_coalesced(seconds: float) -> None:
    """Sleep until then."""
    await asyncio.sleep(end_of_pause(seconds) - asyncio.get_running_loop().time())
