"""Runs a role in this process: control socket, service manager, metrics, reload, the end.

The order of ending matters: Ray first, while its connections still stand, then the streams.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any

from prometheus_client.core import Metric

from rayfwd import codes
from rayfwd.config import Config, ConfigError, load, split_host_port
from rayfwd.daemon import handover, reload
from rayfwd.daemon.canary_verb import CanaryVerb
from rayfwd.daemon.handover import Arrival
from rayfwd.daemon.health import Health
from rayfwd.daemon.history import History
from rayfwd.daemon.httpserver import Served
from rayfwd.daemon.lifetime import OWN_END, Front, Lifetime, Nobody
from rayfwd.daemon.metrics import MetricsService, families
from rayfwd.daemon.page import PageService
from rayfwd.daemon.role import Role
from rayfwd.daemon.trace_verb import TraceVerb
from rayfwd.daemon.watching import watch
from rayfwd.problems import ProblemError
from rayfwd.session.target import Target
from rayfwd.system import logs
from rayfwd.system.control import ControlServer
from rayfwd.system.fdpass import Packed
from rayfwd.system.logs import get_logger
from rayfwd.system.notify import Notifier
from rayfwd.system.restart_job import being_restarted
from rayfwd.system.steps import Steps
from rayfwd.system.watchdog import Late, Watchdog, late_loops
from rayfwd.transport.tracing import tracing
from rayfwd.watch.conditions import Finding

log = get_logger(__name__)


class Runtime:
    """Owns every task of the daemon. `run` works until SIGTERM, SIGINT or `stop`."""

    def __init__(
        self,
        role: Role,
        notifier: Notifier,
        arrival: Arrival | None,
        lifetime: Lifetime | None = None,
        front: Front | None = None,
    ) -> None:
        """`arrival`: what an earlier process of this node has left."""
        self.code = 0
        """The exit code, once it has ended."""
        self.again = False
        """When it stops, the next process takes the place of this one."""
        self.left: Packed | None = None
        """For the process that takes the place of this one."""
        self.health = Health(role)
        self._role = role
        self._node = role.node
        self._notifier = notifier
        self._arrival = arrival
        self._lifetime = lifetime or Lifetime()
        self._front = front or Nobody()
        self._asked = asyncio.Event()
        """It was told to stop."""
        self._steps: Steps | None = None
        """Of its end; None: it was not told to stop."""
        self._ends: float | None = None
        """By the loop's clock, when it is to have stopped; None: it takes what it takes."""
        self._notified = ""
        self._canary_verb = CanaryVerb(self._node.canary)
        self._watchdog = Watchdog(self._late, lambda: self.health.ready_said, notifier)
        config = self._node.config
        metrics = MetricsService(self._families)
        self._metrics = Served(metrics, _metrics_places(config), self._metrics_changed)
        self._history = History(role.links.now, lambda: self._page.at is not None)
        page = PageService(self.health.now, self._history, self._node.listeners.admission)
        self._page = Served(page, config.page_places, self._page_changed)

    # -- life ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Raises ProblemError when it cannot begin."""
        config = self._node.config
        if self._arrival is not None:
            self._node.listeners.inherit(self._arrival.listeners())
        tracing.follow(config.log.level)
        control = ControlServer(
            config.control_socket,
            {
                "status": self._status_verb,
                "plan": self._plan_verb,
                "forget": _not_a_head,
                "canary": self._canary_verb,
                "reload": self._reload_verb,
                "trace": TraceVerb(),
                "environment": self._environment_verb,
                **self._role.verbs(),
            },
        )
        self._node.changed()  # from here on, what is wrong is on the board
        await control.start()
        try:
            await self._work()
        finally:
            await control.close()
        log.info("rayfwd_stopped", node=config.name)

    async def _work(self) -> None:
        node, role = self._node, self._role
        asked = asyncio.create_task(self._asked.wait(), name="stop")
        parts = [
            _task(role.serve(self._arrival), "serve"),
            *(_task(work(), name) for name, work in node.parts().items()),
            _task(self._notify(), "notify"),
            _task(self._lifetime.run(lambda: self.health.ready_said, self._over), "lifetime"),
            _task(self._metrics.run(), "metrics"),
            _task(self._page.run(), "page"),
            _task(self._watchdog.run(), "watchdog"),
        ]
        watchers = node.watchers() | role.watchers() | {"history": self._history.run}
        # A fault of one of these ends no stream: it is logged, and the watcher is started again.
        looking = [_task(watch(name, work), name) for name, work in watchers.items()]
        left = False
        try:
            await asyncio.wait([asked, *parts], return_when=asyncio.FIRST_COMPLETED)
            self.health.stopping = True
            left = await self._finish()
        finally:
            if not left:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._ends):
                        self._begin("link")
                        await role.end()
                        self._begin("overlay")
                        await node.overlay.close()
            elif self.again:
                node.overlay.pass_on(os.environ)
            self._begin("rest")
            for task in [asked, *parts, *looking]:
                task.cancel()
            await self._canary_verb.close()
            results = await asyncio.gather(*parts, *looking, return_exceptions=True)
            await node.connector.close()
            node.claim.close()
        for result in results:
            if isinstance(result, Exception):
                raise result  # a fault of ours ends the daemon loudly; the service restarts it

    async def _finish(self) -> bool:
        """End what ends while connections stand. True: these are left to another process."""
        if self.again:
            self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        else:
            self._notifier.send("STOPPING=1")
            if not self._asked.is_set():
                return False
            if not await being_restarted(os.environ):
                self._role.leaving()
                self._front.shown(self.health.summary())
                await self._node.ray.stop(self._begin)
                return False
        if self._arrival is not None:
            await self._arrival.settled()
        await self._node.ray.leave()
        config = self._node.config
        try:
            if not self.again and not handover.can_keep(self._notifier):
                raise OSError("the service manager keeps no descriptors (FileDescriptorStoreMax=)")
            self.left = await handover.leave(self._role, config.role, config.name)
            if not self.again:
                handover.keep(self.left, self._notifier)
        except OSError as exc:
            log.error("handover_failed", cause=str(exc), remedy=handover.RESET)
            return False
        return True

    def stop(self, why: str) -> None:
        """End in order; `why` is the signal's name."""
        if not self._asked.is_set():
            log.info("rayfwd_stopping", signal=why)
            if (within := self._node.config.stop_timeout) is not None:
                self._ends = asyncio.get_running_loop().time() + within - OWN_END
            self._steps = Steps("asked")
            self._front.stopping(self._node.ray.kill_now, self._steps, self.code)
        self._asked.set()

    def _begin(self, step: str) -> None:
        """Of an end that was asked for, this is next; docs/join.md has the steps."""
        if self._steps is not None:
            self._steps.begin(step)

    def _over(self, why: str, code: int) -> None:
        """The time that it was given is over."""
        if code and not self._asked.is_set():
            self.code = code
            log.error("not_ready_in_time", option=why, cause=self.health.summary())
        self.stop(why)

    def restart(self) -> None:
        """End, and leave everything to the process that takes the place of this one."""
        if not self._asked.is_set():
            log.info("rayfwd_restarting", signal="SIGUSR2")
            self.again = True
        self._asked.set()

    def _late(self) -> list[Late]:
        loops = [*self._node.loops(), *self._role.loops()]
        return late_loops(loops, self._role.muxes().values())

    # -- another file --------------------------------------------------------------------

    def reload(self) -> dict[str, Any]:
        """Read the file again. A mistake in it leaves everything as it was."""
        ready = self.health.ready_said
        if ready:
            self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            return self._reload()
        finally:
            if ready:
                self._notifier.send("READY=1")

    def _reload(self) -> dict[str, Any]:
        path = self._node.config.path
        try:
            new = reload.merge(self._node.config, load(path))
            if new.changed:
                self._role.take_config(new.config)
        except (ConfigError, ProblemError) as exc:
            mistakes = exc.problems if isinstance(exc, ConfigError) else [exc.problem.cause]
            for mistake in mistakes:
                log.error(
                    "config_refused",
                    file=str(path),
                    mistake=mistake,
                    remedy="correct the file and run `rayfwd reload` again; the previous "
                    "configuration stays in force",
                )
            return {"mistakes": [f"{path}: {mistake}" for mistake in mistakes]}
        log.info("config_reloaded", file=str(path), changed=list(new.changed))
        if new.kept:
            remedy = "restart rayfwd (`systemctl restart rayfwd`) for these keys to take effect"
            log.warning("config_kept", kept=list(new.kept), remedy=remedy)
        if new.changed:
            logs.setup(new.config.log)
            tracing.follow(new.config.log.level)
            self._metrics.move(_metrics_places(new.config))
            self._page.move(new.config.page_places)
        return {"changed": list(new.changed), "kept": list(new.kept)}

    # -- seeing it -----------------------------------------------------------------------

    def _families(self) -> Iterable[Metric]:
        now = asyncio.get_running_loop().time()
        return families(self.health.now(), self._role.links.stats(), now)

    def _metrics_changed(self) -> None:
        name, problem = self._node.config.name, self._metrics.problem
        self._node.board.put_all("metrics", [Finding(name, problem)] if problem else [], quiet=True)
        self._node.news.set()

    def _page_changed(self) -> None:
        node, problem, at = self._node, self._page.problem, self._page.at
        node.page = None if at is None else Target(*split_host_port(at))
        found = [Finding(node.config.name, problem)] if problem else []
        node.board.put_all("page", found, quiet=True)
        node.news.set()

    async def _status_verb(self, args: dict[str, Any]) -> dict[str, Any]:
        return self.health.now().to_wire()

    async def _plan_verb(self, args: dict[str, Any]) -> dict[str, Any]:
        return self._node.view.to_wire()

    async def _environment_verb(self, args: dict[str, Any]) -> dict[str, Any]:
        return dict(self._node.driver_environment())

    async def _reload_verb(self, args: dict[str, Any]) -> dict[str, Any]:
        return self.reload()

    async def _notify(self) -> None:
        """Keep the service manager told: READY once, STATUS whenever it changes."""
        while True:
            if not self.health.ready_said and not self.health.waiting_for():
                self.health.ready_said = True
                node = self._node
                log.info("rayfwd_ready", node=node.config.name, listeners=node.listeners.open)
                self._notifier.send("READY=1")
                self._front.ready(self.health.now())
            summary = self.health.summary()
            if summary != self._notified:
                self._notified = summary
                self._notifier.send(f"STATUS={summary}")
                self._front.shown(summary)
            self._node.news.clear()
            await self._node.news.wait()


def _metrics_places(config: Config) -> list[str]:
    return [] if config.metrics.listen is None else [config.metrics.listen]


def _task(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    return asyncio.create_task(work, name=name)


async def _not_a_head(args: dict[str, Any]) -> dict[str, Any]:
    raise codes.NOT_A_HEAD.error("this node is a worker", "run this on the head: it has the roster")
