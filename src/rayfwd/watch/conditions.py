"""Conditions: when what a watcher finds shows, and what explains it.

A `Finding` is followed as an `Alarm`, and shows as a `Condition`. Pure: time is passed in. `step`
follows what a watcher finds over time, `explain` finds the roots;
`board.py` keeps, logs and times them. docs/conditions.md has a section for every code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayfwd import codes
from rayfwd.problems import SEVERITIES, Code, Problem, Severity
from rayfwd.session import messages
from rayfwd.session.messages import MOST_SENT

LINGER_SECONDS = 30.0
"""Seconds after a root is over in which what it explained is still its doing: watchers look every
so often, and Ray takes a while to come back."""


def node_of(subject: str) -> str:
    """The node of a subject: `NODE`, or `NODE/THING` for a lane or a forward of it."""
    return subject.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong, as a watcher found it."""

    subject: str
    """`NODE`, or `NODE/THING`."""
    problem: Problem
    seen_by: str = ""
    """The node that found it; empty: this one."""
    severity: Severity | None = None
    """Where it is another than its code's."""
    blocks_ready: bool = False
    """While it is there, this node is not ready. It shows at once."""
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
    """Something wrong, as it is shown."""

    problem: Problem
    severity: Severity
    subject: str
    since: float
    """Seconds since the epoch."""
    seen_by: str
    explained_by: str | None = None
    """The id of its root; None: it is one itself."""
    blocks_ready: bool = False
    """While it is there, the node that tells of it is not ready."""

    @property
    def code(self) -> Code:
        return self.problem.code

    @property
    def id(self) -> str:
        """Of one that is there, no other has the same."""
        return _id(self.code, self.subject, self.seen_by)

    def to_wire(self) -> dict[str, Any]:
        """For the status."""
        return {
            "id": self.id,
            "code": self.code.name,
            "severity": self.severity,
            "subject": self.subject,
            "since": round(self.since, 1),
            "cause": self.problem.cause,
            "remedy": self.problem.remedy,
            "seen_by": self.seen_by,
            "explained_by": self.explained_by,
            "blocks_ready": self.blocks_ready,
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Condition:
        """The inverse of `to_wire`. Raises ValueError, KeyError and TypeError."""
        root = data["explained_by"]
        return cls(
            codes.problem_from(data),
            _severity(data["severity"]) or "error",
            _text(data["subject"]),
            float(data["since"]),
            _text(data["seen_by"]),
            None if root is None else _text(root),
            data["blocks_ready"] is True,
        )


def _id(code: Code, subject: str, seen_by: str) -> str:
    return f"{code}:{subject}:{seen_by}"


@dataclass(frozen=True, slots=True)
class Alarm:
    """A finding as it is followed from look to look: pending until it is due, then shown.

    Times but `since` are on the clock of `step`.
    """

    finding: Finding
    began: float
    since: float
    """Seconds since the epoch, of the first look that found it."""
    samples: int = 1
    """Looks in a row that found it."""
    shown: bool = False
    root: Key | None = None
    root_over: float | None = None
    """When `root` was found to have ended; None: it has not."""

    @property
    def code(self) -> Code:
        return self.finding.problem.code

    @property
    def severity(self) -> Severity:
        return self.finding.severity or self.code.severity

    @property
    def due(self) -> float | None:
        """When it is to show, if it lasts; None: it shows, or must be found again first."""
        if self.shown:
            return None
        if self.finding.confirmed or self.finding.blocks_ready:
            return self.began
        pending = self.samples < self.code.min_samples
        return None if pending else self.began + self.code.for_seconds

    def condition(self, own: str) -> Condition:
        """As node `own` shows it."""
        root = self.root
        return Condition(
            self.finding.problem,
            self.severity,
            self.finding.subject,
            self.since,
            self.finding.seen_by or own,
            None if root is None else _id(root[0], root[1], root[2] or own),
            self.finding.blocks_ready,
        )


def step(
    before: Mapping[Key, Alarm], found: Iterable[Finding], now: float, wall: float
) -> dict[Key, Alarm]:
    """Follow what one watcher finds through one more look; what it no longer finds is left out."""
    after: dict[Key, Alarm] = {}
    for finding in found:
        old = before.get(finding.key)
        if old is None:
            after[finding.key] = Alarm(finding, now, wall)
        else:
            after[finding.key] = replace(old, finding=finding, samples=old.samples + 1)
    return after


def show(alarms: Mapping[Key, Alarm], now: float) -> dict[Key, Alarm]:
    """Those that have lasted long enough show from now on."""
    return {
        key: replace(alarm, shown=True) if alarm.due is not None and now >= alarm.due else alarm
        for key, alarm in alarms.items()
    }


def explain(alarms: Mapping[Key, Alarm], head: str, now: float) -> dict[Key, Alarm]:
    """Find the root of each, as far as another that is there explains it.

    A root is of the same node, or the head's. Nobody's word on another node explains anything.
    """
    there: dict[str, dict[Code, Alarm]] = {}
    for alarm in sorted(alarms.values(), key=_rank, reverse=True):
        if alarm.finding.explains and _speaks_for_itself(alarm.finding, head):
            there.setdefault(node_of(alarm.finding.subject), {})[alarm.code] = alarm

    def root_of(one: Alarm, above: frozenset[Key]) -> Alarm | None:
        code, node = one.code, node_of(one.finding.subject)
        causes = [
            other
            for of in {node, head}
            for by, other in there.get(of, {}).items()
            if (code.may_follow_from(by) if by != code else code.heads_explains and of != node)
            and other.finding.key not in above
        ]
        if not causes:
            return None
        first = min(causes, key=_rank)
        return root_of(first, above | {first.finding.key}) or first

    after: dict[Key, Alarm] = {}
    for key, one in alarms.items():
        root = root_of(one, frozenset({key}))
        if root is not None:
            after[key] = replace(one, root=root.finding.key, root_over=None)
        elif one.root is None:
            after[key] = one
        elif one.root_over is None:
            after[key] = replace(one, root_over=now)
        elif now - one.root_over >= LINGER_SECONDS:
            after[key] = replace(one, root=None, root_over=None)
        else:
            after[key] = one
    return after


def _rank(one: Alarm) -> tuple[int, float, tuple[str, str, str]]:
    """The worst first, of these the oldest."""
    code, subject, seen_by = one.finding.key
    return SEVERITIES.index(one.severity), one.began, (code.name, subject, seen_by)


def _speaks_for_itself(finding: Finding, head: str) -> bool:
    return finding.seen_by in {"", head, node_of(finding.subject)}


def worst(conditions: Sequence[Condition]) -> Condition | None:
    """The worst root; of several the oldest."""
    roots = [c for c in conditions if c.explained_by is None]
    return min(roots, key=lambda c: (SEVERITIES.index(c.severity), c.since), default=None)


def message(conditions: Iterable[Condition]) -> tuple[messages.Conditions, tuple[str, ...]]:
    """What one node tells another of, and what of it was left out: the worst is told."""
    rows = [
        messages.ConditionTold(
            c.code.name, c.severity, c.subject, c.problem.cause, c.problem.remedy, c.seen_by
        )
        for c in sorted(conditions, key=lambda c: (SEVERITIES.index(c.severity), c.since))
    ]
    sent = tuple(row.cut() for row in rows[:MOST_SENT])
    left_out = []
    if len(rows) > len(sent):
        left_out.append(f"all but the {MOST_SENT} worst")
    if any(row != short for row, short in zip(rows, sent, strict=False)):
        left_out.append("the ends of long texts")
    return messages.Conditions(sent), tuple(left_out)


def from_message(message: messages.Conditions, seen_by: str | None) -> list[Finding]:
    """What another node told of; `seen_by` where it may speak for itself alone.

    Of what is its root the node here judges by itself.
    """
    return [
        Finding(
            row.subject,
            codes.named(row.code).problem(row.cause, row.remedy),
            seen_by or row.seen_by,
            _severity(row.severity),
            confirmed=True,
        )
        for row in message.conditions
    ]


def _severity(value: Any) -> Severity | None:
    """None: another version's."""
    return next((known for known in SEVERITIES if known == value), None)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("conditions: a text is none")
    return value
