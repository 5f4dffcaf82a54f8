"""Reads /proc: which processes there are, whose they are, who holds a port.

Every function may block for some milliseconds on a machine with many processes; the event loop
calls those that look at all processes in a thread. A process that ends meanwhile is left out.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rayfwd.system.sockdiag import Program, SockDiag, programs

PROC = Path("/proc")

STAT_SIZE = 4096
"""Bytes, more than a process's line in /proc/PID/stat can have."""
LISTEN = "0A"
"""TCP state in /proc/net/tcp (`include/net/tcp_states.h`)."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process as it was seen; `start` (clock ticks since boot) tells it from a later namesake."""

    pid: int
    parent: int
    start: int
    session: int
    name: str
    """At most 15 characters, as the kernel keeps it."""


def look_up(pid: int) -> Process | None:
    """The process, or None where it is gone or only waits to be reaped."""
    try:
        # Not by a file object, which takes five times as long: some looks are at every process.
        descriptor = os.open(f"{PROC}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.read(descriptor, STAT_SIZE)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    head, _, tail = stat.rpartition(b")")  # the name may hold spaces and brackets
    fields = tail.split(maxsplit=20)
    if not head or len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    name = head.partition(b"(")[2].decode("utf-8", "replace")
    return Process(pid, int(fields[1]), int(fields[19]), int(fields[3]), name)


def is_alive(process: Process) -> bool:
    now = look_up(process.pid)
    return now is not None and now.start == process.start


def send(process: Process, number: signal.Signals) -> bool:
    """Signal the process if it is still the same one. False where it is gone or not ours."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        # The descriptor holds on to one process: if that is the one meant, no other can be hit.
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def children(pid: int) -> list[Process]:
    """The direct children of a process."""
    return [p for p in _all() if p.parent == pid]


def offspring(leader: Process | None, marker: str) -> list[Process]:
    """Our user's processes that came of `leader`, which began a session.

    Those still in its session, and those that have `marker` (`NAME=value`) in the environment:
    the first because Ray's workers overwrite their environment in memory with their title, the
    second because what a job starts may begin a session of its own. While a process is left in a
    session the kernel gives its number to no new process, so a namesake of the leader that began
    at another time means that the session is over.
    """
    wanted = marker.encode()
    session = None
    if leader is not None:
        namesake = look_up(leader.pid)
        if namesake is None or namesake.start == leader.start:
            session = leader.pid
    return [
        p
        for p in _all()
        if (p.session == session and _is_of_our_user(p.pid))
        or wanted in _read_list(p.pid, "environ")
    ]


def with_argument(name: str, argument: str) -> list[Process]:
    """Processes of that name with that argument, of our user and of our own machine.

    Processes in other containers are visible to us but live on another machine, as Ray sees it:
    those in another process or network namespace are left out.
    """
    wanted = argument.encode()
    return [
        p
        for p in _all()
        if p.name == name and wanted in _read_list(p.pid, "cmdline") and _same_machine(p.pid)
    ]


def with_command(words: Sequence[str]) -> list[Process]:
    """Processes whose command line ends with these words, of our user and of our own machine."""
    wanted = [os.fsencode(word) for word in words]
    return [
        p
        for p in _all()
        if _read_list(p.pid, "cmdline")[:-1][-len(wanted) :] == wanted and _same_machine(p.pid)
    ]


def argument_of(process: Process, flag: str) -> str | None:
    """The value of `flag=value` on the process's command line."""
    for word in _read_list(process.pid, "cmdline"):
        name, equals, value = word.decode("utf-8", "replace").partition("=")
        if equals and name == flag:
            return value
    return None


def has_variable(process: Process, name: str) -> bool:
    """Whether it was given that environment variable."""
    wanted = f"{name}=".encode()
    return any(entry.startswith(wanted) for entry in _read_list(process.pid, "environ"))


def output_of(pid: int) -> Path | None:
    """What a process of our user writes its standard output to."""
    try:
        return Path(os.readlink(PROC / str(pid) / "fd" / "1"))
    except OSError:
        return None


def title(process: Process) -> str:
    """What to call it: of an interpreter the script it runs, `dashboard/agent.py`, else its name.

    Nothing else of its command line: that may hold secrets.
    """
    if process.name.startswith("python"):
        for word in _read_list(process.pid, "cmdline")[1:]:
            if word.endswith(b".py") and not word.startswith(b"-"):
                return "/".join(word.decode("utf-8", "replace").split("/")[-2:])
    return process.name


def listener(port: int) -> Program | None:
    """The process that listens on a TCP port, where /proc lets us see it."""
    found = programs([inode for used, inode in _listeners() if used == port])
    return next(iter(found.values()), None)


def _all() -> Iterator[Process]:
    try:
        names: Iterable[str] = os.listdir(PROC)
    except OSError:
        return
    for name in names:
        if name.isdigit() and (process := look_up(int(name))) is not None:
            yield process


def listening() -> frozenset[int]:
    """The TCP ports with a listening socket on any address of this machine."""
    return frozenset(port for port, _ in _listeners())


def _read_list(pid: int, what: str) -> list[bytes]:
    """A list of strings that end in NUL, or nothing where the process is another user's."""
    if not _is_of_our_user(pid):
        return []
    try:
        return (PROC / str(pid) / what).read_bytes().split(b"\0")
    except OSError:
        return []


def _is_of_our_user(pid: int) -> bool:
    try:
        return (PROC / str(pid)).stat().st_uid == os.geteuid()
    except OSError:
        return False


def _same_machine(pid: int) -> bool:
    try:
        return all(
            os.readlink(PROC / str(pid) / "ns" / kind) == os.readlink(PROC / "self" / "ns" / kind)
            for kind in ("pid", "net")
        )
    except OSError:
        return False


def _listeners() -> list[tuple[int, int]]:
    """Port and inode of every listening TCP socket."""
    try:
        with closing(SockDiag()) as diag:
            return [(found.port, found.inode) for found in diag.listening()]
    except OSError:  # a sandbox without netlink
        return list(_listeners_by_file())


def _listeners_by_file() -> Iterator[tuple[int, int]]:
    """The same, by reading of every connection there is: slow where there are many."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTEN:
                yield int(fields[1].rpartition(":")[2], 16), int(fields[9])
