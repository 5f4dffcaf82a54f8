"""rayfwd is restarted under a job that counts every call, and hands over what is open: no call is
lost, no connection is cut.

One cluster and one job for all tests, which run in the order of this file. SIGUSR2 restarts the
daemon in its place; under systemd a restart does the same (tests/systemd).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.lab.cluster import Cluster
from tests.lab.loadgen import Echoes, Job
from tests.lab.machines import Lab
from tests.lab.mix import DRIVER, WAYS, over_rayfwd

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@dataclass
class Rig:
    cluster: Cluster
    job: Job
    echoes: Echoes

    def restart(self, *names: str) -> list[dict[str, object]]:
        """Restart these daemons at once; what each said of what it took over."""
        daemons = [self.cluster.head if n == "head" else self.cluster.worker(n) for n in names]
        before = [daemon.events() for daemon in daemons]
        for daemon in daemons:
            daemon.process.signal(signal.SIGUSR2)
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
def rig(module_lab: Lab) -> Iterator[Rig]:
    with over_rayfwd(module_lab) as cluster:
        driver = module_lab.machine(DRIVER)
        rig = Rig(cluster, Job(driver, driver.ray_python()), Echoes(module_lab, WAYS))
        rig.whole()
        yield rig


@pytest.mark.parametrize("names", [["w1"], ["head"], ["head", "w1", "w2"]])
def test_no_call_is_lost(rig: Rig, names: list[str]) -> None:
    for taken in rig.restart(*names):
        assert taken["reset"] == 0
        assert int(str(taken["streams"])) > 5
    rig.whole()


def test_every_call_comes_to_its_end(rig: Rig) -> None:
    rig.job.finish()
    rig.job.check()
    rig.echoes.finish()
    assert rig.echoes.failed() == []
    assert all(rig.job.counts()[kind]["done"] > 10 for kind in ("task", "actor"))
