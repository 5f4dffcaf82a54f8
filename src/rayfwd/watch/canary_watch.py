"""Sends the canary every so often and on demand, and says what is wrong with nodes that fail it.

The judgement is pure: `judge` takes the script's results and what was found behind the ports of
the nodes that failed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import CanaryConfig, RayConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import nodes as node_table
from rayfwd.ray.canary import sender
from rayfwd.ray.install import RayInstall, find
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.token import read_token
from rayfwd.system import setting
from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.system.logs import get_logger
from rayfwd.transport.endpoints import Endpoint, EndpointOf
from rayfwd.watch import reach
from rayfwd.watch.board import Board
from rayfwd.watch.canary_round import NodeResult, Round, StageResult
from rayfwd.watch.reach import Peer

FIRST_DELAY = 20.0
"""Seconds after Ray came up until the first canary: nodes that start together are all there."""

WATCHER = "canary"

_log = get_logger(__name__)


class CanaryOwner(Protocol):
    """Who knows what a canary asks before it is sent, and is told when it is back."""

    def situation(self) -> Situation | None:
        """What is there now; None while this node's Ray is not up."""

    def peers(self) -> Mapping[str, Peer]:
        """The nodes whose Ray and whose link are up: only while they are so all the time is a
        failure theirs. A link that is down is said by others, and Ray waits for it."""

    def canary_back(self) -> None:
        """`Canary.last` is a new one."""


class Canary:
    """Owns the canary's process. `run` sends it every `interval`; `ask` at once."""

    def __init__(
        self,
        config: CanaryConfig,
        ray: RayConfig,
        own_name: str,
        board: Board,
        owner: CanaryOwner,
    ) -> None:
        self.last: Round | None = None
        self._config = config
        self._ray = ray
        self._own_name = own_name
        self._board = board
        self._owner = owner
        self._running: asyncio.Task[Round] | None = None

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                # One that was sent by hand and failed is sent again, so that the end of it is seen.
                failed = self.last is not None and not self.last.ok
                if not (self._config.enabled or failed) or self._owner.situation() is None:
                    await sleep_coalesced(1.0)
                    continue
                await asyncio.sleep(FIRST_DELAY if self.last is None else self._config.interval)
                if self._owner.situation() is not None:
                    with suppress(ProblemError):
                        await self.send()
        finally:
            if self._running is not None:
                self._running.cancel()
                await asyncio.wait({self._running})

    def take_config(self, config: CanaryConfig) -> None:
        """From the next canary on."""
        self._config = config

    async def send(self) -> Round:
        """One canary now, or the one that is under way. Raises ProblemError (ray_not_up)."""
        if self._running is None or self._running.done():
            situation = self._owner.situation()
            if situation is None:
                raise codes.RAY_NOT_UP.error(
                    f"Ray is not up on {self._own_name}, so nothing can be sent from it",
                    "wait until `rayfwd status` says that Ray is up",
                )
            self._running = asyncio.create_task(self._round(situation), name="canary round")
        return await asyncio.shield(self._running)

    async def _round(self, situation: Situation) -> Round:
        began, clock = time.time(), time.monotonic()
        problem: Problem | None = None
        rows: tuple[NodeResult, ...] = ()
        found: dict[str, Problem] = {}
        result = sender.CanaryRun()
        before = dict(self._owner.peers())
        try:
            seen = await situation.targets()
            install = await find(self._ray.command, situation.env)
            result = await self._fly(install, situation, seen)
            problem = _own_failure(result)
            if problem is None:
                ports = await _probe_failed(result, seen, situation.plans, situation.endpoint)
                if doubtful := _doubtful(result, seen, ports):
                    again = await self._fly(install, situation, doubtful)
                    if _own_failure(again) is None:
                        for node in doubtful:
                            result.stages[node.node_id] = again.stages.get(node.node_id, {})
                        ports |= await _probe_failed(
                            result, doubtful, situation.plans, situation.endpoint
                        )
                judged = judge(result, seen, situation.plans, ports, self._own_name)
                after = dict(self._owner.peers())
                found = only_theirs(judged, situation.plans, before, after, self._own_name)
                rows = _rows(result, seen, situation.plans, found)
        except ProblemError as exc:
            problem = exc.problem
        done = Round(began, round(time.monotonic() - clock, 1), rows, problem, result.cost)
        self._log_round(done, found)
        return done

    async def _fly(
        self, install: RayInstall, situation: Situation, nodes: Iterable[NodeSeen]
    ) -> sender.CanaryRun:
        return await sender.run(
            install,
            situation.env,
            situation.gcs,
            situation.own.address,
            [node.node_id for node in nodes],
            self._config.timeout,
        )

    def _log_round(self, done: Round, found: Mapping[str, Problem]) -> None:
        self.last = done
        failed = [node.name for node in done.nodes if not node.ok]
        log = _log.info if done.ok else _log.warning
        cause = done.problem.cause if done.problem else None
        log("canary_back", ok=done.ok, seconds=done.seconds, failed=failed, cause=cause)
        own = {self._own_name: done.problem} if done.problem else {}
        self._board.put(WATCHER, {**found, **own})
        self._owner.canary_back()


@dataclass(frozen=True, slots=True)
class Situation:
    """What a canary needs to know before it is sent."""

    own: NodePlan
    gcs: str
    env: Mapping[str, str]
    plans: Mapping[str, NodePlan]
    """By address."""
    targets: Callable[[], Awaitable[list[NodeSeen]]]
    """The nodes it is sent to. Raises ProblemError."""
    endpoint: EndpointOf


async def alive_nodes(dashboard: Endpoint, env: Mapping[str, str]) -> list[NodeSeen]:
    """Every node that is ALIVE in the node table. Raises ProblemError (ray_nodes_failed)."""
    token = await asyncio.to_thread(read_token, env)
    seen = await node_table.fetch(dashboard, token)
    return [node for node in seen if node.state == "ALIVE"]


def _own_failure(result: sender.CanaryRun) -> Problem | None:
    if result.connected and (result.complete or result.stages):
        return None
    did = "did not get to its end" if result.connected else "could not connect to this node's Ray"
    return codes.CANARY_FAILED.problem(
        f"the canary {did}; its last message: {result.said or 'none'}",
        "check that a driver on this node works (`ray.init()` with the Python of its `ray` "
        f"command); raise {setting.key('canary.timeout')} if the machine is slow",
    )


def only_theirs(
    judged: Mapping[str, Problem],
    plans: Mapping[str, NodePlan],
    before: Mapping[str, Peer],
    after: Mapping[str, Peer],
    near: str,
) -> dict[str, Problem]:
    """Without the nodes of the plan that had no endpoint all the time."""
    elsewhere = {plan.name for plan in plans.values()} - {near}
    return {
        name: problem
        for name, problem in judged.items()
        if name not in elsewhere or (name in before and before[name] == after.get(name))
    }


def failed_stage(result: sender.CanaryRun, node_id: str) -> str | None:
    """The first stage that did not go well on a node; None: all did."""
    stages = result.stages.get(node_id, {})
    for name in sender.STAGES:
        stage = stages.get(name)
        if stage is None or not stage.ok:
            return name
    return None


def _doubtful(
    result: sender.CanaryRun,
    seen: Iterable[NodeSeen],
    ports: Mapping[str, Mapping[int, str]],
) -> list[NodeSeen]:
    """The nodes that failed though all their ports answer.

    A machine that is busy starts a worker process too late, too: they get a second chance.
    """
    return [
        node
        for node in seen
        if failed_stage(result, node.node_id) is not None and not ports.get(node.address)
    ]


async def _probe_failed(
    result: sender.CanaryRun,
    seen: Iterable[NodeSeen],
    plans: Mapping[str, NodePlan],
    endpoint: EndpointOf,
) -> dict[str, dict[int, str]]:
    """Dead ports of the nodes that failed, by address."""
    found: dict[str, dict[int, str]] = {}
    for node in seen:
        plan = plans.get(node.address)
        if plan is None or failed_stage(result, node.node_id) is None:
            continue
        servers, workers = await asyncio.gather(
            reach.dead_ports(plan, reach.servers(plan), reach.GREETING_TIMEOUT, endpoint),
            reach.dead_worker_ports(plan, endpoint),
        )
        found[node.address] = servers | workers
    return found


def judge(
    result: sender.CanaryRun,
    seen: Iterable[NodeSeen],
    plans: Mapping[str, NodePlan],
    ports: Mapping[str, Mapping[int, str]],
    near: str,
) -> dict[str, Problem]:
    """What is wrong with each node that failed, by name."""
    found: dict[str, Problem] = {}
    for node in seen:
        stage = failed_stage(result, node.node_id)
        if stage is None:
            continue
        plan = plans.get(node.address)
        name = plan.name if plan else node.address
        stages = result.stages.get(node.node_id, {})
        bad = ports.get(node.address, {})
        behind = reach.explain(plan, bad, near) if plan is not None and bad else None
        found[name] = _no_task(name, near, stages, behind) or _no_objects(
            name, near, stages, behind
        )
    return found


def _no_task(
    name: str, near: str, stages: Mapping[str, sender.Stage], behind: Problem | None
) -> Problem | None:
    task = stages.get("task")
    if task is not None and task.ok:
        return None
    why = task.error if task is not None and task.error else "the canary did not get to it"
    return codes.CANARY_NO_TASK.problem(
        f"node {name} does not run tasks sent from {near} ({why})"
        + (f": {behind.cause}" if behind else ", although its ports answer"),
        behind.remedy
        if behind
        else f"read raylet.out and the worker-*.err files in Ray's session directory on {name}",
    )


def _no_objects(
    name: str, near: str, stages: Mapping[str, sender.Stage], behind: Problem | None
) -> Problem:
    ways = [
        f"from {a} to {b} ({stage.error if stage is not None else 'not tried'})"
        for key, a, b in (("to", near, name), ("from", name, near))
        if (stage := stages.get(key)) is None or not stage.ok
    ]
    return codes.CANARY_NO_OBJECTS.problem(
        f"a 1 MB object does not arrive {' nor '.join(ways)}"
        + (f": {behind.cause}" if behind else ", although the ports of both ends answer"),
        behind.remedy
        if behind
        else f"read raylet.out on {near} and on {name}: it has the object transfers",
    )


def _rows(
    result: sender.CanaryRun,
    seen: Iterable[NodeSeen],
    plans: Mapping[str, NodePlan],
    found: Mapping[str, Problem],
) -> tuple[NodeResult, ...]:
    rows = []
    for node in seen:
        plan = plans.get(node.address)
        name = plan.name if plan else node.address
        problem, passed = found.get(name), failed_stage(result, node.node_id) is None
        stages = {
            stage: StageResult(s.ok, s.seconds, s.error)
            for stage, s in result.stages.get(node.node_id, {}).items()
        }
        judged = problem is not None or passed
        rows.append(NodeResult(name, node.address, passed, stages, problem, judged))
    return tuple(sorted(rows, key=lambda row: row.name))
