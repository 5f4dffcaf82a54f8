"""What the head holds to another machine: redialled, a failure said once, a hurry when missed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rayfwd.problems import Problem, ProblemError
from rayfwd.system.backoff import Backoff
from rayfwd.system.logs import get_logger
from rayfwd.transport.link import (
    LASTED_SECONDS,
    REDIAL_FIRST,
    REDIAL_LAST,
    REDIAL_PARKED,
    counted_rest,
)
from rayfwd.transport.urgency import rest

log = get_logger(__name__)


class Redialled:
    """Of one machine."""

    def __init__(self, called: str, ride_through: float, on_change: Callable[[], None]) -> None:
        """`on_change`: `problem` is another."""
        self.called = called
        self._ride_through = ride_through
        self._on_change = on_change
        self._problem: Problem | None = None
        self._urgent = asyncio.Event()
        """It stood a while ago: streams may wait."""
        self._calm: asyncio.TimerHandle | None = None
        self._standing = asyncio.Event()
        self._closing = False

    @property
    def problem(self) -> Problem | None:
        """What keeps it from standing."""
        return None if self._standing.is_set() else self._problem

    @property
    def stands(self) -> bool:
        return self._standing.is_set()

    async def _redial(
        self,
        one: Callable[[], Awaitable[None]],
        met: Callable[[Problem], None],
        follows: bool = False,
    ) -> None:
        """Make one connection after the other. `one` returns when one that stood is over. What it
        raises, a ProblemError, `met` hears of. `follows`: only while another one stands."""
        backoff = Backoff(REDIAL_FIRST, REDIAL_LAST, jitter=0.2)
        loop = asyncio.get_running_loop()
        while not self._closing:
            if follows:
                await self._standing.wait()
            began, counted = loop.time(), 0.0
            try:
                await one()
                if loop.time() - began > LASTED_SECONDS:
                    backoff.reset()
            except ProblemError as exc:
                counted = counted_rest(exc.problem.code)
                met(exc.problem)
            seconds = max(
                counted, backoff.next(REDIAL_PARKED if self._urgent.is_set() else REDIAL_LAST)
            )
            await rest(self._urgent, seconds, max(counted, min(seconds, REDIAL_FIRST)))

    def _now_stands(self) -> bool:
        """Whether that is news."""
        self._be_calm()
        if self._standing.is_set():
            return False
        self._standing.set()
        self._problem = None
        self._on_change()
        return True

    def _now_gone(self) -> bool:
        """Whether it stood, and is missed."""
        if not self._standing.is_set() or self._closing:
            return False
        self._standing.clear()
        self._urgent.set()
        self._calm = asyncio.get_running_loop().call_later(self._ride_through, self._be_calm)
        self._on_change()
        return True

    def _be_calm(self) -> None:
        self._urgent.clear()
        if self._calm is not None:
            self._calm.cancel()
            self._calm = None

    def _met(self, problem: Problem, **fields: str) -> None:
        """Say it once; the same again is no news. `fields`: of the log."""
        if self._closing or problem == self._problem:
            return
        self._problem = problem
        self._say(problem, **fields)
        self._on_change()

    def _say(self, problem: Problem, **fields: str) -> None:
        log.warning(problem.code.event, cause=problem.cause, remedy=problem.remedy, **fields)
