"""The canary names a node that takes no tasks or no objects, and the port that is dead behind it.

One cluster for all; each fault is made by the machines' own firewalls on loopback, where Ray's
connections meet the listeners, and is undone under the running daemons.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab.cluster import Cluster
from tests.lab.daemon import CONFIG, Daemon
from tests.lab.machines import Lab, Machine
from tests.lab.process import CommandFailed

pytestmark = pytest.mark.ray

Row = dict[str, Any]

NEXT = 60.0
"""Seconds in which the next canary has come back: its interval, its time-out, a slow machine."""
SOONER = 45.0
"""Seconds in which the look at the ports finds a dead one: every 20 s, confirmed once."""


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    switched_on = {"canary": {"enabled": True, "interval": 10, "timeout": 12}}
    cluster = Cluster(module_lab, workers=("w1", "w2"), head=switched_on)
    cluster.start()
    cluster.wait_ready()
    cluster.head.wait_event("canary_back", 120, where={"ok": True, "failed": []})
    yield cluster
    cluster.stop()


def send(daemon: Daemon) -> tuple[int, Row]:
    """`rayfwd canary --json`: its exit code and its answer."""
    argv = [str(daemon.machine.lab.rayfwd), "canary", "--json", "--config", CONFIG]
    ran = daemon.machine.run(argv, check=False, timeout=150)
    if ran.returncode not in {0, 1} or not ran.stdout:
        raise CommandFailed(ran.returncode, argv, ran.stdout, ran.stderr)
    answer: Row = json.loads(ran.stdout)
    return ran.returncode, answer


@contextmanager
def dropped(machine: Machine, *rules: str) -> Iterator[None]:
    """No packet that a rule names leaves a program of the machine; nobody is told."""
    lines = "\n".join(f"{rule} drop" for rule in rules)
    text = f"""table inet shut {{
        chain output {{
            type filter hook output priority 0; policy accept
            {lines}
        }}
    }}"""
    machine.nft(text)
    try:
        yield
    finally:
        machine.nft("delete table inet shut")


def plan_of(cluster: Cluster, name: str) -> tuple[str, int, int]:
    """A node's address, and its first and last port."""
    row = next(node for node in cluster.head.status()["roster"] if node["name"] == name)
    first, last = row["ports"].split("-")
    return row["address"], int(first), int(last)


def of(status: Row, code: str, subject: str) -> Row | None:
    found = [p for p in status["conditions"] if (p["code"], p["subject"]) == (code, subject)]
    assert len(found) < 2
    return found[0] if found else None


def named(daemon: Daemon, code: str, subject: str, seconds: float) -> Row:
    """The problem, once the daemon's status has it."""
    status = daemon.wait_status(lambda s: of(s, code, subject), seconds)
    problem = of(status, code, subject)
    assert problem is not None
    return problem


def check_healed(cluster: Cluster) -> None:
    """Nothing of it is left, on the head and on the workers, and a canary comes back."""
    for daemon in cluster.daemons:
        daemon.wait_status(lambda s: s["conditions"] == [] and s["state"] == "ready", 90)


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


def test_on_demand_from_a_worker_that_has_it_off(cluster: Cluster) -> None:
    """Its own canary goes to the head and to itself."""
    code, answer = send(cluster.worker("w1"))
    assert (code, answer["ok"]) == (0, True)
    assert [node["name"] for node in answer["nodes"]] == ["head", "w1"]


@pytest.mark.runs("rayfwd canary")
def test_a_line_a_node(cluster: Cluster) -> None:
    argv = [str(cluster.lab.rayfwd), "canary", "--config", CONFIG]
    lines = cluster.lab.machine("head").run(argv, timeout=150).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["head", "ok"], ["w1", "ok"], ["w2", "ok"]]


def test_nothing_of_it_is_left(cluster: Cluster) -> None:
    """No process of the canary's outlives its round."""
    send(cluster.head)
    marks = (b"canary_task.py", b"RAYFWD_CANARY=")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        cluster.head.wait_event("canary_back")  # another round may have begun by itself
        texts = [_read(cluster, pid) for pid in cluster.lab.machine("head").pids()]
        if not any(mark in text for mark in marks for text in texts):
            return
        time.sleep(0.5)
    pytest.fail("a process of the canary's is always there")


def _read(cluster: Cluster, pid: int) -> bytes:
    text = b""
    for name in ("cmdline", "environ"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                text += file.read()
        except OSError:
            pass
    return text


def test_one_direction_only_and_an_object_manager_alone(cluster: Cluster) -> None:
    """The head's listeners to w1 are shut while w1 still reaches the head; w2 takes no objects."""
    (w1, first, _), (w2, second, _) = plan_of(cluster, "w1"), plan_of(cluster, "w2")
    head = cluster.lab.machine("head")
    with dropped(head, f"ip daddr {w1} meta l4proto tcp", f"ip daddr {w2} tcp dport {second + 1}"):
        sooner = named(cluster.head, "ray_port_unreachable", "w1", SOONER)
        assert f"{first} (the raylet)" in sooner["cause"]
        assert f"the listener at {w1}" in sooner["cause"]
        assert "on head itself drops packets" in sooner["cause"]
        problem = named(cluster.head, "canary_no_task", "w1", NEXT)
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


def test_worker_ports_alone_and_what_a_worker_sees(cluster: Cluster) -> None:
    """The head reaches no worker process of w1; w2 does not reach the head's object manager."""
    (w1, first, last), (head, base, _) = plan_of(cluster, "w1"), plan_of(cluster, "head")
    ports = f"{first + 8}-{last}"
    with (
        dropped(cluster.lab.machine("head"), f"ip daddr {w1} tcp dport {ports}"),
        dropped(cluster.lab.machine("w2"), f"ip daddr {head} tcp dport {base + 1}"),
    ):
        problem = named(cluster.head, "canary_no_task", "w1", NEXT)
        assert f"port {ports} (workers) of w1" in problem["cause"]
        problem = named(cluster.worker("w2"), "ray_port_unreachable", "head", SOONER)
        assert f"{base + 1} (the object manager) of head" in problem["cause"]
        assert "on w2 itself drops packets" in problem["cause"]
        code, answer = send(cluster.head)
        assert code == 1
        rows = {node["name"]: node for node in answer["nodes"]}
        assert rows["head"]["ok"]
        assert rows["w1"]["problem"]["code"] == "canary_no_task"
        # From the head all ports of w2 answer; w2 itself names the listener.
        assert rows["w2"]["problem"]["code"] == "canary_no_objects"
        assert of(cluster.head.status(), "ray_port_unreachable", "w1") is None
    check_healed(cluster)
