"""Conditions: when what a watcher finds shows, and what explains it.

Pure: time is passed in. `step` follows what a watcher finds over time, `explain` finds the roots;
`board.py` keeps, logs and times them. docs/conditions.md has a section for every code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayfwd import codes
from rayfwd.problems import SEVERITIES, Code, Problem, Severity

LINGER = 30.0
"""Seconds after a root is over in which what it explained is still its doing: watchers look every
so often, and Ray takes a while to come back."""


def node_of(subject: str) -> str:
    """The node of a subject: `NODE`, or `NODE/THING` for a lane or a forward of it."""
    return subject.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Seen:
    """Something wrong, as a watcher found it."""

    subject: str
    """`NODE`, or `NODE/THING`."""
    problem: Problem
    seen_by: str = ""
    """The node that found it; empty: this one."""
    severity: Severity | None = None
    """Where it is another than its code's."""
    explains: bool = True
    """False: it is no root of others (another machine that takes a node's name, say)."""
    confirmed: bool = False
    """It has lasted as long as its code asks for: another node's board shows it."""

    @property
    def key(self) -> Key:
        return (self.problem.code, self.subject, self.seen_by)


Key = tuple[Code, str, str]
"""Code, subject, and who found it."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Something wrong, as it is shown. `since` is in seconds since the epoch."""

    code: Code
    severity: Severity
    subject: str
    since: float
    cause: str
    remedy: str
    seen_by: str
    explained_by: tuple[Code, str] | None = None
    """Code and subject of its root; None: it is one itself."""

    def to_wire(self) -> dict[str, Any]:
        root = self.explained_by
        return {
            "code": self.code.name,
            "severity": self.severity,
            "subject": self.subject,
            "since": round(self.since, 1),
            "cause": self.cause,
            "remedy": self.remedy,
            "seen_by": self.seen_by,
            "explained_by": None if root is None else {"code": root[0].name, "subject": root[1]},
        }


@dataclass(frozen=True, slots=True)
class Tracked:
    """What a watcher finds, as it is followed. Times but `since` are on the clock of `step`."""

    seen: Seen
    first: float
    since: float
    """Seconds since the epoch, of the first look that showed it."""
    looks: int = 1
    shown: bool = False
    root: tuple[Code, str] | None = None
    root_over: float | None = None
    """When `root` was found to have ended; None: it has not."""

    @property
    def severity(self) -> Severity:
        return self.seen.severity or self.seen.problem.code.severity

    @property
    def due(self) -> float | None:
        """When it is to show, if it lasts; None: it shows, or must be found again first."""
        if self.seen.confirmed and not self.shown:
            return self.first
        code = self.seen.problem.code
        return (
            None if self.shown or self.looks < code.min_samples else self.first + code.for_seconds
        )

    def condition(self, own: str) -> Condition:
        problem = self.seen.problem
        return Condition(
            problem.code,
            self.severity,
            self.seen.subject,
            self.since,
            problem.cause,
            problem.remedy,
            self.seen.seen_by or own,
            self.root,
        )


def step(
    before: Mapping[Key, Tracked], found: Iterable[Seen], now: float, wall: float
) -> dict[Key, Tracked]:
    """Follow what one watcher finds through one more look; what it no longer finds is left out."""
    after: dict[Key, Tracked] = {}
    for seen in found:
        old = before.get(seen.key)
        if old is None:
            after[seen.key] = Tracked(seen, now, wall)
        else:
            after[seen.key] = replace(old, seen=seen, looks=old.looks + 1)
    return after


def show(tracked: Mapping[Key, Tracked], now: float) -> dict[Key, Tracked]:
    """Those that have lasted long enough show from now on."""
    return {
        key: replace(t, shown=True) if t.due is not None and now >= t.due else t
        for key, t in tracked.items()
    }


def explain(tracked: Mapping[Key, Tracked], head: str, now: float) -> dict[Key, Tracked]:
    """Find the root of each, as far as another that is there explains it.

    A root is of the same node, or the head's. Nobody's word on another node explains anything.
    """
    there: dict[str, dict[Code, Tracked]] = {}
    for t in sorted(tracked.values(), key=_rank, reverse=True):
        if t.seen.explains and _speaks_for_itself(t.seen, head):
            there.setdefault(node_of(t.seen.subject), {})[t.seen.problem.code] = t

    def root_of(one: Tracked, above: frozenset[Key]) -> Tracked | None:
        code, node = one.seen.problem.code, node_of(one.seen.subject)
        causes = [
            other
            for of in {node, head}
            for by, other in there.get(of, {}).items()
            if (code.may_follow_from(by) if by != code else code.heads_explains and of != node)
            and other.seen.key not in above
        ]
        if not causes:
            return None
        first = min(causes, key=_rank)
        return root_of(first, above | {first.seen.key}) or first

    after: dict[Key, Tracked] = {}
    for key, one in tracked.items():
        root = root_of(one, frozenset({key}))
        if root is not None:
            told = (root.seen.problem.code, root.seen.subject)
            after[key] = replace(one, root=told, root_over=None)
        elif one.root is None:
            after[key] = one
        elif one.root_over is None:
            after[key] = replace(one, root_over=now)
        elif now - one.root_over >= LINGER:
            after[key] = replace(one, root=None, root_over=None)
        else:
            after[key] = one
    return after


def _rank(one: Tracked) -> tuple[int, float, tuple[str, str, str]]:
    """The worst first, of these the oldest."""
    return (
        SEVERITIES.index(one.severity),
        one.first,
        (one.seen.problem.code.name, *one.seen.key[1:]),
    )


def _speaks_for_itself(seen: Seen, head: str) -> bool:
    return seen.seen_by in {"", head, node_of(seen.subject)}


def worst(conditions: Sequence[Condition]) -> Condition | None:
    """The worst root; of several the oldest."""
    roots = [c for c in conditions if c.explained_by is None]
    return min(roots, key=lambda c: (SEVERITIES.index(c.severity), c.since), default=None)


MOST_TOLD = 50
"""Conditions that another node is told of."""
LONGEST = 2000
"""Characters of a text in what is told."""


def message(conditions: Iterable[Condition]) -> dict[str, Any]:
    """What one node tells another of, as a control message; the worst of what is too much."""
    told = sorted(conditions, key=lambda c: (SEVERITIES.index(c.severity), c.since))[:MOST_TOLD]
    keys = ("code", "severity", "subject", "cause", "remedy", "seen_by")
    return {
        "type": "conditions",
        "conditions": [
            {key: value[:LONGEST] for key, value in c.to_wire().items() if key in keys}
            for c in told
        ],
    }


def from_message(message: Mapping[str, Any], seen_by: str | None) -> list[Seen]:
    """What another node told of; `seen_by` where it may speak for itself alone.

    Of what is its root the node here judges by itself. Raises ValueError.
    """
    try:
        return [
            Seen(
                _text(row["subject"], 200),
                _code(row["code"]).problem(_text(row["cause"]), _text(row["remedy"])),
                seen_by or _text(row["seen_by"], 200),
                row["severity"] if row["severity"] in SEVERITIES else None,
                confirmed=True,
            )
            for row in list(message["conditions"])[:MOST_TOLD]
        ]
    except (KeyError, TypeError) as exc:
        raise ValueError(f"conditions: {exc!r}") from exc


def _code(value: Any) -> Code:
    text = _text(value, 64)
    if not text.isidentifier():
        raise ValueError(f"conditions: {text!r} is no code")
    return codes.named(text)


def _text(value: Any, most: int = LONGEST) -> str:
    if not isinstance(value, str):
        raise ValueError("conditions: a text is none")
    return value[:most]
