"""Something wrong, with a name, a cause and a remedy: what logs, status and refusals all carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault that has a name.

    `code` is a fixed short name (`hub_absent`, `ray_not_found`), also the name of its log event;
    `cause` says what was seen, with the thing and the value; `remedy` says what to do.
    """

    code: str
    cause: str
    remedy: str

    def to_wire(self) -> dict[str, Any]:
        return {"code": self.code, "cause": self.cause, "remedy": self.remedy}

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}"


class ProblemError(Exception):
    """Carries a `Problem` to whoever can say it and wait for it to pass."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem
