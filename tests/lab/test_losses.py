"""What costs nothing, and what does: restarts that hand over, mixed faults, and faults too large to
be ridden through, after which all heals without a hand.

One cluster. First rayfwd is restarted under a job that counts every call, and hands over what is
open: no call is lost, no connection is cut. SIGUSR2 restarts the daemon in its place; under systemd
a restart does the same (tests/systemd). Under the same job the links then have every kind of fault
(test_faults.py has each by itself, and times it). Then machines are rebooted; docs/faults.md says
which tasks are lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import Cluster
from tests.lab.false_alarms import errors
from tests.lab.faults import Faults, schedule, strict_firewalls
from tests.lab.loadgen import ECHO, Echoes, Job, listeners
from tests.lab.machines import Lab
from tests.lab.mix import DRIVER, LANES, WAYS, mix, over_rayfwd
from tests.lab.process import until

pytestmark = pytest.mark.timeout(400)


def test_after_ride_through_all_is_given_up(lab: Lab) -> None:
    """Said once on both sides; the next connection waits for the link, and all heals with it."""
    cluster = Cluster(
        lab,
        workers=("w1",),
        every={"ray.start": False, "expose": [ECHO], "ride_through": 6},
        head={"forward": [d for d in listeners("head") if "w1" in d["to"]]},
        w1={"forward": [d for d in listeners("w1") if "head" in d["to"]]},
    )
    cluster.start(["head"])
    cluster.head.wait_event("hub_listening")
    cluster.start(["w1"])
    cluster.wait_ready()
    echoes = Echoes(lab, ["w1>head", "head>w1"])
    echoes.beats()
    assert echoes.failed() == []
    undo: Callable[[], None] = Faults(lab).swallow(lab.machine("w1"))
    for daemon in cluster.daemons:
        daemon.wait_event("session_ended", 20, where=lambda e: e["cause"].startswith("no lane for"))
        status = daemon.wait_status(lambda s: s["streams"]["parked"] == 0, 20)
        assert status["streams"]["open"] == 0
    until(lambda: {e["target"] for e in echoes.failed()} == set(echoes.ways), 10, lambda: "resets")
    undo()
    healed = time.monotonic()
    echoes.beats(40)
    status = cluster.worker("w1").wait_status(lambda s: s["state"] == "ready", 20)
    assert status["conditions"] == []
    failed = [e for e in echoes.failed() if e["began"] > healed + 20]
    assert failed == []
    for daemon in cluster.daemons:
        assert len(daemon.events("session_ended")) == 1
        assert len(daemon.events("link_parked")) == 1
    echoes.finish()
    assert cluster.stop() == {"head": 0, "w1": 0}


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    """A head and two workers, with Ray."""
    strict_firewalls(module_lab)
    with over_rayfwd(module_lab) as made:
        yield made


@dataclass
class Rig:
    cluster: Cluster
    job: Job
    echoes: Echoes

    def restart(self, *names: str) -> list[dict[str, object]]:
        """Restart these daemons at once; what each said of what it took over."""
        daemons = [self.cluster.head if n == "head" else self.cluster.worker(n) for n in names]
        before = [daemon.events() for daemon in daemons]
        ids = [daemon.status()["pid"] for daemon in daemons]
        for daemon, pid in zip(daemons, ids, strict=True):
            daemon.machine.run(["kill", "-USR2", str(pid)])
        taken = []
        for daemon, events in zip(daemons, before, strict=True):
            taken.append(daemon.wait_event("handover_taken", 60, after=events[-1]))
            ray = daemon.wait_event("ray_adopted", 60, after=events[-1])
            assert ray["ours"]
            daemon.wait_event("rayfwd_ready", 60, after=events[-1])
        return taken

    def whole(self) -> None:
        """Everything goes on, and nothing was lost."""
        self.echoes.beats(30)
        self.job.check()
        assert self.echoes.failed() == []


@pytest.fixture(scope="module")
def rig(cluster: Cluster) -> Rig:
    driver = cluster.lab.machine(DRIVER)
    rig = Rig(cluster, Job(driver, driver.ray_python()), Echoes(cluster.lab, WAYS))
    rig.whole()
    return rig


@pytest.mark.ray
@pytest.mark.runs("kill -USR2")
@pytest.mark.parametrize("names", [["w1"], ["head"], ["head", "w1", "w2"]])
def test_no_call_is_lost(rig: Rig, names: list[str]) -> None:
    for taken in rig.restart(*names):
        assert taken["reset"] == 0
        assert int(str(taken["streams"])) > 5
    rig.whole()


@pytest.mark.ray
def test_mixed_faults_cost_no_call_and_no_false_alarm(rig: Rig) -> None:
    since = time.time()
    faults = Faults(rig.cluster.lab)
    cuts = schedule(seed=20261123, cuts=11, workers=["w1", "w2"], longest=8.0)
    for _ in mix(faults, cuts, slot=4.0, seed=1):
        rig.job.check()
    for name, lanes in LANES.items():
        machine = rig.cluster.lab.machine(name)
        until(
            lambda m=machine, n=lanes: len(faults.connections(m)) >= n,  # type: ignore[misc]
            30,
            lambda m=machine: f"{m.name}: lanes {faults.connections(m)}{m.lab.tails()}",  # type: ignore[misc]
        )
    rig.whole()
    for daemon in rig.cluster.daemons:
        ended = daemon.events("session_ended") + daemon.events("not_json")
        assert not ended, f"{daemon.machine.name}: {ended}"
    assert errors(rig.cluster.daemons, since) == []


@pytest.mark.ray
def test_every_call_comes_to_its_end(rig: Rig) -> None:
    counts = rig.job.finish_whole(5)
    rig.echoes.finish()
    assert rig.echoes.failed() == []
    assert all(counts[kind]["done"] > 10 for kind in ("task", "actor"))


@pytest.mark.ray
def test_a_worker_is_rebooted(cluster: Cluster) -> None:
    """What it ran is lost, and nothing else; it comes back by itself."""
    w1, w2 = cluster.lab.machine("w1"), cluster.lab.machine("w2")
    job = Job(w1, w1.ray_python())
    address = cluster.worker("w2").status()["node"]["address"]
    w2.kill_all()
    cluster.start_node("w2")
    # Before that its old self is in Ray's table still.
    until(lambda: job.dead, 120, lambda: f"the node is not found dead{cluster.lab.tails()}")
    before = job.done_on(address)
    until(
        lambda: job.done_on(address) > before + 20,
        120,
        lambda: f"no task on {address}{cluster.lab.tails()}",
    )
    job.finish()
    bad = job.bad()
    assert bad
    assert [line for line in bad if address not in line["way"]] == []
    assert len(job.dead) == 1


@pytest.mark.ray
def test_the_head_is_rebooted(cluster: Cluster) -> None:
    """All of Ray's memory is gone with it; the workers join the new one without a hand."""
    head = cluster.lab.machine("head")
    head.kill_all()
    head.start_sshd()
    cluster.start_node("head")
    cluster.head.wait_ready()
    alive(cluster, 3)
    for name in ("w1", "w2"):  # or their raylets have found it out before, and ended
        daemon = cluster.worker(name)
        again = [e["reason"] for e in daemon.events("ray_restarting")]
        assert again == ["the head's Ray was restarted"] or daemon.events("ray_died")
    addresses = [row["address"] for row in cluster.head.status()["roster"]]
    verify(cluster.driver("w1", ["--checks", "essential"]), "w1", addresses)


def alive(cluster: Cluster, nodes: int) -> None:
    """Wait until so many nodes are alive in Ray's own table, and all daemons are content."""

    def look(status: dict[str, Any]) -> bool:
        seen = (status["cluster"] or {}).get("nodes", [])
        ready: bool = status["state"] == "ready"
        return ready and sum(n["state"] == "ALIVE" for n in seen) == nodes

    cluster.head.wait_status(look, 250)
