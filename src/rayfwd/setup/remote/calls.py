"""What the head asks of a machine that is brought in, and what that answers: each as JSON
(`wire.py`), to and from the functions of `there.py`.

Who looks at a machine or leaves one may meet an earlier version there, so what `Known` and
`TakenAway` have does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayfwd.problems import Problem


@dataclass(frozen=True, slots=True)
class Known:
    """Which node a machine is by its own file, if other machines have the same home."""

    apart: bool = False
    """Others have it."""
    name: str | None = None
    """None: it is no node yet."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a machine has that its node needs."""

    ways: tuple[str, ...]
    """For each way that was asked for, why it does not lead to the head; empty: it does."""
    ray: str | None = None
    """Its command; None: there is none that works."""
    versions: tuple[str, ...] | None = None
    """Ray's, and its Python's."""
    ray_problem: Problem | None = None
    """Of the first command that did not work."""


@dataclass(frozen=True, slots=True)
class NodeRequest:
    """What a machine is to be set up as."""

    name: str
    """The node's."""
    ray: str
    """The command there."""
    service: bool
    """A service manager is to have the daemon."""
    head: str | None
    """As the machine dials it: user@host[:port]; None: the head dials."""
    host_key: str | None
    """The head's, as a line of known hosts."""
    attach: str
    """What is run on the head where its line in authorized_keys does not say."""
    more: Mapping[str, Any]
    """Further keys of its file."""
    elsewhere: tuple[str, ...] = ()
    """Names of nodes that are other machines."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Where a machine has what its daemon needs, and what was made for that."""

    changed: tuple[str, ...]
    """Files and directories that were created or written anew; its key is left out."""
    kept: tuple[str, ...]
    """What somebody had edited."""
    key: str | None
    """The public half of the machine's own; None: the head dials."""
    identity: str
    """The file of that key."""
    known_hosts: str
    socket: str
    """Where the daemon waits for a head that dials."""
    command: str
    """`rayfwd` there."""
    config: str
    user: str
    """Who runs the daemon."""
    service: bool
    """A service manager has the daemon."""


@dataclass(frozen=True, slots=True)
class Started:
    """What came of a start."""

    came: str
    """"runs": it ran before, with all that is new; or "started"."""
    how: str
    """Who keeps the daemon running, in words."""


@dataclass(frozen=True, slots=True)
class SelfReport:
    """What a machine's own daemon says of itself."""

    summary: str
    conditions: tuple[Problem, ...] = ()
    log: str = ""
    """The end of its log, where the daemon does not answer and nobody else has the log."""


@dataclass(frozen=True, slots=True)
class TakenAway:
    """What was undone on a machine."""

    steps: tuple[str, ...]
    """In words."""
    others: int
    """Machines with the same home that are nodes still."""
