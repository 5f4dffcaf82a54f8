"""What process 1 owes its container: it reaps whoever is left to it, and passes signals on.

The work is done by a child, so that nobody else waits for the child's own children. It has a
process group of its own, and the terminal where there is one. When it ends, so does process 1, and
with it, by the kernel's hand, all that is left.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

_PASSED_ON = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def ends_when_told() -> None:
    """For process 1, as long as nothing has begun: the kernel spares it every signal that it has no
    handler for, and a stop while it is still loading would be lost."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def run(work: Callable[[], int]) -> int:
    """`work` in this process; in a child of it where this is process 1 of its namespace."""
    return work() if os.getpid() != 1 else _beside(work)


def _beside(work: Callable[[], int]) -> int:
    """Before any thread is there."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        _take_terminal()
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        return work()
    return _wait_for(child)


def _take_terminal() -> None:
    """What is typed is the child's: it comes once, and not from process 1 as well."""
    os.setpgid(0, 0)
    if os.isatty(0):
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            os.tcsetpgrp(0, os.getpid())
        finally:
            signal.signal(signal.SIGTTOU, before)


def _wait_for(child: int) -> int:
    """Its exit code, as a shell tells it."""
    while True:
        number = signal.sigwait({*_PASSED_ON, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        if (status := _reap(child)) is not None:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _reap(child: int) -> int | None:
    """Everybody who has ended. The child's status, if it is one of them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status
