"""Asks the overlay's keeper: the service's, or one that the daemon starts as its child."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.cluster.plan import PRIVATE_NETWORKS
from rayfwd.network import overlay
from rayfwd.network.ruleset import Rules
from rayfwd.problems import Problem, ProblemError
from rayfwd.system import setting
from rayfwd.system.control import ask, converse

KEEPER = "RAYFWD_OVERLAY"
"""The environment variable that has the path of the keeper's socket."""
CHILD = "RAYFWD_OVERLAY_CHILD"
"""The environment variable by which a process that takes the place of another one knows the pipe
that keeps the other's child alive: `DESCRIPTOR PID`."""
SOCKET = "overlay.sock"
"""The child's, in the runtime directory."""
ANSWER_TIMEOUT = 30.0
"""Seconds for an answer: `ip` and `nft` are run for it."""
DIALLED_TIMEOUT = 45.0
"""Seconds in which it says what was dialled; it waits for less than that."""
START_TIMEOUT = 15.0
"""Seconds for a child to listen."""


START_SERVICE = "start the service rayfwd-net (as root: `systemctl start rayfwd-net`)"
"""What to do where the service does not answer."""


class OverlayClient:
    """The keeper at a socket."""

    def __init__(self, socket: Path, remedy: str = START_SERVICE) -> None:
        """`remedy`: what to do where it does not answer."""
        self._socket = socket
        self._remedy = remedy

    async def up(self, rules: Rules) -> None:
        """Raises ProblemError."""
        await self._ask("up", {"rules": rules.to_wire()})

    async def update(self, rules: Rules) -> None:
        """Raises ProblemError."""
        await self._ask("update", {"rules": rules.to_wire()})

    async def down(self) -> None:
        """Raises ProblemError."""
        await self._ask("down", {})

    async def found(self) -> dict[str, Any]:
        """What stands now. Raises ProblemError."""
        return await self._ask("found", {})

    async def beside(self) -> list[str]:
        """Other tables that see what this machine sends to itself; empty where it is not known, as
        of an older keeper."""
        try:
            return [str(table) for table in (await self._ask("beside", {}))["tables"]]
        except (ProblemError, KeyError, TypeError):
            return []

    async def dialled(self) -> list[tuple[str, int]] | None:
        """Wait for programs to dial ports that are not known to be open, and say which; empty: none
        did so far. None: the keeper does not come to know. Raises ProblemError."""
        answer = await converse(self._socket, "dialled", {}, DIALLED_TIMEOUT)
        try:
            places = answer["places"]
            return None if places is None else [(str(a), int(p)) for a, p in places]
        except (KeyError, TypeError, ValueError):
            return None

    async def decide(self, places: Iterable[tuple[str, int, bool]]) -> None:
        """Say whether they are open. Raises ProblemError."""
        await converse(self._socket, "decide", {"places": list(places)}, ANSWER_TIMEOUT)

    async def _ask(self, verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(ask, self._socket, verb, args, ANSWER_TIMEOUT)
        except ProblemError as exc:
            if exc.problem.code in {codes.OVERLAY_FAILED, codes.OVERLAY_REFUSED}:
                raise
            raise codes.OVERLAY_KEEPER_ABSENT.error(
                f"the process that creates the overlay does not answer: {exc.problem.cause}",
                self._remedy,
            ) from None


class Child:
    """A keeper that lives as long as this process, or the one that takes its place by exec."""

    def __init__(self, pipe: int, pid: int) -> None:
        self._pipe = pipe
        self._pid = pid

    @classmethod
    def start(cls, runtime_dir: Path, interface: str) -> Child:
        """Raises ProblemError where it does not come up."""
        socket = runtime_dir / SOCKET
        argv = [sys.executable, "-I", "-m", "rayfwd", "overlay", str(socket), "--until-eof"]
        argv += ["--interface", interface]
        # It has no more rights than this process: the hub's word is checked for what is in use.
        argv += [f"--network={network}" for network in PRIVATE_NETWORKS]
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(argv, stdin=reading, start_new_session=True)
        except OSError:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        child = cls(writing, process.pid)
        deadline = time.monotonic() + START_TIMEOUT
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(ProblemError):
                ask(socket, "found", {}, 1.0)
                return child
            time.sleep(0.05)
        child.close()
        raise codes.OVERLAY_FAILED.error(
            "the process that creates the overlay did not start",
            "read the lines above in the log, or set "
            + setting.value("network.level", "listeners"),
        )

    @classmethod
    def inherited(cls, env: MutableMapping[str, str]) -> Child | None:
        """The child of the process whose place this one has taken."""
        given = env.pop(CHILD, None)
        if given is None:
            return None
        pipe, pid = map(int, given.split())
        os.set_inheritable(pipe, False)
        return cls(pipe, pid)

    def pass_on(self, env: MutableMapping[str, str]) -> None:
        """To the process that takes the place of this one by exec."""
        os.set_inheritable(self._pipe, True)
        env[CHILD] = f"{self._pipe} {self._pid}"

    def close(self) -> None:
        """End it, and with it the overlay; done when it has ended."""
        os.close(self._pipe)
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def possible() -> Problem | None:
    """Why this process cannot have an overlay by a child of its own; None: it can."""
    if not overlay.capable():
        return codes.OVERLAY_IMPOSSIBLE.problem(
            "this process may not change the network (CAP_NET_ADMIN), and there is no service "
            "rayfwd-net that does it",
            "install rayfwd in a directory that only root can change (/opt/rayfwd), and run "
            "`rayfwd init` there as root; in a container: `docker run --cap-add NET_ADMIN`",
        )
    try:
        overlay.check_tools()
    except ProblemError as exc:
        return exc.problem
    return None
