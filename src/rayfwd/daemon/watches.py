"""The watches on a node's links and on its machine: what they find goes to the board."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping

from rayfwd.config import Config
from rayfwd.ray.supervisor import RaySupervisor
from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.turns import gathered
from rayfwd.transport.listeners import Listeners
from rayfwd.watch import links, machine_watch
from rayfwd.watch.board import Board
from rayfwd.watch.cluster_view import ClusterView
from rayfwd.watch.conditions import Finding
from rayfwd.watch.links import LinkSeen

LINKS_BESIDE = 100
"""Links from which on they are judged beside the loop: a thousand would keep it for long."""
LINKS_LATE = 60.0
"""Seconds that a look at the links may be late before the watchdog takes it for dead."""


class LinkWatch:
    """Looks at the links that are up, which `links_seen` gives with their workers' names, each as
    it is when it is asked for."""

    def __init__(
        self, board: Board, links_seen: Callable[[], Iterator[tuple[str, LinkSeen]]]
    ) -> None:
        self.heartbeat = Heartbeat("links")
        self._board = board
        self._links_seen = links_seen

    async def run(self) -> None:
        """Until cancelled."""
        rules = links.LinkRules()
        loop = asyncio.get_running_loop()
        while True:
            self.heartbeat.beat(links.LINKS_INTERVAL + LINKS_LATE)
            seen, now = await gathered(self._links_seen()), loop.time()
            if len(seen) < LINKS_BESIDE:
                found = rules.sample(seen, now)
            else:
                found = await asyncio.to_thread(rules.sample, seen, now)
            self._board.put_all("links", found)
            await sleep_coalesced(links.LINKS_INTERVAL)


class MachineWatch:
    """Looks at the machine: its descriptors, ports, memory and the space where Ray writes."""

    def __init__(
        self,
        config: Config,
        view: Callable[[], ClusterView],
        board: Board,
        listeners: Listeners,
        ray: RaySupervisor,
    ) -> None:
        self._name = config.name
        self._temp_dir = temp_dir(config.ray.env, config.ray.extra_args)
        self._store = config.ray.object_store_memory
        self._view = view
        self._board = board
        self._listeners = listeners
        self._ray = ray

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            view = self._view()
            seen = await asyncio.to_thread(
                machine_watch.sample,
                self._listeners.wanted,
                view.nodes,
                view.own,
                [self._ray.session_dir or self._temp_dir],
                self._ray.now.state == "up",
                self._store,
            )
            found = [Finding(self._name, problem) for problem in machine_watch.judge(seen)]
            self._board.put_all("machine", found)
            await sleep_coalesced(machine_watch.MACHINE_INTERVAL if view.nodes else 1.0)


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
