"""Every kind of Ray work, from a driver on any node against every node, behind firewalls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.checks import EVERYWHERE, FROM_A_WORKER, verify
from tests.lab.cluster import Cluster
from tests.lab.machines import Lab
from tests.lab.process import UID

pytestmark = pytest.mark.ray

CHECKS = [(driver, check) for driver in ("head", "w1", "w2") for check in EVERYWHERE]
CHECKS += [(driver, check) for driver in ("w1", "w2") for check in FROM_A_WORKER]
CHECKS.sort(key=lambda pair: pair[0])  # the cases of one driver come of one run
CASES = [
    # Between w2 and all others w1's driver does the same, the other way round.
    pytest.param(*case, marks=[pytest.mark.thorough] if case[0] == "w2" else [])
    for case in CHECKS
]


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    cluster = Cluster(module_lab)
    cluster.start(["head"])
    cluster.head.wait_event("hub_listening")  # a worker that comes sooner says that it is absent
    cluster.start(["w1", "w2"])
    cluster.wait_ready()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def addresses(cluster: Cluster) -> list[str]:
    return [node["address"] for node in cluster.head.status()["roster"]]


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    """The lines of every driver that has run."""
    return {}


@pytest.mark.parametrize(("driver", "check"), CASES)
def test_work(
    cluster: Cluster,
    addresses: list[str],
    runs: dict[str, list[dict[str, Any]]],
    driver: str,
    check: str,
) -> None:
    if driver not in runs:
        checks = ",".join(c for d, c in CHECKS if d == driver)
        runs[driver] = []  # a run that breaks down is not made again for every check
        runs[driver] = cluster.driver(driver, ["--checks", checks])
    verify(runs[driver], driver, addresses, [check])


def test_every_node_has_an_address_of_the_plan(addresses: list[str]) -> None:
    assert sorted(addresses) == ["127.77.0.1", "127.77.0.2", "127.77.0.3"]


def test_totals_are_in_the_status_of_every_node(cluster: Cluster) -> None:
    for daemon in cluster.daemons:
        status = daemon.wait_status(lambda s: (s["cluster"] or {}).get("totals"), 60)
        assert status["cluster"]["totals"]["CPU"][1] == 3.0


def test_nothing_went_wrong(cluster: Cluster) -> None:
    for daemon in cluster.daemons:
        bad = [e for e in daemon.events() if e.get("level") not in {"debug", "info"}]
        assert not bad, f"{daemon.machine.name}: {bad}"
        status = daemon.status()
        assert status["state"] == "ready"
        assert status["conditions"] == []


def test_only_loopback_listens(cluster: Cluster) -> None:
    """rayfwd itself: Ray's own servers bind the wildcard, as ever."""
    for daemon in cluster.daemons:
        listening = [
            line.split()[3]
            for line in daemon.machine.network_command("ss", "-Hltnp").splitlines()
            if f"pid={daemon.process.pid}," in line
        ]
        assert listening, f"{daemon.machine.name}: no listener is open"
        outside = [where for where in listening if not where.startswith("127.")]
        assert not outside, f"{daemon.machine.name}: {outside}"


def test_rayfwd_runs_as_an_ordinary_user(cluster: Cluster) -> None:
    for daemon in cluster.daemons:
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == [str(UID)] * 4
        assert int(fields["CapEff"], 16) == 0


def test_sshd_is_as_debian_has_it(cluster: Cluster) -> None:
    head = cluster.lab.machine("head")
    packaged = head.run(["cat", "/usr/share/openssh/sshd_config"]).stdout
    assert head.run(["cat", "/etc/ssh/sshd_config"], user="root").stdout == packaged
    assert head.run(["ls", "/etc/ssh/sshd_config.d"], user="root").stdout == ""


def test_no_names_are_needed(cluster: Cluster) -> None:
    """No entry of /etc/hosts leads from a worker to the head's Ray, and there is no DNS."""
    for name in ("w1", "w2"):
        hosts = cluster.lab.machine(name).run(["cat", "/etc/hosts"]).stdout
        assert "head" not in hosts
        assert "127.77" not in hosts
