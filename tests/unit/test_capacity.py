"""What a container or a job has of its machine, as Ray counts it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from rayfwd.config import RayConfig
from rayfwd.ray import supervisor
from rayfwd.system import capacity
from rayfwd.watch.machine_watch import MachineSeen, judge, rays_store, sample

GIB = 1 << 30


def group(root: Path, **files: str) -> Path:
    """A control group; `__` is a directory, `_0` a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_0", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu_0max": "400000 100000\n"}, 4),
        ({"cpu_0max": "150000 100000\n"}, 1),
        ({"cpu_0max": "max 100000\n"}, os.cpu_count()),
        ({}, os.cpu_count()),
        ({"cpu__cpu_0cfs_quota_us": "-1\n", "cpu__cpu_0cfs_period_us": "100000"}, os.cpu_count()),
        (
            {
                "cpu__cpu_0cfs_quota_us": "800000",
                "cpu__cpu_0cfs_period_us": "100000",
                "cpuset__cpuset_0cpus": "0-1,8\n",
            },
            3,
        ),
        ({"cpuset__cpuset_0cpus": "nonsense"}, os.cpu_count()),
    ],
)
def test_processors_by_the_control_group(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    assert capacity.rays_cpus(group(tmp_path, **files)) == cpus


def test_processors_by_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would count 256, and start as many workers."""
    monkeypatch.setattr(capacity, "rays_cpus", lambda: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert capacity.cpus() == 3
    assert supervisor._as_bounded(RayConfig()).num_cpus == 3
    assert supervisor._as_bounded(RayConfig(num_cpus=7)).num_cpus == 7
    monkeypatch.setattr(capacity, "rays_cpus", lambda: 3)
    assert supervisor._as_bounded(RayConfig()).num_cpus is None, "Ray counts right by itself"


def test_memory_by_the_control_group(tmp_path: Path) -> None:
    machine = capacity.memory(tmp_path)
    assert machine > GIB // 2
    assert capacity.memory(group(tmp_path / "a", memory_0max=f"{GIB // 4}\n")) == GIB // 4
    assert capacity.memory(group(tmp_path / "b", memory_0max="max\n")) == machine
    old = group(tmp_path / "c", memory__memory_0limit_in_bytes="9223372036854771712")
    assert capacity.memory(old) == machine


DOCKER = MachineSeen(
    listeners=0,
    others=0,
    limit=-1,
    disks={},
    listening=(),
    workers=range(0),
    store=rays_store(32 * 10**9),
    shared=64 * 2**20,
)


def test_the_64_mb_of_docker_are_named() -> None:
    (problem,) = judge(DOCKER)
    assert problem.code.name == "shared_memory_small"
    assert problem.cause.startswith("/dev/shm has 67 MB, but Ray's objects here may take 9.6 GB")
    assert "docker run --shm-size=9.6gb" in problem.remedy
    assert judge(replace(DOCKER, shared=10**10)) == []
    assert judge(replace(DOCKER, store=60_000_000)) == []
    assert judge(replace(DOCKER, shared=None)) == []


def test_what_is_looked_at() -> None:
    seen = sample(0, (), None, (), False, 123)
    assert (seen.store, seen.shared) == (123, capacity.shared_memory())
    assert sample(0, (), None, (), False).store == rays_store(capacity.memory())
    assert rays_store(10**12) == 10**10
