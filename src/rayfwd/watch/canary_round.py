"""What a canary brought back, as it is kept and shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayfwd.problems import Problem
from rayfwd.wire import fields_from_wire, fields_to_wire


@dataclass(frozen=True, slots=True)
class StageResult:
    """How one stage went on one node."""

    ok: bool
    seconds: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class NodeResult:
    """How it went on one node."""

    name: str
    address: str
    ok: bool
    stages: Mapping[str, StageResult]
    """`task`, `to` (1 MB to the node) and `from`; one that was not reached is absent."""
    problem: Problem | None
    judged: bool
    """False: it failed while its link or its Ray was down, which is not the canary's to judge."""


@dataclass(frozen=True, slots=True)
class Round:
    """One canary."""

    began: float
    """Seconds since the epoch."""
    seconds: float
    """How long all of it took."""
    nodes: tuple[NodeResult, ...]
    problem: Problem | None
    """What kept the canary itself from its work."""
    cost: Mapping[str, float]
    """What it took: CPU seconds and bytes of memory, by name."""

    @property
    def ok(self) -> bool:
        """It could be sent, and every node passed: one that could not be judged has not."""
        return self.problem is None and all(node.ok for node in self.nodes)

    def to_wire(self) -> dict[str, Any]:
        return {**fields_to_wire(self), "ok": self.ok}

    @classmethod
    def from_wire(cls, data: Any) -> Round:
        """The inverse of `to_wire`. Raises ValueError."""
        return fields_from_wire(cls, data, "canary")
