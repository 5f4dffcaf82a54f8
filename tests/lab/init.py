"""First process of one of the lab's machines: makes its namespaces, holds them, and reaps.

Usage: python -I -S init.py SPEC, where SPEC is a JSON object (see `main`). Says "ready" on standard
output, then lives until its standard input ends, which it does whenever and however the process
that started it ends. The kernel ends all other processes of the machine with it, and with the last
of them its namespaces, mounts and interfaces are gone: nothing has a name outside.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PR_SET_PDEATHSIG = 1

PRIVATE = {
    "/tmp": 0o1777,
    "/var/tmp": 0o1777,
    "/dev/shm": 0o1777,
    "/run": 0o755,
    "/home": 0o755,
    "/root": 0o755,
}
"""Directories of which a machine has its own, empty, with their modes."""

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    args = [None if a is None else a.encode() for a in (source, target, kind)]
    end = None if data is None else data.encode()
    check(libc.mount(*args, ctypes.c_ulong(flags), end), f"mount {kind or source} on {target}")


def closed_to_others(path: Path) -> Path | None:
    """The first directory above `path` that an ordinary user cannot enter."""
    for above in reversed(path.parents):
        if above.exists() and not above.stat().st_mode & stat.S_IXOTH:
            return above
    return None


def cover(tag: str, keep: list[str]) -> None:
    """Mount a machine's own directories, and put the trees of `keep` back where they were covered.

    Python may lie in root's home, which ordinary users cannot enter: such a directory is covered
    too, by one that they can, and holds nothing but the trees.
    """
    trees = {Path(p) for given in keep for p in (given, os.path.realpath(given))}
    covers = {os.path.realpath(path): mode for path, mode in PRIVATE.items()}
    for tree in trees:
        if (closed := closed_to_others(tree)) is not None:
            covers.setdefault(str(closed), 0o755)
    handles = {tree: os.open(tree, os.O_PATH | os.O_DIRECTORY) for tree in sorted(trees)}
    for path in sorted(covers):
        if os.path.isdir(path):
            mount(tag, path, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={covers[path]:o}")
    for tree, handle in handles.items():  # parents come first
        if not tree.exists():
            tree.mkdir(parents=True)
            mount(f"/proc/self/fd/{handle}", str(tree), None, MS_BIND | MS_REC)
        os.close(handle)


def replace(files: dict[str, tuple[str, int]]) -> None:
    """Give the machine its own files below /etc: path to content and mode."""
    own = Path("/run/lab/etc")
    own.mkdir(parents=True)
    for path, (text, mode) in files.items():
        source = own / Path(path).name
        source.write_text(text)
        source.chmod(mode)
        target = os.path.realpath(path)  # resolv.conf may be a link into /run
        if os.path.exists(target):
            mount(str(source), target, None, MS_BIND)


def become(spec: dict[str, Any]) -> None:
    """Turn this process, the first of its process namespace, into the machine's init."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)  # nothing of ours is seen outside
    cover(spec["tag"], spec["keep"])
    mount(spec["tag"], "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    replace(spec["files"])
    socket.sethostname(spec["name"])
    home = Path(spec["home"])
    home.mkdir(mode=0o755)
    os.chown(home, spec["uid"], spec["uid"])


def live() -> None:
    """Reap until standard input ends."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer)
    while True:
        ready, _, _ = select.select([0, reader], [], [])
        if reader in ready:
            os.read(reader, 4096)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if 0 in ready and not os.read(0, 4096):
            return


def main() -> None:
    """The specification: tag, name, home, uid, keep (paths), files; or bare (a network alone)."""
    spec = json.loads(sys.argv[1])
    os.umask(0o022)
    os.chdir("/")
    if spec["bare"]:
        check(libc.unshare(CLONE_NEWNET), "unshare")
    else:
        flags = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID
        check(libc.unshare(flags), "unshare")
        if child := os.fork():
            signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
        become(spec)
    os.write(1, b"ready\n")
    live()


if __name__ == "__main__":
    main()
