"""`systemctl restart rayfwd`, and an upgrade, under a job that counts every call: none is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lab.process import Process
from tests.lab.toll import Job
from tests.systemd.cluster import Cluster
from tests.systemd.machines import Machine

pytestmark = pytest.mark.timeout(400)

PYTHON = Path("/home/ray/venv/bin/python")
UPGRADE = "/opt/rayfwd/bin/pip install --force-reinstall --no-deps /wheels/rayfwd-*.whl"


class AsRay:
    """A machine as the job sees it: everything is done by the user that Ray runs as."""

    def __init__(self, machine: Machine) -> None:
        self.lab = machine.lab
        self._machine = machine

    def write(self, path: str, text: str) -> None:
        self._machine.write(path, text, "ray")

    def popen(self, argv: list[str]) -> Process:
        return self._machine.popen(argv, user="ray")


@pytest.fixture(scope="module")
def job(cluster: Cluster) -> Job:
    """From a driver on the worker."""
    return Job(AsRay(cluster.worker), PYTHON, "--nodes", "2")  # type: ignore[arg-type]


def restart(machine: Machine) -> dict[str, Any]:
    """What the new process said of what it took over."""
    before = machine.show()["MainPID"]
    machine.systemctl("restart", "rayfwd")
    shown = machine.wait_for(ActiveState="active", SubState="running")
    assert shown["MainPID"] != before
    assert shown["StatusText"].startswith("ready")
    return machine.events("handover_taken")[-1]


@pytest.mark.parametrize("name", ["worker", "head"])
def test_a_restart_costs_no_call(cluster: Cluster, job: Job, name: str) -> None:
    done = job.done()
    taken = restart(cluster.lab.machine(name))
    assert taken["RESET"] == "0"
    assert int(taken["STREAMS"]) > 5
    cluster.work()
    job.check()
    assert job.done() > done


def test_nor_does_an_upgrade(cluster: Cluster, job: Job) -> None:
    for machine in cluster.lab.machines:
        machine.run(["sh", "-c", UPGRADE], timeout=120)
        assert restart(machine)["RESET"] == "0"
    cluster.work()
    job.finish()
    job.check()


def test_nothing_stays_with_the_service_manager(cluster: Cluster) -> None:
    for machine in cluster.lab.machines:
        assert machine.show()["NFileDescriptorStore"] == "0"
        assert not machine.events("handover_failed")
        assert not machine.events("handover_refused")
