"""What head and worker have in common: directories, signals, Ray, listeners, control, status.

The order of ending matters: Ray first, while its connections still stand, then the streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from prometheus_client.core import Metric

from rayfwd import __version__, codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config, ConfigError, ForwardConfig, load
from rayfwd.daemon import handover, reload, restart_job
from rayfwd.daemon.canary_verb import CanaryVerb
from rayfwd.daemon.handover import Arrival
from rayfwd.daemon.metrics import MetricsServer, families
from rayfwd.daemon.resources import lock, make_directory, raise_descriptor_limit
from rayfwd.daemon.watches import Watches
from rayfwd.problems import Problem, ProblemError, Severity
from rayfwd.ray import token
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.supervisor import RaySupervisor
from rayfwd.ray.token import RayAuth
from rayfwd.session.snapshot import Tree
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Target
from rayfwd.system import logs
from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.system.control import ControlServer
from rayfwd.system.fdpass import Packed
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.logs import get_logger
from rayfwd.system.notify import Notifier
from rayfwd.system.users import allowed_uids
from rayfwd.system.watchdog import Late, Watchdog, late_loops
from rayfwd.transport.admission import Admission
from rayfwd.transport.connector import LocalConnector
from rayfwd.transport.linkstats import LinkStats
from rayfwd.transport.listeners import Listeners, listeners_for
from rayfwd.transport.mux import Mux, MuxStream
from rayfwd.transport.relay import SocketRelay
from rayfwd.watch.board import Board
from rayfwd.watch.canary import Canary, Situation
from rayfwd.watch.conditions import Seen, worst
from rayfwd.watch.links import LinkSeen
from rayfwd.watch.reach import Peer, Reach

log = get_logger(__name__)

STATUS_SCHEMA = 1
"""Raised when a key of the status changes its meaning or goes; new keys may come."""


TOKEN_INTERVAL = 15.0
"""Seconds between two looks at Ray's token: two small requests to the head's dashboard."""


SAY_AGAIN = {"type": "say_again"}
"""A control message: whoever sends it was restarted, and knows no more what it had been told."""


class Daemon:
    """A node's daemon. `run` works until SIGTERM or SIGINT."""

    def __init__(self, config: Config) -> None:
        """Raises ProblemError."""
        self.config = config
        self.own: NodePlan | None = None
        self.nodes: tuple[NodePlan, ...] = ()
        self.cluster: ClusterReport | None = None
        uids = allowed_uids(config.listeners.users, "listeners.users")
        self.listeners = Listeners(self.route, self.changed, Admission(uids))
        self.connector = LocalConnector()
        self._started = time.time()
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._ready_said = False
        self._stopping = False
        self.again = False
        """When it stops, the next process takes the place of this one."""
        self._arrival: Arrival | None = None
        self.left: Packed | None = None
        """For the process that takes the place of this one."""
        self._notifier = Notifier()
        self._notified = ""
        self.ray = RaySupervisor(config, config.hub.network, self.changed)
        self._metrics: MetricsServer | None = None
        self._metrics_changed = asyncio.Event()
        self._watchdog = Watchdog(self._late, lambda: self._ready_said, self._notifier)
        self.board = Board(self.board_changed, config.name, _later)
        self.watches = Watches(self)
        self.canary = Canary(
            config.canary,
            config.ray,
            config.name,
            self.board,
            self.situation,
            self.peers,
            self.changed,
        )
        self.reach = Reach(config.name, self.peers, self.board)
        self._canary_verb = CanaryVerb(self.canary)
        self.auth: RayAuth | None = None
        """Ray's token as the head has decided; None: not known, or an older head's."""

    # -- what head and worker fill in --------------------------------------------------------

    def route(self, target: Target, relay: SocketRelay) -> None:
        """Find a stream for a connection that came to a listener."""
        raise NotImplementedError

    async def serve(self) -> None:
        """The role's own work, until cancelled."""
        raise NotImplementedError

    async def end(self) -> None:
        """End the role's own work in order."""
        raise NotImplementedError

    def link_problems(self) -> list[Problem]:
        """What the role waits for, Ray apart; empty when it stands."""
        raise NotImplementedError

    def role_status(self) -> dict[str, Any]:
        """The role's part of the status."""
        raise NotImplementedError

    def link_stats(self) -> Mapping[str, LinkStats]:
        """What the role's links have been through, by the peer's name in the metrics."""
        raise NotImplementedError

    def peers(self) -> Mapping[str, Peer]:
        """The nodes whose Ray this one ought to reach now."""
        raise NotImplementedError

    async def canary_targets(self) -> list[NodeSeen]:
        """The nodes that a canary is sent to. Raises ProblemError."""
        raise NotImplementedError

    def situation(self) -> Situation | None:
        """What a canary needs to know; None while this node's Ray is not up."""
        head, env = self.node_named("head"), self.ray.environment
        if self.own is None or head is None or env is None or self.ray.state.phase != "up":
            return None
        return Situation(
            own=self.own,
            gcs=f"{head.address}:{head.services['gcs']}",
            env=env,
            plans={node.address: node for node in self.nodes},
            targets=self.canary_targets,
        )

    async def _watch_token(self) -> None:
        """Whether this node's Ray and its user's drivers have the token that the cluster wants."""
        while True:
            await sleep_coalesced(TOKEN_INTERVAL)
            found: Problem | None = None
            situation, head = self.situation(), self.node_named("head")
            if situation is not None and head is not None and not self.link_problems():
                host, port = head.address, head.services["dashboard"]
                found = await token.check(host, port, situation.env)
            if found is None and self.auth is not None:
                found = await asyncio.to_thread(
                    token.provide, self.auth, os.environ, self.config.state_dir
                )
            self.board.put("token", {} if found is None else {self.config.name: found})

    async def forget(self, args: dict[str, Any]) -> dict[str, Any]:
        """Drop a node from the roster; a head can."""
        raise codes.NOT_A_HEAD.error(
            "this node is a worker", "ask on the head: the roster is there"
        )

    def board_changed(self) -> None:
        """What is wrong has changed."""
        self._changed.set()

    def link_conditions(self) -> list[Seen]:
        """What is wrong with the role's links; the link or the hub has logged it."""
        raise NotImplementedError

    def links_seen(self) -> Mapping[str, LinkSeen]:
        """The role's links that are up, by the worker's name."""
        raise NotImplementedError

    def loops(self) -> Iterable[Heartbeat]:
        """The loops that the watchdog looks at."""
        return (self.ray.heartbeat, self.watches.heartbeat)

    def _late(self) -> list[Late]:
        return late_loops(self.loops(), self.muxes().values())

    @property
    def metrics_problem(self) -> Problem | None:
        """What keeps the metrics from being asked for."""
        return self._metrics.problem if self._metrics is not None else None

    # -- for a process that comes after this one --------------------------------------------------

    def muxes(self) -> Mapping[str, Mux]:
        """The sessions that there are, by the peer's name."""
        raise NotImplementedError

    def waiting(self) -> Iterable[tuple[Target, SocketRelay]]:
        return ()

    def stop_accepting(self) -> socket.socket | None:
        return None

    def hand_over(self) -> Tree:
        raise NotImplementedError

    def take_over(self, tree: Tree) -> None:
        raise NotImplementedError

    def take_over_splices(self, tree: Tree) -> None: ...

    async def go_on(self) -> None:
        """Take over what an earlier process has left; the role is ready for it."""
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            await arrival.take_over(self)

    async def _finish(self) -> bool:
        """End what ends while connections stand. True: these are left to another process."""
        if self.again:
            self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        else:
            self._tell("STOPPING=1")
            if not self._stop.is_set():
                return False
            if not await restart_job.being_restarted(os.environ):
                await self.ray.stop()
                return False
        await self.ray.leave()
        try:
            if not self.again and not handover.can_keep(self._notifier):
                raise OSError("the service manager keeps no descriptors (FileDescriptorStoreMax=)")
            self.left = await handover.leave(self, self.config.role, self.config.name)
            if not self.again:
                handover.keep(self.left, self._notifier)
        except OSError as exc:
            log.error("handover_failed", cause=str(exc), remedy=handover.RESET)
            return False
        return True

    # -- life --------------------------------------------------------

    async def run(self) -> None:
        """Raises ProblemError when it cannot begin."""
        config = self.config
        with contextlib.ExitStack() as stack:
            make_directory(config.state_dir, 0o700)
            # Users whom the hub is to serve must get through to its socket; the control socket
            # beside it is for the daemon's own user by its mode.
            make_directory(config.runtime_dir, 0o711 if config.hub.users else 0o700)
            stack.enter_context(lock(config.state_dir / "lock", config.state_dir))
            raise_descriptor_limit()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._asked_to_stop, signal.Signals(number).name)
            loop.add_signal_handler(signal.SIGUSR2, self._asked_to_exec)
            # Where there is a terminal, this is its end.
            by_hand = os.isatty(0)
            loop.add_signal_handler(
                signal.SIGHUP, self._asked_to_stop if by_hand else self._asked_to_reload, "SIGHUP"
            )
            log.info("rayfwd_starting", version=__version__, role=config.role, node=config.name)
            self._arrival = handover.arrived(os.environ, config.role, config.name, self._notifier)
            if self._arrival is not None:
                stack.callback(self._arrival.close)
                self.listeners.inherit(self._arrival.listeners())
            control = ControlServer(
                config.control_socket,
                {
                    "status": self._status_verb,
                    "plan": self._plan_verb,
                    "forget": self.forget,
                    "canary": self._canary_verb,
                    "reload": self._reload_verb,
                },
            )
            await control.start()
            try:
                await self._work()
            finally:
                await control.close()
        log.info("rayfwd_stopped", node=config.name)

    async def _work(self) -> None:
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        parts = [
            self._task(self.serve(), "serve"),
            self._task(self.listeners.run(), "listeners"),
            self._task(self.ray.run(), "ray"),
            self._task(self.canary.run(), "canary"),
            self._task(self.reach.run(), "reach"),
            self._task(self._watch_token(), "token"),
            self._task(self.watches.run_links(), "links"),
            self._task(self.watches.run_machine(), "machine"),
            self._task(self._notify(), "notify"),
            self._task(self._serve_metrics(), "metrics"),
            self._task(self._watchdog.run(), "watchdog"),
        ]
        left = False
        try:
            await asyncio.wait([stopping, *parts], return_when=asyncio.FIRST_COMPLETED)
            self._stopping = True
            left = await self._finish()
        finally:
            if not left:
                await self.end()
            for task in [stopping, *parts]:
                task.cancel()
            await self._canary_verb.close()
            results = await asyncio.gather(*parts, return_exceptions=True)
            await self.connector.close()
        for result in results:
            if isinstance(result, Exception):
                raise result  # a fault of ours ends the daemon loudly; the service restarts it

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        return asyncio.create_task(work, name=name)

    def _asked_to_stop(self, name: str) -> None:
        if not self._stop.is_set():
            log.info("rayfwd_stopping", signal=name)
        self._stop.set()

    def _asked_to_exec(self) -> None:
        if not self._stop.is_set():
            log.info("rayfwd_restarting", signal="SIGUSR2")
            self.again = True
        self._stop.set()

    # -- another file --------------------------------------------------------

    def _asked_to_reload(self, name: str) -> None:
        self.reload()

    async def _reload_verb(self, args: dict[str, Any]) -> dict[str, Any]:
        return self.reload()

    def reload(self) -> dict[str, Any]:
        """Read the file again. A mistake in it leaves everything as it was."""
        if self._ready_said:
            self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            return self._reload()
        finally:
            if self._ready_said:
                self._notifier.send("READY=1")

    def _reload(self) -> dict[str, Any]:
        path = self.config.path
        try:
            new = reload.merge(self.config, load(path))
            uids = allowed_uids(new.config.listeners.users, "listeners.users")
        except (ConfigError, ProblemError) as exc:
            mistakes = exc.problems if isinstance(exc, ConfigError) else [exc.problem.cause]
            for mistake in mistakes:
                log.error(
                    "config_refused",
                    file=str(path),
                    mistake=mistake,
                    remedy="the configuration that was read before stays in force",
                )
            return {"mistakes": [f"{path}: {mistake}" for mistake in mistakes]}
        log.info("config_reloaded", file=str(path), changed=list(new.changed))
        if new.kept:
            remedy = "restart rayfwd (`systemctl restart rayfwd`) for these to take effect"
            log.warning("config_kept", kept=list(new.kept), remedy=remedy)
        if new.changed:
            self.listeners.admission.take_uids(uids)
            self.take_config(new.config)
        return {"changed": list(new.changed), "kept": list(new.kept)}

    def take_config(self, config: Config) -> None:
        """What `reload.LIVE` has may be different now."""
        before, self.config = self.config, config
        logs.setup(config.log)
        self.canary.take_config(config.canary)
        if config.metrics != before.metrics:
            self._metrics_changed.set()
        if self.nodes:
            self.plan_changed()

    async def _serve_metrics(self) -> None:
        """Where the file says so, also after it has changed."""
        while True:
            self._metrics_changed.clear()
            listen = self.config.metrics.listen
            tasks = [self._task(self._until_changed(), "metrics changed")]
            self._metrics = None
            if listen is not None:
                self._metrics = MetricsServer(listen, self._families, self.changed)
                tasks.append(self._task(self._metrics.run(), "metrics server"))
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            self.changed()

    async def _until_changed(self) -> None:
        await self._metrics_changed.wait()

    def changed(self) -> None:
        """Something that status or readiness depend on has changed."""
        self.watches.put_own()
        self._changed.set()

    # -- the plan --------------------------------------------------------

    def plan_changed(self) -> None:
        """Open the listeners that the plan and the configuration ask for."""
        wanted: dict[Target, Target] = {}
        for node in self.nodes:
            if not node.advertised and (self.own is None or node.name != self.own.name):
                wanted |= listeners_for(node.address, node.ports)
        for forward in self.forwards():
            name, port = forward.target()
            node_ = self.node_named(name)
            if node_ is not None:
                wanted[Target(*forward.listen_address())] = Target(node_.address, port)
        self.listeners.set_wanted(wanted)
        self.changed()

    def forwards(self) -> tuple[ForwardConfig, ...]:
        """The further listeners; by default a worker's leads to the head's dashboard."""
        head = self.node_named("head")
        if self.config.role == "worker" and self.config.forward is None and head is not None:
            port = head.services["dashboard"]
            return (ForwardConfig(listen=f"127.0.0.1:{port}", to=f"head:{port}"),)
        return self.config.forwards

    def node_named(self, name: str) -> NodePlan | None:
        return next(
            (n for n in self.nodes if n.name == name or (name == "head" and n.role == "head")), None
        )

    def accept(self, stream: MuxStream, target: Target) -> SocketRelay | None:
        """A stream to this machine: dial the port if the plan or `expose` has it."""
        own = self.own
        if own is not None and target.address == own.address:
            if target.port in own.ports:
                return self.connector.accept(stream, target)
            if target.port in self.config.expose:
                return self.connector.accept(stream, Target("127.0.0.1", target.port))
        stream.reset(
            ResetReason.NOT_IN_PLAN,
            f"{target} is no port that {self.config.name} serves (ray's ports, or expose)",
        )
        return None

    # -- how it is --------------------------------------------------------

    def waiting_for(self) -> list[Problem]:
        """What keeps this node from being ready."""
        waits = self.link_problems()
        ray = self.ray.state
        if not waits and ray.phase not in {"up", "by_hand"}:
            waits.append(
                ray.problem
                or codes.RAY_STARTING.problem(self.ray_waits(), "nothing: this takes a while")
            )
        return waits

    def ray_waits(self) -> str:
        """What Ray, which is not up, is about."""
        return f"Ray is {self.ray.state.phase}"

    def summary(self) -> str:
        """One line in plain words, for systemd and for people."""
        if self._stopping:
            return "stopping"
        waits = self.waiting_for()
        if waits:
            return f"waiting: {waits[0].cause}"
        bad = worst(self.board.conditions)
        if bad is not None and bad.severity != "note":
            return f"ready, but: {bad.cause}"
        note = f"; {bad.cause}" if bad is not None else ""
        return f"ready: {len(self.nodes)} nodes in the plan, {self.listeners.open} listeners{note}"

    def problems(self) -> list[dict[str, Any]]:
        """Every condition, here and elsewhere, but what `waiting_for` has; roots first."""
        waits = {p.code for p in self.waiting_for()}
        own = self.config.name
        return [
            c.to_wire()
            for c in self.board.conditions
            if not (c.code in waits and c.subject == own and c.seen_by == own)
        ]

    def _severity(self, waited_for: Problem) -> Severity:
        """A link that is parked is not as bad as one that is down, for the same reason."""
        code, own = waited_for.code, self.config.name
        shown = (c.severity for c in self.board.conditions if (c.code, c.subject) == (code, own))
        return next(shown, code.severity)

    def state(self) -> str:
        """`starting`, `waiting`, `ready` or `stopping`."""
        if self._stopping:
            return "stopping"
        if not self.waiting_for():
            return "ready"
        if self._ready_said or self.link_problems() or self.ray.state.problem:
            return "waiting"
        return "starting"

    def status(self) -> dict[str, Any]:
        """The whole of `rayfwd status --json`."""
        ray = self.ray.state
        versions = ray.versions
        return {
            "schema": STATUS_SCHEMA,
            "version": __version__,
            "role": self.config.role,
            "name": self.config.name,
            "pid": os.getpid(),
            "uptime": round(time.time() - self._started, 1),
            "state": self.state(),
            "summary": self.summary(),
            "waiting_for": [
                {**p.to_wire(), "severity": self._severity(p)} for p in self.waiting_for()
            ],
            "problems": self.problems(),
            "node": None if self.own is None else self.own.to_wire(),
            **self.role_status(),
            "listeners": {
                "open": self.listeners.open,
                "blocked": [p.to_wire() for p in self.listeners.blocked],
                "refused": [
                    {"user": user, "connections": count}
                    for user, count in self.listeners.admission.refused.most_common()
                ],
            },
            "ray": {
                "phase": ray.phase,
                "since": ray.since,
                "version": versions.ray if versions else None,
                "python": versions.python if versions else None,
                "pid": ray.pid,
                "adopted": ray.adopted,
                "restarts": ray.restarts,
                "problem": ray.problem.to_wire() if ray.problem else None,
                "command": ray.command,
            },
            "cluster": self.cluster.to_wire() if self.cluster else None,
            "canary": self.canary.last.to_wire() if self.canary.last else None,
        }

    def _families(self) -> Iterable[Metric]:
        return families(self.status(), self.link_stats(), asyncio.get_running_loop().time())

    async def _status_verb(self, args: dict[str, Any]) -> dict[str, Any]:
        return self.status()

    async def _plan_verb(self, args: dict[str, Any]) -> dict[str, Any]:
        return self.plan_wire()

    def plan_wire(self) -> dict[str, Any]:
        """The plan as `rayfwd plan` reads it."""
        head = self.node_named("head")
        return {
            "own": None if self.own is None else self.own.to_wire(),
            "head": None if head is None else head.to_wire(),
            "nodes": [node.to_wire() for node in self.nodes],
            "network": self.config.hub.network,
            "ride_through": self.config.ride_through,
        }

    async def _notify(self) -> None:
        """Keep the service manager told: READY once, STATUS whenever it changes."""
        while True:
            if not self._ready_said and not self.waiting_for():
                self._ready_said = True
                log.info("rayfwd_ready", node=self.config.name, listeners=self.listeners.open)
                self._tell("READY=1")
            summary = self.summary()
            if summary != self._notified:
                self._notified = summary
                self._tell(f"STATUS={summary}")
            self._changed.clear()
            await self._changed.wait()

    def _tell(self, line: str) -> None:
        self._notifier.send(line)


def _later(seconds: float, function: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, function)
