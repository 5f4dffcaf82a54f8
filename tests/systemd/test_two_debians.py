"""Two releases of Debian in one cluster: rayfwd on each one's own Python, sshd and libc.

Ray itself wants the same Python on all nodes, so there both have bookworm's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.systemd.cluster import Cluster
from tests.systemd.install import installed, with_ray_of
from tests.systemd.machines import Lab

PYTHON = {"bookworm": "/usr/bin/python3.11", "trixie": "/usr/bin/python3.13"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("trixie", "bookworm"), id="trixie-bookworm"),
        pytest.param(("bookworm", "trixie"), id="bookworm-trixie", marks=pytest.mark.thorough),
    ],
)
def lab(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Head and worker, in that order."""
    made = {"bookworm": installed("bookworm"), "trixie": with_ray_of("trixie", "bookworm")}
    roots = {
        name: made[suite] for name, suite in zip(("head", "worker"), request.param, strict=True)
    }
    with Lab(tmp_path_factory.mktemp("lab"), roots) as lab:
        lab.boot()
        yield lab


def test_tasks_run_on_both(cluster: Cluster) -> None:
    """With data there and back, after a restart of each side."""
    for machine in cluster.lab.machines:
        daemon = machine.show()["MainPID"]
        running = machine.run(["readlink", f"/proc/{daemon}/exe"]).stdout.strip()
        assert running == PYTHON[machine.suite]
    for machine in cluster.lab.machines:
        assert cluster.restart(machine)["RESET"] == "0"
    assert cluster.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]
