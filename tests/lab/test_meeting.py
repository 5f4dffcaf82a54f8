"""A meeting place: neither the head nor a worker lets anybody in, and a third host with a stock
sshd and nothing of rayfwd's lets both. The tests are one story over one cluster with Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import Cluster
from tests.lab.machines import Lab
from tests.lab.process import HOME

pytestmark = [pytest.mark.ray("2.60.0"), pytest.mark.story, pytest.mark.timeout(400)]

CONFIG = f"{HOME}/rayfwd.toml"
NODES = ["127.77.0.1", "127.77.0.2"]


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


def test_ray_works_by_it(cluster: Cluster) -> None:
    cluster.wait_ready()
    lines = cluster.driver("w1", ["--checks", "small_tasks", "--nodes", "2"])
    verify(lines, "w1", NODES, ("small_tasks",))
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


@pytest.mark.parametrize("whose", ["head", "w1"])
def test_a_cut_of_either_side_is_ridden_through(cluster: Cluster, whose: str) -> None:
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
    assert not cluster.head.events("session_ended")


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
