"""A link drops and Ray does not notice: every fault for real, under a job that counts every call.

One cluster and one job for all tests, which run in the order of this file. Times in them are
rayfwd's promises (docs/faults.md), not speeds. Mixed faults are in test_losses.py, which times
nothing and need not be alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import pytest

from tests.lab.cluster import Cluster
from tests.lab.daemon import Daemon, Event
from tests.lab.false_alarms import errors
from tests.lab.faults import Connection, Faults, kill, strict_firewalls
from tests.lab.loadgen import Echoes, Job
from tests.lab.machines import Lab, Machine
from tests.lab.mix import DRIVER, LANES, WAYS, over_rayfwd
from tests.lab.process import until

pytestmark = [pytest.mark.timeout(400), pytest.mark.alone, pytest.mark.story]

NOTICED = 6.0
"""Seconds in which a silent peer is noticed."""
NOTICED_BY_WHO_HEARS = 10.0
"""Seconds, by the end that still hears the other (docs/protocol.md): a PING that comes counts."""
DEAF = {"swallow_from": {"head"}, "swallow_to": {"w1"}, "swallow": {"head", "w1"}}
"""The ends that hear nothing, by faults of w1's link."""
AGAIN = 2.0
"""Seconds after the return of the path in which data flows again."""
LANE = 1.0
"""Seconds that the loss of one lane of several may stall anything."""
OF_W1 = [way for way in WAYS if "w2" not in way]
"""The echoes that only w1's link carries."""


@dataclass
class Rig:
    """The cluster, the job and the echoes that run all the time."""

    cluster: Cluster
    faults: Faults
    job: Job
    echoes: Echoes
    since: float
    """When all was well, on the clock on the wall."""

    @property
    def lab(self) -> Lab:
        return self.cluster.lab

    @property
    def w1(self) -> Machine:
        return self.lab.machine("w1")

    @property
    def w2(self) -> Machine:
        return self.lab.machine("w2")

    def whole(self, *workers: str, ways: list[str] | None = None) -> None:
        """Wait until all lanes stand and all echoes come back; nothing may be lost."""
        for name in workers or LANES:
            worker = self.lab.machine(name)
            until(
                lambda w=worker, n=LANES[name]: len(self.faults.connections(w)) >= n,  # type: ignore[misc]
                30,
                lambda w=worker: f"{w.name}: lanes {self.faults.connections(w)}{self.lab.tails()}",  # type: ignore[misc]
            )
        self.echoes.beats(30, ways)
        self.job.check()
        assert self.echoes.failed() == []


@pytest.fixture(scope="module")
def rig(module_lab: Lab) -> Iterator[Rig]:
    strict_firewalls(module_lab)
    with over_rayfwd(module_lab) as cluster:
        driver = module_lab.machine(DRIVER)
        job = Job(driver, driver.ray_python())
        rig = Rig(cluster, Faults(module_lab), job, Echoes(module_lab, WAYS), time.time())
        rig.whole()
        yield rig


def said_at(event: Event) -> float:
    """When an event was logged, wall-clock seconds."""
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def last_event(daemon: Daemon) -> Event | None:
    events = daemon.events()
    return events[-1] if events else None


AT_ONCE = {
    "kill_sshd": AGAIN,
    "reset": AGAIN,
    "restart_sshd": 1.0 + AGAIN,
    "change_address": NOTICED + AGAIN,
    "forget_connections": NOTICED + AGAIN,
}
"""Faults that last no time, and how long they may stall anything."""


class Cut100:
    """A silence of w2's link that lasts 100 s, however long the tests beside it take."""

    def __init__(self, rig: Rig) -> None:
        self.began = time.monotonic()
        self.healed = 0.0
        self._undo = rig.faults.swallow(rig.w2)
        self._timer = threading.Timer(100.0, self._heal)
        self._timer.start()

    def _heal(self) -> None:
        self._undo()
        self.healed = time.monotonic()

    def wait(self) -> None:
        """Until it is over."""
        self._timer.join()
        assert self.healed, "the cut was not undone"


@pytest.fixture(scope="class")
def cut(rig: Rig) -> Iterator[Cut100]:
    made = Cut100(rig)
    yield made
    made.wait()


@pytest.mark.ray
class TestWhileAnotherWorkerIsCutFor100Seconds:
    """Faults of w1's link, one after another; w2 is gone meanwhile."""

    @pytest.mark.parametrize(
        "name",
        [
            "kill_sshd",
            pytest.param("reset", marks=pytest.mark.runs("ss -*K*")),
            "restart_sshd",
            "change_address",
            pytest.param("forget_connections", marks=pytest.mark.runs("conntrack -D")),
        ],
    )
    def test_over_at_once(self, rig: Rig, cut: Cut100, name: str) -> None:
        began = time.monotonic()
        getattr(rig.faults, name)(rig.w1)
        rig.whole("w1", ways=OF_W1)
        for what in ("echo", "new"):
            assert max(rig.echoes.longest(began, what, way) for way in OF_W1) < AT_ONCE[name]

    @pytest.mark.parametrize(
        ("name", "seconds"),
        [
            ("swallow_from", 8),
            ("swallow_to", 8),
            ("swallow", 20),
            # As the one before; that of the other worker lasts longer still.
            pytest.param("swallow", 45, marks=pytest.mark.thorough),
        ],
    )
    def test_silence(self, rig: Rig, cut: Cut100, name: str, seconds: float) -> None:
        silence(rig, name, seconds, OF_W1)

    def test_it_is_ridden_through(self, rig: Rig, cut: Cut100) -> None:
        cut.wait()
        rig.whole()
        # By w2's link alone: w1 may be cut itself at that moment.
        assert rig.echoes.after(cut.healed, cut.began, "w2>head") < AGAIN
        resumed = rig.cluster.worker("w2").wait_event("link_resumed", 5)
        assert resumed["parked_seconds"] > 90


def silence(rig: Rig, name: str, seconds: float, ways: list[str]) -> None:
    """A fault of w1's link of which nobody is told, for so many seconds."""
    ends = (rig.cluster.head, rig.cluster.worker("w1"))
    before = [last_event(daemon) for daemon in ends]
    began = time.monotonic()
    undo = getattr(rig.faults, name)(rig.w1)
    wall = time.time()
    try:
        time.sleep(seconds)
    finally:
        undo()
    healed = time.monotonic()
    rig.whole("w1", ways=ways)
    assert max(rig.echoes.after(healed, began, way) for way in ways) < AGAIN
    if seconds > NOTICED:
        for daemon, event in zip(ends, before, strict=True):
            parked = daemon.wait_event(
                "link_parked", 5, where=lambda e: e["node"] in {"head", "w1"}, after=event
            )
            deaf = daemon.machine.name in DEAF[name]
            assert said_at(parked) - wall < (NOTICED if deaf else NOTICED_BY_WHO_HEARS)
        held = [e for e in rig.echoes.slow() if e["what"] == "new" and began < e["began"] < healed]
        assert held, "no connection was made meanwhile"


@pytest.mark.ray
@pytest.mark.parametrize("seconds", [1, 5])
def test_all_packets_are_swallowed(rig: Rig, seconds: float) -> None:
    silence(rig, "swallow", seconds, list(WAYS))


@pytest.mark.ray
@pytest.mark.parametrize("how", ["killed", "silent", "slow"])
def test_one_lane_of_several(rig: Rig, how: str) -> None:
    """Each of w1's three lanes in turn."""
    worker = rig.cluster.worker("w1")
    first = before = last_event(worker)
    assert first is not None
    began = time.monotonic()
    for number in range(LANES["w1"]):
        rig.whole()
        # A lane that is lost comes back as the youngest.
        oldest, *_ = connections = rig.faults.connections(rig.w1)
        if how == "killed":
            kill(oldest)
            until(lambda o=oldest: o not in rig.faults.connections(rig.w1), 10, lambda: "killed")  # type: ignore[misc]
        elif how == "silent":
            undo = rig.faults.swallow_lane(rig.w1, oldest)
            worker.wait_event("lane_lost", NOTICED + 1, after=before)
            undo()
        else:
            crawl(rig, connections[number])
        before = last_event(worker)
        assert rig.cluster.head.status()["workers"][0]["state"] == "up"
    rig.whole()
    # A slow lane is not lost: what is on it already takes its time.
    bound = NOTICED if how == "slow" else LANE
    for what in ("echo", "new"):
        assert rig.echoes.longest(began, what) < bound
    if how != "slow":
        lost = {e["lane"] for e in worker.events("lane_lost") if e["_index"] > first["_index"]}
        assert lost == {"interactive", "bulk-1", "bulk-2"}


def crawl(rig: Rig, connection: Connection) -> None:
    undo = rig.faults.slow_lane(rig.w1, connection)
    try:
        time.sleep(5)
    finally:
        undo()


@pytest.mark.ray
def test_nothing_was_lost(rig: Rig) -> None:
    rig.job.finish_whole(5)
    assert rig.echoes.failed() == []
    for daemon in rig.cluster.daemons:
        ended = daemon.events("session_ended") + daemon.events("not_json")
        assert not ended, f"{daemon.machine.name}: {ended}"


@pytest.mark.ray
def test_nobody_cried_wolf(rig: Rig) -> None:
    """All these cuts were ridden through: no error was said. (false_alarms.py takes longer.)"""
    assert errors(rig.cluster.daemons, rig.since) == []
