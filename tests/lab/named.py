"""What tests ask of a condition: that it is named in time, with words that help, and is over.

Times are of the clock on the wall, which all machines of the lab share, and are what the daemons
themselves say: asking them costs more than the bounds leave on a busy computer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from tests.lab.daemon import Daemon

Row = dict[str, Any]

ASKING = 60.0
"""Seconds that `rayfwd status` may take to be asked, besides."""


def rows(status: Row) -> list[Row]:
    """All that is wrong by a status."""
    return list(status["conditions"])


def waited_for(status: Row) -> list[Row]:
    """What keeps the node from being ready."""
    return [row for row in rows(status) if row["blocks_ready"]]


def of(status: Row, code: str, subject: str) -> Row | None:
    """The condition of this code and subject, in a status; None: there is none."""
    found = [row for row in rows(status) if (row["code"], row["subject"]) == (code, subject)]
    assert len({row["seen_by"] for row in found}) == len(found)
    return found[0] if found else None


def named(
    daemons: Iterable[Daemon], code: str, subject: str, within: float, since: float
) -> list[Row]:
    """The condition as each daemon has it, `within` seconds after `since` (seconds since 1970).

    A node that another one has told of it has it since it was told, so that what had to be
    confirmed first is in its time.
    """
    found = []
    for daemon in daemons:
        left = max(1.0, since + within + ASKING - time.time())
        status = daemon.wait_status(lambda s: of(s, code, subject), left)
        row = of(status, code, subject)
        assert row is not None
        took = (row["since"] if "since" in row else logged(daemon, code, since)) - since
        assert took <= within, f"{daemon.machine.name}: {code} was named after {took:.1f} s"
        found.append(row)
    return found


def logged(daemon: Daemon, code: str, since: float) -> float:
    """When a daemon first logged it from then on."""
    event = daemon.wait_event(code, 10, where=lambda event: said_at(event) >= since - 0.1)
    return said_at(event)


def said_at(event: Row) -> float:
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def over(daemons: Iterable[Daemon], within: float, *codes: str, subject: str = "") -> None:
    """No daemon has any of these codes any more; without codes: nothing at all is wrong.

    `subject`: a node, where only its conditions and those of its lanes and listeners count.
    """
    deadline = time.time() + within + ASKING

    def left(status: Row) -> Sequence[Row]:
        return [
            row
            for row in rows(status)
            if (not codes or row["code"] in codes)
            and (not subject or row["subject"].partition("/")[0] == subject)
        ]

    for daemon in daemons:
        daemon.wait_status(lambda s: not left(s), max(1.0, deadline - time.time()))
