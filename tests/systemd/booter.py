"""Boots one machine with systemd-nspawn, as often as it is told to, and leaves nothing.

Usage: python -I -S booter.py SPEC, where SPEC is a JSON object (see `main`). Says `ready` on
standard output when it can be told to boot, by a line on standard input. It lives until that ends,
which it does whenever and however the process that started it ends: nspawn then dies with the
namespace of processes that it is in, all mounts with that of mounts, and last go the control
groups, which have names outside. The machine's disk is an overlay whose upper part is memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PR_SET_PDEATHSIG = 1
NETWORK = Path("/run/network")
REBOOT = 133
"""What nspawn ends with, under --keep-unit, when its machine wants to be booted again."""

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    args = [None if a is None else a.encode() for a in (source, target, kind)]
    end = None if data is None else data.encode()
    check(libc.mount(*args, ctypes.c_ulong(flags), end), f"mount {kind or source} on {target}")


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
    mount("none", "/", None, MS_REC | MS_PRIVATE)
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
    """Do what is asked, and reap, until standard input ends."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer)
    nspawn = 0
    while True:
        ready, _, _ = select.select([0, reader], [], [])
        if reader in ready:
            os.read(reader, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == nspawn:
                    again = os.waitstatus_to_exitcode(ended[1]) == REBOOT
                    nspawn = boot(spec) if again else 0
        if 0 in ready:
            asked = os.read(0, 4096)
            if not asked:
                return
            if nspawn == 0:
                nspawn = boot(spec)


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
    try:
        check(libc.unshare(CLONE_NEWPID), "unshare")
        child = os.fork()
        if child == 0:
            check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
            check(libc.unshare(CLONE_NEWNS), "unshare")
            prepare(spec)
            os.write(1, b"ready\n")
            live(spec)
            os._exit(0)  # and with it, the first of its namespace, everything in there
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        os.waitpid(child, 0)
    finally:
        leave_groups()
        remove_groups(spec["tag"])


if __name__ == "__main__":
    main()
