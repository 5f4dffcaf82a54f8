"""What several watchers find wrong with nodes: said once, kept with its time, over once.

Each watcher puts up all that it finds at present; what it no longer finds is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from rayfwd.logs import get_logger
from rayfwd.problems import Problem
from rayfwd.ray.cluster import NodeProblem

_log = get_logger(__name__)


class Board:
    """Belongs to the daemon. `on_change` is called in the loop after a change."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._found: dict[str, dict[str, NodeProblem]] = {}
        self._on_change = on_change

    @property
    def problems(self) -> tuple[NodeProblem, ...]:
        """Everything, in the order of the watchers."""
        return tuple(p for found in self._found.values() for p in found.values())

    def put(self, watcher: str, found: Mapping[str, Problem]) -> None:
        """All that this watcher finds now, by the node's name."""
        before = self._found.get(watcher, {})
        after: dict[str, NodeProblem] = {}
        for subject, problem in found.items():
            old = before.get(subject)
            if old is not None and old.problem.code == problem.code:
                after[subject] = NodeProblem(subject, old.since, problem)
                continue
            after[subject] = NodeProblem(subject, time.time(), problem)
            _log.error(problem.code, node=subject, cause=problem.cause, remedy=problem.remedy)
        for subject, old in before.items():
            now = after.get(subject)
            if now is None or now.problem.code != old.problem.code:
                lasted = round(time.time() - old.since)
                _log.info("problem_over", node=subject, code=old.problem.code, after_seconds=lasted)
        self._found[watcher] = after
        if before != after:
            self._on_change()

    def put_one(self, watcher: str, subject: str, problem: Problem | None) -> None:
        """As `put`, where only one node was looked at; None: nothing is wrong with it."""
        found = {s: p.problem for s, p in self._found.get(watcher, {}).items() if s != subject}
        self.put(watcher, found if problem is None else found | {subject: problem})

    def keep(self, subjects: Collection[str]) -> None:
        """The other nodes have gone: nothing is said of them any more."""
        for watcher, found in list(self._found.items()):
            self.put(watcher, {s: p.problem for s, p in found.items() if s in subjects})
