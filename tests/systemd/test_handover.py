"""`systemctl restart rayfwd`, and an upgrade, under a job that counts every call: none is lost."""

from __future__ import annotations

import pytest

from tests.lab.toll import Job
from tests.systemd.cluster import Cluster

pytestmark = pytest.mark.timeout(400)

UPGRADE = "/opt/rayfwd/bin/pip install --force-reinstall --no-deps /wheels/rayfwd-*.whl"


@pytest.fixture(scope="module")
def job(cluster: Cluster) -> Job:
    return cluster.job()


@pytest.mark.parametrize("name", ["worker", "head"])
def test_a_restart_costs_no_call(cluster: Cluster, job: Job, name: str) -> None:
    done = job.done()
    taken = cluster.restart(cluster.lab.machine(name))
    assert taken["RESET"] == "0"
    assert int(taken["STREAMS"]) > 5
    cluster.work(cpus=0)
    job.check()
    assert job.done() > done


def test_nor_does_an_upgrade(cluster: Cluster, job: Job) -> None:
    for machine in cluster.lab.machines:
        machine.run(["sh", "-c", UPGRADE], timeout=120)
        assert cluster.restart(machine)["RESET"] == "0"
    cluster.work(cpus=0)
    job.finish()
    job.check()


def test_nothing_stays_with_the_service_manager(cluster: Cluster) -> None:
    for machine in cluster.lab.machines:
        assert machine.show()["NFileDescriptorStore"] == "0"
        assert not machine.events("handover_failed")
        assert not machine.events("handover_refused")
