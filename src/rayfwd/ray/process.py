"""One `ray start --block` of ours: starting it, knowing it again, its output, ending all of it.

Ray must outlive rayfwd: it runs in a session of its own and writes to a file, not to a pipe, so
that neither a signal nor the end of the daemon reaches it (`launcher.py`: whose child it is).
`ray.json` in the state directory tells the next daemon what runs. Everything that Ray starts is in
that session or has inherited the variable RAYFWD_NODE, whose value is used once: that is ours to
end, whoever its parent is by now, and nothing else is.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rayfwd.ray import procfs
from rayfwd.ray.commandline import DRAIN_VARIABLE, MARKER
from rayfwd.ray.install import Versions
from rayfwd.ray.launcher import OUTPUT, DirectLauncher, Launcher
from rayfwd.ray.output import OutputLog
from rayfwd.system.files import read_regular, replace_file
from rayfwd.system.logs import get_logger
from rayfwd.system.steps import Begin, no_step

_log = get_logger(__name__)

RECORD = "ray.json"

STARTED = "Ray runtime started"
"""What `ray start` prints when every process of the node is up (Ray 2.9 to 2.60)."""

DAEMONS = ("raylet", "gcs_server")
"""Children of `ray start` without which the node is dead; the second on a head only. `ray start
--block` goes on blocking when one of them exits with 0 or by SIGTERM."""

DRAIN_TIMEOUT = 30.0
"""Seconds that a Ray which drains gives its tasks after SIGTERM; older ones end at once."""

DRAIN_MARGIN = 20.0
"""Seconds `ray start` may take besides, to end its children one by one."""

STARTING_TIMEOUT = 5.0
"""Seconds for a `ray start` that is not done: it has no tasks to end, and now and then the signal
is lost on it while it waits for its children (seen with 2.60.0)."""

SETTLE_TIMEOUT = 3.0
"""Seconds for workers to notice that their raylet has gone, and again after SIGTERM."""

KILL_TIMEOUT = 10.0
KILL_RESERVE = 1.0
"""Seconds that are kept for the last step, where there is a bound for all of them."""
KEEP_LINES = 12
"""Lines of output that are kept for a message."""
OUTPUT_LIMIT = 16 * 1024 * 1024
"""Bytes from which the file of Ray's output is emptied, once all of it is in the log."""
READ_SIZE = 256 * 1024
"""Bytes of it that are read at once, and of a line at most."""

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


@dataclass(frozen=True, slots=True)
class RayRecord:
    """What `ray.json` holds."""

    token: str
    digest: str
    ray: str
    python: str
    command: str
    """For display; no secrets."""
    drain: float
    """Seconds this Ray may take after SIGTERM to end its tasks."""
    boot: str
    pid: int = 0
    """Of `ray start`; 0 until it is known."""
    start: int = 0
    ready: bool = False
    offset: int = 0
    """Bytes of the output that the log has."""
    joined: str | None = None
    """Of a worker: which start of the head's Ray it joined; None: not known."""

    @classmethod
    def from_wire(cls, data: Any) -> RayRecord:
        """Raises ValueError for what is not a record."""
        try:
            return cls(
                token=str(data["token"]),
                digest=str(data["digest"]),
                ray=str(data["ray"]),
                python=str(data["python"]),
                command=str(data["command"]),
                drain=float(data["drain"]),
                boot=str(data["boot"]),
                pid=int(data["pid"]),
                start=int(data["start"]),
                ready=bool(data["ready"]),
                offset=int(data["offset"]),
                joined=None if data.get("joined") is None else str(data["joined"]),
            )
        except (KeyError, TypeError) as exc:
            raise ValueError(f"not a record of Ray: {exc!r}") from exc


class RayProcess:
    """Our own `ray start` and all that came of it. Not safe to share between tasks."""

    def __init__(self, state_dir: Path, record: RayRecord, launcher: Launcher) -> None:
        self._state_dir = state_dir
        self._launcher = launcher
        self.record = record
        self.exit_code: int | None = None
        """Of `ray start`, where its launcher knows; minus the signal's number if by a signal."""
        self.daemons: dict[str, procfs.Process] = {}
        """Those of `DAEMONS` seen so far."""
        self.session_dir: str | None = None
        self.last_lines: list[str] = []
        self.log = OutputLog(record.ready)
        self.said_started = record.ready
        """`ray start` reported that every process of the node is up."""
        self._main = procfs.Process(record.pid, 0, record.start, record.pid, "")
        self._partial = b""
        self._ended = False

    @classmethod
    def spawn(
        cls,
        argv: list[str],
        env: Mapping[str, str],
        state_dir: Path,
        *,
        digest: str,
        versions: Versions,
        command: str,
        launcher: Launcher,
        joined: str | None = None,
    ) -> RayProcess:
        """Start `argv`. Raises OSError where that, or writing the record, fails, and what
        `launcher` raises.

        There is no pause in it, so a task that is cancelled has started either nothing or all.
        """
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        record = RayRecord(
            token=secrets.token_hex(12),
            digest=digest,
            ray=versions.ray,
            python=versions.python,
            command=command,
            drain=_seconds(env.get(DRAIN_VARIABLE)),
            boot=_boot_id(),
            joined=joined,
        )
        # First the token: should we be killed right after the start, it finds what was started.
        _write(state_dir / RECORD, record)
        pid = launcher.spawn(argv, {**env, MARKER: record.token}, state_dir)
        seen = procfs.look_up(pid)
        found = replace(record, pid=pid, start=seen.start if seen else 0)
        process = cls(state_dir, found, launcher)
        process._save()
        return process

    @classmethod
    def recover(cls, state_dir: Path, launcher: Launcher | None = None) -> RayProcess | None:
        """What an earlier daemon left: the Ray of its record, which may be dead or half dead."""
        try:
            record = RayRecord.from_wire(json.loads(read_regular(state_dir / RECORD)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return (
                None  # nothing can be known of it; a running raylet is still found by its address
            )
        if record.boot != _boot_id():
            (state_dir / RECORD).unlink(missing_ok=True)
            return None
        process = cls(state_dir, record, launcher or DirectLauncher())
        process.find_daemons()
        return process

    @property
    def versions(self) -> Versions:
        return Versions(self.record.ray, self.record.python)

    @property
    def pid(self) -> int:
        return self.record.pid

    @property
    def start(self) -> str:
        """Which start of Ray this is: the same in every daemon that watches it."""
        return hashlib.sha256(self.record.token.encode()).hexdigest()[:16]

    def alive(self) -> bool:
        """Whether `ray start` runs. Learns its exit code once it does not."""
        if self.record.pid == 0 or self._ended:
            return False
        if procfs.is_alive(self._main):
            return True
        self._ended = True
        self.exit_code = self._launcher.exit_code(self.record.pid)
        return False

    def dead_daemons(self) -> list[str]:
        """Those that were seen and have gone."""
        return [name for name, p in self.daemons.items() if not procfs.is_alive(p)]

    def find_daemons(self) -> None:
        """Look for the daemons among the children. Blocks for some milliseconds."""
        for child in procfs.children(self.record.pid) if self.record.pid else []:
            if child.name in DAEMONS:
                self.daemons[child.name] = child
                if child.name == "raylet":
                    self.session_dir = session_dir_of(child) or self.session_dir

    def mark_ready(self) -> None:
        if not self.record.ready:
            self.record = replace(self.record, ready=True)
            self._save()

    def mark_joined(self, start: str) -> None:
        """Of a worker: it belongs to this start of the head's Ray."""
        if self.record.joined != start:
            self.record = replace(self.record, joined=start)
            self._save()

    def read_output(self, everything: bool = False) -> list[str]:
        """The lines that came since the last call; with `everything` also one that has no end."""
        path = self._state_dir / OUTPUT
        try:
            with path.open("r+b") as output:
                output.seek(self.record.offset + len(self._partial))
                data = self._partial + output.read(READ_SIZE)
                done = len(data) if everything else data.rfind(b"\n") + 1
                if len(data) - done >= READ_SIZE:  # a line without end must not grow for ever
                    done = len(data)
                offset = self.record.offset + done
                if offset >= OUTPUT_LIMIT and done == len(data) and not output.read(1):
                    output.truncate(0)  # the writer appends, so it goes on at the new end
                    offset = 0
        except OSError:
            return []
        self._partial = data[done:]
        if offset != self.record.offset:
            self.record = replace(self.record, offset=offset)
            with suppress(OSError):
                self._save()
        lines = clean_lines(data[:done])
        self.said_started = self.said_started or any(STARTED in line for line in lines)
        self.last_lines = (self.last_lines + lines)[-KEEP_LINES:]
        return lines

    def log_output(self, everything: bool = False) -> None:
        """Have the log tell of the lines that came."""
        self.log.add(self.read_output(everything), up=self.record.ready)

    async def wait(self, seconds: float) -> None:
        """Until `ray start` has ended, but no longer than that."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.1)

    async def end(
        self,
        on_output: Callable[[], None],
        drain: bool = True,
        within: float | None = None,
        begin: Begin = no_step,
    ) -> int:
        """End all of it; returns how many processes had to be killed.

        First SIGTERM to `ray start` and, with `drain`, the time its tasks may take; then whatever
        else came of it. `within`: seconds that all of it may take. `begin`: what is told of the
        steps. Removes the record once nothing is left.
        """
        ends = math.inf if within is None else time.monotonic() + within - KILL_RESERVE
        grace = (self.record.drain if drain else 0.0) + DRAIN_MARGIN
        if not self.said_started:
            grace = STARTING_TIMEOUT
        if self.alive():
            begin("ray_tasks" if self.said_started else "ray_start")
            procfs.send(self._main, signal.SIGTERM)
            deadline = min(time.monotonic() + grace, ends)
            while self.alive() and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
                on_output()
        steps: list[tuple[signal.Signals | None, float]] = [
            (None, SETTLE_TIMEOUT),
            (signal.SIGTERM, SETTLE_TIMEOUT),
            (signal.SIGKILL, KILL_TIMEOUT),
        ]
        begin("ray_processes")
        killed = 0
        left: list[procfs.Process] = []
        for number, wait in steps[1:] if self.alive() else steps:
            if time.monotonic() >= ends and number != signal.SIGKILL:
                continue
            left = await self._left()
            if number is not None:
                for process in left:
                    title = procfs.title(process)  # as long as it can be read
                    if procfs.send(process, number) and number == signal.SIGKILL:
                        killed += 1
                        _log.info("ray_process_killed", pid=process.pid, title=title)
            # The last step has what was kept for it.
            last = ends + KILL_RESERVE if number == signal.SIGKILL else ends
            deadline = min(time.monotonic() + wait, last)
            while left and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
                self.alive()  # reaps
                left = await self._left()
                if number == signal.SIGKILL:
                    for process in left:  # born of another in the meantime
                        procfs.send(process, number)
            if not left:
                break
        on_output()
        if not left:
            (self._state_dir / RECORD).unlink(missing_ok=True)
        return killed

    def kill_now(self) -> int:
        """Kill all of it, and wait for nothing; how many processes. Blocks for some
        milliseconds."""
        return sum(procfs.send(process, signal.SIGKILL) for process in self._there())

    async def _left(self) -> list[procfs.Process]:
        return await asyncio.to_thread(self._there)

    def _there(self) -> list[procfs.Process]:
        leader = self._main if self.record.pid and self.record.start else None
        marker = f"{MARKER}={self.record.token}"
        found = procfs.offspring(leader, marker)
        return [p for p in found if p.pid != os.getpid()]

    def _save(self) -> None:
        _write(self._state_dir / RECORD, self.record)


def clean_lines(data: bytes) -> list[str]:
    """Text lines without colours, progress bars' carriage returns and empty ones."""
    text = _ANSI.sub("", data.decode("utf-8", "replace"))
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [line for line in lines if line]


def session_dir_of(raylet: procfs.Process) -> str | None:
    """Where that node keeps its logs, from the raylet's command line."""
    return procfs.argument_of(raylet, "--session_dir")


def find_foreign(address: str) -> procfs.Process | None:
    """A raylet of our user on this machine that has `address`, whoever started it."""
    found = procfs.with_argument("raylet", f"--node_ip_address={address}")
    return found[0] if found else None


def started_by(raylet: procfs.Process) -> Path | None:
    """The state directory of the rayfwd that started that Ray, as its output tells; None: it was
    started otherwise, or that cannot be known."""
    if not procfs.has_variable(raylet, MARKER):
        return None
    output = procfs.output_of(raylet.parent)
    return output.parent if output is not None and output.name == OUTPUT else None


def _seconds(given: str | None) -> float:
    try:
        return max(0.0, float(given)) if given else DRAIN_TIMEOUT
    except ValueError:
        return DRAIN_TIMEOUT


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _write(path: Path, record: RayRecord) -> None:
    replace_file(path, json.dumps(asdict(record)).encode())
