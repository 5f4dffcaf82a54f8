"""What is wrong, of all watchers together: said once, kept with its time, over once.

Each watcher puts up all that it finds at present; what it no longer finds is over. When it shows
and what explains it is decided by `conditions.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rayfwd.problems import Problem
from rayfwd.system.logs import get_logger
from rayfwd.watch import conditions
from rayfwd.watch.conditions import Alarm, Condition, Finding, Key

_log = get_logger(__name__)

Later = Callable[[float, Callable[[], None]], Any]
"""Calls a function after so many seconds, as `loop.call_later` does."""


class Board:
    """Belongs to the daemon. `on_change` is called in the loop after a change of what shows.

    `later` wakes it when something has lasted long enough; without it, the next look does.
    """

    def __init__(
        self,
        on_change: Callable[[], None],
        own: str = "",
        later: Later | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.head = ""
        """The head's name, whose faults explain other nodes'; empty: not known yet."""
        self._found: dict[str, dict[Key, Alarm]] = {}
        self._quiet: set[str] = set()
        self._logged: dict[tuple[str, Key], bool] = {}
        """Which were logged: True as a root, False as explained by another."""
        self._shown: tuple[Condition, ...] = ()
        self._on_change = on_change
        self._own = own
        self._later = later
        self._clock = clock
        self._woken_at: float | None = None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All that shows, the roots before the rest, in the order of the watchers."""
        return self._shown

    def ids_of(self, watcher: str) -> tuple[str, ...]:
        """Of the conditions that this watcher finds, as far as they show."""
        alarms = self._found.get(watcher, {}).values()
        return tuple(alarm.condition(self._own).id for alarm in alarms if alarm.shown)

    def put(self, watcher: str, found: Mapping[str, Problem]) -> None:
        """All that this watcher finds now, one a subject."""
        self.put_all(watcher, [Finding(subject, problem) for subject, problem in found.items()])

    def put_all(self, watcher: str, found: Iterable[Finding], quiet: bool = False) -> None:
        """All that this watcher finds now. `quiet`: somebody else logs it."""
        if quiet:
            self._quiet.add(watcher)
        before = self._found.get(watcher, {})
        self._replace(watcher, conditions.step(before, found, self._clock(), time.time()))

    def leave(self, watcher: str) -> None:
        """It finds nothing any more, and nothing is kept of it: watchers come and go with nodes."""
        if watcher in self._found:
            self._replace(watcher, {})
            self._found.pop(watcher, None)
        self._quiet.discard(watcher)

    def drop(self, gone: Collection[str], but: Collection[str] = ()) -> None:
        """These nodes have gone: nothing is said of them any more, but by the watchers named."""
        for watcher, found in list(self._found.items()):
            left = {k: t for k, t in found.items() if conditions.node_of(k[1]) not in gone}
            if watcher not in but and len(left) < len(found):
                self._replace(watcher, left)

    def _replace(self, watcher: str, after: dict[Key, Alarm]) -> None:
        before = self._found.get(watcher, {})
        self._found[watcher] = after
        for key, old in before.items():
            if key not in after and self._logged.pop((watcher, key), None) is not None:
                code, subject, seen_by = key
                lasted = round(time.time() - old.since)
                _log.info(
                    "problem_over",
                    node=subject,
                    code=code.name,
                    after_seconds=lasted,
                    seen_by=seen_by or self._own,
                )
        self._settle()

    def pending(self, watcher: str) -> bool:
        """Whether something that it found waits to be confirmed."""
        return any(not t.shown for t in self._found.get(watcher, {}).values())

    def _settle(self) -> None:
        """What has lasted shows, roots are found, what is new is logged."""
        now = self._clock()
        flat: dict[Key, Alarm] = {}
        for found in self._found.values():
            flat |= {key: alarm for key, alarm in found.items() if key not in flat}
        shown = {key: t for key, t in conditions.show(flat, now).items() if t.shown}
        explained = conditions.explain(shown, self.head, now)
        for found in self._found.values():
            for key, t in list(found.items()):
                if key in explained:
                    one = explained[key]
                    found[key] = replace(t, shown=True, root=one.root, root_over=one.root_over)
        for watcher, found in self._found.items():
            if watcher not in self._quiet:
                for key, t in found.items():
                    if t.shown:
                        self._log_alarm(watcher, key, t)
        before = self._shown
        rows = [t.condition(self._own) for t in explained.values()]
        self._shown = tuple(sorted(rows, key=lambda c: c.explained_by is not None))
        self._wake_later(now)
        if before != self._shown:
            self._on_change()

    def _log_alarm(self, watcher: str, key: Key, t: Alarm) -> None:
        """Once as it shows; once more if it turns out to be a root after all."""
        logged = self._logged.get((watcher, key))
        if logged or (logged is False and t.root is not None):
            return
        self._logged[watcher, key] = t.root is None
        problem = t.finding.problem
        fields = {"node": t.finding.subject, "cause": problem.cause, "remedy": problem.remedy}
        if not problem.code.known:
            fields["code"] = problem.code.name
        if t.finding.seen_by:
            fields["seen_by"] = t.finding.seen_by
        if t.root is not None:
            _log.info(problem.code.event, **fields, explained_by=f"{t.root[0]} {t.root[1]}")
            return
        log = {"error": _log.error, "warning": _log.warning, "note": _log.info}[t.severity]
        log(problem.code.event, **fields)

    def _wake_later(self, now: float) -> None:
        """Have `_settle` called when the next one is to show, or is no longer explained."""
        if self._later is None:
            return
        every = [t for found in self._found.values() for t in found.values()]
        times = [t.due for t in every if t.due is not None]
        times += [t.root_over + conditions.LINGER_SECONDS for t in every if t.root_over is not None]
        at = max(min(times), now + 0.01) if times else None
        if at is not None and (self._woken_at is None or at < self._woken_at):
            self._woken_at = at
            self._later(at - now, self._wake)

    def _wake(self) -> None:
        self._woken_at = None
        self._settle()
