"""The keeper: starts `ray start` for the daemon, reaps it, and ends it when it is itself ended.

A process of its own, in the unit `rayfwd-ray.service`, with the rights that Ray needs and no
network of its own. It knows nothing of plans and versions: the daemon says what to run, watches it
and ends it. It lives as long as Ray does, through restarts and upgrades of the daemon, so that an
old keeper and a new daemon must understand each other: verbs and their arguments are only added to.

    spawn {argv, env, state_dir} -> {pid} or {errno}
    exit_code {pid} -> {exit_code}: null while it runs, or where it was not started here
    done {} -> {}: the keeper ends, and what it still has of Ray in order before that
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfwd.ray.launcher import spawn
from rayfwd.ray.process import RayProcess
from rayfwd.system.control import ControlServer
from rayfwd.system.logs import get_logger
from rayfwd.system.notify import Notifier

REQUEST_LIMIT = 4 << 20
"""Bytes: an environment and its arguments may have 2 MiB (execve(2))."""

MOST_CODES = 64
"""Exit codes that are remembered."""

_log = get_logger(__name__)


class Children:
    """What was started here, as a `Launcher`."""

    log = None

    def __init__(self) -> None:
        self._codes: dict[int, int | None] = {}
        """By process id: the exit code, None while it runs."""
        self.state_dirs: set[Path] = set()

    def spawn(self, argv: Sequence[str], env: Mapping[str, str], state_dir: Path) -> int:
        pid = spawn(argv, env, state_dir)
        self._codes[pid] = None
        self.state_dirs.add(state_dir)
        for old in [pid for pid, code in self._codes.items() if code is not None][:-MOST_CODES]:
            del self._codes[old]
        _log.info("keeper_spawned", pid=pid)
        return pid

    def exit_code(self, pid: int) -> int | None:
        self.reap()  # its end may be known to others before SIGCHLD is handled here
        return self._codes.get(pid)

    def done(self) -> None: ...

    def reap(self) -> None:
        for pid in self.alive():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._codes[pid] = code = os.waitstatus_to_exitcode(status)
                _log.info("keeper_child_ended", pid=pid, exit_code=code)

    def alive(self) -> list[int]:
        return [pid for pid, code in self._codes.items() if code is None]


class Keeper:
    """`run` works until SIGTERM, SIGINT or `done`."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._children = Children()
        self._stop = asyncio.Event()
        self._notifier = Notifier()

    async def run(self) -> None:
        """Raises ProblemError where it cannot listen."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop, signal.Signals(number).name)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        verbs = {"spawn": self._spawn, "exit_code": self._exit_code, "done": self._done}
        server = ControlServer(self._socket, verbs, request_limit=REQUEST_LIMIT)
        await server.start()
        try:
            _log.info("keeper_listening", socket=str(self._socket))
            self._notifier.send("READY=1", "STATUS=no Ray runs")
            await self._stop.wait()
            self._notifier.send("STOPPING=1", "STATUS=ending")
        finally:
            await server.close()
        for state_dir in self._children.state_dirs:
            await self._end_ray(state_dir)

    async def _end_ray(self, state_dir: Path) -> None:
        process = await asyncio.to_thread(RayProcess.recover, state_dir, self._children)
        if process is None:
            return  # the daemon has ended it
        _log.info("ray_stopping", pid=process.pid, reason="the keeper was told to end")
        killed = await process.end(lambda: None)
        _log.info("ray_stopped", pid=process.pid, exit_code=process.exit_code, killed=killed)

    def _asked_to_stop(self, why: str) -> None:
        if not self._stop.is_set():
            _log.info("keeper_stopping", signal=why)
        self._stop.set()

    def _reap(self) -> None:
        self._children.reap()
        self._notify()

    def _notify(self) -> None:
        pids = ", ".join(map(str, self._children.alive()))
        self._notifier.send(f"STATUS=Ray runs (pid {pids})" if pids else "STATUS=no Ray runs")

    async def _spawn(self, args: dict[str, Any]) -> dict[str, Any]:
        try:
            pid = self._children.spawn(args["argv"], args["env"], Path(args["state_dir"]))
        except OSError as exc:
            return {"errno": exc.errno}
        self._notify()
        return {"pid": pid}

    async def _exit_code(self, args: dict[str, Any]) -> dict[str, Any]:
        return {"exit_code": self._children.exit_code(int(args["pid"]))}

    async def _done(self, args: dict[str, Any]) -> dict[str, Any]:
        self._asked_to_stop("done")
        return {}
