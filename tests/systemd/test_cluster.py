"""A cluster set up by the README's commands on two bare machines."""

from __future__ import annotations

from tests.systemd.cluster import Cluster


def test_ready_means_that_tasks_run_on_every_node(cluster: Cluster) -> None:
    for machine in cluster.lab.machines:
        shown = machine.show()
        assert (shown["ActiveState"], shown["NRestarts"]) == ("active", "0")
        assert shown["StatusText"].startswith("ready")
    assert cluster.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]
