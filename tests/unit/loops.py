"""Runs a test's coroutine with a bound in time, and sees that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.testing import capture_logs

Log = list[Any]
"""Events as dictionaries: `event`, `log_level` and the fields."""


def descriptors() -> dict[int, str]:
    """The open file descriptors of this process, and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the one that listed the directory
    return found


def run(main: Callable[[], Coroutine[Any, Any, None]], seconds: float = 30.0) -> None:
    """Run `main`. Fails if it takes longer, leaves a task or a descriptor, or if the loop was
    told of an exception that nobody took."""
    gc.collect()
    before = descriptors()
    asyncio.run(_bounded(main, seconds))
    gc.collect()
    left = {n: what for n, what in descriptors().items() if n not in before}
    assert not left, f"descriptors left open: {left}"


async def _bounded(main: Callable[[], Coroutine[Any, Any, None]], seconds: float) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.append(about))
    async with asyncio.timeout(seconds):
        await main()
    await until(lambda: not other_tasks(), 2.0, lambda: f"tasks left: {other_tasks()}")
    assert not complaints, f"the loop was told: {complaints}"


def other_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def until(
    true: Callable[[], object], seconds: float = 10.0, what: Callable[[], str] | str = ""
) -> None:
    """Wait for something to become true. Fails after `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not true():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(what() if callable(what) else what or "it never came true")
        await asyncio.sleep(0.01)


@contextmanager
def log_events() -> Iterator[Log]:
    """The events that are logged meanwhile."""
    structlog.reset_defaults()
    with capture_logs() as caught:
        yield caught


def of(log: Log, event: str) -> Log:
    """The events of one name."""
    return [entry for entry in log if entry["event"] == event]
