"""What the doctor finds: a row for each check, and the whole (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rayfwd import codes
from rayfwd.problems import Problem, printable

Result = Literal["pass", "warn", "fail", "skip"]
WORST_FIRST: tuple[Result, ...] = ("fail", "warn", "pass", "skip")

SCHEMA = 1
"""Raised when a key of the JSON changes its meaning or goes; new keys and checks may come."""

WORKER = (
    "config", "daemon", "keeper", "ssh", "host_key", "auth", "channel", "hub", "place",
    "direct", "ray", "versions", "ports", "listeners", "network", "limits", "clock", "names",
    "proxies", "link", "advertise", "advertise_self",
)  # fmt: skip
HEAD = (
    "config", "daemon", "keeper", "socket", "sshd", "dial", "meet", "ray", "ports", "listeners",
    "network", "limits", "clock", "names", "proxies", "link",
)  # fmt: skip
CLIENT = (
    "config", "listen", "ssh", "host_key", "auth", "channel", "hub", "names", "proxies", "link",
)  # fmt: skip
"""The checks of each role, in order."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one check went."""

    check: str
    result: Result
    said: str
    """What was seen, in a line; of a `skip`, why it was not looked at."""
    problem: Problem | None = None
    """Of a `warn` and a `fail`."""
    seen: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and names, for JSON."""

    def to_wire(self) -> dict[str, Any]:
        problem = self.problem
        return {
            "check": self.check,
            "result": self.result,
            "said": self.said,
            "code": None if problem is None else problem.code.name,
            "remedy": None if problem is None else problem.remedy,
            "seen": dict(self.seen),
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of `to_wire`, of another process's own making."""
        problem = None
        if data["code"] is not None:
            problem = codes.named(data["code"]).problem(data["said"], data["remedy"])
        return cls(data["check"], data["result"], data["said"], problem, data["seen"])


def passed(check: str, said: str, **seen: Any) -> Row:
    return Row(check, "pass", printable(said), seen=seen)


def skipped(check: str, why: str) -> Row:
    return Row(check, "skip", why)


def warned(check: str, problem: Problem, **seen: Any) -> Row:
    return Row(check, "warn", problem.cause, problem, seen)


def failed(check: str, problem: Problem, **seen: Any) -> Row:
    return Row(check, "fail", problem.cause, problem, seen)


def worst(rows: Iterable[Row]) -> Result:
    """`fail`, `warn` or `pass`: what was skipped is no fault."""
    found = {row.result for row in rows}
    return next((result for result in WORST_FIRST[:2] if result in found), "pass")


def summary(rows: Sequence[Row]) -> str:
    """`12 pass, 1 fails, 3 skipped`."""
    words = {"pass": "pass", "warn": "warn", "fail": "fail", "skip": "skipped"}
    counts = {result: sum(row.result == result for row in rows) for result in words}
    return ", ".join(f"{n} {words[result]}" for result, n in counts.items() if n)


def document(
    role: str | None, name: str | None, version: str, rows: Sequence[Row]
) -> dict[str, Any]:
    """The whole of `rayfwd doctor --json`."""
    return {
        "schema": SCHEMA,
        "version": version,
        "role": role,
        "name": name,
        "result": worst(rows),
        "checks": [row.to_wire() for row in rows],
    }
