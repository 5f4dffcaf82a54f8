"""Looks at the cluster from the head every so often, and applies the rules to what it saw.

`ClusterWatch` reads what `ray status` would print, and the node table; `DashboardWatch` asks the
dashboard for no more than an answer, and more often.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import RayConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import nodes as node_table
from rayfwd.ray import status_text
from rayfwd.ray.cluster_report import ClusterReport, Told
from rayfwd.ray.install import find
from rayfwd.ray.supervisor import RaySupervisor
from rayfwd.ray.token import read_token
from rayfwd.system.coalesce import end_of_pause, sleep_coalesced
from rayfwd.system.logs import get_logger
from rayfwd.transport.endpoints import Endpoint, EndpointOf
from rayfwd.watch import rules
from rayfwd.watch.board import Board
from rayfwd.watch.cluster_view import ClusterView
from rayfwd.watch.conditions import Finding
from rayfwd.watch.interruptions import Interruptions

SOON_INTERVAL = 5.0
"""Seconds until the next look while something is being confirmed, or could not be seen."""

SETTLE_SECONDS = 6.0
"""Seconds after a change in which Ray's totals, renewed every 5 s, have taken it in."""

TABLE_INTERVAL = 1.0
"""Seconds between two looks at the node table alone, while nodes come or go."""

FEW_NODES = 100
"""Nodes up to which the table is looked at, and told to all, at each change."""

SOON_RETRIES = 3
"""Looks that fail one after another and are soon repeated: each may cost a second of CPU."""

WATCHER = "cluster"
TOTALS = "totals"
"""As the watcher of the totals' age, which is known without the node table."""
LOOKING = "cluster look"
"""As the watcher that finds what kept from looking."""

_log = get_logger(__name__)


class ClusterWatchOwner(Protocol):
    """The head, as far as the watch on its cluster asks it."""

    @property
    def view(self) -> ClusterView:
        """The cluster as the roster has it."""

    def up(self) -> list[NodePlan]:
        """The nodes whose own rayfwd has Ray up, with a link that is up."""

    def declared(self) -> Mapping[str, Mapping[str, float]]:
        """What the configurations of the nodes say that they bring, by address."""

    def reported(self, report: ClusterReport, told: Told) -> None:
        """What was seen, and what others are told of it; after every look."""


class ClusterWatch:
    """Of a head. One task, `run`, owns it. `interruptions` knows when nodes went."""

    def __init__(
        self,
        ray: RayConfig,
        head: NodePlan,
        supervisor: RaySupervisor,
        board: Board,
        interruptions: Interruptions,
        owner: ClusterWatchOwner,
        endpoint: EndpointOf,
    ) -> None:
        self._endpoint = endpoint
        self._ray = ray
        self._head = head
        self._supervisor = supervisor
        self._board = board
        self._interruptions = interruptions
        self._owner = owner
        self._totals_told: dict[str, float] | None = None
        self._last: ClusterReport | None = None
        """What was reported last."""
        self._soon = asyncio.Event()

    def take_config(self, ray: RayConfig) -> None:
        """From the next look on; only its interval may differ."""
        self._ray = ray

    def scan_soon(self) -> None:
        """A node's Ray came up or went: the node table is read at once, and the next look need not
        wait its whole turn."""
        self._soon.set()

    async def run(self) -> None:
        """Until cancelled. Looks only while the head's own Ray is up."""
        failed = 0
        while True:
            began = asyncio.get_running_loop().time()
            pending = False
            if self._supervisor.now.state == "up":
                try:
                    pending = await self._scan()
                    failed = 0
                    self._board.put(LOOKING, {})
                except ProblemError as exc:
                    failed += 1
                    pending = failed <= SOON_RETRIES
                    self._board.put(LOOKING, {self._head.name: exc.problem})
            else:
                failed = 0
                for watcher in (LOOKING, WATCHER, TOTALS):
                    self._board.put(watcher, {})
            interval = min(SOON_INTERVAL, self._ray.status_interval) if pending else None
            wait = interval or (
                self._ray.status_interval if self._supervisor.now.state == "up" else 1.0
            )
            with suppress(TimeoutError):
                took = asyncio.get_running_loop().time() - began
                async with asyncio.timeout_at(end_of_pause(max(1.0, wait - took))):
                    await self._soon.wait()
                    await self._settle()
            self._soon.clear()

    async def _settle(self) -> None:
        """While the totals take a change in: who is there, at this change and at the next ones."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                while len(self._owner.view.nodes) <= FEW_NODES:
                    self._soon.clear()
                    with suppress(ProblemError):  # the look that follows says why
                        await self._look_at_table()
                    await asyncio.sleep(TABLE_INTERVAL)
                    await self._soon.wait()
                await asyncio.Event().wait()

    async def _look_at_table(self) -> None:
        """Tell who is there, with the totals as they were. Raises ProblemError."""
        if self._last is None or self._supervisor.now.state != "up":
            return
        token = await asyncio.to_thread(read_token, self._supervisor.environment or {})
        seen = tuple(await node_table.fetch(self._dashboard, token))
        if seen != self._last.nodes:
            report = replace(self._last, nodes=seen)
            self._report(report, await asyncio.to_thread(report.message))

    def _report(self, report: ClusterReport, told: Told) -> None:
        self._last = report
        self._owner.reported(report, told)

    async def _scan(self) -> bool:
        """One look. Returns whether a fault waits to be confirmed."""
        env = self._supervisor.environment or {}
        token = await asyncio.to_thread(read_token, env)
        status = await self._totals(env, token)
        self._board.put_all(TOTALS, rules.stale_totals(status, self._head.name, time.time()))
        # The table after the totals: what joins in between is confirmed by the next look.
        seen = await node_table.fetch(self._dashboard, token)
        view, declared = self._owner.view, self._owner.declared()
        plans = {plan.address: plan for plan in view.nodes}
        names = {address: plan.name for address, plan in plans.items()}
        now = time.time()
        twice = rules.one_address_twice(seen, names, self._interruptions, view.gives_up_after, now)
        up = self._owner.up()
        report = ClusterReport(as_of=status.as_of, totals=status.totals, nodes=tuple(seen))

        def judge() -> tuple[list[Finding], Told]:
            """Beside the loop: of a thousand nodes it would keep it for long."""
            found = [
                *rules.fewer_than_declared(seen, plans, declared),
                *twice,
                *rules.not_listed(seen, up),
                *rules.nodes_without_resources(status, seen, names, declared, now),
            ]
            return found, report.message()

        found, told = await asyncio.to_thread(judge)
        self._log_totals(status, seen)
        self._board.put_all(WATCHER, found)
        self._report(report, told)
        waits = status.as_of is None or rules.ageing(status, now)
        return waits or self._board.pending(WATCHER) or self._board.pending(TOTALS)

    @property
    def _dashboard(self) -> Endpoint:
        """Raises ProblemError."""
        return self._endpoint(self._head, self._head.services["dashboard"])

    async def _totals(self, env: Mapping[str, str], token: str | None) -> status_text.RayStatus:
        """By the dashboard, or where that does not say by the command. Raises ProblemError."""
        status = await status_text.fetch(self._dashboard, token)
        if status is not None:
            return status
        install = await find(self._ray.command, env)
        gcs = self._endpoint(self._head, self._head.services["gcs"])
        return await status_text.ask(install.command, str(gcs), env)

    def _log_totals(
        self, status: status_text.RayStatus, seen: Iterable[node_table.NodeSeen]
    ) -> None:
        totals = {resource: total for resource, (_, total) in status.totals.items()}
        # Free memory moves a little at every start; what counts is which there is and how many.
        counted = {r: t for r, t in totals.items() if "memory" not in r}
        if status.as_of is not None and counted != self._totals_told:
            self._totals_told = counted
            alive = sum(node.state == "ALIVE" for node in seen)
            _log.info("ray_totals", totals=totals, nodes_alive=alive)


class DashboardWatch:
    """Of a head. `run` asks the dashboard for its version until it is cancelled."""

    INTERVAL = 8.0
    """Seconds between two questions; one costs the dashboard a millisecond."""
    AGAIN = 3.0
    """Seconds until the next one after a failure."""
    ANSWER_TIMEOUT = 6.0
    """Seconds for an answer."""
    GRACE = 60.0
    """Seconds after Ray came up in which a dashboard that never answered may still be starting."""

    def __init__(
        self, head: NodePlan, supervisor: RaySupervisor, board: Board, endpoint: EndpointOf
    ) -> None:
        self._endpoint = endpoint
        self._head = head
        self._supervisor = supervisor
        self._board = board
        self._answered = 0.0
        """Since when Ray was up as it answered last."""

    async def run(self) -> None:
        while True:
            why = await self._scan()
            self._board.put(
                "dashboard", {} if why is None else {self._head.name: self._problem(why)}
            )
            await sleep_coalesced(self.INTERVAL if why is None else self.AGAIN)

    async def _scan(self) -> str | None:
        """What is wrong with it; None: nothing, or it is not to be expected now."""
        before = self._supervisor.now
        if before.state != "up":
            return None
        try:
            dashboard = self._endpoint(self._head, self._head.services["dashboard"])
        except ProblemError as exc:
            why: str | None = exc.problem.cause
        else:
            why = await node_table.no_answer(dashboard, self.ANSWER_TIMEOUT)
        if why is None:
            self._answered = before.since
        elif self._answered != before.since and time.time() - before.since < self.GRACE:
            return None
        now = self._supervisor.now
        return why if (now.state, now.since) == (before.state, before.since) else None

    def _problem(self, why: str) -> Problem:
        where = f"{self._head.address}:{self._head.services['dashboard']}"
        return codes.RAY_DASHBOARD_ABSENT.problem(
            f"Ray's dashboard does not answer at http://{where}: {why}",
            "read dashboard.log and dashboard.err in Ray's session directory on the head. Without "
            "the dashboard there are no job submissions, no state API and no node table. Install "
            'it with `pip install "ray[default]"`; it comes back with a restart of the head\'s Ray',
        )
