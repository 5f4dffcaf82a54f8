"""Who was refused: said seldom, and known for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rayfwd.problems import Code, Problem
from rayfwd.system.logs import get_logger
from rayfwd.system.seldom import Seldom

log = get_logger(__name__)

LASTING_SECONDS = 45.0
"""Seconds since the last refusal after which it is over: workers dial again within 18 s."""
REPEAT_SECONDS = 600.0
"""Seconds in which the same refusal is said once."""
MOST_LOGGED = 256
"""Different refusals that are said in that time, at most."""


class Refusals:
    """The refusals of one hub."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        """`on_change` is called when `lately` has become another."""
        self._on_change = on_change
        self._logged = Seldom(REPEAT_SECONDS, MOST_LOGGED)
        self._lately: dict[tuple[str, Code], tuple[Problem, float]] = {}
        """The last ones by node and code, and when they were."""

    def add(self, node: str, uid: int, refusal: Problem) -> None:
        """Say it; a worker that tries again and again is said seldom."""
        now = asyncio.get_running_loop().time()
        if not refusal.code.passing and len(self._lately) < MOST_LOGGED:
            first = (node, refusal.code) not in self._lately
            self._lately[node, refusal.code] = (refusal, now)
            asyncio.get_running_loop().call_later(LASTING_SECONDS + 0.1, self._expire)
            if first:
                self._on_change()
        if self._logged.due(now, (node, uid, refusal.code)):
            log.warning(
                "lane_refused", node=node, uid=uid, code=refusal.code.name, cause=refusal.cause
            )

    def lately(self) -> list[tuple[str, Problem]]:
        """Those of the last `LASTING_SECONDS` seconds, with the name that was claimed."""
        return [(name, refusal) for (name, _), (refusal, _) in self._lately.items()]

    def forget(self, name: str) -> None:
        """Whoever claimed this name was welcomed, and is no longer among `lately`."""
        self._lately = {key: value for key, value in self._lately.items() if key[0] != name}

    def _expire(self) -> None:
        now, before = asyncio.get_running_loop().time(), len(self._lately)
        self._lately = {
            key: (refusal, at)
            for key, (refusal, at) in self._lately.items()
            if now - at < LASTING_SECONDS
        }
        if len(self._lately) < before:
            self._on_change()
