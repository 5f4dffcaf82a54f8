"""A cluster set up by the README's commands on two bare machines."""

from __future__ import annotations

from tests.systemd.cluster import Cluster


def test_ready_means_that_tasks_run_on_every_node(cluster: Cluster) -> None:
    for machine in cluster.lab.machines:
        shown = machine.show()
        assert (shown["ActiveState"], shown["NRestarts"]) == ("active", "0")
        assert shown["StatusText"].startswith("ready")
    ran = cluster.work()
    assert [(sent, back) for sent, _, back in ran] == [(1_000_000, 2_000_000)] * 2
    assert [address for _, address, _ in ran] == ["127.77.0.1", "127.77.0.2"]


def test_the_journal_has_fields(cluster: Cluster) -> None:
    (ready,) = cluster.worker.events("rayfwd_ready")
    assert ready["NODE"] == "worker"
    assert ready["_SYSTEMD_UNIT"] == "rayfwd.service"
    assert ready["PRIORITY"] == "6"
