"""What a daemon of either role puts on its board: its own parts' problems, its links, its machine.

And what nodes tell each other of: a worker the head of what it found, the head every worker of all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from rayfwd import codes
from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.watch import conditions, links, machine
from rayfwd.watch.conditions import Seen, node_of

if TYPE_CHECKING:
    from rayfwd.daemon.runtime import Daemon

MOST_LISTENERS = 20
"""Listeners that have a condition of their own; all that are blocked are in the status."""

PATIENCE = 60.0
"""Seconds that a look at the links may be late before the watchdog takes it for dead."""

LINK = "link"
"""The watcher of the links, which says why a node is away when everybody else is silent on it."""


class Watches:
    """Belongs to the daemon, which runs `run_links` and `run_machine` as tasks."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.heartbeat = Heartbeat("links")
        self.told: dict[str, Any] | None = None
        """The last message to the others."""

    def put_own(self) -> None:
        """What the daemon's parts know themselves; most of them log it, too."""
        daemon = self._daemon
        name, board = daemon.config.name, daemon.board
        head = daemon.node_named("head")
        board.head = head.name if head is not None else ""
        board.put_all(LINK, daemon.link_conditions(), quiet=True)
        ray = daemon.ray.state
        wrong = [Seen(name, ray.problem)] if ray.problem and ray.phase != "up" else []
        board.put_all("ray", wrong, quiet=True)
        blocked = islice(daemon.listeners.blocked_at.items(), MOST_LISTENERS)
        wrong = [Seen(name, p) for p in daemon.listeners.problems]
        wrong += [Seen(f"{name}/{at}", p) for at, p in blocked]
        board.put_all("listeners", wrong, quiet=True)
        problem = daemon.metrics_problem
        board.put_all("metrics", [Seen(name, problem)] if problem else [], quiet=True)
        board.put_all("forwards", self._forwards())

    def _forwards(self) -> list[Seen]:
        daemon = self._daemon
        return [
            Seen(
                f"{daemon.config.name}/{forward.listen}",
                codes.FORWARD_TARGET_UNKNOWN.problem(
                    f"[[forward]] to = {forward.to}: no node {forward.target()[0]} is in the plan",
                    "correct the name; it opens by itself when the node joins",
                ),
            )
            for forward in (daemon.forwards() if daemon.nodes else ())
            if daemon.node_named(forward.target()[0]) is None
        ]

    async def run_links(self) -> None:
        """Until cancelled."""
        rules = links.LinkRules()
        loop = asyncio.get_running_loop()
        while True:
            self.heartbeat.beat(links.INTERVAL + PATIENCE)
            found = rules.look(self._daemon.links_seen(), loop.time())
            self._daemon.board.put_all("links", found)
            await sleep_coalesced(links.INTERVAL)

    async def run_machine(self) -> None:
        """Until cancelled."""
        daemon = self._daemon
        while True:
            seen = await asyncio.to_thread(
                machine.look,
                daemon.listeners.wanted,
                daemon.nodes,
                daemon.own,
                [
                    daemon.ray.session_dir
                    or temp_dir(daemon.config.ray.env, daemon.config.ray.extra_args)
                ],
                daemon.ray.state.phase == "up",
            )
            found = [Seen(daemon.config.name, problem) for problem in machine.judge(seen)]
            daemon.board.put_all("machine", found)
            await sleep_coalesced(machine.INTERVAL if daemon.nodes else 1.0)

    # -- between nodes --------------------------------------------------------

    def message(self, all_of_them: bool) -> dict[str, Any] | None:
        """What the others are told of; None: they know already."""
        own = self._daemon.config.name
        told = conditions.message(
            c
            for c in self._daemon.board.conditions
            if all_of_them or (c.seen_by == own and not c.code.both_ends and c.severity != "note")
        )
        if told == self.told:
            return None
        self.told = told
        return told

    def forget_told(self) -> None:
        """Somebody is there who has heard nothing yet."""
        self.told = None

    def heard(self, message: Mapping[str, Any], node: str, speaks_for_all: bool) -> None:
        """What another node tells. Raises ValueError."""
        own, board = self._daemon.config.name, self._daemon.board
        told = conditions.from_message(message, None if speaks_for_all else node)
        news = [
            seen
            for seen in told
            if seen.seen_by != own
            and not (node_of(seen.subject) == own and seen.problem.code.both_ends)
        ]
        # Of a hundred nodes each need not log what is wrong with the ninety-eight others.
        near = {own, board.head} if speaks_for_all else {node_of(seen.subject) for seen in news}
        self.put_told(node, [seen for seen in news if node_of(seen.subject) in near], quiet=False)
        self.put_told(
            node, [seen for seen in news if node_of(seen.subject) not in near], quiet=True
        )

    def put_told(self, node: str, found: list[Seen], quiet: bool) -> None:
        watcher = f"{'quiet' if quiet else 'told'}:{node}"
        self._daemon.board.put_all(watcher, found, quiet=quiet)

    def unheard(self, node: str) -> None:
        """It is away: what it told of counts no more."""
        self.put_told(node, [], quiet=False)
        self.put_told(node, [], quiet=True)


def temp_dir(env: Mapping[str, str], arguments: tuple[str, ...]) -> str:
    """Where Ray will have its sessions (`ray._private.utils.get_ray_temp_dir`)."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in {"--temp-dir", "--temp_dir"}:
            return value if equals else "".join(arguments[index + 1 : index + 2])
    for known in (env, os.environ):
        for variable in ("RAY_TMPDIR", "TMPDIR"):
            if known.get(variable):
                return f"{known[variable]}/ray"
    return "/tmp/ray"
