"""What a container or a job has of its machine, as Ray counts it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from rayfwd.config import RayConfig
from rayfwd.ray import starter
from rayfwd.system import capacity
from rayfwd.system.capacity import rays_store
from rayfwd.watch.machine_watch import MachineSeen, judge, sample

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
        ({"cpu_0max": "50000 100000\n"}, 0),
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
    monkeypatch.setattr(capacity, "rays_cpus", lambda *_: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert capacity.cpus() == 3
    assert starter._as_bounded(RayConfig()).num_cpus == 3
    assert starter._as_bounded(RayConfig(num_cpus=7)).num_cpus == 7
    monkeypatch.setattr(capacity, "rays_cpus", lambda *_: 3)
    assert starter._as_bounded(RayConfig()).num_cpus is None, "Ray counts right by itself"


def test_of_half_a_processor_ray_is_told_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it would have none, and run no task."""
    monkeypatch.setattr(capacity, "rays_cpus", lambda *_: 0)
    assert capacity.cpus() == 1
    assert starter._as_bounded(RayConfig()).num_cpus == 1
    assert starter._as_bounded(RayConfig(num_cpus=0)).num_cpus == 0


def test_memory_by_the_control_group(tmp_path: Path) -> None:
    machine = capacity.rays_memory(tmp_path)
    assert machine > GIB // 2
    assert capacity.rays_memory(group(tmp_path / "a", memory_0max=f"{GIB // 4}\n")) == GIB // 4
    assert capacity.rays_memory(group(tmp_path / "b", memory_0max="max\n")) == machine
    old = group(tmp_path / "c", memory__memory_0limit_in_bytes="9223372036854771712")
    assert capacity.rays_memory(old) == machine


def tree(root: Path, own: str, **files: str) -> tuple[Path, Path]:
    """The groups of a machine, and the file that says which this process is in."""
    (root / "own").write_text(own)
    return group(root / "cgroup", **files), root / "own"


def test_bounds_of_groups_below_the_outermost_of_version_2(tmp_path: Path) -> None:
    """Of a job of Slurm or a unit of systemd, which see all groups of the machine."""
    root, own = tree(
        tmp_path,
        "0::/system.slice/job_7/step\n",
        system_0slice__cpu_0max="150000 100000\n",
        system_0slice__job_7__cpu_0max="max 100000\n",
        system_0slice__job_7__memory_0max=f"{GIB // 2}\n",
        system_0slice__job_7__memory_0high="max\n",
        system_0slice__job_7__step__memory_0max="max\n",
        system_0slice__job_7__step__memory_0high=f"{GIB // 4}\n",
        cpu_0stat="usage_usec 1\n",
    )
    assert capacity.cpus(root, own) == 1
    assert capacity.memory(root, own) == GIB // 4
    assert capacity.rays_cpus(root) == os.cpu_count(), "Ray does not look there"
    assert capacity.rays_memory(root) > GIB // 2


def test_bounds_of_groups_below_the_outermost_of_version_1(tmp_path: Path) -> None:
    root, own = tree(
        tmp_path,
        "12:cpu,cpuacct:/slurm/job_7\n4:memory:/slurm/job_7/step_0\n1:name=systemd:/\n0::/\n",
    )
    group(root / "cpu,cpuacct" / "slurm" / "job_7", **QUOTA)
    group(root / "memory" / "slurm", memory_0limit_in_bytes="9223372036854771712\n")
    group(root / "memory" / "slurm" / "job_7", memory_0limit_in_bytes=f"{GIB // 4}\n")
    assert capacity.cpus(root, own) == 1
    assert capacity.memory(root, own) == GIB // 4
    # Of a container that has no namespace for them: nothing is there but the outermost.
    assert capacity.memory(group(tmp_path / "other", memory_0max=f"{GIB // 8}"), own) == GIB // 8


QUOTA = {"cpu_0cfs_quota_us": "100000\n", "cpu_0cfs_period_us": "100000\n"}


@pytest.mark.parametrize("own", ["", "0::/../outside\n", "0::/gone\n", "9:net_cls:/x\n"])
def test_groups_of_which_nothing_is_known_bound_nothing(tmp_path: Path, own: str) -> None:
    root, told = tree(tmp_path, own)
    assert capacity.memory(root, told) == capacity.rays_memory(root)
    assert capacity.cpus(root, tmp_path / "none") == len(os.sched_getaffinity(0))


def test_ray_is_told_of_bounds_that_it_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "cpus", lambda: 2)
    monkeypatch.setattr(capacity, "rays_cpus", lambda: 64)
    monkeypatch.setattr(capacity, "rays_memory", lambda: 512 * GIB)
    monkeypatch.setattr(capacity, "memory", lambda: 10 * GIB)
    told = starter._as_bounded(RayConfig())
    store = 3 * GIB
    assert (told.num_cpus, told.object_store_memory) == (2, store)
    assert told.extra_args == (f"--memory={10 * GIB - store}",)
    said = RayConfig(object_store_memory=GIB, extra_args=("--memory=1",), num_cpus=1)
    assert starter._as_bounded(said) == said
    monkeypatch.setattr(capacity, "memory", lambda: GIB // 8)
    assert starter._as_bounded(RayConfig()).object_store_memory == capacity.STORE_LEAST
    monkeypatch.setattr(capacity, "memory", lambda: 512 * GIB)
    assert starter._as_bounded(RayConfig()).extra_args == (), "Ray counts right by itself"


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
