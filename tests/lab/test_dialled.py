"""The head dials: two workers with sshd, whose network cannot reach the head, and a mixed cluster.

w1's key for the head may forward to sockets and nothing else, w2's runs `rayfwd attach` and nothing
else. The tests are one story over one cluster with Ray: a counted job runs through cuts, restarts
and mixed faults, and once more while w2 comes by the system's `ssh` through a jump host, with a
direct way to w1.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import HUB_SOCKET, RUNTIME_DIR, Cluster, change
from tests.lab.legs import legs_of, mixed
from tests.lab.loadgen import Job
from tests.lab.machines import Lab
from tests.lab.process import HOME

pytestmark = [pytest.mark.ray("2.60.0"), pytest.mark.story, pytest.mark.timeout(400)]

WORKERS = ("w1", "w2")
CHECKS = ("small_tasks", "large_results", "actors", "worker_to_worker")
LINK_SOCKET = f"{RUNTIME_DIR}/link.sock"
CONFIG = f"{HOME}/rayfwd.toml"


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    """Nothing comes in at the head. At the workers, SSH does, and the head knows their keys."""
    lab, head = module_lab, module_lab.machine("head")
    head.firewall([])
    rows = []
    for name in WORKERS:
        machine = lab.machine(name)
        machine.firewall([22])
        machine.start_sshd()
        attach = f'command="{lab.rayfwd} attach --config {CONFIG}"'
        what = "port-forwarding" if name == "w1" else attach
        machine.authorize(f"restrict,{what} {head.public_key}")
        row = {"ssh": f"ray@{machine.address}", "name": name, "socket": LINK_SOCKET}
        rows.append(row | ({"via": "exec"} if name == "w2" else {}))
    head.know(*(f"{m.address} {m.host_key}" for m in map(lab.machine, WORKERS)))
    dialled = {"head": None, "head.dialled": True}
    made = Cluster(lab, head={"hub.dial": rows}, w1=dialled, w2=dialled)
    for name in made.names:
        made.start_node(name)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def job(cluster: Cluster) -> Job:
    driver = cluster.lab.machine("w1")
    return Job(driver, driver.ray_python(), "--rest", "3")


def test_ray_works_by_it(cluster: Cluster) -> None:
    cluster.wait_ready()
    verify(cluster.driver("head", ["--checks", ",".join(CHECKS)]), "head", _all(), CHECKS)
    for name in WORKERS:
        assert cluster.worker(name).status()["link"]["head"] == "the head, which dials"
        listening = cluster.lab.machine(name).network_command("ss", "-Hltn")
        assert "0.0.0.0:22" in listening, "sshd's is the only port beside Ray's own"


def test_init_prints_what_goes_where(cluster: Cluster) -> None:
    lab, w2 = cluster.lab, cluster.lab.machine("w2")
    key = lab.machine("head").public_key
    wanted = ["--head-key", key, "--ray", str(w2.ray()), "--dry-run"]
    own = [str(lab.rayfwd), "--config", f"{HOME}/new.toml", "init", "worker", "--dialled", *wanted]
    said = w2.run(own).stdout
    lines = [line.strip() for line in said.splitlines()]
    assert f'restrict,command="{lab.rayfwd} attach" {key}' in lines
    assert "[[hub.dial]]" in lines
    assert 'via = "exec"' in lines


def test_a_cut_is_ridden_through(cluster: Cluster, job: Job) -> None:
    lab = cluster.lab
    for name in WORKERS:
        lab.cut(lab.machine(name))
    for name in WORKERS:
        cluster.worker(name).wait_event("link_parked", 30)
    time.sleep(3)
    began = time.monotonic()
    for name in WORKERS:
        lab.heal(lab.machine(name))
    for name in WORKERS:
        cluster.worker(name).wait_event("link_resumed", 30)
    assert time.monotonic() - began < 6.0
    cluster.wait_ready()
    job.check()
    assert not cluster.head.events("session_ended")


@pytest.mark.parametrize("name", ["w1", "head"])
def test_a_restart_of_either_end_loses_nothing(cluster: Cluster, job: Job, name: str) -> None:
    daemon = cluster.head if name == "head" else cluster.worker(name)
    last = daemon.events()[-1]
    daemon.process.signal(signal.SIGUSR2)
    daemon.wait_event("rayfwd_ready", 60, after=last)
    cluster.wait_ready()
    job.check()
    assert not cluster.head.events("session_ended")


def test_mixed_faults_cost_no_call(cluster: Cluster, job: Job) -> None:
    legs = legs_of(cluster.lab, "head>w1", "head>w2")
    for _ in mixed(legs, seed=15, cuts=7, longest=3.0, pause=1.0, moving="head"):
        job.check()
    cluster.wait_ready()
    nothing_lost(cluster, job)


def nothing_lost(cluster: Cluster, job: Job) -> None:
    """Once the job has ended."""
    job.finish_whole(1)
    for daemon in cluster.daemons:
        assert not daemon.events("session_ended")


def _all() -> list[str]:
    return [f"127.77.0.{number}" for number in (1, 2, 3)]


def test_who_cannot_be_dialled_is_named(cluster: Cluster) -> None:
    lab, w2 = cluster.lab, cluster.lab.machine("w2")
    last = cluster.head.events()[-1]
    w2.stop_sshd()
    lab.reset_connections(w2)
    said = cluster.head.wait_event("ssh_unreachable", 30, {"worker": "w2"}, last)
    assert w2.address in said["cause"]
    ran = lab.machine("head").run(
        [str(lab.rayfwd), "doctor", "--config", CONFIG], check=False, timeout=120
    )
    assert f"nothing listens on the SSH port of ray@{w2.address}" in ran.stdout
    w2.start_sshd()
    cluster.wait_ready()


def test_a_mixed_cluster(cluster: Cluster) -> None:
    """w2 may dial from now on, and does, by the system's ssh and with w1 as its jump host; the head
    goes on dialling w1, and w2 in vain. w2 dials w1 directly as well."""
    head, w1, w2 = map(cluster.lab.machine, ("head", "w1", "w2"))
    head.firewall([22])
    head.start_sshd()
    lines = [f"restrict,port-forwarding {m.public_key}" for m in (head, w2)]
    w1.authorize(*lines)
    w2.know(*(f"{m.address} {m.host_key}" for m in (head, w1)))
    w2.write(f"{HOME}/.ssh/config", f"Host {head.address}\n  ProxyJump {w1.address}\n")
    assert cluster.worker("w2").stop() == 0
    own = {"head.ssh": f"ray@{head.address}", "head.socket": HUB_SOCKET}
    peers = {"socket": f"{RUNTIME_DIR}/peers.sock", "via": "socket"}
    way = {"node": "w1", "ssh": f"ray@{w1.address}", **peers}
    change(
        cluster.configs["w2"],
        {**own, "head.dialled": True, "head.transport": "openssh", "direct": [way]},
    )
    w2.stop_sshd()
    w2_daemon = cluster.start_node("w2")
    cluster.wait_ready()
    w2_daemon.wait_status(lambda s: [d["way"] for d in s["direct"]] == ["direct"], 60)
    verify(cluster.driver("w2", ["--checks", ",".join(CHECKS)]), "w2", _all(), CHECKS)


def test_mixed_faults_of_a_mixed_cluster_cost_no_call(cluster: Cluster) -> None:
    driver = cluster.lab.machine("w2")
    ended = {d: len(d.events("session_ended")) for d in cluster.daemons}
    job = Job(driver, driver.ray_python(), "--rest", "3")
    legs = legs_of(cluster.lab, "w2>w1", "w1>head", "head>w1")
    for _ in mixed(legs, seed=16, cuts=7, longest=3.0, pause=1.0):
        job.check()
    cluster.wait_ready()
    job.finish()
    job.check()
    assert ended == {d: len(d.events("session_ended")) for d in cluster.daemons}
