"""Looks at this machine: names, limits, who listens. Changes nothing.

What takes long is async; the rest reads /proc and files, and may block for milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.problems import Problem
from rayfwd.ray.launcher import KEEPER
from rayfwd.session.target import Target
from rayfwd.system import setting
from rayfwd.transport.listeners import listeners_for, why_blocked

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")

LOOKUP_TIMEOUT = 20.0
"""Seconds for a name: the resolver's own patience is 5 s a server and attempt (resolv.conf(5))."""
GREETING_TIMEOUT = 5.0
"""Seconds for a connection, and for what its server says first."""


async def resolve(host: str, port: int) -> tuple[float, list[str]]:
    """Seconds that it took, and the addresses. Raises ProblemError (ssh_unreachable)."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(LOOKUP_TIMEOUT):
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError) as exc:
        why = getattr(exc, "strerror", None) or f"no answer within {LOOKUP_TIMEOUT:.0f} s"
        raise codes.SSH_UNREACHABLE.error(
            f"the name {host} cannot be resolved: {why}",
            f"correct {setting.key('head.ssh')}, or this machine's DNS",
        ) from None
    return time.monotonic() - began, list(dict.fromkeys(str(a[4][0]) for a in found))


async def greeting(host: str, port: int) -> str | None:
    """What an SSH server there says first; None: there is none."""
    writer = None
    try:
        async with asyncio.timeout(GREETING_TIMEOUT):
            reader, writer = await asyncio.open_connection(host, port)
            said = await reader.readline()
    except (OSError, TimeoutError, ValueError):
        return None
    finally:
        if writer is not None:
            writer.transport.abort()
    text = said.decode(errors="replace").strip()
    return text.removeprefix("SSH-2.0-") if text.startswith("SSH-") else None


@dataclass(frozen=True, slots=True)
class UsableLimits:
    """What may be used, and whose limits they are."""

    whose: str
    descriptors: int
    """-1: no limit."""
    threads: int | None
    """Processes and threads; None: no limit. The tighter of the user's and the control group's."""
    running: int
    """How many of them there are."""


def limits(pid: int | None, ray: int | None = None) -> UsableLimits:
    """Of the daemon, or of this process where there is none or it may not be looked at.

    `ray` is the process id of Ray, which may run in a service of its own: its processes count.
    """
    whose, files, processes = "the daemon's", (0, 0), (0, 0)
    try:
        if pid is None:
            raise PermissionError
        files = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        processes = resource.prlimit(ray or pid, resource.RLIMIT_NPROC)
        descriptors = files[0]
    except OSError:
        whose, pid, ray = "this shell's; a service has its own", os.getpid(), None
        files, processes = (
            resource.getrlimit(resource.RLIMIT_NOFILE),
            resource.getrlimit(resource.RLIMIT_NPROC),
        )
        descriptors = files[1]  # the daemon takes all that it may
    tightest: tuple[int, int] | None = None
    own = [(processes[1], _threads(os.geteuid()))] if processes[1] >= 0 and os.geteuid() else []
    for limit, running in [*own, *_of_cgroups(ray or pid)]:
        if tightest is None or limit - running < tightest[0] - tightest[1]:
            tightest = (limit, running)
    threads, running = tightest if tightest is not None else (None, 0)
    return UsableLimits(whose, descriptors, threads, running)


def _threads(uid: int) -> int:
    count = 0
    for entry in os.scandir(PROC):
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == uid:
                    count += len(os.listdir(f"{entry.path}/task"))
            except OSError:  # it has ended
                continue
    return count


def _of_cgroups(pid: int) -> Iterator[tuple[int, int]]:
    """Limit and number of tasks, of the process's control group (version 2) and those above."""
    try:
        lines = (PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        return
    group = CGROUPS / path.lstrip("/")
    for directory in [group, *group.parents]:
        if not directory.is_relative_to(CGROUPS):
            return
        try:
            limit = (directory / "pids.max").read_text().strip()
            if limit != "max":
                yield int(limit), int((directory / "pids.current").read_text())
        except (OSError, ValueError):
            continue


def keeper_of(pid: int) -> Path | None:
    """The socket of the keeper that a daemon was started with; None: none, or it is not to be seen.

    What it was started with is what counts: that is where it has Ray started.
    """
    try:
        words = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = {name: value for name, _, value in (word.partition(b"=") for word in words)}
    path = found.get(KEEPER.encode())
    return Path(os.fsdecode(path)) if path else None


def blocked_listeners(nodes: Iterable[NodePlan], own: NodePlan) -> list[Problem]:
    """Listeners that could not be opened now, one problem each."""
    found = []
    for node in nodes:
        if node.advertised or node.name == own.name:
            continue
        for listen, target in listeners_for(node.address, node.ports).items():
            if (problem := _blocked(listen, target)) is not None:
                found.append(problem)
    return found


def _blocked(listen: Target, target: Target) -> Problem | None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(listen)
        except OSError as exc:
            return why_blocked(listen, target, exc)
    return None
