"""Whose child Ray is: the daemon's own, or a keeper's, which outlives the daemon.

A service has a keeper (`keeper.py`), a small process in a unit of its own: Ray needs rights that
the part that talks to the network has not, and goes on while that part is restarted. Its unit names
the keeper's socket as RAYFWD_KEEPER; where it is not named, the daemon starts Ray itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rayfwd import codes
from rayfwd.problems import ProblemError
from rayfwd.system.control import ask

KEEPER = "RAYFWD_KEEPER"
"""The environment variable that has the path of the keeper's socket."""

OUTPUT = "ray.log"
"""In the state directory: what `ray start` writes."""

ANSWER_TIMEOUT = 2.0
"""For the keeper's answer, which takes it a millisecond. The event loop waits for it."""


class Launcher(Protocol):
    """Starts `ray start`, and knows how it ended."""

    @property
    def log(self) -> str | None:
        """Where else than in Ray's own files it may be said why Ray ended; None: nowhere."""
        ...

    def spawn(self, argv: Sequence[str], env: Mapping[str, str], state_dir: Path) -> int:
        """The process id of `argv`, in a session of its own, writing to `OUTPUT` in `state_dir`.

        Raises OSError where it cannot be started, and ProblemError where nobody can start it now.
        """
        ...

    def exit_code(self, pid: int) -> int | None:
        """Of one that has ended: minus the signal's number if by a signal; None: not known."""
        ...

    def done(self) -> None:
        """Everything has ended, and nothing is to be started any more."""
        ...


def launcher_of(env: Mapping[str, str]) -> Launcher:
    """The one that this environment names."""
    path = env.get(KEEPER)
    return ByKeeper(Path(path)) if path else DirectLauncher()


def spawn(argv: Sequence[str], env: Mapping[str, str], state_dir: Path) -> int:
    """Start a child of this process, as `Launcher.spawn` says."""
    output = os.open(state_dir / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    try:
        return os.posix_spawn(
            argv[0],
            list(argv),
            dict(env),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
            ],
            setsid=True,
            setsigmask=(),
            # Python ignores these two and what is ignored stays so across exec.
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
        )
    finally:
        os.close(output)


class DirectLauncher:
    """Ray is the daemon's own child."""

    log = None

    def spawn(self, argv: Sequence[str], env: Mapping[str, str], state_dir: Path) -> int:
        return spawn(argv, env, state_dir)

    def exit_code(self, pid: int) -> int | None:
        with suppress(ChildProcessError):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
        return None  # an earlier daemon's child

    def done(self) -> None: ...


class ByKeeper:
    """Ray is the keeper's child."""

    log = "`journalctl -u rayfwd-ray` (a user's own service: with `--user`)"
    """There: that the keeper itself was killed, or that systemd ended all of the unit."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def spawn(self, argv: Sequence[str], env: Mapping[str, str], state_dir: Path) -> int:
        args = {"argv": list(argv), "env": dict(env), "state_dir": str(state_dir)}
        answer = self._ask("spawn", args)
        if "errno" in answer:
            raise OSError(int(answer["errno"]), os.strerror(int(answer["errno"])))
        return int(answer["pid"])

    def exit_code(self, pid: int) -> int | None:
        with suppress(ProblemError):
            code = self._ask("exit_code", {"pid": pid})["exit_code"]
            return None if code is None else int(code)
        return None

    def check(self) -> None:
        """That it answers. Raises ProblemError."""
        self._ask("exit_code", {"pid": 0})

    def done(self) -> None:
        with suppress(ProblemError):  # it has ended already
            self._ask("done", {})

    def _ask(self, verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return ask(self._socket, verb, args, ANSWER_TIMEOUT)
        except ProblemError as exc:
            cause = f"the process that runs Ray does not answer: {exc.problem.cause}"
            if exc.problem.code == codes.DAEMON_NOT_ANSWERING:
                remedy = "read its log; a restart of the service rayfwd-ray ends Ray"
                raise codes.KEEPER_SILENT.error(cause, remedy) from None
            remedy = "start the service rayfwd-ray (as root: `systemctl start rayfwd-ray`)"
            raise codes.KEEPER_ABSENT.error(cause, remedy) from None
