"""Runs the tasks that only look: a fault of one ends that one, which is started again.

What carries bytes goes on: no stream is lost because something could not be looked at.
"""

from __future__ import annotations

import asyncio

from rayfwd.daemon.node import Work
from rayfwd.system.backoff import Backoff
from rayfwd.system.logs import get_logger

log = get_logger(__name__)

AGAIN_FIRST, AGAIN_LAST = 2.0, 30.0
"""Seconds until a watcher is started again; the last is less than the watchdog leaves a loop."""
STEADY = 300.0
"""Seconds without a fault after which it is started again soon."""


async def watch(name: str, work: Work) -> None:
    """Run a watcher until cancelled. What it found last stays on the board meanwhile."""
    loop = asyncio.get_running_loop()
    backoff = Backoff(AGAIN_FIRST, AGAIN_LAST)
    while True:
        began = loop.time()
        try:
            await work()
            raise RuntimeError("it has ended by itself")
        except Exception:
            if loop.time() - began >= STEADY:
                backoff.reset()
            wait = backoff.next()
            log.error("watcher_fault", watcher=name, again_in=wait, exc_info=True)
        await asyncio.sleep(wait)
