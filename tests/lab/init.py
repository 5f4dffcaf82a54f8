"""First process of one of the lab's machines: makes its namespaces, holds them, and reaps.

Usage: python -E -s -S -m tests.lab.init SPEC, where SPEC is a JSON object (see `main`). Says
"ready" on standard output, then lives until its standard input ends, which it does whenever and
however the process that started it ends. The kernel ends all other processes of the machine with
it, and with the last of them its namespaces, mounts and interfaces are gone: nothing has a name
outside.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Any

from tests import namespaces
from tests.namespaces import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    mount,
)

PRIVATE = {
    "/tmp": 0o1777,
    "/var/tmp": 0o1777,
    "/dev/shm": 0o1777,
    "/run": 0o755,
    "/home": 0o755,
    "/root": 0o755,
}
"""Directories of which a machine has its own, empty, with their modes."""


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
    modes = {os.path.realpath(path): mode for path, mode in PRIVATE.items()}
    for tree in trees:
        if (closed := closed_to_others(tree)) is not None:
            modes.setdefault(str(closed), 0o755)
    covers = {path: f"mode={mode:o}" for path, mode in modes.items()}
    namespaces.cover(tag, covers, list(trees))


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
    namespaces.private_mounts()
    cover(spec["tag"], spec["keep"])
    mount(spec["tag"], "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    replace(spec["files"])
    socket.sethostname(spec["name"])
    home = Path(spec["home"])
    home.mkdir(mode=0o755)
    os.chown(home, spec["uid"], spec["uid"])


def live() -> None:
    """Hold the namespaces until standard input ends."""
    namespaces.ready()
    namespaces.serve()


def main() -> int:
    """The specification: tag, name, home, uid, keep (paths), files; or bare (a network alone)."""
    spec = json.loads(sys.argv[1])
    os.umask(0o022)
    os.chdir("/")
    if spec["bare"]:
        namespaces.unshare(CLONE_NEWNET)
        live()
        return 0

    def machine() -> None:
        become(spec)
        live()

    namespaces.unshare(CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID)
    return namespaces.first_process(machine)


if __name__ == "__main__":
    sys.exit(main())
