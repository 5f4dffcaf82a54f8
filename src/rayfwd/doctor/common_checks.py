"""What the examinations have in common: the file, the daemon, its keeper, Ray, ports, limits."""

from __future__ import annotations

import asyncio
import ipaddress
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config
from rayfwd.daemon.watches import temp_dir
from rayfwd.doctor import judgements, observe, unit_checks
from rayfwd.doctor.rows import Row, failed, passed, skipped, warned
from rayfwd.doctor.settings import warnings
from rayfwd.doctor.unit_checks import Unit
from rayfwd.network.overlay import check_commands
from rayfwd.network.overlay_client import START_SERVICE, possible
from rayfwd.network.own_name import GLOO_NEEDS
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import install, ports
from rayfwd.ray.install import RayInstall
from rayfwd.ray.launcher import ByKeeper
from rayfwd.ray.process import RayProcess, find_foreign
from rayfwd.status import Network, Status
from rayfwd.system import capacity, setting
from rayfwd.system.control import ask
from rayfwd.transport.listeners import listeners_for
from rayfwd.watch import machine_watch

Emit = Callable[[Row], None]

OVERLAY_CODES = frozenset(
    {
        codes.OVERLAY_IMPOSSIBLE,
        codes.OVERLAY_FAILED,
        codes.OVERLAY_REFUSED,
        codes.OVERLAY_KEEPER_ABSENT,
        codes.OVERLAY_GONE,
        codes.OVERLAY_BLOCKED,
    }
)
TAKE_OVERLAY = "restart rayfwd, which then restarts this node's Ray once"
"""What gives a node the overlay, where it has become possible while the daemon runs."""
OVERLAY_SOCKET = Path("/run/rayfwd-net/overlay.sock")
"""As the units have it (systemd/rayfwd.service)."""


class Examination(ABC):
    """Of any role."""

    def __init__(self, config: Config, control: Path, env: Mapping[str, str], emit: Emit) -> None:
        self.config = config
        self.env = env
        self.rows: list[Row] = []
        self._control = control
        self._emit = emit
        self.status: Status | None = None
        """Of the daemon, where one answers."""
        self.nodes: tuple[NodePlan, ...] = ()
        self.own: NodePlan | None = None
        self.network = config.hub.network

    def emit(self, row: Row) -> None:
        self.rows.append(row)
        self._emit(row)

    @abstractmethod
    async def run(self) -> None:
        """Make all checks of the role, in their order."""

    # -- the file and the daemon --------------------------------------------------------

    def settings(self) -> Row:
        config = self.config
        found = list(warnings(config))
        if not found:
            return passed("config", f"{config.path}: a {config.role}, named {config.name}")
        return warned(
            "config",
            codes.CONFIG_DOUBTFUL.problem("; ".join(found), "check whether this is intended"),
        )

    async def daemon(self) -> Row:
        try:
            answer = await asyncio.to_thread(ask, self._control, "status")
            self.status = status = Status.from_answer(answer)
        except ProblemError as exc:
            if exc.problem.code == codes.DAEMON_NOT_RUNNING:
                return skipped("daemon", "no daemon runs here")
            return warned("daemon", exc.problem)
        self.own = status.node
        seen = {"pid": status.pid, "state": status.state}
        wrong = sorted(status.conditions, key=lambda c: not c.blocks_ready)
        first = next((c for c in wrong if c.severity != "note"), None)
        if first is None and status.state == "ready":
            return passed("daemon", status.summary, **seen)
        code = next((c.code for c in (first, *wrong) if c is not None), codes.RAY_STARTING)
        return warned(
            "daemon",
            code.problem(status.summary, "run `rayfwd status` for its cause and remedy"),
            **seen,
        )

    async def keeper(self) -> Row:
        """The service in which Ray runs: that it answers the daemon that there is, or is to."""
        if self.status is None:
            unit = unit_checks.find(self.config.path, self.env)
            if unit is None or not unit.has_keeper:
                return skipped(
                    "keeper", "no service with this configuration file runs Ray separately"
                )
            if not unit.keeper.exists():
                cause = f"{unit.path} runs Ray in a separate service, but {unit.keeper} is missing"
                problem = codes.KEEPER_ABSENT.problem(
                    cause, "run `rayfwd init` again: it makes the missing unit"
                )
                return failed("keeper", problem)
            return passed(
                "keeper", f"{unit.keeper.name} is installed, and starts with {unit.path.name}"
            )
        socket = await asyncio.to_thread(observe.keeper_of, self.status.pid)
        if socket is None:
            return skipped("keeper", "the running daemon has none: it runs Ray itself")
        try:
            await asyncio.to_thread(ByKeeper(socket).check)
        except ProblemError as exc:
            return failed("keeper", exc.problem)
        return passed("keeper", f"{unit_checks.RAY_SERVICE} answers on {socket}")

    @property
    def ray_state(self) -> str | None:
        """As the daemon has it; None: no daemon answers."""
        return None if self.status is None else self.status.ray.state

    # -- Ray, ports, limits --------------------------------------------------------

    async def ray(self) -> tuple[Row, RayInstall | None]:
        try:
            found = await install.find(self.config.ray.command, self.env)
        except ProblemError as exc:
            if not self.config.ray.start:
                return warned("ray", exc.problem), None
            return failed("ray", exc.problem), None
        versions = found.versions
        said = f"{found.command}: Ray {versions.ray}, Python {versions.python}"
        return passed("ray", said, ray=versions.ray, python=versions.python), found

    async def ports(self) -> Row:
        own, ray_state = self.own, self.ray_state
        if own is None:
            return skipped("ports", "this node's ports are not known before the hub answers")
        span = f"{own.base}-{own.last_worker_port}"
        if own.head_services:
            span = ", ".join([*(str(p) for p in own.head_services.values()), span])
        if ray_state == "up":
            return passed("ports", f"{span}: in use by this node's Ray")
        if ray_state == "starting":
            return skipped("ports", "Ray is just starting on them")
        found = await asyncio.to_thread(self._taken, own)
        if isinstance(found, Problem):
            return failed("ports", found)
        return passed("ports", f"{span}: {found}")

    def _taken(self, own: NodePlan) -> Problem | str:
        try:
            ports.check_free(own.ports)
        except ProblemError as exc:
            left = RayProcess.recover(self.config.state_dir)
            if left is not None and left.alive():
                return "in use by a Ray that rayfwd started and will take over"
            if find_foreign(own.address) is not None:
                return "in use by a Ray of this user with this node's address"
            return exc.problem
        return "free"

    async def listeners(self) -> Row:
        own = self.own
        if self.status is not None:
            listeners = self.status.listeners
            ids = listeners.conditions
            if wrong := [c.problem for c in self.status.conditions if c.id in ids]:
                return failed("listeners", several(wrong))
            return passed("listeners", f"open: {listeners.open}", open=listeners.open)
        if own is None or not self.nodes:
            return skipped("listeners", "the other nodes are not known before the hub answers")
        blocked = await asyncio.to_thread(observe.blocked_listeners, self.nodes, own)
        if blocked:
            return failed("listeners", several(blocked))
        count = self._listeners()
        return passed("listeners", f"can be opened: {count}" if count else "none is needed yet")

    async def network_level(self) -> Row:
        """How programs here reach other nodes, and why so; docs/overlay.md."""
        if self.status is not None:
            network = self.status.network
            said = f"{network.level}: {network.why}{await self._more_of(network)}"
            wrong = next((c for c in self.status.conditions if c.code in OVERLAY_CODES), None)
            if wrong is not None and wrong.subject.partition("/")[0] == self.config.name:
                return warned("network", wrong.problem, level=network.level)
            return passed("network", said, level=network.level)
        asked = self.config.network.level
        if asked == "listeners":
            return passed(
                "network", f"listeners: {setting.value('network.level', 'listeners')}", level=asked
            )
        problem = await asyncio.to_thread(self._no_overlay)
        if problem is None:
            return passed("network", "overlay: this machine allows it", level="overlay")
        if (unit := self._starts_with_the_daemon(problem)) is not None:
            starts = f"{unit.overlay.name} is there, and starts with {unit.path.name}"
            said = f"overlay, if this machine allows it: {starts}"
            return passed("network", said, level="overlay")
        if asked == "overlay":
            return warned("network", problem, level="listeners")
        said = f"listeners: {problem.cause}; to get the overlay: {problem.remedy}"
        return passed("network", said, level="listeners")

    def _starts_with_the_daemon(self, problem: Problem) -> Unit | None:
        """The unit of the daemon, where that of the overlay beside it is only not started yet."""
        if problem.code != codes.OVERLAY_KEEPER_ABSENT:
            return None
        unit = unit_checks.find(self.config.path, self.env)
        return unit if unit is not None and unit.overlay.exists() else None

    async def _more_of(self, network: Network) -> str:
        """What else there is to know of the level that a daemon has."""
        needs = "" if network.hosts_line is None else f"; {GLOO_NEEDS}: {network.hosts_line}"
        if network.level == "listeners" and self.config.network.level != "listeners":
            problem = await asyncio.to_thread(self._no_overlay)
            if problem is None or self._starts_with_the_daemon(problem) is not None:
                jobs = ", and ends every job" if self.config.role == "head" else ""
                return f"; the overlay is possible now: {TAKE_OVERLAY}{jobs}{needs}"
            return f"; to get the overlay: {problem.remedy}{needs}"
        if network.level == "overlay" and not network.guard and self.own is not None:
            why = (
                "this node advertises an address, and "
                f"{setting.key('network.guard_from')} names no machine"
                if self.config.network.guard
                else setting.value("network.guard", False)
            )
            return f"; other machines reach Ray's ports here: {why}"
        return needs

    def _no_overlay(self) -> Problem | None:
        """Why the daemon of this file could not have one; None: it could."""
        unit = unit_checks.find(self.config.path, self.env)
        if unit is None or not unit.has_overlay:
            return possible()
        try:
            check_commands()
            ask(OVERLAY_SOCKET, "found")
        except ProblemError as exc:
            if exc.problem.code == codes.OVERLAY_IMPOSSIBLE:
                return exc.problem
            if exc.problem.code != codes.DAEMON_NOT_PERMITTED:
                cause = f"the service rayfwd-net does not answer: {exc.problem.cause}"
                return codes.OVERLAY_KEEPER_ABSENT.problem(cause, START_SERVICE)
        return None

    def _listeners(self) -> int:
        others = [n for n in self.nodes if not (n.advertised or n is self.own)]
        others = [n for n in others if self.own is None or n.name != self.own.name]
        return sum(len(listeners_for(n.address, n.ports)) for n in others)

    async def limits(self) -> Row:
        pid = ray_pid = None
        if self.status is not None:
            pid, ray_pid = self.status.pid, self.status.ray.pid
        found = await asyncio.to_thread(observe.limits, pid, ray_pid)
        ray = self.config.ray
        cpus = ray.num_cpus if ray.num_cpus is not None else capacity.cpus()
        directory = temp_dir(ray.env, ray.extra_args)
        seen = machine_watch.sample(
            self._listeners(), self.nodes, self.own, [directory], False, ray.object_store_memory
        )
        wrong = machine_watch.judge(replace(seen, limit=found.descriptors))
        threads = judgements.judge_threads(found.threads, found.running, cpus)
        if threads is not None:
            wrong.append(threads)
        values = {"descriptors": found.descriptors, "threads": found.threads, "whose": found.whose}
        if wrong:
            return warned("limits", several(wrong), **values)
        files = "any number of" if found.descriptors < 0 else str(found.descriptors)
        tasks = "any number of" if found.threads is None else str(found.threads)
        said = f"{files} files, {tasks} processes and threads ({found.whose} limits)"
        return passed("limits", said, **values)

    def proxies(self, addresses: Sequence[str] = ()) -> Row:
        """Of these addresses; without any, of the head's and this node's."""
        if not addresses:
            nodes = [node for node in (*self.nodes[:1], self.own) if node is not None]
            addresses = list(dict.fromkeys(node.address for node in nodes))
        addresses = addresses or [str(ipaddress.ip_network(self.network)[1])]
        problem = judgements.judge_proxies(self.env, self.config.ray.env, self.network, addresses)
        if problem is not None:
            return warned("proxies", problem)
        return passed("proxies", f"no proxy would get requests to {', '.join(addresses)}")


def plan_of(data: Any) -> NodePlan | None:
    try:
        return NodePlan.from_wire(data) if data else None
    except ValueError:
        return None


def several(problems: list[Problem]) -> Problem:
    """The first, with what the next ones say."""
    first, *others = problems
    if not others:
        return first
    shown = "; ".join(p.cause for p in problems[:4])
    more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
    different = list(dict.fromkeys(p.remedy for p in problems[:4]))
    return first.code.problem(f"{shown}{more}", "; ".join(different))
