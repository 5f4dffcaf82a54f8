"""Gives back the names of nodes that were away for long, and says when there is little room left.

The head's. An ephemeral node's is given back when its session ends; here, where that was while no
head ran. Who was here last, and when, is kept in the roster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from rayfwd import codes
from rayfwd.daemon.node import Node
from rayfwd.hub.roster import Roster
from rayfwd.problems import Problem, ProblemError
from rayfwd.system import setting
from rayfwd.system.coalesce import end_of_pause

NAMES_INTERVAL = 60.0
"""Seconds between two looks at whose names are to be given back."""
SEEN_INTERVAL = 3600.0
"""Seconds between two notes of who is here, at most; a tenth of `hub.forget_after` if shorter."""
RETURN_SECONDS = 600.0
"""Seconds from the head's start in which no name is given back: whoever was here has to return."""
ROOM_INTERVAL = 1.0
"""Seconds between two looks at how much room is left, while nodes come and go."""
ROOM_SAID = 5
"""Further workers for which there is to be room; where there is less, it is said."""


class Names:
    """One task, `run`, looks once a minute, and at the room soon after a change."""

    def __init__(
        self,
        node: Node,
        roster: Roster,
        give_back: Callable[[str], None],
        here: Callable[[], set[str]],
    ) -> None:
        """`here`: who has a link; `give_back` is called for each who was away for long."""
        self._node = node
        self._roster = roster
        self._give_back = give_back
        self._here = here
        self._changed = asyncio.Event()

    def plan_changed(self) -> None:
        """A node has come or gone for good: there is room for others than before."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        now = asyncio.get_running_loop().time
        began = noted = now()
        self._note_seen()
        while True:
            await self._look_for_room_until(end_of_pause(NAMES_INTERVAL))
            limit = self._node.config.hub.forget_after
            if now() - noted >= min(SEEN_INTERVAL, limit / 10) or self._roster.has_new():
                noted = now()
                self._note_seen()
            if now() - began >= RETURN_SECONDS:
                self._give_back_names(limit)

    def _give_back_names(self, limit: float) -> None:
        here = self._here()
        gone = [*self._roster.away_for(limit, time.time()), *self._roster.for_a_while()]
        for name in dict.fromkeys(gone):
            if name not in here:
                self._give_back(name)

    async def _look_for_room_until(self, due: float) -> None:
        """Now, and soon after each change; many may come together."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(due):
                while True:
                    self._changed.clear()
                    self._look_for_room()
                    await asyncio.sleep(ROOM_INTERVAL)
                    await self._changed.wait()

    def _note_seen(self) -> None:
        with suppress(ProblemError):  # whoever joins next is told of it
            self._roster.note_seen(self._here(), time.time())

    def _more_room(self, full: Literal["plan", "files"]) -> str:
        ports = f"lower {setting.theirs('ray.worker_ports')} of workers"
        if full == "files":
            limit = "raise the head's limit (LimitNOFILE= of the service, or `ulimit -n`)"
            return f"{limit}, or {ports}"
        later, lower = setting.key("hub.forget_after"), setting.key("hub.port_base")
        return f"shorten {later}, or lower {lower}, or {ports}"

    def _look_for_room(self) -> None:
        left, full = self._roster.room(ROOM_SAID)
        found: dict[str, Problem] = {}
        if left < ROOM_SAID:
            more = {0: "no more worker", 1: "only 1 more worker"}.get(
                left, f"only {left} more workers"
            )
            what = "file descriptors" if full == "files" else "addresses and ports"
            found[self._node.config.name] = codes.PLAN_NEARLY_FULL.problem(
                f"there are {what} for {more} as large as the largest",
                "run `rayfwd forget --keep-token NAME` for nodes that are gone for good, or "
                + self._more_room(full),
            )
        self._node.board.put("names", found)
