"""A connection on which there was no hub, kept for the next attempt.

While the hub is away and sshd is not, each attempt would be a login, once a second while streams
wait: more than `ufw limit` and the like let through, and a process each on the head. On a
connection that stands, an attempt is a channel.
"""

from __future__ import annotations

from rayfwd import codes
from rayfwd.problems import Problem
from rayfwd.transport.carrier import Connection

KEPT_SECONDS = 60.0
"""From its login: what only a new login brings (a group, another line in authorized_keys) is
waited for no longer than this."""


class Kept:
    """Of one lane."""

    def __init__(self) -> None:
        self._connection: Connection | None = None
        self._until = 0.0

    def made(self, now: float) -> None:
        """A connection is new."""
        self._until = now + KEPT_SECONDS

    def offer(self, connection: Connection, problem: Problem, now: float) -> bool:
        """An attempt on it has failed so: whether it is kept. If not, it is to be ended."""
        if problem.code is not codes.HUB_ABSENT or now >= self._until:
            return False
        if not connection.takes_another:
            return False
        self._connection = connection
        return True

    def take(self) -> Connection | None:
        """The one that was kept, if it still stands."""
        connection, self._connection = self._connection, None
        return connection if connection is not None and connection.takes_another else None
