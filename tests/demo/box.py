"""A machine to run the demo in, so that whatever it left behind would be seen there, and only it.

It is made by the demo's own `machine_init.py`: with processes,
mounts, `/tmp` and so on of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import rayfwd
from rayfwd.demo import machine_init
from tests import commands
from tests.need import CHECKOUT, ray_envs, tool

OTHER = 4242
SOURCE = Path(rayfwd.__file__).resolve().parents[1]


def needed() -> list[Path]:
    """Directories of the programs that run in the box, wherever they lie on this machine."""
    prefixes = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1]]
    rays = [env for env in ray_envs().glob("ray-*") if env.is_dir()]
    pythons = [(env / "bin" / "python").resolve().parents[1] for env in rays]
    found = [CHECKOUT, SOURCE, *prefixes, *rays, *pythons]
    return [path for path in dict.fromkeys(found) if path.is_dir()]


def closed_to_others(path: Path) -> Path | None:
    """The first directory on the way to `path` that other users may not enter."""
    for ancestor in reversed([path, *path.parents]):
        if not ancestor.stat().st_mode & 0o001:
            return ancestor
    return None


class Box:
    """The machine; `start` runs one command in it."""

    def __init__(self, folder: Path) -> None:
        self.tmp = folder / "tmp"
        self._folder = folder
        self._keep = [*needed(), folder]  # the folder for what is printed
        # As root some of it may be where an ordinary user cannot go: made enterable in here.
        closed = {closed_to_others(path) for path in needed()} if os.geteuid() == 0 else set()
        self._private = {"/tmp": self.tmp}
        for number, path in enumerate(sorted(p for p in closed if p not in (None, Path("/tmp")))):
            self._private[str(path)] = folder / f"private-{number}"
        self._codes: dict[str, int] = {}

    def __enter__(self) -> Self:
        for path in self._private.values():
            path.mkdir(mode=0o755)
        self.tmp.chmod(0o1777)
        spec = {
            "name": "box",
            "private": {path: str(private) for path, private in self._private.items()},
            "keep": [str(path) for path in self._keep],
            "shm": "1g",
        }
        self._init = subprocess.Popen(
            [sys.executable, "-I", machine_init.__file__, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        up = self._heard()
        assert up["event"] == "up", up
        self.before = sorted(os.listdir(self.tmp))
        self.mounts_before = self.mounts()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._init.stdin is not None
        assert self._init.stdout is not None
        self._init.stdin.close()
        self._init.wait(30)
        self._init.stdout.close()

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start a process; what it prints is in `output`."""
        everything = {**os.environ, "PYTHONPATH": str(SOURCE), **(env or {})}
        out = {"out": str(self._out(name)), "log": str(self._out(name))}
        self._tell({"do": "start", "name": name, "argv": list(argv), "env": everything, **out})

    def demo(self, *args: str, uid: int | None = None, before: Sequence[str] = ()) -> None:
        """Start `rayfwd demo`, perhaps as another user, perhaps behind another command."""
        rights = [tool("setpriv"), f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        env = {"HOME": "/nonexistent"} if uid is not None else {}
        argv = [*before, *(rights if uid is not None else [])]
        argv += [sys.executable, "-m", "rayfwd", "demo", *args]
        commands.note(argv)
        self.start("demo", argv, env)

    def output(self, name: str = "demo") -> str:
        try:
            return self._out(name).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def until_said(self, text: str, name: str = "demo", seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output(name):
            assert time.monotonic() < deadline, f"not said: {text}\n{self.output(name)}"
            time.sleep(0.1)

    def signal(self, name: str, number: signal.Signals) -> None:
        self._tell({"do": "signal", "name": name, "signal": int(number)})

    def wait(self, name: str = "demo") -> int:
        """The exit code, negative where a signal ended it."""
        while name not in self._codes:
            said = self._heard()
            if said["event"] == "exited":
                self._codes[said["name"]] = said["code"]
        return self._codes[name]

    def processes(self) -> list[str]:
        self._tell({"do": "list"})
        while (said := self._heard())["event"] != "processes":
            if said["event"] == "exited":
                self._codes[said["name"]] = said["code"]
        return [str(name) for name in said["names"]]

    def mounts(self) -> list[str]:
        """Of the box itself, as a process in it sees them."""
        name = f"mounts-{time.monotonic_ns()}"
        self.start(name, ["/bin/cat", "/proc/self/mounts"])
        assert self.wait(name) == 0
        return self.output(name).splitlines()

    def left(self) -> dict[str, list[str]]:
        """What is there now that was not before: nothing, once a demo has ended."""
        found = {
            "processes": self.processes(),
            "files": sorted(set(os.listdir(self.tmp)) - set(self.before)),
            "mounts": sorted(set(self.mounts()) - set(self.mounts_before)),
        }
        return {kind: things for kind, things in found.items() if things}

    def _out(self, name: str) -> Path:
        return self._folder / f"{name}.out"

    def _tell(self, order: Mapping[str, Any]) -> None:
        assert self._init.stdin is not None
        self._init.stdin.write(json.dumps(order) + "\n")
        self._init.stdin.flush()

    def _heard(self) -> dict[str, Any]:
        assert self._init.stdout is not None
        line = self._init.stdout.readline()
        assert line, "the box has ended by itself"
        heard: dict[str, Any] = json.loads(line)
        return heard
