"""`ray.start = false`: rayfwd holds the forwards, and the command that it prints starts Ray."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import Cluster, change
from tests.lab.daemon import CONFIG
from tests.lab.machines import Lab, Machine
from tests.lab.process import without_forks

pytestmark = pytest.mark.ray
CHECKS = ("small_tasks", "large_results", "large_arguments", "nested_tasks")


def raylets(machine: Machine) -> list[int]:
    """Host-side ids of the machine's raylets."""
    return without_forks([pid for pid in machine.pids() if named(pid) == "raylet"])


def named(pid: int) -> str:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:
        return ""


@pytest.mark.runs("rayfwd plan", "ray start")
def test_ray_is_started_by_hand_and_outlives_rayfwd(lab: Lab) -> None:
    cluster = Cluster(lab, workers=("w1",), every={"ray.start": False})
    cluster.start()
    for name in ("head", "w1"):
        daemon = cluster.head if name == "head" else cluster.worker("w1")
        machine = lab.machine(name)
        daemon.wait_ready()  # there is nothing else that it waits for
        assert daemon.status()["ray"]["state"] == "by_hand"
        assert raylets(machine) == []
        command = daemon.wait_event("ray_start_by_hand")["command"]
        plan = machine.run([str(lab.rayfwd), "plan", "--config", CONFIG]).stdout
        assert command in plan.splitlines()
        machine.run(["bash", "-c", command], timeout=120)
        status = daemon.wait_status(lambda s: s["ray"]["state"] == "up", 30)
        assert status["ray"]["adopted"] is True
        assert status["ray"]["pid"] is not None

    addresses = [node["address"] for node in cluster.head.status()["roster"]]
    lines = cluster.driver("w1", ["--nodes", "2", "--checks", ",".join(CHECKS)])
    verify(lines, "w1", addresses, CHECKS)

    before = {name: raylets(lab.machine(name)) for name in ("head", "w1")}
    assert [len(pids) for pids in before.values()] == [1, 1]
    assert cluster.stop() == {"head": 0, "w1": 0}
    assert {name: raylets(lab.machine(name)) for name in ("head", "w1")} == before

    # Nor does a daemon that would start Ray itself touch one that is not its own.
    change(cluster.configs["head"], {"ray.start": True})
    for name in ("head", "w1"):
        cluster.start_node(name)
    cluster.wait_ready()
    for daemon in cluster.daemons:
        daemon.wait_status(lambda s: s["ray"]["state"] == "up" and s["ray"]["adopted"], 30)
    lines = cluster.driver("head", ["--nodes", "2", "--checks", "small_tasks,large_results"])
    verify(lines, "head", addresses, ("small_tasks", "large_results"))
    assert {name: raylets(lab.machine(name)) for name in ("head", "w1")} == before

    # When the raylet is ended by whoever started it, rayfwd waits for the next one.
    (raylet,) = before["w1"]
    os.kill(raylet, signal.SIGTERM)
    cluster.worker("w1").wait_status(lambda s: s["ray"]["state"] == "by_hand", 60)
