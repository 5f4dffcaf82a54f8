"""The two nodes of the tests with the real Ray: both on one machine, each on its own address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayfwd.cluster.plan import allocate, head_plan
from rayfwd.config import Config, parse
from tests.need import ray_envs

NETWORK = "127.77.0.0/16"
HEAD = head_plan("head", NETWORK, 20000, 67, {"gcs": 6379, "dashboard": 8265, "client": 10001})
WORKER = allocate([HEAD], "w1", NETWORK, 20000, 67, None)


def ray_command(version: str) -> Path:
    """The `ray` of that version's environment, which the test set-up makes."""
    return ray_envs() / f"ray-{version}" / "bin" / "ray"


def head_config(folder: Path, command: str, **ray: Any) -> Config:
    return _config({"role": "head", "name": "head"}, folder, command, ray)


def worker_config(folder: Path, command: str, **ray: Any) -> Config:
    data = {"role": "worker", "name": "w1", "head": {"ssh": "nobody@nowhere"}}
    return _config(data, folder, command, ray)


def _config(data: dict[str, Any], folder: Path, command: str, ray: dict[str, Any]) -> Config:
    own = folder / data["name"]
    section = {"command": command, "num_cpus": 1, "object_store_memory": 100_000_000, **ray}
    return parse({**data, "state_dir": str(own), "runtime_dir": str(own / "run"), "ray": section})
