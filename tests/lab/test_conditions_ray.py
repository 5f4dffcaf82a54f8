"""What can be wrong with Ray is named in time, on the head and on the workers, and is over again.

One cluster and one story, in the order of this file. Ray's processes are killed, never stubbed;
how often rayfwd looks is as it is by default.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cluster import Cluster, change
from tests.lab.daemon import Daemon
from tests.lab.machines import Lab, Machine
from tests.lab.named import Row, named, over, said_at
from tests.lab.process import HOME, tail, until, without_forks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

HOARD = Path(__file__).with_name("fd_hog.py")
FEW = 8
"""Ports of w2 for Ray's worker processes: the least that there may be."""


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    fewer = {"ray.num_cpus": 2, "ray.extra_args": ["--num-cpus=1"]}
    few_ports = {"ray.worker_ports": FEW, "ray.resources": {"tape": 2}}
    cluster = Cluster(module_lab, w1=fewer, w2=few_ports)
    cluster.start(["head"])
    cluster.head.wait_event("hub_listening")
    cluster.start(["w1"])
    cluster.wait_ready()
    yield cluster
    cluster.stop()


def kill(machine: Machine, name: str, number: int = signal.SIGKILL) -> float:
    """Kill Ray's process of that name, or with that in its command line; when it was."""
    found = without_forks([pid for pid in machine.pids() if is_called(pid, name)])
    assert len(found) == 1, (name, found)
    os.kill(found[0], number)
    return time.time()


def is_called(pid: int, name: str) -> bool:
    try:
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return comm == name or any(word.endswith(name) for word in words[:4])


def since_start(daemon: Daemon) -> float:
    """When its Ray had started."""
    return said_at(daemon.wait_event("ray_started", 120))


def test_fewer_resources_than_declared(cluster: Cluster) -> None:
    w1 = cluster.worker("w1")
    since = since_start(w1)
    for row in named([cluster.head, w1], "ray_resources_fewer", "w1", 60, since):
        assert "CPU 1 of 2" in row["cause"]
        assert "rayfwd plan" in row["remedy"]


def test_stale_totals_and_what_they_lack_and_no_resources(cluster: Cluster) -> None:
    """The monitor has ended when w2 joins, and w1 comes back with nothing."""
    head = cluster.head
    assert cluster.worker("w1").stop() == 0
    over([head], 60)
    # By SIGTERM: `ray start` takes that for graceful, and all goes on without it.
    killed = kill(head.machine, "/monitor.py", signal.SIGTERM)
    change(cluster.configs["w1"], {"ray.extra_args": ["--num-cpus=0"]})
    cluster.start(["w1", "w2"])
    w1, w2 = cluster.worker("w1"), cluster.worker("w2")
    joined = max(since_start(daemon) for daemon in (w1, w2))
    stale = named([head, w1, w2], "ray_totals_stale", "head", 60, killed)
    for row in stale:
        assert row["explained_by"] is None
        assert "monitor" in row["remedy"]
    lacking = named([head, w1, w2], "ray_node_without_resources", "w2", 60, joined)
    for row, root in zip(lacking, stale, strict=True):
        assert "tape 0 of 2" in row["cause"]
        assert row["explained_by"] == root["id"]
    for row in named([head, w1], "ray_resources_none", "w1", 60, joined):
        assert "CPU 0 of 2" in row["cause"]


def test_the_dashboard_ends(cluster: Cluster) -> None:
    head = cluster.head
    killed = kill(head.machine, "/dashboard.py", signal.SIGTERM)
    for row in named(cluster.daemons, "ray_dashboard_absent", "head", 30, killed):
        assert "http://127.77.0.1:8265" in row["cause"]
        assert "dashboard.log" in row["remedy"]


def test_the_gcs_ends_and_all_join_again(cluster: Cluster) -> None:
    """rayfwd starts the head's Ray anew, which ends all that was wrong with the old one."""
    head, w2 = cluster.head, cluster.worker("w2")
    assert cluster.worker("w1").stop() == 0
    killed = kill(head.machine, "gcs_server")
    named([head, w2], "ray_died", "head", 30, killed)
    change(cluster.configs["w1"], {"ray.extra_args": None})
    w1 = cluster.start_node("w1")
    over([head, w1, w2], 180)
    # The totals come after the node: until then they lack its tapes.
    head.wait_status(lambda s: len(alive(s)) == 3 and "tape" in s["cluster"]["totals"], 60)
    assert head.status()["cluster"]["totals"]["tape"][1] == 2
    assert w2.status()["ray"]["restarts"] > 0


def alive(status: Row, address: str = "") -> list[str]:
    """The raylets that Ray takes for alive, of all nodes or of the one with this address."""
    nodes = (status["cluster"] or {"nodes": []})["nodes"]
    mine = (node for node in nodes if address in {"", node["address"]})
    return [node["node_id"] for node in mine if node["state"] == "ALIVE"]


def test_a_raylet_ends(cluster: Cluster) -> None:
    head, w1, w2 = cluster.head, cluster.worker("w1"), cluster.worker("w2")
    address = w2.status()["node"]["address"]
    (before,) = alive(head.status(), address)
    killed = kill(w2.machine, "raylet")
    for row in named([w2, head, w1], "ray_died", "w2", 30, killed):
        assert "raylet" in row["cause"]
        assert "raylet.out" in row["remedy"]
    over([head, w1, w2], 120)
    # Ray may still take the one that was killed for alive, and have it start what comes next.
    head.wait_status(lambda s: len(alive(s, address)) == 1 and before not in alive(s, address), 90)


def taken(worker: Daemon) -> int:
    """How many of its ports for worker processes are listened on."""
    (row,) = [row for row in worker.status()["roster"] if row["name"] == worker.machine.name]
    last = int(row["ports"].partition("-")[2])
    ports = f"( sport >= :{last - FEW + 1} and sport <= :{last} )"
    return len(set(worker.machine.network_command("ss", "-Hltn", ports).splitlines()))


def test_worker_ports_are_exhausted(cluster: Cluster) -> None:
    head, w2 = cluster.head, cluster.worker("w2")
    script = f"{HOME}/fd_hog.py"
    head.machine.write(script, HOARD.read_text())
    argv = [str(head.machine.ray_python()), script, "tape", str(FEW + 2)]
    driver = head.machine.popen(argv)

    def all_taken() -> bool:
        assert driver.poll() is None, f"the driver has ended{tail(driver.log)}"
        return taken(w2) == FEW

    until(all_taken, 200, lambda: f"only {taken(w2)} ports{tail(driver.log)}{head.tail()}")
    since = time.time()
    for row in named([w2, head], "ray_worker_ports_exhausted", "w2", 60, since):
        assert f"all {FEW} ports" in row["cause"]
        assert f"ray.worker_ports = {2 * FEW}" in row["remedy"]
    driver.signal(signal.SIGTERM)
    over(cluster.daemons, 60)
    # Ray has given up the raylet that was killed: the node did not flap.
    assert head.events("ray_node_flapping") == []
