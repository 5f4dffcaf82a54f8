"""One cluster through restarts, an upgrade and boots.

`systemctl restart rayfwd` and an upgrade under a job that counts every call: none is lost. After a
boot, in whatever order and with the network late, the cluster is there by itself: nobody says
anything to systemd but to boot.
"""

from __future__ import annotations

import pytest

from tests.lab.loadgen import Job
from tests.lab.process import until
from tests.systemd.cluster import BOTH, Cluster
from tests.systemd.machines import Machine

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
    assert cluster.addresses_that_work() == BOTH


def test_nothing_stays_with_the_service_manager(cluster: Cluster) -> None:
    """But the listeners' sockets, as one descriptor, while it runs."""
    for machine in cluster.lab.machines:
        assert machine.show()["NFileDescriptorStore"] == "1"
        assert not machine.events("handover_failed")
        assert not machine.events("handover_refused")


# -- boots


def system_state(machine: Machine) -> str:
    """What a user sees who asks how the boot went."""
    return machine.systemctl("is-system-running", check=False).strip()


def test_head_reboots(cluster: Cluster) -> None:
    """Its Ray is another one afterwards: the worker's joins that."""
    cluster.head.reboot()
    cluster.wait_ready()
    assert cluster.addresses_that_work() == BOTH


def test_worker_reboots(cluster: Cluster) -> None:
    before = cluster.worker.status()["node"]
    cluster.worker.reboot()
    cluster.wait_ready()
    assert cluster.addresses_that_work() == BOTH
    assert cluster.worker.status()["node"] == before, "its address and its ports are its own"


@pytest.mark.runs("systemctl is-system-running")
def test_worker_is_up_before_the_head(cluster: Cluster) -> None:
    """And says what it waits for; systemd has it as starting, and does not give it up."""
    for machine in (cluster.worker, cluster.head):
        machine.poweroff()
    cluster.worker.boot()
    shown = cluster.worker.wait_for_status("waiting: ")
    assert (shown["ActiveState"], shown["SubState"]) == ("activating", "start")
    assert "head" in shown["StatusText"]
    # Nothing else of the boot waits for the head.
    for unit in ("multi-user.target", "getty.target", "systemd-user-sessions"):
        cluster.worker.wait_for(unit, ActiveState="active")
    jobs = cluster.worker.systemctl("list-jobs", "--no-legend")
    assert [line.split()[1] for line in jobs.splitlines()] == ["rayfwd.service"]
    assert system_state(cluster.worker) == "starting", "as docs/operations.md says"
    cluster.head.boot()
    cluster.wait_ready()
    until(lambda: system_state(cluster.worker) == "running", 20, lambda: "the boot is finished")
    assert cluster.addresses_that_work() == BOTH


def test_both_reboot_at_once_and_the_network_is_late(cluster: Cluster) -> None:
    """Later than network-online.target: systemd stops waiting for a cable at some time."""
    wait = "/lib/systemd/systemd-networkd-wait-online"
    text = f"[Service]\nExecStart=\nExecStart={wait} --timeout=2\n"
    for machine in cluster.lab.machines:
        drop_in = "/etc/systemd/system/systemd-networkd-wait-online.service.d"
        machine.run(["mkdir", "-p", drop_in])
        machine.write(f"{drop_in}/short.conf", text)
        cluster.lab.unplug(machine)
    for machine in cluster.lab.machines:
        machine.reboot()
    cluster.head.wait_for(ActiveState="active")  # it needs nobody
    shown = cluster.worker.wait_for_status("waiting: ")
    assert shown["ActiveState"] == "activating"
    assert cluster.worker.show("network-online.target")["ActiveState"] == "active"
    for machine in cluster.lab.machines:
        cluster.lab.plug(machine)
    cluster.wait_ready()
    assert cluster.addresses_that_work() == BOTH
    for machine in cluster.lab.machines:
        assert machine.show()["NRestarts"] == "0", "it waited; it did not fail and begin again"
