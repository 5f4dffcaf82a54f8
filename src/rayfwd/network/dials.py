"""Which ports besides the plan's are dialled between nodes, and which of these are refused: counted
by node and port, and a refusal is named once in a while.

"It hangs" and "connection refused" have a cause in the log then, on the side that dials and on the
one that is dialled.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Literal

from rayfwd.system import setting
from rayfwd.system.logs import get_logger
from rayfwd.system.seldom import Seldom

log = get_logger(__name__)

MOST_PLACES = 200
"""Ports that are counted by their own number; further ones are counted together, as port 0."""
TOLD_AGAIN = 600.0
"""Seconds after which the same refusal is named again."""
FURTHER = ("(others)", 0)
"""Where further ones are counted."""

Place = tuple[str, int]
"""A node's name, or an address that has none, and a port of it."""
Side = Literal["there", "here"]
"""Where the port is that was refused: on another node, or on this one, for the node that asked."""


def remedy(side: Side) -> str:
    """What to do about a port that was refused."""
    if side == "there":
        return (
            "check that its program runs there as Ray's user, listens on the node's address or "
            "on all addresses, and that network.deny there does not name the port"
        )
    return (
        "nothing if this is intended; otherwise let the program listen as Ray's user, on this "
        f"node's address or on all addresses, or name the port in {setting.key('expose')}"
    )


class Dials:
    """Of one node, since its daemon began."""

    def __init__(self) -> None:
        self.made: Counter[Place] = Counter()
        """Connections to ports of other nodes that are not in the plan."""
        self.refused: dict[Side, Counter[Place]] = {"there": Counter(), "here": Counter()}
        self._refusal_logged = Seldom(TOLD_AGAIN, MOST_PLACES)

    def dialled(self, node: str, port: int) -> None:
        """A program here dials a port that is not in the plan."""
        _count(self.made, (node, port), 1)

    def refuse(self, side: Side, node: str, port: int, cause: str, count: int = 1) -> None:
        """So many connections were refused."""
        place = (node, port)
        _count(self.refused[side], place, count)
        if not self._refusal_logged.due(asyncio.get_running_loop().time(), (side, place)):
            return
        log.warning(
            "dial_refused",
            side=side,
            node=node,
            port=port,
            count=self.refused[side][place],
            cause=cause,
            remedy=remedy(side),
        )


def _count(counter: Counter[Place], place: Place, more: int) -> None:
    if place not in counter and len(counter) >= MOST_PLACES:
        place = FURTHER
    counter[place] += more
