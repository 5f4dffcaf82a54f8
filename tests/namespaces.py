"""What the first processes of the tests' namespaces share: mounts, the first fork, reaping.

Standard library only: they run without site-packages (`COMMAND`), as what they import must not be
covered under them. The demo's (`src/rayfwd/demo/machine_init.py`) is a part of the product, works
without root, and shares nothing with these.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

COMMAND = [sys.executable, "-E", "-s", "-S", "-m"]
"""Before the name of a module with such a first process; from the checkout's directory."""

# <linux/sched.h>
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# <sys/mount.h>
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18

PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2). Raises OSError."""
    args = [None if a is None else a.encode() for a in (source, target, kind)]
    end = None if data is None else data.encode()
    what = f"mount {kind or source} on {target}"
    _check(_libc.mount(*args, ctypes.c_ulong(flags), end), what)


def private_mounts() -> None:
    """Nothing that is mounted from now on is seen outside."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)


def cover(source: str, covers: Mapping[str, str], keep: Sequence[Path]) -> None:
    """Mount a tmpfs over each directory of `covers`, and put the trees of `keep` back on them.

    A cover's value is the options of its mount; one that is no directory is left out.
    """
    handles = {tree: os.open(tree, os.O_PATH | os.O_DIRECTORY) for tree in sorted(keep)}
    for path, options in sorted(covers.items()):
        if os.path.isdir(path):
            mount(source, path, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for tree, handle in handles.items():  # parents come first, and their trees with them
        if not tree.exists():
            tree.mkdir(parents=True)
            mount(f"/proc/self/fd/{handle}", str(tree), None, MS_BIND | MS_REC)
        os.close(handle)


def die_with_parent() -> None:
    """SIGKILL to this process when the one that forked it ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")


def first_process(live: Callable[[], None]) -> int:
    """Call `live` in a child, the first of the process namespace that was just unshared.

    Returns its exit code when it has ended, and with it everything in there; SIGTERM ends it.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_with_parent()
            live()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF


def ready() -> None:
    """Tell whoever started this that all is made."""
    os.write(1, b"ready\n")


def _ignored(*_: object) -> None:
    pass


def serve(
    ended: Callable[[int, int], None] = _ignored, asked: Callable[[], None] = _ignored
) -> None:
    """Reap until standard input ends.

    `ended` is told of each process that ends, with its wait status, `asked` of what comes in.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, _ignored)
    signal.set_wakeup_fd(writer)
    while True:
        readable, _, _ = select.select([0, reader], [], [])
        if reader in readable:
            os.read(reader, 4096)
        with contextlib.suppress(ChildProcessError):
            while (child := os.waitpid(-1, os.WNOHANG))[0]:
                ended(*child)
        if 0 in readable:
            if not os.read(0, 4096):
                return
            asked()
