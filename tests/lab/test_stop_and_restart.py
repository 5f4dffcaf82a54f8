"""Stopping at any moment leaves nothing, and whatever is killed heals without a hand.

One cluster of a head and a worker for all tests, which run in the order of this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import RUNTIME_DIR, Cluster
from tests.lab.machines import Lab, Machine
from tests.lab.named import waited_for
from tests.lab.process import until
from tests.lab.test_doctor import doctor

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

BOTH_WAYS = ("small_tasks", "large_results", "large_arguments")
"""What shows that Ray works again: tasks of that driver's on both nodes, with data each way."""

BRIEF = 15
"""Seconds for a stop where there is no Ray to end."""


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    cluster = Cluster(module_lab, workers=("w1",))
    yield cluster
    for daemon in cluster.daemons:
        if daemon.process.poll() is None:
            daemon.stop()


def rest(machine: Machine) -> dict[int, str]:
    """What runs in a machine besides its sshd."""
    sshd = "sshd" if machine.sshd_runs else None
    found = {}
    for pid in machine.pids():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if sshd is None or not any(sshd in word for word in words[:2]):
            found[pid] = " ".join(words)
    return found


def check_nothing_left(machine: Machine) -> None:
    """No process, no socket, no shared memory of ours. The connection of a worker may linger."""
    until(lambda: not rest(machine), 5, lambda: f"{machine.name}: {rest(machine)}")
    sockets = machine.run(["find", RUNTIME_DIR, "-type", "s"], check=False).stdout
    assert sockets == "", "sockets are left"
    memory = machine.run(["ls", "-A", "/dev/shm"]).stdout
    assert memory == "", "shared memory is left"


def placed(status: dict[str, Any]) -> tuple[str, int, int]:
    node = status["node"]
    return node["address"], node["base"], node["worker_ports"]


def test_sigterm_while_dialling(cluster: Cluster) -> None:
    worker = cluster.start_node("w1")
    event = worker.wait_event("ssh_unreachable")
    assert event["level"] == "error"
    assert worker.stop(BRIEF) == 0
    check_nothing_left(worker.machine)


def test_sigterm_right_after_the_start(cluster: Cluster) -> None:
    for pause in ("rayfwd_starting", None):
        worker = cluster.start_node("w1")
        if pause is not None:
            worker.wait_event(pause)
        code = worker.stop(BRIEF)
        # Before Python has come to our handler the signal ends it as it ends any program.
        assert code == 0 or (pause is None and code == -15)
        check_nothing_left(worker.machine)


def test_sigterm_while_ray_starts(cluster: Cluster) -> None:
    cluster.start()
    cluster.worker("w1").wait_event("ray_starting", 120)
    assert cluster.worker("w1").stop() == 0
    check_nothing_left(cluster.lab.machine("w1"))


def test_sigterm_while_parked(cluster: Cluster) -> None:
    cluster.start_node("w1")
    cluster.wait_ready()
    worker = cluster.worker("w1")
    cluster.lab.cut(worker.machine)
    worker.wait_event("link_parked", 30)
    assert worker.stop() == 0
    check_nothing_left(worker.machine)
    cluster.lab.heal(worker.machine)


def test_starting_again_gives_the_same_address_and_ports(cluster: Cluster) -> None:
    before = {row["name"]: row for row in cluster.head.status()["roster"]}
    worker = cluster.start_node("w1")
    status = worker.wait_ready()
    assert status["node"]["address"] == before["w1"]["address"]
    assert before["w1"]["ports"].startswith(f"{status['node']['base']}-")
    works(cluster, "w1")


def test_the_hub_is_killed_and_comes_back(cluster: Cluster) -> None:
    head, worker = cluster.head, cluster.worker("w1")
    was = placed(head.status())
    assert "in use by this node's Ray" in ports_by_doctor(cluster)
    head.kill()
    worker.wait_event("link_parked", 30)
    assert "that rayfwd started and will take over" in ports_by_doctor(cluster)
    head = cluster.start_node("head")
    assert head.wait_event("ray_adopted", 60)["ours"]
    assert placed(head.wait_ready()) == was
    worker.wait_status(lambda status: status["state"] == "ready", 60)
    works(cluster, "head")


def test_the_worker_is_killed_and_comes_back(cluster: Cluster) -> None:
    worker = cluster.worker("w1")
    was = placed(worker.status())
    worker.kill()
    worker = cluster.start_node("w1")
    assert worker.wait_event("ray_adopted", 60)["ours"]
    assert placed(worker.wait_ready()) == was
    works(cluster, "w1")


def test_the_head_is_stopped_under_a_worker_and_comes_back(cluster: Cluster) -> None:
    """Its Ray forgets everything: the worker's Ray has to join the new one."""
    worker = cluster.worker("w1")
    assert cluster.head.stop() == 0
    check_nothing_left(cluster.lab.machine("head"))
    waiting = worker.wait_status(waited_for, 30)
    assert waiting["state"] == "waiting"
    cluster.start_node("head").wait_ready()
    worker.wait_status(lambda status: status["state"] == "ready", 60)
    until(
        lambda: alive(cluster) == set(addresses(cluster)),
        200,
        lambda: f"the nodes alive are {alive(cluster)}{cluster.lab.tails()}",
    )
    # While the head's Ray was starting, nobody wondered at its ports.
    assert worker.events("ray_port_unreachable") == []
    works(cluster, "w1")


def test_an_orderly_end_is_known_at_once(cluster: Cluster) -> None:
    worker = cluster.worker("w1")
    assert worker.stop() == 0
    check_nothing_left(worker.machine)
    ended = cluster.head.wait_event(
        "session_ended", 5, where=lambda event: "was stopped" in event["cause"]
    )
    assert ended["node"] == "w1"


def works(cluster: Cluster, driver: str) -> None:
    """Ray does, from that machine."""
    lines = cluster.driver(driver, ["--checks", ",".join(BOTH_WAYS), "--nodes", "2"])
    verify(lines, driver, addresses(cluster), BOTH_WAYS)


def ports_by_doctor(cluster: Cluster) -> str:
    """What `rayfwd doctor` says of the head's ports, in which Ray's own are no fault."""
    found = doctor(cluster, "head")
    assert found.of("fail") == [], found.rows
    return str(found.rows["ports"]["said"])


def addresses(cluster: Cluster) -> list[str]:
    return [row["address"] for row in cluster.head.status()["roster"]]


def alive(cluster: Cluster) -> set[str]:
    """The nodes that the head's look at Ray's node table found alive."""
    seen = (cluster.head.status()["cluster"] or {}).get("nodes", [])
    return {node["address"] for node in seen if node["state"] == "ALIVE"}
