"""Boots one machine with systemd-nspawn, as often as it is told to, and leaves nothing.

Usage: python -E -s -S -m tests.systemd.booter SPEC, where SPEC is a JSON object (see `main`). Says
`ready` on standard output when it can be told to boot, by a line on standard input. It lives until
that ends, which it does whenever and however the process that started it ends: nspawn then dies
with the namespace of processes that it is in, all mounts with that of mounts, and last go the
control groups, which have names outside. The machine's disk is an overlay whose upper part is
memory.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import namespaces
from tests.namespaces import CLONE_NEWNS, CLONE_NEWPID, MS_BIND, mount

NETWORK = Path("/run/network")
REBOOT = 133
"""What nspawn ends with, under --keep-unit, when its machine wants to be booted again."""


def hierarchies() -> Iterator[Path]:
    """Where systemd puts control groups: cgroup2, and version 1's hierarchy of its own."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            yield Path(where)


def groups(name: str) -> list[Path]:
    """Of a machine, in each hierarchy."""
    return [where / name for where in hierarchies()]


def remove_groups(name: str) -> None:
    """Take a machine's control groups away, once their processes have ended."""
    deadline = time.monotonic() + 10
    for top in groups(name):
        while top.exists():
            try:
                for below in sorted(top.rglob("*/"), reverse=True):
                    below.rmdir()
                top.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                # The kernel counts a process to its group until somebody has waited for it.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def enter_groups(name: str) -> None:
    """Put this process in the machine's control groups, which are made."""
    for top in groups(name):
        top.mkdir()
        (top / "cgroup.procs").write_text("0")


def leave_groups() -> None:
    for where in hierarchies():
        (where / "cgroup.procs").write_text("0")


def prepare(spec: dict[str, Any]) -> None:
    """Make the mounts that nspawn needs, seen by nobody outside."""
    namespaces.private_mounts()
    # nspawn's own records, which a host that runs systemd has as well.
    mount(spec["tag"], "/run", "tmpfs", 0, "mode=755")
    NETWORK.touch()
    mount(f"/proc/{spec['network']}/ns/net", str(NETWORK), None, MS_BIND)
    mount("proc", "/proc", "proc", 0)
    space = Path("/run/space")
    for part in ("upper", "work", "tree"):
        (space / part).mkdir(parents=True)
    lower = ":".join(spec["lower"])
    options = f"lowerdir={lower},upperdir={space}/upper,workdir={space}/work"
    mount(spec["tag"], f"{space}/tree", "overlay", 0, options)
    for path, (text, mode) in spec["files"].items():
        target = space / "tree" / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)


def live(spec: dict[str, Any]) -> None:
    """Boot when it is asked, and again when the machine wants it, until standard input ends."""
    nspawn = 0

    def ended(pid: int, status: int) -> None:
        nonlocal nspawn
        if pid == nspawn:
            nspawn = boot(spec) if os.waitstatus_to_exitcode(status) == REBOOT else 0

    def asked() -> None:
        nonlocal nspawn
        nspawn = nspawn or boot(spec)

    namespaces.serve(ended, asked)


def boot(spec: dict[str, Any]) -> int:
    """Start nspawn; its id in here."""
    where = [f"--network-namespace-path={NETWORK}", "--directory=/run/space/tree"]
    argv = [spec["nspawn"], *spec["options"], *where, "--boot"]
    if (child := os.fork()) == 0:
        try:
            log = os.open(spec["console"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            null = os.open("/dev/null", os.O_RDONLY)
            for here, there in ((null, 0), (log, 1), (log, 2)):
                os.dup2(here, there)
            # In a group of its own: Ctrl-C is for the tests.
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.execve(argv[0], argv, spec["environment"])
        finally:
            os._exit(127)
    return child


def main() -> None:
    """The specification.

    tag (of mounts and control groups), lower (directories, the uppermost first), files (path to
    text and mode), network (a process in the machine's), nspawn (path), options, environment,
    console (the path of a log).
    """
    spec = json.loads(sys.argv[1])
    os.umask(0o022)
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    enter_groups(spec["tag"])

    def machine() -> None:
        namespaces.unshare(CLONE_NEWNS)
        prepare(spec)
        namespaces.ready()
        live(spec)

    try:
        namespaces.unshare(CLONE_NEWPID)
        namespaces.first_process(machine)
    finally:
        leave_groups()
        remove_groups(spec["tag"])


if __name__ == "__main__":
    main()
