"""A meeting place: neither the head nor a worker lets anybody in, and a third host with a stock
sshd and nothing of rayfwd's lets both. The tests are one story over one cluster with Ray, in which
a counted job runs through cuts, mixed faults and a restart of the head.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator

import pytest

from tests import shown
from tests.lab.checks import verify
from tests.lab.cluster import Cluster
from tests.lab.legs import legs_of, mixed
from tests.lab.loadgen import Job
from tests.lab.machines import Lab
from tests.lab.process import HOME

pytestmark = [pytest.mark.ray("2.60.0"), pytest.mark.story, pytest.mark.timeout(400)]

CONFIG = f"{HOME}/rayfwd.toml"
NODES = ["127.77.0.1", "127.77.0.2"]
CHECKS = ("small_tasks", "large_results", "actors")


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    """w2 is the third host. The head's sshd is behind a firewall that lets nothing in."""
    lab, head, w1 = module_lab, module_lab.machine("head"), module_lab.machine("w1")
    third = lab.machine("w2")
    for machine in (head, w1):
        machine.firewall([])
    third.firewall([22])
    third.start_sshd()
    third.authorize(*(f"restrict,port-forwarding {m.public_key}" for m in (head, w1)))
    head.authorize(w1.public_key)
    at_third = f"{third.address} {third.host_key}"
    head.know(at_third)
    w1.know(at_third, f"the-head {head.host_key}")
    meet = {"ssh": f"ray@{third.address}"}
    own = {"head.ssh": "ray@the-head", "head.meet": f"ray@{third.address}"}
    made = Cluster(lab, workers=("w1",), head={"hub.meet": [meet]}, w1=own)
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def job(cluster: Cluster) -> Job:
    driver = cluster.lab.machine("w1")
    return Job(driver, driver.ray_python(), "--rest", "3", "--nodes", "2")


def test_ray_works_by_it(cluster: Cluster) -> None:
    cluster.wait_ready()
    lines = cluster.driver("w1", ["--checks", ",".join(CHECKS), "--nodes", "2"])
    verify(lines, "w1", NODES, CHECKS)
    listening = cluster.lab.machine("w2").network_command("ss", "-Hltn")
    assert len(listening.splitlines()) == 2, "sshd's are the only ports there"


@pytest.mark.runs(
    "rayfwd init head --meet * --ray *", "rayfwd init worker --head * --meet * --ray *"
)
def test_init_prints_what_goes_where(cluster: Cluster) -> None:
    lab, third = cluster.lab, cluster.lab.machine("w2")
    for name, role in (("head", ["head"]), ("w1", ["worker", "--head", "ray@the-head"])):
        machine = lab.machine(name)
        wanted = ["--meet", f"ray@{third.address}", "--ray", str(machine.ray()), "--dry-run"]
        own = [str(lab.rayfwd), "--config", f"{HOME}/new.toml", "init", *role, *wanted]
        said = machine.run(own).stdout
        lines = [line.strip() for line in said.splitlines()]
        assert any(line.startswith("restrict,port-forwarding ") for line in lines), said
        scan = f"ssh-keyscan -p 22 {third.address} >> ~/.ssh/known_hosts"
        assert f"mkdir -p ~/.ssh && {scan}" in lines
        shown.compare("README.md", "Add this line to", said)
        if name == "head":
            assert "it is the name under which this machine's host key is known there." in lines


@pytest.mark.parametrize("whose", ["head", "w1"])
def test_a_cut_of_either_side_is_ridden_through(cluster: Cluster, job: Job, whose: str) -> None:
    lab, w1 = cluster.lab, cluster.worker("w1")
    last = w1.events()[-1]
    lab.cut(lab.machine(whose))
    w1.wait_event("link_parked", 30, after=last)
    time.sleep(6)  # the head has found out as well
    began = time.monotonic()
    lab.heal(lab.machine(whose))
    w1.wait_event("link_resumed", 30, after=last)
    print(json.dumps({"cut": whose, "seconds": round(time.monotonic() - began, 1)}))
    cluster.wait_ready()
    job.check()
    assert not cluster.head.events("session_ended")


def test_a_restart_of_the_head_is_ridden_through(cluster: Cluster, job: Job) -> None:
    """The next process logs in there anew, in the place of a socket that was left."""
    head, w1 = cluster.head, cluster.worker("w1")
    last, last_here = head.events()[-1], w1.events()[-1]
    head.process.signal(signal.SIGUSR2)
    head.wait_event("meeting_held", 60, after=last)
    w1.wait_event("link_resumed", 60, after=last_here)
    cluster.wait_ready()
    job.check()


def test_mixed_faults_cost_no_call(cluster: Cluster, job: Job) -> None:
    legs = legs_of(cluster.lab, "w1>w2", "head>w2")
    for _ in mixed(legs, seed=15, cuts=6, longest=3.0, pause=2.0, moving="w1"):
        job.check()
    cluster.wait_ready()
    job.finish_whole(1)
    for daemon in cluster.daemons:
        assert not daemon.events("session_ended")


def test_that_the_third_host_is_down_is_said_on_both_sides(cluster: Cluster) -> None:
    lab, head, w1 = cluster.lab, cluster.head, cluster.worker("w1")
    third = lab.machine("w2")
    third.stop_sshd()
    for machine in ("head", "w1"):
        lab.reset_connections(lab.machine(machine))
    said = head.wait_event("ssh_unreachable", 30, {"place": third.address})
    assert third.address in said["cause"]
    named = f"the meeting place ray@{third.address}"
    w1.wait_event("ssh_unreachable", 30, lambda event: named in event["cause"])
    for machine in ("head", "w1"):
        ran = lab.machine(machine).run(
            [str(lab.rayfwd), "doctor", "--config", CONFIG], check=False, timeout=120
        )
        assert "nothing listens on the SSH port of" in ran.stdout
        assert f"ray@{third.address}" in ran.stdout
    third.start_sshd()
    cluster.wait_ready()
    assert not head.events("session_ended")


def test_a_head_that_was_killed_waits_there_again(cluster: Cluster) -> None:
    """In the place of the socket that it has left; its Ray lives on."""
    cluster.head.kill()
    cluster.start_node("head")
    cluster.head.wait_event("meeting_held", 60)
    cluster.wait_ready()
