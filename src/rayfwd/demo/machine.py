"""A machine for the demo, seen from outside: made, told what to start, and ended.

What happens inside is in `machine_init.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.problems import Problem, ProblemError

MAKING_SECONDS = 15.0
"""Seconds until the machine says that it is up."""
ENDING_SECONDS = 20.0
"""Seconds that the kernel may take to end all processes of a machine."""

_INIT = Path(__file__).with_name("machine_init.py")
_SETTINGS = Path("/proc/sys")


class DemoMachine:
    """One machine. `close` ends everything in it; so does the death of this process."""

    def __init__(self, name: str, folder: Path, keep: Sequence[Path], shm: str) -> None:
        """`folder` (made here) holds its private files; `keep` stays visible in its `/tmp`.

        `shm` is the size of its `/dev/shm`, as tmpfs takes it (`300m`).
        """
        self.name = name
        self.folder = folder
        self.interfaces: list[str] = []
        self.own_user_namespace = False
        self._keep = keep
        self._shm = shm
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._log: Any = None
        self._up: asyncio.Future[Mapping[str, Any]] | None = None
        self._exits: dict[str, asyncio.Future[int]] = {}
        self._listed: asyncio.Future[list[str]] | None = None

    async def start(self) -> None:
        """Make it. Raises ProblemError `namespaces_forbidden` or `machine_failed`."""
        temporary = self.folder / "tmp"
        temporary.mkdir(parents=True)
        spec = {
            "name": self.name,
            "private": {"/tmp": str(temporary)},
            "keep": [str(path) for path in self._keep],
            "shm": self._shm,
        }
        self._up = asyncio.get_running_loop().create_future()
        self._log = await asyncio.to_thread((self.folder / "init.log").open, "wb")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S"),
            str(_INIT),
            json.dumps(spec),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C at the terminal is for us to act on
        )
        self._reader = asyncio.create_task(self._read(), name=f"machine {self.name}")
        try:
            async with asyncio.timeout(MAKING_SECONDS):
                said = await self._up
        except TimeoutError:
            raise self._failed(f"it did not come up in {MAKING_SECONDS:.0f} s") from None
        if said["event"] == "failed":
            raise ProblemError(why_forbidden(said["errno"], said["cause"]))
        self.interfaces = list(said["interfaces"])
        self.own_user_namespace = bool(said["own_user_namespace"])

    def run(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], out: Path, log: Path
    ) -> asyncio.Future[int]:
        """Start a process in it; the future is its exit code, negative where a signal ended it."""
        exited = self._exits[name] = asyncio.get_running_loop().create_future()
        files = {"out": str(out), "log": str(log)}
        self._order({"do": "start", "name": name, "argv": list(argv), "env": dict(env), **files})
        return exited

    def signal(self, name: str, number: signal.Signals) -> None:
        """Signal a process that `run` started; one that has ended is left alone."""
        self._order({"do": "signal", "name": name, "signal": int(number)})

    async def processes(self) -> list[str]:
        """The command lines of everything that runs in it now. Raises ProblemError."""
        self._listed = asyncio.get_running_loop().create_future()
        self._order({"do": "list"})
        try:
            async with asyncio.timeout(MAKING_SECONDS):
                return await self._listed
        except TimeoutError:
            raise self._failed("it does not answer") from None

    async def close(self) -> None:
        """End everything in it. Returns when it is gone; may be called again."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(ENDING_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()  # it kills the first process and waits for it
            await process.wait()
        if self._reader is not None:
            await self._reader
        self._log.close()

    def _order(self, order: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            match said["event"]:
                case "up" | "failed":
                    self._settle(self._up, said)
                case "exited":
                    self._settle(self._exits.get(said["name"]), said["code"])
                case "processes":
                    self._settle(self._listed, said["names"])
        # It has gone, and everything in it.
        gone = self._failed("it ended by itself")
        for future in (self._up, self._listed, *self._exits.values()):
            if future is not None and not future.done():
                future.set_exception(gone)
                future.exception()  # seen: nobody may be waiting any more

    @staticmethod
    def _settle(future: asyncio.Future[Any] | None, value: Any) -> None:
        if future is not None and not future.done():
            future.set_result(value)

    def _failed(self, what: str) -> ProblemError:
        try:
            said = (self.folder / "init.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            said = []
        cause = f"the machine {self.name}: {what}{f' ({said[-1]})' if said else ''}"
        return codes.MACHINE_FAILED.error(cause, "try again, or run it as root")


def why_forbidden(number: int, cause: str) -> Problem:
    """The problem behind a refused step, with the remedy that fits this host."""
    remedies = []
    if _setting("kernel/apparmor_restrict_unprivileged_userns") == 1:
        remedies.append("`sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`")
    if _setting("kernel/unprivileged_userns_clone") == 0:
        remedies.append("`sudo sysctl kernel.unprivileged_userns_clone=1`")
    if number == errno.ENOSPC or _setting("user/max_user_namespaces") == 0:
        remedies.append("`sudo sysctl user.max_user_namespaces=10000`")
    if os.geteuid() != 0:
        remedies.append("run it as root")
    if os.geteuid() == 0 or _in_a_container():
        remedies.append(
            "in a container, start the container with `--privileged`, or run the demo outside of it"
        )
    return codes.NAMESPACES_FORBIDDEN.problem(
        "the demo makes two machines out of Linux namespaces, but this user may not "
        f"create any here: {cause}",
        "; or ".join(remedies),
    )


def _setting(name: str) -> int | None:
    try:
        return int((_SETTINGS / name).read_text())
    except (OSError, ValueError):
        return None


def _in_a_container() -> bool:
    return any(Path(p).exists() for p in ("/.dockerenv", "/run/.containerenv"))
