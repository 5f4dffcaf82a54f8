"""Two workers of which one may log in to the other: their streams go there, not by the head.

Real sshd on w2, whose key line for w1 runs `rayfwd attach --peer` and nothing else. Ray is not
started. What the head carries is counted by its kernel, at its network's interface.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import status_doc
from tests.lab.cluster import RUNTIME_DIR, Cluster
from tests.lab.conversation import FAST, PARTS, SLOW
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, until
from tests.lab.talk import BASE, LISTENER, Talk, forwards

pytestmark = pytest.mark.story

PROBE = Path(__file__).with_name("echo_probe.py")
SOURCE, ECHO = PARTS.index("source"), PARTS.index("echo")
A_LITTLE = (FAST + SLOW) / 20
"""Bytes: of a transfer that goes the direct way, the head carries less."""


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    """SSH comes in at the head and at w2, nothing at w1."""
    lab, w1, w2 = module_lab, module_lab.machine("w1"), module_lab.machine("w2")
    w2.firewall([22])
    w2.start_sshd()
    attach = f"{lab.rayfwd} attach --peer --socket {RUNTIME_DIR}/peers.sock"
    w2.authorize(f'restrict,command="{attach}" {w1.public_key}')
    head = lab.machine("head")
    w1.know(f"{head.address} {head.host_key}", f"{w2.address} {w2.host_key}")
    ports = [BASE + i for i in range(len(PARTS))]
    own: dict[str, Any] = {name: {"forward": forwards(name)} for name in LISTENER}
    way = {"node": "w2", "ssh": f"ray@{w2.address}", "socket": f"{RUNTIME_DIR}/peers.sock"}
    own["w1"]["direct"] = [way]
    made = Cluster(lab, every={"ray.start": False, "expose": ports}, **own)
    made.start()
    made.wait_ready()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def talk(cluster: Cluster) -> Talk:
    return Talk(cluster.lab)


def goes(cluster: Cluster, way: str) -> None:
    """Both workers say so of the way between them."""
    for name, other in (("w1", "w2"), ("w2", "w1")):
        cluster.worker(name).wait_status(
            lambda s, other=other: [(d["node"], d["way"]) for d in s["direct"]] == [(other, way)],  # type: ignore[misc]
            60,
        )


def carried(machine: Machine) -> int:
    """Bytes that came in at a machine's interfaces but loopback, ever."""
    links = json.loads(machine.network_command("ip", "-j", "-s", "link"))
    return sum(link["stats64"]["rx"]["bytes"] for link in links if link["ifname"] != "lo")


@pytest.mark.parametrize("way", [("w1", "w2"), ("w2", "w1")])
def test_what_two_workers_say_is_not_carried_by_the_head(
    cluster: Cluster, talk: Talk, way: tuple[str, str]
) -> None:
    source, target = way
    head = cluster.lab.machine("head")
    port = LISTENER[target] + SOURCE
    here, _ = talk.both(cluster.lab.machine(target), target, BASE + SOURCE, "source", 2)
    by_head: list[int] = []
    # A lane whose sshd waits for a processor is late, and then another way is taken for a while.
    while not by_head or (by_head[-1] >= A_LITTLE and len(by_head) < 3):
        goes(cluster, "direct")
        before = carried(head)
        through, _ = talk.both(cluster.lab.machine(source), target, port, "source", 2)
        by_head.append(carried(head) - before)
        assert through == here, "the same bytes as without rayfwd"
    assert by_head[-1] < A_LITTLE, by_head


def test_the_rows_of_the_status_are_as_documented(cluster: Cluster) -> None:
    keys, seen = status_doc.documented(), set()
    for name in ("w1", "w2"):
        wrong, found = status_doc.mistakes(cluster.worker(name).status(), keys)
        assert wrong == []
        seen |= found
    rows = {key for key in keys if key.startswith("direct[]") and not keys[key].optional}
    assert rows <= seen


def test_the_doctor_goes_it(cluster: Cluster) -> None:
    """Hop by hop from the worker that dials; the other one says that it is dialled."""
    goes(cluster, "direct")
    found = {name: doctors_row(cluster, name) for name in ("w1", "w2")}
    assert [row["result"] for row in found.values()] == ["pass", "pass"]
    assert found["w1"]["seen"]["ways"]["w2"]["user"] == "ray"
    assert found["w2"]["said"] == "the way of w1, which dials, is up"
    w2 = cluster.lab.machine("w2")
    w2.stop_sshd()
    away = doctors_row(cluster, "w1")
    assert (away["result"], away["code"]) == ("warn", "ssh_unreachable")
    assert f"nothing listens on the SSH port of ray@{w2.address}" in away["said"]
    assert "check that sshd runs on w2" in away["remedy"]
    w2.start_sshd()


def doctors_row(cluster: Cluster, name: str) -> dict[str, Any]:
    argv = [str(cluster.lab.rayfwd), "doctor", "--json", "--config", f"{HOME}/rayfwd.toml"]
    said = cluster.lab.machine(name).run(argv, check=False, timeout=120).stdout
    row: dict[str, Any] = next(c for c in json.loads(said)["checks"] if c["check"] == "direct")
    return row


def test_a_direct_way_that_is_cut_costs_no_stream(cluster: Cluster, talk: Talk) -> None:
    """Its packets are dropped, and nobody is told: the streams go on by the head, then return."""
    lab, w1, w2 = cluster.lab, cluster.lab.machine("w1"), cluster.lab.machine("w2")
    script = f"{HOME}/echo_probe.py"
    w1.write(script, PROBE.read_text())
    target = f"w2=127.0.0.1:{LISTENER['w2'] + ECHO}"
    probe = w1.popen([talk.python, script, "call", target])
    until(lambda: echoes(probe.log.read_text()) >= 20, 30, lambda: "echoes")
    lab.drop_one_way(w1, w2)
    lab.drop_one_way(w2, w1)
    goes(cluster, "hub")
    by_hub = echoes(probe.log.read_text())
    until(lambda: echoes(probe.log.read_text()) >= by_hub + 40, 30, lambda: "echoes by the head")
    lab.drop_nothing()
    goes(cluster, "direct")
    again = echoes(probe.log.read_text())
    until(lambda: echoes(probe.log.read_text()) >= again + 40, 30, lambda: "echoes once more")
    probe.signal(signal.SIGTERM)
    probe.wait(20)
    said = [json.loads(line) for line in probe.log.read_text().splitlines()]
    assert not [line for line in said if line.get("error")]
    assert not cluster.worker("w1").events("session_ended")


def echoes(log: str) -> int:
    """How many came back on the connection that is kept, by the probe's last count."""
    counts = [json.loads(line)["counts"] for line in log.split("\n")[:-1] if '"counts"' in line]
    return int(counts[-1].get("w2 echo", 0)) if counts else 0
