"""What of this machine a process here may use, as Ray counts it: processors, memory, shared memory.

A container or a job sees all of its host; its control group and its affinity say what is its own.
Ray looks at the outermost group that a process sees, which is a container's own. What has no
namespace for it (a job of Slurm, a unit of systemd) has its bounds in groups below that one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
SHARED = Path("/dev/shm")

STORE_LEAST = 75 << 20
"""Bytes for objects without which Ray does not start."""
STORE_PART, STORE_MOST = 0.3, 10**10
"""Ray's own part of the memory for objects. Of more than 10 GB it takes as much as /dev/shm has
(`ray._private.utils.resolve_object_store_memory`, Ray 2.9 to 2.60)."""


def cpus(root: Path = CGROUP, own: Path = OWN_GROUPS) -> int:
    """Processors that may be used at a time: by the affinity and by the quota of any group."""
    bounds = [rays_cpus(root), len(os.sched_getaffinity(0))]
    bounds += [int(quota) for group in _groups(root, own, "cpu") if (quota := _quota(group))]
    return max(1, min(bounds))


def rays_cpus(root: Path = CGROUP) -> int:
    """As Ray counts (`ray._private.utils.get_num_cpus`): by the control group, not by affinity."""
    found = os.cpu_count() or 1
    quota, cpuset = _rays_quota(root), _cpuset(root)
    bounds = [n for n in (quota, cpuset) if n]
    return int(min(bounds)) if bounds else found


def _rays_quota(root: Path) -> float | None:
    first = root / "cpu"
    return _quota(first if (first / "cpu.cfs_quota_us").exists() else root)


def _quota(group: Path) -> float | None:
    """Processors' worth of time; None: no bound."""
    first = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
    words = first if len(first) == 2 else _words(group / "cpu.max")
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota >= 0 and period > 0 else None


def _cpuset(root: Path) -> int | None:
    try:
        return sum(_span(part) for part in "".join(_words(root / "cpuset/cpuset.cpus")).split(","))
    except ValueError:
        return None


def _span(part: str) -> int:
    first, _, last = part.partition("-")
    return int(last or first) - int(first) + 1


def memory(root: Path = CGROUP, own: Path = OWN_GROUPS) -> int:
    """Bytes that may be used, by the bounds of every group: what is above memory.high is reclaimed
    at once, and its processes are slowed down."""
    bounds = [rays_memory(root)]
    for group in _groups(root, own, "memory"):
        for name in ("memory.limit_in_bytes", "memory.max", "memory.high"):
            bounds += [int(word) for word in _words(group / name)[:1] if word.isdecimal()]
    return min(bounds)


def rays_memory(root: Path = CGROUP) -> int:
    """As Ray counts (`ray._common.utils.get_system_memory`): the machine's, or what the outermost
    control group allows of them."""
    machine = next(
        (
            int(line.split()[1]) * 1024
            for line in MEMINFO.read_text().splitlines()
            if line.startswith("MemTotal:")
        ),
        0,
    )
    for name in ("memory/memory.limit_in_bytes", "memory.max"):
        words = _words(root / name)
        if words and words[0].isdecimal():
            return min(machine, int(words[0]))
    return machine


def _groups(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """The groups of this process that may bound it, from its own outwards, of either version."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top = root
        elif controller in controllers.split(","):
            top = root / controllers if (root / controllers).exists() else root / controller
        else:
            continue
        inside = Path(path.lstrip("/"))
        # Of a group outside of what is seen here (`/..`) nothing is known.
        if ".." not in inside.parts:
            yield from (top / each for each in (inside, *inside.parents))


def rays_store(of_memory: int) -> int:
    """Bytes that Ray takes for objects by itself, on a node that may have so many."""
    return min(int(of_memory * STORE_PART), STORE_MOST)


def store_within(memory: int) -> int:
    """What to give Ray for objects where it would count on more memory than this: its own part of
    it, with its own bounds."""
    most = max(STORE_MOST, shared_memory() or 0)
    return max(STORE_LEAST, min(int(memory * STORE_PART), most))


def shared_memory() -> int | None:
    """Bytes of /dev/shm, in use or not; None: there is none."""
    try:
        found = os.statvfs(SHARED)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
