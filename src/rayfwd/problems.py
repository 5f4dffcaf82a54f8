"""Something wrong, with a name, a cause and a remedy: what logs, status and refusals all carry.

What is known of each name is in `codes.py`.

A cause may quote what another machine has said before anybody knows who that is. So a problem
holds no control characters: whoever prints one, on a terminal or in a log, need not think of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NewType

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first. An error: something that was to work does not. A warning: it works, and may soon
not. A note: it passes by itself, or is as somebody wanted it."""

Stage = Literal["ssh", "host_key", "auth", "channel", "hub"]
"""How far a machine got on its way to the hub."""

EventName = NewType("EventName", str)
"""That of an event of the log which is named by a code; the others are in `system/eventlog.py`."""


class Group(Enum):
    """Codes that are causes of the same things."""

    LINK_FAULT = "what keeps a node's link from standing"
    LINK_GONE = "that a node's link does not stand"
    RAY = "what keeps a node's Ray from running"
    PORTS = "what keeps a node's Ray from being reached though it runs"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Code:
    """The name of a fault, and all that is known of every fault of this name.

    There is one object of a name (`codes.py`), and it equals nothing else: the type checker finds
    a comparison with a text. A name of another version's is an error that shows at once.
    """

    name: str
    """Snake case; also its heading in docs/conditions.md."""
    severity: Severity = "error"
    group: Group | None = None
    for_seconds: float = 0.0
    """How long it must last before it shows."""
    min_samples: int = 1
    """How often in a row its watcher must have found it before it shows."""
    caused_by: tuple[Code | Group, ...] = ()
    """What explains it where the same node has that, or the head."""
    heads_explains: bool = False
    """The same fault of the head explains another node's."""
    counted: bool = True
    """Listed in the status and counted in the metrics; False: only ever an answer to a command or
    to another node, or what ends the daemon."""
    both_ends: bool = False
    """Both ends of a link see it for themselves: neither tells the other."""
    untold: bool = False
    """No other node is told of it."""
    passing: bool = False
    """A refusal after which the other side goes on by itself, or which no worker of ours gets."""
    new_session: bool = False
    """A refusal after which the worker begins another session."""
    breach: bool = False
    """The other side sent what docs/protocol.md does not allow."""
    stage: Stage = "hub"
    """Where on the way to the hub it is met."""
    before_dialling: bool = False
    """It is met before anything was dialled."""
    check: Literal["advertise", "advertise_self", ""] = ""
    """The check of `rayfwd doctor` that fails by it, where the daemon has looked already."""
    lasting: bool = False
    """Waiting does not mend it: it ends a client whose link has not stood yet."""
    another_way: bool = False
    """The hub's socket cannot be opened; `rayfwd attach` on the head may find or reach it."""
    daemon_away: bool = False
    """What a restart of the daemon looks like to who asks it."""
    known: bool = True
    """False: it is another version's, or made up by whoever said it."""

    @property
    def event(self) -> EventName:
        """Under which it is logged. Names of events are few: what another says is none of them."""
        return EventName(self.name if self.known else "condition")

    def problem(self, cause: str, remedy: str) -> Problem:
        """One of this name; `cause` and `remedy` as those of `Problem`."""
        return Problem(self, cause, remedy)

    def error(self, cause: str, remedy: str) -> ProblemError:
        """The same, to be raised."""
        return ProblemError(Problem(self, cause, remedy))

    def may_follow_from(self, other: Code) -> bool:
        """Whether `other` explains it, where the same node has it, or the head."""
        return other in self.caused_by or other.group in self.caused_by

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Code({self.name})"


def printable(text: str) -> str:
    """`text` with what moves a cursor, writes elsewhere or turns the direction of reading shown as
    its escape (`\\x1b`); a line's end as well, as a line of its own could be anything's."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault that has a name.

    `cause` says what was seen, with the thing and the value; `remedy` says what to do.
    """

    code: Code
    cause: str
    remedy: str

    def __post_init__(self) -> None:
        for name in ("cause", "remedy"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def to_wire(self) -> dict[str, Any]:
        return {"code": self.code.name, "cause": self.cause, "remedy": self.remedy}

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}"


class ProblemError(Exception):
    """Carries a `Problem` to whoever can say it and wait for it to pass."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem
