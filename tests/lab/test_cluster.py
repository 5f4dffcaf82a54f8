"""Every kind of Ray work, from a driver on any node against every node, behind firewalls.

Then what is seen of that cluster: the status, the screen, the metrics, the dashboard, and canaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import exposition, status_doc
from tests.lab.canaries import check_healed, dropped, named, nothing_of_it, of, plan_of, send
from tests.lab.checks import EVERYWHERE, FROM_A_WORKER, verify
from tests.lab.cluster import Cluster, change
from tests.lab.daemon import CONFIG, Daemon
from tests.lab.machines import Lab
from tests.lab.process import UID, until

pytestmark = pytest.mark.ray

CHECKS = [(driver, check) for driver in ("head", "w1", "w2") for check in EVERYWHERE]
CHECKS += [(driver, check) for driver in ("w1", "w2") for check in FROM_A_WORKER]
CHECKS.sort(key=lambda pair: pair[0])  # the cases of one driver come of one run
CASES = [
    # Between w2 and all others w1's driver does the same, the other way round.
    pytest.param(*case, marks=[pytest.mark.thorough] if case[0] == "w2" else [])
    for case in CHECKS
]


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
    "network.guard_from[]",  # test_advertise.py
}
"""What a healthy cluster has none of below these, or only one kind of node has."""


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    cluster = Cluster(
        module_lab, every={"metrics.listen": METRICS}, w1={"ray.resources": {"disk": 2}}
    )
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


# -- what is seen of it


@pytest.fixture(scope="module")
def cut(cluster: Cluster) -> None:
    """A canary is back, and the first worker's link was cut for a while."""
    for daemon in cluster.daemons:
        daemon.wait_status(lambda s: (s["cluster"] or {}).get("totals", {}).get("CPU") == [0, 3])
    cluster.head.machine.run([str(cluster.lab.rayfwd), "canary", "--config", CONFIG], timeout=150)
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
    # Nothing is wrong here, or little; there is no overlay and no direct way (test_metrics.py).
    absent = {"rayfwd_conditions", "rayfwd_network_refused_packets_total"}
    absent |= {name for name in table if name.startswith("rayfwd_direct_")}
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


# -- its canary, which names a node that takes no tasks or no objects, and the port that is dead

SOONER = 45.0
"""Seconds in which the look at the ports finds a dead one: every 20 s, confirmed once."""


@pytest.fixture(scope="module")
def canary(cluster: Cluster) -> None:
    """It is switched on under the running head, and off again once it has come back: the tests
    send it, and where it fails it is sent again by itself."""
    before = cluster.head.events()[-1]
    every_ten_seconds(cluster, True)
    cluster.head.wait_event("canary_back", 120, where={"ok": True, "failed": []}, after=before)
    every_ten_seconds(cluster, False)
    check_healed(cluster)


def every_ten_seconds(cluster: Cluster, enabled: bool) -> None:
    """In the head's file, which it reads again."""
    head = cluster.head
    change(cluster.configs["head"], {"canary": {"enabled": enabled, "interval": 10, "timeout": 30}})
    head.machine.write(CONFIG, cluster.config("head"))
    head.machine.run([str(cluster.lab.rayfwd), "reload", "--config", CONFIG])


@pytest.mark.usefixtures("canary")
def test_on_demand(cluster: Cluster) -> None:
    code, answer = send(cluster.head)
    assert code == 0
    assert answer["ok"] is True
    assert [node["name"] for node in answer["nodes"]] == ["head", "w1", "w2"]
    for node in answer["nodes"]:
        assert node["stages"].keys() == {"task", "to", "from"}
        assert all(stage["ok"] for stage in node["stages"].values())
    assert 0 < answer["cost"]["cpu"] < 60
    assert cluster.head.status()["canary"]["ok"] is True


@pytest.mark.usefixtures("canary")
def test_on_demand_from_a_worker_that_has_it_off(cluster: Cluster) -> None:
    """Its own canary goes to the head and to itself."""
    code, answer = send(cluster.worker("w1"))
    assert (code, answer["ok"]) == (0, True)
    assert [node["name"] for node in answer["nodes"]] == ["head", "w1"]


@pytest.mark.usefixtures("canary")
@pytest.mark.runs("rayfwd canary")
def test_a_line_a_node(cluster: Cluster) -> None:
    argv = [str(cluster.lab.rayfwd), "canary", "--config", CONFIG]
    lines = cluster.lab.machine("head").run(argv, timeout=150).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["head", "ok"], ["w1", "ok"], ["w2", "ok"]]


@pytest.mark.usefixtures("canary")
def test_nothing_of_it_is_left(cluster: Cluster) -> None:
    """No process of the canary's outlives its round. Another round may have begun by itself."""
    send(cluster.head)
    until(lambda: nothing_of_it(cluster), 30, lambda: "a process of the canary's is always there")


@pytest.mark.usefixtures("canary")
def test_one_direction_only_and_an_object_manager_alone(cluster: Cluster) -> None:
    """The head's listeners to w1 are shut while w1 still reaches the head; w2 takes no objects."""
    (w1, first, _), (w2, second, _) = plan_of(cluster, "w1"), plan_of(cluster, "w2")
    head = cluster.lab.machine("head")
    with dropped(head, f"ip daddr {w1} meta l4proto tcp", f"ip daddr {w2} tcp dport {second + 1}"):
        sooner = named(cluster.head, "ray_port_unreachable", "w1", SOONER)
        assert f"{first} (the raylet)" in sooner["cause"]
        assert f"the listener at {w1}" in sooner["cause"]
        assert "on head itself drops packets" in sooner["cause"]
        assert send(cluster.head)[0] == 1
        problem = named(cluster.head, "canary_no_task", "w1", 10)
        assert f"{first} (the raylet)" in problem["cause"]
        assert "firewall" in problem["remedy"]

        problem = named(cluster.head, "canary_no_objects", "w2", 10)
        assert "from head to w2" in problem["cause"]
        assert f"{second + 1} (the object manager)" in problem["cause"]
        assert f"{second} (the raylet)" not in problem["cause"]
        sooner = named(cluster.head, "ray_port_unreachable", "w2", SOONER)
        assert f"{second + 1} (the object manager)" in sooner["cause"]
        # The worker concerned hears of it, and so does the third.
        for name in ("w1", "w2"):
            assert named(cluster.worker(name), "canary_no_task", "w1", 20)["cause"]
    check_healed(cluster)


@pytest.mark.usefixtures("canary")
def test_worker_ports_alone_and_what_a_worker_sees(cluster: Cluster) -> None:
    """The head reaches no worker process of w1; w2 does not reach the head's object manager."""
    (w1, first, last), (head, base, _) = plan_of(cluster, "w1"), plan_of(cluster, "head")
    ports = f"{first + 8}-{last}"
    with (
        dropped(cluster.lab.machine("head"), f"ip daddr {w1} tcp dport {ports}"),
        dropped(cluster.lab.machine("w2"), f"ip daddr {head} tcp dport {base + 1}"),
    ):
        problem = named(cluster.worker("w2"), "ray_port_unreachable", "head", SOONER)
        assert f"{base + 1} (the object manager) of head" in problem["cause"]
        assert "on w2 itself drops packets" in problem["cause"]
        code, answer = send(cluster.head)
        assert code == 1
        problem = named(cluster.head, "canary_no_task", "w1", 10)
        assert f"port {ports} (workers) of w1" in problem["cause"]
        rows = {node["name"]: node for node in answer["nodes"]}
        assert rows["head"]["ok"]
        assert rows["w1"]["problem"]["code"] == "canary_no_task"
        # From the head all ports of w2 answer; w2 itself names the listener.
        assert rows["w2"]["problem"]["code"] == "canary_no_objects"
        assert of(cluster.head.status(), "ray_port_unreachable", "w1") is None
    check_healed(cluster)
