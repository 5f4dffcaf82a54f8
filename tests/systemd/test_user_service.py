"""The same without root: services of an ordinary user, who lingers, on both machines."""

from __future__ import annotations

import pytest

from tests.systemd.cluster import Cluster
from tests.systemd.machines import Lab


@pytest.fixture(scope="module")
def own(lab: Lab) -> Cluster:
    """Set up by user `ray`, and ready."""
    cluster = Cluster(lab, user="ray")
    for machine in lab.machines:
        machine.run(["loginctl", "enable-linger", "ray"])  # as init says
    cluster.set_up()
    cluster.start()
    cluster.wait_ready()
    return cluster


def test_it_is_a_cluster(own: Cluster) -> None:
    assert own.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]
    for machine in own.lab.machines:
        assert machine.show("rayfwd")["LoadState"] == "not-found", "nothing of root's"
        assert machine.status(user="ray")["state"] == "ready"
        config = machine.run(["stat", "-c", "%a %U", "/home/ray/.config/rayfwd.toml"]).stdout
        assert config == "600 ray\n"


def test_said_again_it_changes_nothing(own: Cluster) -> None:
    said = own.init_worker()
    assert "Nothing was to be done" in said
    assert "loginctl enable-linger ray" in said


def test_it_comes_up_at_boot(own: Cluster) -> None:
    own.worker.reboot()
    own.wait_ready()
    assert own.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]


def test_uninstall(own: Cluster) -> None:
    for machine in (own.worker, own.head):
        machine.run(["rayfwd", "uninstall", "--purge"], user="ray", timeout=150)
        left = machine.run(["find", "/home/ray", "-iname", "*rayfwd*"]).stdout
        assert left == ""
        assert machine.show(user="ray")["LoadState"] == "not-found"
        assert (
            machine.run(
                ["pgrep", "-u", "ray", "-f", "raylet|gcs_server|rayfwd"], check=False
            ).stdout
            == ""
        )
