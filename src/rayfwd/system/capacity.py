"""What of this machine a process here may use, as Ray counts it: processors, memory, shared memory.

A container or a job sees all of its host; its control group and its affinity say what is its own.
"""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
SHARED = Path("/dev/shm")


def cpus() -> int:
    """Processors that may be used at a time: by the affinity and by the control group's quota."""
    return max(1, min(rays_cpus(), len(os.sched_getaffinity(0))))


def rays_cpus(root: Path = CGROUP) -> int:
    """As Ray counts (`ray._private.utils.get_num_cpus`): by the control group, not by affinity."""
    found = os.cpu_count() or 1
    quota, cpuset = _quota(root), _cpuset(root)
    bounds = [n for n in (quota, cpuset) if n]
    return int(min(bounds)) if bounds else found


def _quota(root: Path) -> float | None:
    """Processors' worth of time; None: no bound."""
    first = _words(root / "cpu/cpu.cfs_quota_us") + _words(root / "cpu/cpu.cfs_period_us")
    words = first if len(first) == 2 else _words(root / "cpu.max")
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


def memory(root: Path = CGROUP) -> int:
    """Bytes: the machine's, or what the control group allows of them."""
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
