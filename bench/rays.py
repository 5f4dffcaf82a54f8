"""Ray over rayfwd and over `ssh -L`/`-R`, on the machines of tests/lab: a head and one worker.

Needs root and Ray, as the lab does (RAYFWD_RAY_ENVS). Both ways carry the same plan: the same
addresses and ports, and Ray started with the same flags.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from rayfwd.cluster.plan import NodePlan, allocate, head_plan
from rayfwd.config import RayConfig
from rayfwd.ray.commandline import RayPlan, by_hand
from tests.lab import package
from tests.lab.cluster import Cluster
from tests.lab.machines import Lab
from tests.lab.mix import NETWORK, RIDE_THROUGH, ssh_config
from tests.lab.process import HOME, until
from tests.need import tool

JOB = Path(__file__).with_name("ray_job.py")
STORE = 1_000_000_000
"""Bytes of each node's object store: room for objects of 300 MB."""
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}


def plans() -> tuple[NodePlan, NodePlan]:
    """The head's and the worker's, as a hub would make them."""
    head = head_plan("head", NETWORK, 20000, 40, PORTS)
    return head, allocate([head], "w1", NETWORK, 20000, 40, None)


@contextlib.contextmanager
def over_rayfwd(lab: Lab, workers: tuple[str, ...] = ("w1",)) -> Iterator[Cluster]:
    """The daemons of a head and its workers, and Ray on them."""
    cluster = Cluster(lab, workers=workers, ray={"object_store_memory": STORE})
    cluster.start(["head"])
    cluster.head.wait_event("hub_listening")
    cluster.start(workers)
    cluster.wait_ready()
    yield cluster
    cluster.stop()


@contextlib.contextmanager
def over_ssh(lab: Lab) -> Iterator[None]:
    """One `ssh` of the worker's that forwards every port both ways."""
    head, worker = lab.machine("head"), lab.machine("w1")
    both = plans()
    head.start_sshd(("-o", "GatewayPorts=clientspecified"))
    worker.write(f"{HOME}/.ssh/config", ssh_config(both[1], list(both), head))
    worker.popen([tool("ssh"), "-N", "head"])
    gcs = f"src {both[0].address}:{PORTS['gcs']}"
    until(lambda: worker.network_command("ss", "-Hltn", gcs).strip(), 30, lambda: "ssh forwards")
    for plan, machine in zip(both, (head, worker), strict=True):
        ray = RayConfig(
            command=str(machine.ray()), num_cpus=1, worker_ports=40, object_store_memory=STORE
        )
        line = by_hand(RayPlan(plan, both[0], ray, RIDE_THROUGH, NETWORK))
        machine.run(["bash", "-c", line], timeout=120)
    yield


def measure(lab: Lab) -> dict[str, float]:
    """What the job finds between the head and the worker, by the ways that stand."""
    head = lab.machine("head")
    script = f"{HOME}/{JOB.name}"
    head.write(script, JOB.read_text())
    argv = [str(head.ray_python()), script, plans()[1].address]
    ran = head.run(argv, timeout=180)
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def install(directory: Path) -> None:
    """rayfwd as a user has it, for the machines; once a run."""
    package.current() or package.install(directory / "package")
