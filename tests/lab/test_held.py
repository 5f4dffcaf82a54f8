"""Each way, by both kinds of SSH where there are both: Ray's essential work, and a counted job
while its connections have every fault there is. CI's shorter runs are in the files of each way.

Prints what it measured, a line of JSON a way; docs/ways.md has it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import RUNTIME_DIR, Cluster
from tests.lab.faults import strict_firewalls
from tests.lab.legs import legs_of, mixed
from tests.lab.loadgen import ECHO, LISTENERS, Echoes, Job
from tests.lab.machines import Lab
from tests.lab.process import HOME

pytestmark = [
    pytest.mark.ray("2.60.0"),
    pytest.mark.thorough,
    pytest.mark.alone,
    pytest.mark.timeout(600),
]

CHECKS = ("small_tasks", "large_results", "actors")
RIDE_THROUGH = 120.0
SILENCE, CUTS, LONGEST, PAUSE = 5.0, 11, 8.0, 3.0
Keys = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a way is made of."""

    legs: tuple[str, ...]
    """Who dials whom by SSH, each `dials>server`."""
    nodes: Mapping[str, Keys]
    """What the files of the nodes have on top."""
    echoes: tuple[str, ...] = ("w1>head", "head>w1")
    moving: str = ""
    """Whose address may change."""


def straight(lab: Lab, ssh: Keys) -> Plan:
    del lab
    own = {f"head.{key}": value for key, value in ssh.items()}
    return Plan(("w1>head",), {"w1": own}, moving="w1")


def jump_host(lab: Lab, ssh: Keys) -> Plan:
    head, w1, third = map(lab.machine, ("head", "w1", "third"))
    third.authorize(f"restrict,port-forwarding {w1.public_key}")
    w1.know(*(f"{m.address} {m.host_key}" for m in (head, third)))
    hosts = {"bastion": third, "the-head": head}
    lines = [f"Host {name}\n  HostName {m.address}\n  User ray\n" for name, m in hosts.items()]
    w1.write(f"{HOME}/.ssh/config", "".join(lines) + "  ProxyJump bastion\n")
    own = {"head.ssh": "the-head"} | {f"head.{key}": value for key, value in ssh.items()}
    return Plan(("w1>third", "third>head"), {"w1": own}, moving="w1")


def head_dials(lab: Lab, ssh: Keys) -> Plan:
    head, w1 = lab.machine("head"), lab.machine("w1")
    w1.authorize(f"restrict,port-forwarding {head.public_key}")
    head.know(f"{w1.address} {w1.host_key}")
    row = {"ssh": f"ray@{w1.address}", "name": "w1", "socket": f"{RUNTIME_DIR}/link.sock", **ssh}
    dialled = {"head": None, "head.dialled": True}
    return Plan(("head>w1",), {"head": {"hub.dial": [row]}, "w1": dialled}, moving="head")


def meeting_place(lab: Lab, ssh: Keys) -> Plan:
    head, w1, third = map(lab.machine, ("head", "w1", "third"))
    third.authorize(*(f"restrict,port-forwarding {m.public_key}" for m in (head, w1)))
    known = f"{third.address} {third.host_key}"
    head.know(known)
    w1.know(known, f"the-head {head.host_key}")
    own = {"head.ssh": "ray@the-head", "head.meet": f"ray@{third.address}"}
    own |= {f"head.{key}": value for key, value in ssh.items()}
    meet = {"hub.meet": [{"ssh": f"ray@{third.address}"}]}
    return Plan(("w1>third", "head>third"), {"head": meet, "w1": own}, moving="w1")


def directly(lab: Lab, ssh: Keys) -> Plan:
    head, w1, w2 = map(lab.machine, ("head", "w1", "w2"))
    attach = f"{lab.rayfwd} attach --peer --socket {RUNTIME_DIR}/peers.sock"
    w2.authorize(f'restrict,command="{attach}" {w1.public_key}')
    w1.know(*(f"{m.address} {m.host_key}" for m in (head, w2)))
    way = {"node": "w2", "ssh": f"ray@{w2.address}", **ssh}
    return Plan(
        ("w1>w2", "w1>head", "w2>head"),
        {"w1": {"direct": [way]}, "w2": {}},
        ("w1>w2", "w2>w1"),
        moving="w1",
    )


OPENSSH = {"transport": "openssh"}
WAYS: dict[str, tuple[Callable[[Lab, Keys], Plan], Keys]] = {
    "straight, openssh": (straight, OPENSSH),
    "jump host": (jump_host, {}),
    "jump host, openssh": (jump_host, OPENSSH),
    "head dials": (head_dials, {}),
    "head dials, openssh": (head_dials, OPENSSH),
    "meeting place": (meeting_place, {}),
    "meeting place, openssh": (meeting_place, OPENSSH),
    "direct": (directly, {}),
    "direct, openssh": (directly, OPENSSH),
}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path / "lab", names=("head", "w1", "w2", "third")) as made:
        yield made


def started(lab: Lab, plan: Plan) -> Cluster:
    """sshd where somebody dials it, and all daemons."""
    servers = {leg.partition(">")[2] for leg in plan.legs}
    strict_firewalls(lab, tuple(servers))
    for name in servers - {"head"}:
        lab.machine(name).start_sshd()
    workers = [name for name in plan.nodes if name != "head"]
    names = ("head", *workers)
    own: dict[str, Any] = {name: dict(plan.nodes.get(name, {})) for name in names}
    for name in names:
        own[name]["forward"] = [
            {"listen": f"127.0.0.1:{LISTENERS[other]}", "to": f"{other}:{ECHO}"}
            for other in names
            if other != name
        ]
    every = {"expose": [ECHO], "ride_through": RIDE_THROUGH}
    cluster = Cluster(lab, workers=workers, every=every, **own)
    cluster.start()
    cluster.wait_ready()
    return cluster


@pytest.mark.parametrize("name", WAYS)
def test_it_is_held_together(lab: Lab, name: str) -> None:
    build, ssh = WAYS[name]
    plan = build(lab, ssh)
    cluster = started(lab, plan)
    nodes = [f"127.77.0.{number}" for number in range(1, len(cluster.names) + 1)]
    driver = lab.machine("w1")
    words = ["--checks", ",".join(CHECKS), "--nodes", str(len(nodes))]
    verify(cluster.driver("w1", words), "w1", nodes, CHECKS)
    job = Job(driver, driver.ray_python(), "--nodes", str(len(nodes)))
    echoes = Echoes(lab, plan.echoes)
    echoes.beats()
    found = {}
    for leg in legs_of(lab, *plan.legs):
        found[leg.name] = recovery(echoes, leg.faults.swallow(lab.machine(leg.dials)))
        job.check()
    legs = legs_of(lab, *plan.legs)
    for _ in mixed(legs, 20261123, CUTS, LONGEST, PAUSE, plan.moving):
        job.check()
    echoes.beats(60)
    counts = job.finish_whole(5, timeout=120)
    assert echoes.failed() == []
    for daemon in cluster.daemons:
        assert daemon.events("session_ended") == []
    trips = {n: cluster.worker(n).status()["link"]["lanes"][0]["rtt_ms"] for n in cluster.names[1:]}
    calls = {kind: count["done"] for kind, count in counts.items()}
    print(json.dumps({"way": name, "recovery": found, "rtt_ms": trips, "calls": calls}))
    cluster.stop()


def recovery(echoes: Echoes, undo: Callable[[], None]) -> float:
    """Seconds until all that waited has come, from when the path is back."""
    began = time.monotonic()
    try:
        time.sleep(SILENCE)
    finally:
        undo()
    healed = time.monotonic()
    echoes.beats(60)
    return round(echoes.after(healed, began), 1)
