"""An event loop whose time moves only when nothing else is left to do, as trio's MockClock does.

Sockets, and what threads of the loop's executor do, are real and are waited for. When all of it
rests, the time jumps to the next timer. So a pause of a minute takes a moment, a loaded machine
makes nothing late, and a test may say exactly when a thing happens. What other processes do is
seen only through sockets and pipes and takes no time: a test that waits for one has `loops.run`.
"""

from __future__ import annotations

import asyncio
import selectors
from asyncio.events import AbstractEventLoop
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SETTLE = 0.001
"""Real seconds in which nothing must come in before the time jumps. What one socket of this
machine sends to another is there at once, unless the kernel leaves it to one of its own threads."""

START = 1000.0
"""When the clock begins: not 0, which some code could take for never."""


class FakeClockLoop(asyncio.SelectorEventLoop):
    """Runs on a clock of its own, in seconds from `START`."""

    def __init__(self) -> None:
        self._now = START
        self._in_threads = 0
        self._awaited: list[tuple[Callable[[], object], asyncio.Future[None]]] = []
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._now

    def run_in_executor(
        self, executor: Any, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """As ever; the time stands meanwhile."""
        future = super().run_in_executor(executor, func, *args)
        self._in_threads += 1
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, *timeout: Any) -> None:
        """As ever; the time stands until the threads have ended. From Python 3.12 on it is given a
        timeout of five minutes, over which the time would jump at once."""
        self._in_threads += 1
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self._in_threads -= 1

    async def come_true(self, condition: Callable[[], object], seconds: float) -> None:
        """Wait for it, asking after every turn of the loop. Raises TimeoutError."""
        if condition():
            return
        future = self.create_future()
        entry = (condition, future)
        self._awaited.append(entry)
        try:
            async with asyncio.timeout(seconds):
                await future
        finally:
            self._awaited.remove(entry)

    def before_waiting(self) -> bool:
        """Ask what is awaited. True: something came true, and the loop has work."""
        work = False
        for condition, future in self._awaited:
            if future.done():
                continue
            try:
                true = condition()
            except Exception as exc:  # it is the test's: that is where it is to be raised
                future.set_exception(exc)
                work = True
            else:
                if true:
                    future.set_result(None)
                    work = True
        return work

    @property
    def in_threads(self) -> bool:
        """The executor's threads are at work, and will wake the loop."""
        return self._in_threads > 0

    def jump(self, seconds: float) -> None:
        self._now += seconds

    def _thread_done(self, _future: asyncio.Future[Any]) -> None:
        self._in_threads -= 1


class _Selector(selectors.DefaultSelector):
    """Waits for sockets, and has the loop's time jump instead of waiting for a timer."""

    def __init__(self, loop: FakeClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self._loop.before_waiting():
            return super().select(0)
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(None if self._loop.in_threads else SETTLE)
        if not ready:
            self._loop.jump(timeout)
        return ready


def fake_clock_loop() -> AbstractEventLoop:
    """For asyncio.Runner."""
    return FakeClockLoop()
