"""What is seen of a real cluster: the status, the screen, the metrics, the dashboard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import exposition, status_doc
from tests.lab.cluster import Cluster
from tests.lab.daemon import CONFIG, Daemon
from tests.lab.machines import Lab

pytestmark = pytest.mark.ray

METRICS = "127.0.0.1:9477"
SCRAPE = f"""
import urllib.request
print(urllib.request.urlopen("http://{METRICS}/metrics", timeout=10).read().decode())
"""

SELDOM = {
    *("problem", "conditions", "refused", "head_services", "declares"),
    "direct",  # test_direct.py
    "clients",  # whose rows test_client.py holds to the document
    *("dialled", "refused_here", "refused_there"),  # ports of programs: test_overlay.py
    "network.open[]",  # the same, test_direct.py
}
"""What a healthy cluster has none of below these, or only one kind of node has."""


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    cluster = Cluster(
        module_lab, every={"metrics.listen": METRICS}, w1={"ray.resources": {"disk": 2}}
    )
    cluster.start(["head"])
    cluster.head.wait_event("hub_listening")
    cluster.start(["w1", "w2"])
    cluster.wait_ready()
    for daemon in cluster.daemons:
        daemon.wait_status(lambda s: (s["cluster"] or {}).get("totals", {}).get("CPU") == [0, 3])
    cluster.head.machine.run([str(module_lab.rayfwd), "canary", "--config", CONFIG], timeout=150)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def cut(cluster: Cluster) -> None:
    """The first worker's link is cut for a while, and comes back."""
    w1 = cluster.lab.machine("w1")
    cluster.lab.cut(w1)
    cluster.worker("w1").wait_event("link_parked")
    cluster.head.wait_event("link_parked")
    cluster.lab.heal(w1)
    cluster.worker("w1").wait_event("link_resumed")
    cluster.head.wait_event("link_resumed")
    cluster.worker("w1").wait_status(lambda s: len(s["link"]["lanes"]) == 2)


def scrape(daemon: Daemon) -> str:
    """As Prometheus does, on the same machine, as another user."""
    python = str(daemon.machine.ray_python())
    return str(daemon.machine.run([python, "-c", SCRAPE], user="root").stdout)


def screen(daemon: Daemon) -> str:
    argv = [str(daemon.machine.lab.rayfwd), "status", "--config", CONFIG]
    return str(daemon.machine.run(argv).stdout)


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return values(text)[name, frozenset(labels.items())]


@pytest.mark.usefixtures("cut")
def test_the_status_is_as_documented(cluster: Cluster) -> None:
    keys = status_doc.documented()
    seen: set[str] = set()
    for daemon in cluster.daemons:
        wrong, found = status_doc.mistakes(daemon.status(), keys)
        assert wrong == [], daemon.machine.name
        seen |= found
    unseen = [
        key
        for key in keys.keys() - seen
        if not SELDOM & {key, *(part.rstrip("[]") for part in key.split("."))}
        and not keys[key].optional
    ]
    assert unseen == []


@pytest.mark.usefixtures("cut")
def test_the_metrics_are_as_documented(cluster: Cluster) -> None:
    found: dict[str, Any] = {}
    for daemon in cluster.daemons:
        for name, row in exposition.exposed(scrape(daemon)).items():
            assert found.setdefault(name, row) == row, name
    table = exposition.documented()
    # Nothing is wrong here, or little; and there is no overlay.
    absent = {"rayfwd_conditions", "rayfwd_network_refused_packets_total"}
    expected = {name: row for name, row in table.items() if name not in absent}
    assert {name: row for name, row in found.items() if name not in absent} == expected


@pytest.mark.usefixtures("cut")
def test_the_dashboard_finds_what_it_asks_for(cluster: Cluster) -> None:
    # What a healthy cluster without a canary does not have, as docs/metrics.md has it.
    more = (
        'rayfwd_conditions{code="x",severity="error"} 1\n'
        "rayfwd_canary_timestamp_seconds 1\n"
        'rayfwd_canary_success{node="w1"} 1\n'
        'rayfwd_canary_stage_seconds{node="w1",stage="task"} 1\n'
    )
    there = exposition.series(more, *(scrape(daemon) for daemon in cluster.daemons))
    assert exposition.dashboard_mistakes(there) == []


@pytest.mark.usefixtures("cut")
def test_a_cut_is_counted_at_both_ends(cluster: Cluster) -> None:
    for daemon, peer in ((cluster.worker("w1"), "head"), (cluster.head, "w1")):
        text = scrape(daemon)
        cuts = value(text, "rayfwd_link_cuts_total", peer=peer)
        assert cuts >= 1
        assert value(text, "rayfwd_link_ride_through_seconds_count", peer=peer) == cuts
        length = value(text, "rayfwd_link_ride_through_seconds_sum", peer=peer)
        assert length > 0
        parked = value(text, "rayfwd_link_parked_seconds_total", peer=peer)
        assert parked == pytest.approx(length)
        assert value(text, "rayfwd_link_sessions_total", peer=peer) == 1
        assert value(text, "rayfwd_link_state", peer=peer, state="up") == 1
        assert value(text, "rayfwd_link_received_bytes_total", peer=peer) > 1000
        assert value(text, "rayfwd_ray_state", state="up") == 1
    assert value(text, "rayfwd_link_cuts_total", peer="w2") == 0
    assert value(text, "rayfwd_cluster_resource_capacity", resource="disk") == 2


@pytest.mark.usefixtures("cut")
def test_the_head_shows_the_whole_cluster(cluster: Cluster) -> None:
    shown = screen(cluster.head)
    assert shown.startswith("READY  head head at 127.77.0.1")
    for name in ("w1", "w2"):
        rows = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
        assert len(rows) == 2, shown
        assert " up " in rows[0]
        assert " alive " in rows[1]
    assert "disk 0 of 2" in shown


@pytest.mark.usefixtures("cut")
def test_a_worker_shows_its_link(cluster: Cluster) -> None:
    shown = screen(cluster.worker("w1"))
    assert "ridden through" in shown
    assert "ago, for " in shown
    assert "given up" not in shown
    assert "\nw1 (this)" in shown


def test_metrics_are_asked_for_on_loopback_only(cluster: Cluster) -> None:
    for daemon in cluster.daemons:
        listening = daemon.machine.network_command("ss", "-Hltn", "sport = :9477").split()
        assert listening[3] == METRICS
