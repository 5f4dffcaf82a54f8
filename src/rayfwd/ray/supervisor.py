"""Keeps Ray running on this machine as the plan says: start, adopt, watch, restart, stop.

    waiting   no plan yet, or (worker) the link is down      -> starting, by_hand, up
    starting  `ray start` runs and has not said that it is up -> up, failed
    up        the raylet lives                                -> failed, stopping
    failed    waits to try again; `problem` says what happened -> starting, up
    by_hand   ray.start = false and no raylet of ours is seen -> up
    stopping  ours is being ended                             -> starting, off
    off       stopped

One task owns all of it (`run`); `set_plan` and `set_link_up` only leave a note and wake it.
A Ray that somebody else started on our address is watched and never ended.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config
from rayfwd.problems import Code, Problem, ProblemError
from rayfwd.ray import procfs
from rayfwd.ray.install import Versions
from rayfwd.ray.launcher import Launcher, launcher_of
from rayfwd.ray.process import RayProcess, find_foreign, session_dir_of, started_by
from rayfwd.ray.starter import BeforeStart, RayWanted, Starter
from rayfwd.ray.token import RayAuth
from rayfwd.system import setting
from rayfwd.system.backoff import Backoff
from rayfwd.system.coalesce import end_of_pause
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.logs import get_logger
from rayfwd.system.steps import Begin, no_step

State = Literal["waiting", "starting", "up", "stopping", "failed", "by_hand", "off"]

START_INTERVAL = 0.5
"""Seconds between two looks at our processes and their output while Ray starts."""

WATCH_INTERVAL = 1.0
"""Seconds between two looks at them once it is up."""

BY_HAND_INTERVAL = 2.0
"""Seconds between two searches of /proc for a raylet that somebody starts by hand."""

START_TIMEOUT = 180.0
"""Seconds `ray start` may take; on a slow disk its first import alone can take one minute."""

REPORT_TIMEOUT = 2.5
"""Seconds for `ray start`, which looks once a second, to say how its child ended."""

BACKOFF_FIRST = 1.0
BACKOFF_LAST = 60.0
"""Seconds between starts of a Ray that does not come up: the first pause, and the longest."""
GOOD_RUN_SECONDS = 300.0
"""Seconds of being up after which the next failure counts as the first."""

TURN_TIMEOUT = 60.0
"""Seconds that a turn of the loop may take more than it waits, for the watchdog."""

BUSY_TURN_TIMEOUT = 300.0
"""The same where it starts or ends Ray: the checks before, Ray's own drain time."""

REJOIN_SECONDS = 5.0
"""Seconds that Ray may take to end where the Ray that it belongs to is gone, its tasks with it."""

REDIS_VARIABLE = "RAY_REDIS_ADDRESS"
"""Where it is set, the GCS keeps its tables in a Redis, and raylets outlive it."""

SHOWN_LINES = 6

_EXITED = re.compile(r" -- (\w+) \[exit code=-?\d+\]$")
"""How `ray start --block` says which of its children has failed (Ray 2.9 to 2.60)."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RayNow:
    """What is known of Ray on this machine."""

    state: State
    since: float
    """Seconds since the epoch, when that began."""
    versions: Versions | None = None
    pid: int | None = None
    """Of our `ray start`; of the raylet where Ray is not ours."""
    adopted: bool = False
    """Ray ran already when we came."""
    restarts: int = 0
    """How often Ray was started again after it had failed, or for a changed plan."""
    problem: Problem | None = None
    """What kept Ray from running last; None while it is up."""
    command: str | None = None
    """As a shell line, secrets blanked; by hand: what is to be run."""


class RaySupervisor:
    """Owns Ray on this machine. `on_change` is called in the loop after every change of `now`."""

    def __init__(
        self,
        config: Config,
        network: str,
        on_change: Callable[[], None],
        launcher: Launcher | None = None,
        before_start: BeforeStart | None = None,
    ) -> None:
        """`launcher`: None is the one that the environment names."""
        self.now = RayNow("waiting", time.time())
        self._launcher = launcher or launcher_of(os.environ)
        self._starter = Starter(config, network, self._launcher, before_start)
        self._config = config
        self._on_change = on_change
        self._wanted: RayWanted | None = None
        self._link_up = True
        self._head_start: str | None = None
        """Which start of the head's Ray there is to join; None: not known."""
        self._stopping = False
        self._wake = asyncio.Event()
        self.heartbeat = Heartbeat("ray")
        self._inner: asyncio.Task[None] | None = None
        self._process: RayProcess | None = None
        self._last_logged: tuple[Code, str] | None = None
        """Code and text, without numbers, of the problem that was logged last."""
        self._last_command: str | None = None
        self._backoff = Backoff(BACKOFF_FIRST, BACKOFF_LAST)
        self._starts = 0

    @property
    def environment(self) -> dict[str, str] | None:
        """What Ray's own command-line tools need here; None before the plan is known."""
        wanted = self._wanted
        return self._starter.environment(wanted) if wanted else None

    @property
    def by_hand(self) -> bool:
        """Somebody else starts Ray here, or has started the one that runs: we do not end it."""
        if self.now.state == "up":
            return self._process is None
        return self.now.state == "by_hand"

    @property
    def session_dir(self) -> str | None:
        """Ray's directory of this run; None where it is not known."""
        return self._process.session_dir if self._process is not None else None

    def set_plan(
        self,
        own: NodePlan,
        head: NodePlan,
        head_versions: Versions | None,
        ride_through: float,
        network: str | None = None,
        auth: RayAuth | None = None,
        interface: str | None = None,
    ) -> None:
        """What Ray is to be, and the plan's network where the hub names another than expected.
        `interface`: the one that has the node's address, if there is one.

        A change that reaches Ray restarts it; any other does not.
        """
        wanted = self._starter.wanted(
            own, head, head_versions, ride_through, network, auth, interface
        )
        if wanted != self._wanted:
            self._wanted = wanted
            self._wake.set()

    def set_link_up(self, up: bool) -> None:
        """Of a worker: link and the head's Ray. While False, Ray is not started; one that runs is
        left alone."""
        if up != self._link_up:
            self._link_up = up
            self._wake.set()

    def set_head_start(self, start: str | None) -> None:
        """Of a worker: which start of the head's Ray is up. Ours is started again where it belongs
        to an earlier one, whose nodes the new one does not know; None: not known."""
        if start != self._head_start:
            self._head_start = start
            self._wake.set()

    @property
    def own_start(self) -> str | None:
        """Which start of Ray this is, for the workers of a head. None: not known, or its nodes are
        kept in a Redis, from where the next start has them."""
        redis = self._config.ray.env.get(REDIS_VARIABLE, os.environ.get(REDIS_VARIABLE))
        if self._process is None or redis:
            return None
        return self._process.start

    async def run(self) -> None:
        """Until cancelled or stopped. Ray goes on when this is cancelled."""
        if self._stopping:
            return
        self._inner = asyncio.create_task(self._loop(), name="ray-loop")
        try:
            await asyncio.wait({self._inner})
        finally:
            self._inner.cancel()
        if not self._inner.cancelled():
            self._inner.result()

    async def stop(self, begin: Begin = no_step) -> None:
        """End our own Ray in order, within its drain time, and all that came of it. `begin`: what
        is told of the steps, so that whoever waits can say where the time went."""
        began = time.monotonic()
        begin("ray_watch")
        await self._cease()
        if self._process is None:
            self._process = await self._recover()
        if self._process is not None:
            within = self._starter.stop_within
            spent = time.monotonic() - began
            left = None if within is None else max(0.0, within - spent)
            await self._end("stop", within=left, begin=begin)
        elif self.now.state == "up":
            _log.info("ray_left_running", pid=self.now.pid, ours=False)
        await asyncio.to_thread(self._launcher.done)
        self._set(state="off", pid=None)

    def kill_now(self) -> int:
        """Kill what there is of our own Ray, and wait for nothing; how many processes. From any
        thread."""
        process = self._process
        return 0 if process is None else process.kill_now()

    async def leave(self) -> None:
        """Watch no more. Ray goes on, and the next daemon adopts it."""
        await self._cease()
        if self.now.pid is not None:
            _log.info("ray_left_running", pid=self.now.pid, ours=self._process is not None)

    async def _cease(self) -> None:
        self._stopping = True
        self.heartbeat.idle()
        if self._inner is not None and not self._inner.done():
            self._inner.cancel()
            await asyncio.wait({self._inner})

    async def _recover(self) -> RayProcess | None:
        state_dir = self._config.state_dir
        return await asyncio.to_thread(RayProcess.recover, state_dir, self._launcher)

    # The loop

    async def _loop(self) -> None:
        self._process = await self._recover()
        while True:
            wanted = self._wanted
            if wanted is None:
                await self._sleep(None)
                continue
            try:
                await self._one_life(wanted)
            except ProblemError as exc:
                await self._failed(exc.problem)

    async def _one_life(self, wanted: RayWanted) -> None:
        """Ray from its start or adoption to its end. Raises ProblemError with what went wrong;
        returns where the plan changed or something has to be waited for first."""
        self.heartbeat.beat(BUSY_TURN_TIMEOUT)
        process = self._process
        if process is not None and not process.alive():
            _log.info("ray_remains_found", pid=process.pid)
            await self._end("dead", drain=False)
            process = None
        if process is not None and process.record.digest != wanted.digest:
            _log.info("ray_restarting", reason="the plan or the configuration changed")
            await self._end("changed")
            process = None
        if process is not None:
            _log.info("ray_adopted", pid=process.pid, version=process.record.ray, ours=True)
            self._starts += 1
            self._set(
                state="starting",
                versions=process.versions,
                pid=process.pid,
                adopted=True,
                command=process.record.command,
            )
            await self._watch(process, wanted)
            return
        foreign = await asyncio.to_thread(find_foreign, wanted.plan.own.address)
        if foreign is not None:
            self._check_adoptable(foreign)
            await self._watch_foreign(foreign, wanted)
        elif not self._config.ray.start:
            await self._wait_for_hand(wanted)
        elif not self._link_up:
            self._set(state="waiting", pid=None)
            await self._sleep(None)
        else:
            process = await self._start(wanted)
            if process is not None:
                await self._watch(process, wanted)

    def _check_adoptable(self, raylet: procfs.Process) -> None:
        """Raises ProblemError where another rayfwd has started it, for a cluster of its own."""
        theirs = started_by(raylet)
        if theirs is not None and theirs != self._config.state_dir:
            raise codes.RAY_OF_ANOTHER.error(
                f"a Ray with this node's address runs here (pid {raylet.pid}); another rayfwd "
                f"started it, whose state directory is {theirs}",
                f"start that rayfwd again, or end its Ray (kill {raylet.parent}); to run both "
                f"clusters here, change {setting.keys('hub.network', 'hub.port_base')} and Ray's "
                "ports on the head of one of them",
            )

    async def _start(self, wanted: RayWanted) -> RayProcess | None:
        """None: meanwhile the link has gone, or the plan has changed."""
        install = await self._starter.check(wanted)
        if not self._link_up or self._plan_changed(wanted):
            return None
        try:
            process = self._starter.start(wanted, install, joined=self._head_start)
        except ProblemError as exc:
            if exc.problem.code == codes.KEEPER_SILENT:  # it may have been started all the same
                self._process = await self._recover()
            raise
        self._process = process
        self._starts += 1
        command = process.record.command
        self._set(
            state="starting",
            versions=install.versions,
            pid=process.pid,
            adopted=False,
            command=command,
            restarts=self._starts - 1,
        )
        _log.info(
            "ray_starting",
            pid=process.pid,
            version=install.versions.ray,
            python=install.versions.python,
            command=command,
        )
        return process

    async def _watch(self, process: RayProcess, wanted: RayWanted) -> None:
        """Until our Ray has ended or has to be ended."""
        began = time.monotonic()
        up_at: float | None = None
        while True:
            process.log_output()
            if self._plan_changed(wanted):
                _log.info("ray_restarting", reason="the plan or the configuration changed")
                await self._end("changed")
                return
            if up_at is not None and self._belongs_to_another(process):
                _log.info("ray_restarting", reason="the head's Ray was restarted")
                await self._end("head", within=REJOIN_SECONDS)
                return
            running = process.alive()
            if up_at is None and running:
                await asyncio.to_thread(process.find_daemons)
                if await self._is_up(process, wanted):
                    up_at = time.monotonic()
                    process.mark_ready()
                    self._last_logged = None
                    self._set(state="up", problem=None)
                    _log.info("ray_started", pid=process.pid, seconds=round(up_at - began, 1))
            dead = process.dead_daemons()
            late = up_at is None and time.monotonic() - began > START_TIMEOUT
            if not running or dead or late:
                break
            await self._sleep(START_INTERVAL if up_at is None else WATCH_INTERVAL)
        if up_at is not None and time.monotonic() - up_at > GOOD_RUN_SECONDS:
            self._backoff.reset()
        if dead:
            await process.wait(REPORT_TIMEOUT)
        process.log_output()
        process.log.failed()
        problem = _ending(process, dead, up_at is not None, late, self._launcher.log)
        _log.warning("ray_exited", pid=process.pid, exit_code=process.exit_code, dead=dead)
        await self._end("dead", drain=False)
        raise ProblemError(problem)

    def _belongs_to_another(self, process: RayProcess) -> bool:
        """Whether it joined an earlier start of the head's Ray. Its raylet would find that out by
        itself, half a minute or more later (`docs/faults.md`)."""
        if self._head_start is None:
            return False
        if process.record.joined is None:
            process.mark_joined(self._head_start)
        return process.record.joined != self._head_start

    async def _is_up(self, process: RayProcess, wanted: RayWanted) -> bool:
        if not process.said_started or "raylet" not in process.daemons:
            return False
        if wanted.plan.own.role == "worker":
            return True
        return await _accepts(wanted.plan.own.address, wanted.plan.own.services["gcs"])

    async def _watch_foreign(self, raylet: procfs.Process, wanted: RayWanted) -> None:
        with suppress(ProblemError):
            self._set(versions=(await self._starter.find(wanted)).versions)
        _log.info("ray_adopted", pid=raylet.pid, ours=False, session_dir=session_dir_of(raylet))
        self._last_logged = None
        self._backoff.reset()
        self._starts += 1
        self._set(state="up", pid=raylet.pid, adopted=True, problem=None)
        while procfs.is_alive(raylet):
            if self._plan_changed(wanted):
                return
            await self._sleep(WATCH_INTERVAL)
        _log.warning("ray_exited", pid=raylet.pid, dead=["raylet"])
        if self._config.ray.start:
            raise codes.RAY_DIED.error(
                f"the raylet (pid {raylet.pid}), which rayfwd did not start, has ended",
                "nothing: rayfwd now starts Ray itself",
            )

    async def _wait_for_hand(self, wanted: RayWanted) -> None:
        install = None
        with suppress(ProblemError):
            install = await self._starter.find(wanted)
        command = self._starter.by_hand(wanted, install)
        self._set(
            state="by_hand",
            pid=None,
            adopted=False,
            problem=None,
            command=command,
            versions=install.versions if install else None,
        )
        if self._last_command != command:
            self._last_command = command
            _log.info("ray_start_by_hand", command=command)
        while not self._plan_changed(wanted):
            await self._sleep(BY_HAND_INTERVAL)
            if await asyncio.to_thread(find_foreign, wanted.plan.own.address) is not None:
                return

    async def _failed(self, problem: Problem) -> None:
        delay = self._backoff.next()
        self._set(state="failed", problem=problem, pid=None)
        logged = (problem.code, re.sub(r"[0-9a-f]*\d[0-9a-f]*", "#", problem.cause))
        if logged != self._last_logged:
            self._last_logged = logged
            _log.error(
                problem.code.event,
                cause=problem.cause,
                remedy=problem.remedy,
                retry_in_seconds=delay,
            )
        await self._sleep(delay)

    async def _end(
        self,
        reason: str,
        drain: bool = True,
        within: float | None = None,
        begin: Begin = no_step,
    ) -> None:
        process = self._process
        if process is None:
            return
        self.heartbeat.beat(BUSY_TURN_TIMEOUT + process.record.drain)
        if drain:
            _log.info("ray_stopping", pid=process.pid, reason=reason)
            self._set(state="stopping")
        killed = await process.end(process.log_output, drain, within, begin)
        process.log_output(everything=True)
        if drain:
            _log.info("ray_stopped", pid=process.pid, exit_code=process.exit_code, killed=killed)
        self._process = None

    # Small parts

    def _plan_changed(self, wanted: RayWanted) -> bool:
        return self._wanted is not None and self._wanted.digest != wanted.digest

    async def _sleep(self, seconds: float | None) -> None:
        """For so long, or until a note was left."""
        if seconds is None:
            self.heartbeat.idle()
        else:
            self.heartbeat.beat(seconds + TURN_TIMEOUT)
        # Not wait_for: up to Python 3.11 it loses a cancellation that comes with the note.
        with suppress(TimeoutError):
            async with asyncio.timeout_at(None if seconds is None else end_of_pause(seconds)):
                await self._wake.wait()
        self._wake.clear()
        self.heartbeat.beat(BUSY_TURN_TIMEOUT)

    def _set(self, **changes: Any) -> None:
        now = replace(self.now, **changes)
        if now.state != self.now.state:
            now = replace(now, since=time.time())
        if now != self.now:
            self.now = now
            self._on_change()


def _ending(process: RayProcess, dead: list[str], up: bool, late: bool, log: str | None) -> Problem:
    output = " | ".join(process.last_lines[-SHOWN_LINES:]) or "none"
    logs = f"{process.session_dir}/logs" if process.session_dir else "Ray's session directory"
    if up:
        # `ray start --block` ends all where one of its children fails: that one is the cause.
        first = [name for line in process.last_lines for name in _EXITED.findall(line)]
        what = " and ".join(first or dead) or "`ray start`"
        code = "" if process.exit_code is None else f" (`ray start`: {_exit(process.exit_code)})"
        return codes.RAY_DIED.problem(
            f"Ray's {what} ended{code}; its last output: {output}",
            f"read raylet.out, raylet.err and gcs_server.out in {logs}"
            + (f", and at {log}" if log else "")
            + "; rayfwd starts Ray again by itself",
        )
    if late:
        cause = f"`ray start` did not finish within {START_TIMEOUT:.0f} s"
    elif process.exit_code is None:
        cause = f"{' and '.join(dead) or '`ray start`'} ended while Ray was starting"
    else:
        cause = f"`ray start` ended: {_exit(process.exit_code)}"
    return codes.RAY_START_FAILED.problem(
        f"{cause}; its last output: {output}",
        f"correct what the output names (more in {logs}); rayfwd tries again by itself",
    )


def _exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


async def _accepts(address: str, port: int) -> bool:
    try:
        async with asyncio.timeout(2.0):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True
