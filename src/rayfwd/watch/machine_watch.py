"""What this machine itself is short of: file descriptors, disk, ports for Ray's workers.

The rules are pure; `sample` reads what they need from the kernel and may block for milliseconds.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.problems import Problem
from rayfwd.ray import procfs
from rayfwd.system import capacity, setting

MACHINE_INTERVAL = 10.0
"""Seconds between two looks."""

OWN_DESCRIPTORS = 64
"""What the daemon needs for itself: lanes, logs, the control socket, the metrics."""
NODE_DESCRIPTORS = 64
"""Connections that one other node's Ray keeps open through the listeners here, at least: an idle
cluster of three has 20 to 40 a node."""

DISK_FULL_PART = 0.95
"""Part of the disk from which on Ray creates no more objects there
(`RAY_local_fs_capacity_threshold`, Ray 2.9 to 2.60)."""


@dataclass(frozen=True, slots=True)
class MachineSeen:
    """What was looked at. Sizes in bytes."""

    listeners: int
    """Listeners that there are to be here."""
    others: int
    """Nodes that reach this one, or are reached, through listeners."""
    limit: int
    """File descriptors that the daemon may have open."""
    disks: Mapping[str, tuple[int, int]]
    """Directory to what is free there for a user, and what there is."""
    listening: Collection[int]
    """Ports with a listening socket on this machine."""
    workers: range
    """Ports that are Ray's for worker processes here; empty: Ray is not up."""
    store: int = 0
    """What Ray's objects may have."""
    shared: int | None = None
    """What /dev/shm has, in use or not; None: there is none."""


def sample(
    listeners: int,
    nodes: Collection[NodePlan],
    own: NodePlan | None,
    disks: Collection[str],
    up: bool,
    store: int | None = None,
) -> MachineSeen:
    """Look now. Directories that cannot be looked at are left out."""
    found = {}
    for directory in disks:
        try:
            stat = os.statvfs(_there(Path(directory)))
        except OSError:
            continue
        if stat.f_blocks:
            # As Ray counts it: what only root may use is not there.
            total = (stat.f_blocks - stat.f_bfree + stat.f_bavail) * stat.f_frsize
            found[directory] = (stat.f_bavail * stat.f_frsize, total)
    workers = range(own.first_worker_port, own.last_worker_port + 1) if own and up else range(0)
    return MachineSeen(
        listeners=listeners,
        others=max(0, len(nodes) - 1),
        limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disks=found,
        listening=procfs.listening() if workers else (),
        workers=workers,
        store=capacity.rays_store(capacity.memory()) if store is None else store,
        shared=capacity.shared_memory(),
    )


def _there(path: Path) -> Path:
    """The directory, or the nearest above it that there is."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def judge(seen: MachineSeen) -> list[Problem]:
    """What is short."""
    found = [*_descriptors(seen), *_ports(seen), *_shared_memory(seen)]
    for directory, (free, total) in seen.disks.items():
        if total > 0 and 1 - free / total >= DISK_FULL_PART:
            found.append(
                codes.DISK_NEARLY_FULL.problem(
                    f"the disk of {directory}, where Ray keeps logs and spilled objects, is "
                    f"{100 * (1 - free / total):.0f} % full ({free / 1e6:.0f} MB free)",
                    "remove Ray's old sessions there (session_latest is the one that runs), or "
                    "give Ray another directory: `--temp-dir=…` in "
                    f"{setting.key('ray.extra_args')} (with older Rays, on the head for all nodes)",
                )
            )
            break  # one disk, as a rule
    return found


def _descriptors(seen: MachineSeen) -> list[Problem]:
    need = OWN_DESCRIPTORS + seen.listeners + NODE_DESCRIPTORS * seen.others
    if seen.limit < 0 or seen.limit >= need:
        return []
    return [
        codes.DESCRIPTORS_LOW.problem(
            f"rayfwd may open {seen.limit} files, but the plan needs {need}: {seen.listeners} "
            f"listeners, and connections to {seen.others} other nodes",
            f"raise the limit to at least {2 * need}: LimitNOFILE= of the service, or `ulimit -Hn`",
        )
    ]


def _shared_memory(seen: MachineSeen) -> list[Problem]:
    if seen.shared is None or seen.shared >= seen.store:
        return []
    need = f"{math.ceil(seen.store / 1e8) / 10:g}"
    return [
        codes.SHARED_MEMORY_SMALL.problem(
            f"/dev/shm has {seen.shared / 1e6:.0f} MB, but Ray's objects here may take "
            f"{seen.store / 1e9:.1f} GB, so Ray keeps them in /tmp, on a disk",
            f"in a container: `docker run --shm-size={need}gb` (compose: shm_size), or "
            f"--ipc=host; otherwise set {setting.key('ray.object_store_memory')} below the size "
            "of /dev/shm",
        )
    ]


def _ports(seen: MachineSeen) -> list[Problem]:
    if not seen.workers or not set(seen.workers) <= set(seen.listening):
        return []
    span = f"{seen.workers[0]}-{seen.workers[-1]}"
    return [
        codes.RAY_WORKER_PORTS_EXHAUSTED.problem(
            f"all {len(seen.workers)} ports for Ray's worker processes ({span}) are in use, so "
            'Ray starts no more of them here (raylet.out has "No available ports")',
            f"set {setting.value('ray.worker_ports', 2 * len(seen.workers))} or more on this node, "
            "and restart rayfwd there; each actor, each running task and each driver takes one",
        )
    ]
