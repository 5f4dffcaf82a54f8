"""What process 1 owes its container: it reaps whoever is left to it, and passes signals on.

The work is done by a child, so that nobody else waits for the child's own children. It has a
process group of its own, and the terminal where there is one. When it ends, so does process 1, and
with it, by the kernel's hand, all that is left.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

_PASSED_ON = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


SPARE = 0.4
"""Seconds of those for a stop that are the kernel's, which ends whatever is left."""


def ends_when_told() -> None:
    """For process 1, as long as nothing has begun: the kernel spares it every signal that it has no
    handler for, and a stop while it is still loading would be lost."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def run(work: Callable[[], int], stop_seconds: float | None = None) -> int:
    """`work` in this process; in a child of it where this is process 1 of its namespace.

    `stop_seconds`: after SIGTERM or SIGINT, process 1 has ended by then, and with it the
    container, whatever the child is about; None: it waits for the child.
    """
    return work() if os.getpid() != 1 else _beside(work, stop_seconds)


def _beside(work: Callable[[], int], stop_seconds: float | None) -> int:
    """Before any thread is there."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        _take_terminal()
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        return work()
    return _wait_for(child, stop_seconds)


def _take_terminal() -> None:
    """What is typed is the child's: it comes once, and not from process 1 as well."""
    os.setpgid(0, 0)
    if os.isatty(0):
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            os.tcsetpgrp(0, os.getpid())
        finally:
            signal.signal(signal.SIGTTOU, before)


def _wait_for(child: int, stop_seconds: float | None) -> int:
    """Its exit code, as a shell tells it."""
    ends: float | None = None
    while True:
        number = _next_signal(ends)
        if number is None:
            os.kill(child, signal.SIGKILL)
            return 128 + signal.SIGKILL
        if number != signal.SIGCHLD:
            if number in {signal.SIGTERM, signal.SIGINT} and ends is None and stop_seconds:
                ends = time.monotonic() + stop_seconds - SPARE
            os.kill(child, number)
            continue
        if (status := _reap(child)) is not None:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _next_signal(ends: float | None) -> int | None:
    """None: it is `ends` by now."""
    wanted = {*_PASSED_ON, signal.SIGCHLD}
    if ends is None:
        return signal.sigwait(wanted)
    found = signal.sigtimedwait(wanted, max(0.0, ends - time.monotonic()))
    return None if found is None else found.si_signo


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
