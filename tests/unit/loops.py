"""Runs a test's coroutine with a bound in time, and sees that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import structlog
from structlog.testing import capture_logs

from tests.unit.fake_clock import FakeClockLoop, fake_clock_loop

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


Main = Callable[[], Coroutine[Any, Any, None]]


def run(main: Main, seconds: float = 30.0) -> None:
    """Run `main`. Fails if it takes longer, leaves a task, a descriptor or a command that nobody
    has waited for, or if the loop was told of an exception that nobody took."""
    _run(main, seconds, asyncio.new_event_loop)


def run_on_fake_clock(main: Main, seconds: float = 3600.0) -> None:
    """As `run`, where time jumps over whatever would be waited for (`fake_clock.py`)."""
    _run(main, seconds, fake_clock_loop)


def _run(main: Main, seconds: float, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    gc.collect()
    before = descriptors()
    started = Started(loop)
    with asyncio.Runner(loop_factory=started.loop) as runner:
        runner.run(_bounded(main, seconds, started))
    gc.collect()
    left = {n: what for n, what in descriptors().items() if n not in before}
    assert not left, f"descriptors left open: {left}"


class Started:
    """The commands that a loop has started.

    One that has ended is no descriptor any more, and the loop may be closed before it hears of it.
    Python complains of its transport whenever that is thrown away: in some later test.
    """

    def __init__(self, factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._factory = factory
        self._transports: list[asyncio.SubprocessTransport] = []

    def loop(self) -> asyncio.AbstractEventLoop:
        """A new one that notes them."""
        loop = self._factory()
        start = getattr(loop, "_make_subprocess_transport")  # noqa: B009  # for mypy

        async def noted(*args: Any, **kwargs: Any) -> asyncio.SubprocessTransport:
            transport: asyncio.SubprocessTransport = await start(*args, **kwargs)
            self._transports.append(transport)
            return transport

        setattr(loop, "_make_subprocess_transport", noted)  # noqa: B010  # for mypy
        return loop

    @property
    def open(self) -> list[asyncio.SubprocessTransport]:
        """Those that are not closed, or of whose end the loop has not heard: closing one kills it,
        and Python complains of a process that nobody has waited for."""
        return [
            transport
            for transport in self._transports
            if not transport.is_closing() or transport.get_returncode() is None
        ]


async def _bounded(main: Main, seconds: float, started: Started) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.append(about))
    async with asyncio.timeout(seconds):
        await main()
    me = asyncio.current_task()

    def others() -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks() - {me}

    await until(lambda: not others(), 2.0, lambda: f"tasks left: {others()}")
    await until(lambda: not started.open, 2.0, lambda: f"commands left: {started.open}")
    assert not complaints, f"the loop was told: {complaints}"


async def until(
    true: Callable[[], object], seconds: float = 10.0, what: Callable[[], str] | str = ""
) -> None:
    """Wait for something to become true. Fails after `seconds`."""
    try:
        await _come_true(true, seconds)
    except TimeoutError:
        message = what() if callable(what) else what or "it never came true"
        raise AssertionError(message) from None


async def _come_true(true: Callable[[], object], seconds: float) -> None:
    loop = asyncio.get_running_loop()
    if isinstance(loop, FakeClockLoop):
        await loop.come_true(true, seconds)
        return
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


async def turns(number: int = 3) -> None:
    """Let the loop see to all that is there for it now, some times over."""
    for _ in range(number):
        await asyncio.sleep(0)


@asynccontextmanager
async def closing() -> AsyncIterator[None]:
    """At the end, wait until what was opened meanwhile is closed: of a connection whose other end
    another process has closed, the loop hears a moment later."""
    before = descriptors().keys()
    yield
    await until(lambda: descriptors().keys() <= before, what=lambda: f"left: {descriptors()}")


@contextmanager
def log_events() -> Iterator[Log]:
    """The events that are logged meanwhile, of every level, whatever an earlier test has set."""
    structlog.reset_defaults()
    with capture_logs() as caught:
        yield caught


def of(log: Log, event: str) -> Log:
    """The events of one name."""
    return [entry for entry in log if entry["event"] == event]
