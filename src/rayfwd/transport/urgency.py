"""How long a step towards the head may take: less while streams wait for it.

A step that nobody waited for when it began may be waited for before it ends: the last lane is lost
meanwhile. From then on it gets no longer than a step begun at that moment, for the path may have
gone in the middle of it, and TCP alone would find out late that it is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class AdaptiveTimeout:
    """Seconds that one kind of step gets while streams wait.

    Each step that these were too few for doubles them, up to a bound, and so does one that went
    well and took more than half of them: for heads that are slow.
    """

    def __init__(self, least: float, most: float) -> None:
        self._least = least
        self._most = most
        self.seconds = least

    def timed_out(self) -> None:
        """A step was given up."""
        self.seconds = min(2 * self.seconds, self._most)

    def succeeded(self, seconds: float) -> None:
        """A step went well."""
        self.seconds = min(max(self._least, 2 * seconds, self.seconds / 2), self._most)


@asynccontextmanager
async def time_limit(
    urgent: asyncio.Event, usual: float, adaptive: AdaptiveTimeout
) -> AsyncIterator[None]:
    """Ends what is within after `usual` seconds, or where it is urgent by `adaptive`, which learns
    from it. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        async with asyncio.timeout(adaptive.seconds if urgent.is_set() else usual) as limit:
            hurrying = asyncio.create_task(_hurry(urgent, limit, adaptive), name="hurry")
            try:
                yield
            finally:
                hurrying.cancel()
    except TimeoutError:
        if urgent.is_set():
            adaptive.timed_out()
        raise
    adaptive.succeeded(loop.time() - began)


async def rest(urgent: asyncio.Event, seconds: float, least: float) -> None:
    """Before another attempt: so many seconds, or from when it becomes urgent no more than `least`
    of them."""
    if urgent.is_set():
        await asyncio.sleep(seconds)
        return
    await asyncio.sleep(least)
    # Not wait_for: up to Python 3.11 it loses a cancellation that comes with the event.
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds - least)):
            await urgent.wait()


async def _hurry(urgent: asyncio.Event, limit: asyncio.Timeout, adaptive: AdaptiveTimeout) -> None:
    await urgent.wait()
    until, now = limit.when(), asyncio.get_running_loop().time()
    if until is not None and not limit.expired():
        limit.reschedule(min(until, now + adaptive.seconds))
