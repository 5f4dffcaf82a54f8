"""`systemctl restart rayfwd`, and an upgrade, under a job that counts every call: none is lost."""

from __future__ import annotations

import pytest

from tests.lab.loadgen import Job
from tests.systemd.cluster import Cluster

pytestmark = pytest.mark.timeout(400)

UPGRADE = "/opt/rayfwd/bin/pip install --force-reinstall --no-deps /wheels/rayfwd-*.whl"


@pytest.fixture(scope="module")
def job(cluster: Cluster) -> Job:
    return cluster.job()


@pytest.mark.parametrize("name", ["worker", "head"])
def test_a_restart_costs_no_call(cluster: Cluster, job: Job, name: str) -> None:
    taken = cluster.restart(cluster.lab.machine(name))
    assert taken["RESET"] == "0"
    assert int(taken["STREAMS"]) > 5
    cluster.goes_on(job)
    job.check()


def test_nor_does_an_upgrade(cluster: Cluster, job: Job) -> None:
    for machine in cluster.lab.machines:
        machine.run(["sh", "-c", UPGRADE], timeout=120)
        assert cluster.restart(machine)["RESET"] == "0"
    cluster.goes_on(job)
    job.finish()
    job.check()
    assert cluster.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]


def test_nothing_stays_with_the_service_manager(cluster: Cluster) -> None:
    """But the listeners' sockets, as one descriptor, while it runs."""
    for machine in cluster.lab.machines:
        assert machine.show()["NFileDescriptorStore"] == "1"
        assert not machine.events("handover_failed")
        assert not machine.events("handover_refused")
