"""An advertised address that does not work is named before Ray is started under it.

One cluster for all: w1 advertises its address, and its firewall is what a test makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from rayfwd.ray.commandline import given_up_after
from rayfwd.watch.flapping import TRIAL_FACTOR
from tests.lab.cluster import Cluster
from tests.lab.machines import Lab, Machine
from tests.lab.named import waited_for
from tests.lab.process import until

pytestmark = pytest.mark.ray

WITHIN = 10.0
"""Seconds from the moment that the worker knows its ports."""
RIDE_THROUGH = 20
LOOKS = 120.0
"""Seconds in which the head has looked at its node table again: every 30, and as long as it takes
`ray status` on a busy machine. Nothing is said of that; only for ever is it not waited."""


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    w1 = module_lab.machine("w1")
    cluster = Cluster(
        module_lab,
        workers=("w1",),
        every={"ride_through": RIDE_THROUGH},
        w1={"ray.advertise": w1.address},
    )
    cluster.start(["head"])
    cluster.head.wait_ready()
    yield cluster
    cluster.stop()


def block(cluster: Cluster) -> tuple[int, int]:
    row = next(node for node in cluster.head.status()["roster"] if node["name"] == "w1")
    first, last = row["ports"].split("-")
    return int(first), int(last)


def refuse(machine: Machine) -> None:
    """Its firewall answers with a reset instead of silence."""
    machine.firewall()
    machine.nft("add rule inet firewall input meta l4proto tcp reject with tcp reset")


def of(status: dict[str, Any], code: str) -> list[dict[str, Any]]:
    return [p for p in status["conditions"] if p["code"] == code]


def check_named(cluster: Cluster, code: str) -> dict[str, Any]:
    """The worker waits for it, and the head shows it too; Ray was not started."""
    worker = cluster.worker("w1")
    status = worker.wait_status(lambda s: of(s, code), 60)
    assert status["state"] == "waiting"
    assert status["ray"]["state"] == "failed"
    (problem,) = of(cluster.head.wait_status(lambda s: of(s, code), 10), code)
    assert problem["subject"] == "w1"
    assert {k: problem[k] for k in ("cause", "remedy")} == {
        k: waited_for(status)[0][k] for k in ("cause", "remedy")
    }
    assert worker.events("ray_starting") == []
    return problem


def seconds_between(first: dict[str, Any], second: dict[str, Any]) -> float:
    begin, end = (datetime.fromisoformat(e["timestamp"]) for e in (first, second))
    return (end - begin).total_seconds()


def test_packets_are_dropped(cluster: Cluster) -> None:
    worker = cluster.start_node("w1")
    known = worker.wait_event("plan_received")
    said = worker.wait_event("advertise_dropped")
    assert seconds_between(known, said) < WITHIN
    seen = cluster.head.wait_event("advertise_dropped", where={"node": "w1"})
    assert seconds_between(known, seen) < WITHIN
    problem = check_named(cluster, "advertise_dropped")
    first, last = block(cluster)
    assert f"{first} (the raylet)" in problem["cause"]
    assert f"{first + 8}-{last} (workers) are dropped" in problem["cause"]
    assert f"allow inbound TCP to ports {first}-{last}" in problem["remedy"]


def test_connections_are_refused(cluster: Cluster) -> None:
    refuse(cluster.lab.machine("w1"))
    problem = check_named(cluster, "advertise_refused")
    assert "are refused" in problem["cause"]


def test_some_ports_are_open(cluster: Cluster) -> None:
    first, last = block(cluster)
    cluster.lab.machine("w1").firewall(range(first, first + 8))
    worker = cluster.worker("w1")
    worker.wait_event("advertise_dropped", where=lambda e: "other ports answer" in e["cause"])
    problem = check_named(cluster, "advertise_dropped")
    assert f"{first + 8}-{last} (workers) are dropped" in problem["cause"]
    assert "(the raylet)" not in problem["cause"]


def test_its_own_address_is_shut_to_itself(cluster: Cluster) -> None:
    """As a cloud's firewall does it that knows the machine by another address."""
    first, last = block(cluster)
    w1 = cluster.lab.machine("w1")
    w1.firewall(range(first, last + 1))
    w1.nft(
        f"insert rule inet firewall input ip saddr {w1.address} ip daddr {w1.address} "
        f"tcp dport {first}-{last} drop"
    )
    problem = check_named(cluster, "advertise_self_unreachable")
    assert f"from {w1.address}/32 to ports {first}-{last}" in problem["remedy"]


def test_cleared_when_it_works(cluster: Cluster) -> None:
    first, last = block(cluster)
    cluster.lab.machine("w1").firewall(range(first, last + 1))
    worker = cluster.worker("w1")
    worker.wait_event("advertise_checked", 90)
    worker.wait_status(lambda s: s["state"] == "ready", 120)
    cluster.head.wait_status(lambda s: s["conditions"] == [], 60)
    over = cluster.head.events("problem_over")
    assert over[-1]["node"] == "w1"
    assert over[-1]["code"] == "advertise_self_unreachable"


def test_overridden_it_joins_and_is_gone(cluster: Cluster) -> None:
    worker = cluster.worker("w1")
    assert worker.stop() == 0
    cluster.lab.machine("w1").firewall()
    cluster.configs["w1"]["ray"]["advertise_check"] = False
    worker = cluster.start_node("w1")
    joined = worker.wait_event("ray_started", 120)
    # Sooner than Ray itself gives it up.
    found = cluster.head.wait_event("ray_port_unreachable", 90, where={"node": "w1"})
    assert seconds_between(joined, found) < 90
    flapping = cluster.head.wait_event("ray_node_flapping", 150, where={"node": "w1"})
    gone = worker.wait_event("ray_exited", 30)
    assert seconds_between(gone, flapping) < 90
    assert "ray.advertise" in flapping["remedy"]
    # The worker concerned hears of it, and knows nothing of it by itself.
    told = worker.wait_event("ray_node_flapping", 30)
    assert (told["node"], told["seen_by"]) == ("w1", "head")


def test_it_flaps_no_more_when_it_has_stayed(cluster: Cluster) -> None:
    """Its firewall is opened under the running daemons; how long it must stay follows from
    `ride_through`.

    A look judges what it has seen: the first one that was begun after the trial says that it is
    over, however long after the one before it that look comes.
    """
    head, worker = cluster.head, cluster.worker("w1")
    first, last = block(cluster)
    cluster.lab.machine("w1").firewall(range(first, last + 1))
    trial = TRIAL_FACTOR * given_up_after(RIDE_THROUGH)
    told = {"code": "ray_node_flapping", "node": "w1"}
    looks: list[tuple[float, bool]] = []
    """Seconds that it had stayed when it was looked at, at the least, and whether it flapped."""

    def is_over() -> bool:
        status = head.status()
        cluster = status["cluster"]
        rows = [n for n in cluster["nodes"] if lives(n) and not n["is_head"]]
        flaps = bool(of(status, "ray_node_flapping"))
        if rows and cluster["as_of"] is not None:
            looks.append((cluster["as_of"] - rows[0]["started"], flaps))
        return not flaps

    # It may have joined once more while the firewall was shut, and be given up for that.
    until(is_over, 2 * trial + LOOKS, lambda: f"flaps on: {looks[-1:]}")
    assert [stayed for stayed, flaps in looks if flaps and stayed > trial] == []
    (row,) = [n for n in head.status()["cluster"]["nodes"] if lives(n) and not n["is_head"]]
    for daemon in (head, worker):
        over = daemon.wait_event("problem_over", WITHIN, told)
        assert datetime.fromisoformat(over["timestamp"]).timestamp() - row["started"] > trial
    for daemon in (head, worker):
        daemon.wait_status(lambda s: s["state"] == "ready" and s["conditions"] == [], 60)
    assert worker.process.poll() is None
    assert len(worker.events("rayfwd_starting")) == 1


def lives(node: dict[str, Any]) -> bool:
    return bool(node["state"] == "ALIVE")
