"""The two `rayfwd run` of the demo: their configuration files, environment, status and logs."""

from __future__ import annotations

import asyncio
import os
import signal
import site
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from rayfwd.demo.machine import DemoMachine
from rayfwd.ray.install import RayInstall
from rayfwd.status import Link, Status
from rayfwd.system.control import ask

OBJECT_STORE = 250_000_000
"""Bytes of each node's object store."""
WORKER_PORTS = 32

_DAEMON = "rayfwd"
_NOT_OURS = ("RAY_", "RAYFWD_", "SSH_")
"""What a variable of the caller begins with that would change what the demo does."""
_NOT_OURS_EITHER = frozenset(
    {
        *("TMPDIR", "TEMP", "TMP", "NOTIFY_SOCKET"),
        *("STATE_DIRECTORY", "RUNTIME_DIRECTORY", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"),
        *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    }
)


class Daemon:
    """A `rayfwd run` in a machine of the demo."""

    def __init__(self, machine: DemoMachine, config: Mapping[str, Any]) -> None:
        """`config` as the file has it; the directories are filled in."""
        folder = machine.folder
        self.machine = machine
        self.log = folder / "rayfwd.log"
        self.hub_socket = folder / "run" / "hub.sock"
        self._control = folder / "run" / "control.sock"
        self._config = {
            "network": {"level": "listeners"},
            **config,
            "name": machine.name,
            "state_dir": str(folder / "state"),
            "runtime_dir": str(folder / "run"),
            "log": {"format": "text"},
        }
        self._ended: asyncio.Future[int] | None = None

    def start(self, env: Mapping[str, str]) -> None:
        """Write the file and start; the machine must be up."""
        file = self.machine.folder / "rayfwd.toml"
        file.write_text(tomli_w.dumps(self._config), encoding="utf-8")
        argv = [sys.executable, "-m", "rayfwd", "run", "--config", str(file)]
        self._ended = self.machine.run(_DAEMON, argv, env, out=self.log, log=self.log)

    @property
    def exit_code(self) -> int | None:
        """None while it runs. Raises ProblemError when its whole machine has gone."""
        if self._ended is None or not self._ended.done():
            return None
        return self._ended.result()

    async def status(self) -> Status:
        """Its answer to `rayfwd status`. Raises ProblemError while it gives none."""
        return Status.from_answer(await asyncio.to_thread(ask, self._control, "status"))

    async def link(self) -> Link:
        """A worker's link. Raises ProblemError as `status` does."""
        link = (await self.status()).link
        assert link is not None, "a worker has one"
        return link

    def stop(self) -> None:
        """Ask it to end, and its Ray with it."""
        self.machine.signal(_DAEMON, signal.SIGTERM)


def environment(machine: DemoMachine, caller: Mapping[str, str]) -> dict[str, str]:
    """The caller's variables for a process in the machine, with a home directory of its own.

    There, no key, token or configuration of the caller is found by accident.
    """
    env = {
        name: value
        for name, value in caller.items()
        if not name.startswith(_NOT_OURS) and name not in _NOT_OURS_EITHER
    }
    home = machine.folder / "home"
    home.mkdir(exist_ok=True)
    env["HOME"] = str(home)
    if site.ENABLE_USER_SITE:  # it hangs on HOME otherwise
        env["PYTHONUSERBASE"] = site.getuserbase()
    if "PYTHONPATH" in env:
        parts = [part for part in env["PYTHONPATH"].split(os.pathsep) if part]
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in parts)
    return env


def needed_paths(folder: Path, ray: RayInstall) -> list[Path]:
    """Directories that must stay visible where a machine gets a private one: the programs'."""
    python = Path(ray.python)
    return [
        folder,
        Path(__file__).resolve().parents[2],
        *(Path(p) for p in (sys.prefix, sys.base_prefix, *sys.path) if os.path.isabs(p)),
        python.parent.parent,
        python.resolve().parent.parent,
        Path(ray.command).parent,
        Path(ray.command).resolve().parent,
    ]
