"""The head dials: two workers with sshd, whose network cannot reach the head, and a mixed cluster.

w1's key for the head may forward to sockets and nothing else, w2's runs `rayfwd attach` and nothing
else. The tests are one story over one cluster with Ray.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import HUB_SOCKET, RUNTIME_DIR, Cluster, change
from tests.lab.machines import Lab
from tests.lab.process import HOME

pytestmark = [pytest.mark.ray("2.60.0"), pytest.mark.story, pytest.mark.timeout(400)]

WORKERS = ("w1", "w2")
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


def test_ray_works_by_it(cluster: Cluster) -> None:
    cluster.wait_ready()
    nodes = [f"127.77.0.{number}" for number in (1, 2, 3)]
    lines = cluster.driver("w1", ["--checks", "small_tasks,worker_to_worker"])
    verify(lines, "w1", nodes, ("small_tasks", "worker_to_worker"))
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


def test_a_cut_is_ridden_through(cluster: Cluster) -> None:
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
    assert not cluster.head.events("session_ended")


def test_a_restart_of_either_end_loses_nothing(cluster: Cluster) -> None:
    for daemon in (cluster.worker("w1"), cluster.head):
        last = daemon.events()[-1]
        daemon.process.signal(signal.SIGUSR2)
        daemon.wait_event("rayfwd_ready", 60, after=last)
        cluster.wait_ready()
        assert not cluster.head.events("session_ended")
    verify(cluster.driver("head", ["--checks", "small_tasks"]), "head", _all(), ("small_tasks",))


def _all() -> list[str]:
    return [f"127.77.0.{number}" for number in (1, 2, 3)]


def test_who_cannot_be_dialled_is_named(cluster: Cluster) -> None:
    lab, w2 = cluster.lab, cluster.lab.machine("w2")
    w2.stop_sshd()
    lab.reset_connections(w2)
    said = cluster.head.wait_event("ssh_unreachable", 30)
    assert said["worker"] == "w2"
    assert w2.address in said["cause"]
    ran = lab.machine("head").run(
        [str(lab.rayfwd), "doctor", "--config", CONFIG], check=False, timeout=120
    )
    assert f"nothing listens on the SSH port of ray@{w2.address}" in ran.stdout
    w2.start_sshd()
    cluster.wait_ready()


def test_a_mixed_cluster(cluster: Cluster) -> None:
    """w2 may dial from now on, and does; the head goes on dialling w1, and w2 in vain."""
    head, w2 = cluster.lab.machine("head"), cluster.lab.machine("w2")
    head.firewall([22])
    head.start_sshd()
    w2.know(f"{head.address} {head.host_key}")
    assert cluster.worker("w2").stop() == 0
    own = {"head.ssh": f"ray@{head.address}", "head.socket": HUB_SOCKET}
    change(cluster.configs["w2"], {**own, "head.dialled": True})
    w2.stop_sshd()
    cluster.start_node("w2")
    cluster.wait_ready()
    lines = cluster.driver("w2", ["--checks", "small_tasks,worker_to_worker"])
    verify(lines, "w2", _all(), ("small_tasks", "worker_to_worker"))
