"""Looks at the cluster from the head every so often, applies the rules and tells what changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from rayfwd.config import RayConfig
from rayfwd.logs import get_logger
from rayfwd.plan import NodePlan
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import nodes as node_table
from rayfwd.ray import status as ray_status
from rayfwd.ray.cluster import ClusterReport, NodeProblem
from rayfwd.ray.install import find
from rayfwd.ray.supervisor import RaySupervisor
from rayfwd.ray.token import read_token
from rayfwd.watch import rules

SOON = 5.0
"""Seconds until the next look while something is being confirmed, or could not be seen."""

SETTLE = 6.0
"""Seconds after a change in which Ray's totals, renewed every 5 s, have taken it in."""

_log = get_logger(__name__)


class ClusterWatch:
    """Of a head. One task, `run`, owns it; `report` is its last look, None before the first.

    `plans` gives the nodes of the roster, `declared` what their configurations say they bring, by
    address. `on_report` is called in the loop after every look.
    """

    def __init__(
        self,
        ray: RayConfig,
        head: NodePlan,
        supervisor: RaySupervisor,
        plans: Callable[[], Iterable[NodePlan]],
        on_report: Callable[[ClusterReport], None],
        declared: Callable[[], Mapping[str, Mapping[str, float]]] = dict,
    ) -> None:
        self.report: ClusterReport | None = None
        self._ray = ray
        self._head = head
        self._supervisor = supervisor
        self._plans = plans
        self._on_report = on_report
        self._declared = declared
        self._tracked: dict[str, rules.Tracked] = {}
        self._totals_told: dict[str, float] | None = None
        self._failures: list[str] = []
        """Codes of the looks in a row that failed."""
        self._soon = asyncio.Event()

    def look_soon(self) -> None:
        """A node's Ray came up or went: the next look need not wait its whole turn."""
        self._soon.set()

    async def run(self) -> None:
        """Until cancelled. Looks only while the head's own Ray is up."""
        while True:
            began = time.monotonic()
            pending = False
            if self._supervisor.state.phase == "up":
                try:
                    pending = await self._look()
                    self._failures.clear()
                except ProblemError as exc:
                    pending = True
                    self._tell_failure(exc.problem)
            interval = min(SOON, self._ray.status_interval) if pending else None
            wait = interval or (
                self._ray.status_interval if self._supervisor.state.phase == "up" else 1.0
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(max(1.0, wait - (time.monotonic() - began))):
                    await self._soon.wait()
                    await asyncio.sleep(SETTLE)
            self._soon.clear()

    async def _look(self) -> bool:
        """One look. Returns whether a fault waits to be confirmed."""
        env = self._supervisor.environment or {}
        install = await find(self._ray.command, env)
        services = self._head.services
        gcs = f"{self._head.address}:{services['gcs']}"
        status = await ray_status.ask(install.command, gcs, env)
        token = await asyncio.to_thread(read_token, env)
        # The table after the totals: what joins in between is confirmed by the next look.
        seen = await node_table.fetch(self._head.address, services["dashboard"], token)
        names = {plan.address: plan.name for plan in self._plans()}
        found = rules.nodes_without_resources(status, seen, names, time.time(), self._declared())
        now = time.monotonic()
        self._tracked, changes = rules.step(self._tracked, found, now)
        for change in changes:
            _tell(change, now)
        self._tell_totals(status, seen)
        offset = time.time() - now
        self.report = ClusterReport(
            as_of=status.as_of,
            totals=status.totals,
            nodes=tuple(seen),
            problems=tuple(
                NodeProblem(subject, t.first + offset, t.problem)
                for subject, t in sorted(self._tracked.items())
                if t.told is not None
            ),
        )
        self._on_report(self.report)
        return status.as_of is None or any(t.told is None for t in self._tracked.values())

    def _tell_totals(
        self, status: ray_status.RayStatus, seen: Iterable[node_table.NodeSeen]
    ) -> None:
        totals = {resource: total for resource, (_, total) in status.totals.items()}
        # Free memory moves a little at every start; what counts is which there is and how many.
        counted = {r: t for r, t in totals.items() if "memory" not in r}
        if status.as_of is not None and counted != self._totals_told:
            self._totals_told = counted
            alive = sum(node.state == "ALIVE" for node in seen)
            _log.info("ray_totals", totals=totals, nodes_alive=alive)

    def _tell_failure(self, problem: Problem) -> None:
        """Once, at the second in a row: a dashboard that starts answers with errors for a while."""
        self._failures.append(problem.code)
        if self._failures.count(problem.code) == 2:
            _log.warning(problem.code, cause=problem.cause, remedy=problem.remedy)


def _tell(change: rules.Change, now: float) -> None:
    problem = change.tracked.problem
    lasted = round(now - change.tracked.first)
    if change.kind == "cleared":
        _log.info("ray_node_resources_back", node=change.subject, after_seconds=lasted)
    else:
        _log.error(
            problem.code,
            node=change.subject,
            cause=problem.cause,
            remedy=problem.remedy,
            for_seconds=lasted,
        )
