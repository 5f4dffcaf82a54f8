"""Three firewalled machines at the level `overlay`: what opens ports of its own works between them.

The head lets in SSH, the workers nothing. Ray's environment has torch (tests/setup_envs.py).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.cluster import Cluster
from tests.lab.machines import Lab
from tests.lab.process import HOME, until
from tests.need import need_libraries
from tests.setup_envs import LIBRARIES

SOCKET = "/run/lab/overlay.sock"
JOB = Path(__file__).with_name("ddp_job.py")

pytestmark = [pytest.mark.lab, pytest.mark.ray]


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    need_libraries()
    made = Cluster(module_lab, LIBRARIES, network={"level": "overlay"}, ride_through=60)
    module_lab.machine("head").start_sshd()
    for machine in module_lab.machines:
        argv = [str(module_lab.rayfwd), "overlay", SOCKET, "--user", "ray"]
        keeper = machine.popen(argv, user="root")
        until(
            lambda k=keeper: "overlay_keeper_listening" in k.log.read_text(),  # type: ignore[misc]
            30,
            keeper.log.read_text,
        )
        made.start_node(machine.name, under=["env", f"RAYFWD_OVERLAY={SOCKET}"])
    made.wait_ready(240)
    yield made
    made.stop()


def train(cluster: Cluster, where: str, steps: int) -> list[dict[str, Any]]:
    """DDP from a driver on that machine; what each rank said."""
    machine = cluster.lab.machine(where)
    script = f"{HOME}/ddp_job.py"
    machine.write(script, JOB.read_text())
    argv = [str(machine.ray_python(LIBRARIES)), script, str(steps)]
    ran = machine.run(argv, timeout=300, env={"RAY_ADDRESS": "127.77.0.1:6379"})
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    ranks: list[dict[str, Any]] = json.loads(line)["ranks"]
    return ranks


def test_every_node_is_at_the_level_that_was_asked_for(cluster: Cluster) -> None:
    for daemon in cluster.daemons:
        status = daemon.status()
        assert status["network"]["level"] == "overlay", status["network"]
        assert status["network"]["interface"] == "rayfwd0"
        assert status["conditions"] == []


@pytest.mark.parametrize("where", ["head", "w1"])
def test_torch_trains_between_machines(cluster: Cluster, where: str) -> None:
    ranks = train(cluster, where, 20)
    assert {r["host"] for r in ranks} == {"head", "w1", "w2"}
    assert [r["steps"] for r in ranks] == [20] * 3
    assert len({r["parameters"] for r in ranks}) == 1, "gradients were averaged over all ranks"


def test_a_dropped_link_costs_no_step(cluster: Cluster) -> None:
    """Every SSH connection is killed and one machine's packets are swallowed for 8 s."""
    found: list[list[dict[str, Any]]] = []
    job = threading.Thread(target=lambda: found.append(train(cluster, "head", 2500)))
    job.start()
    time.sleep(12)  # Ray starts the ranks in some seconds; the steps take half a minute
    lab = cluster.lab
    lab.reset_connections(lab.machine("head"))
    lab.cut(lab.machine("w1"))
    time.sleep(8)
    lab.heal(lab.machine("w1"))
    job.join(300)
    (ranks,) = found
    assert [r["steps"] for r in ranks] == [2500] * 3
    assert len({r["parameters"] for r in ranks}) == 1
    assert max(r["longest"] for r in ranks) > 4, "the cut fell into the training"
