"""Three firewalled machines at the level `overlay`, with Ray and the libraries that run on it.

The head lets in SSH, the workers nothing. Head and w1 have a service that makes the overlay, w2 is
as a container that may change its network. No file names a level: the overlay is what `auto` takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab import kinds
from tests.lab.cluster import Cluster
from tests.lab.machines import Lab
from tests.lab.mix import RIDE_THROUGH
from tests.lab.process import until
from tests.lab.shared import Shared, shared
from tests.need import need_libraries
from tests.setup_envs import LIBRARIES

SOCKET = "/run/lab/overlay.sock"


@pytest.fixture(scope="package")
def with_overlay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    need_libraries("torch")

    @contextmanager
    def made() -> Iterator[Cluster]:
        with Lab(tmp_path_factory.mktemp("lab")) as lab:
            cluster = Cluster(lab, LIBRARIES, ride_through=RIDE_THROUGH, w1=kinds.FILE)
            lab.machine("head").start_sshd()
            for machine in map(lab.machine, ("head", "w1")):
                argv = [str(lab.rayfwd), "overlay", SOCKET, "--user", "ray"]
                keeper = machine.popen(argv, user="root")
                until(
                    lambda k=keeper: "overlay_keeper_listening" in k.log.read_text(),  # type: ignore[misc]
                    30,
                    keeper.log.read_text,
                )
                cluster.start_node(machine.name, under=["env", f"RAYFWD_OVERLAY={SOCKET}"])
            cluster.start_node("w2", net_admin=True)
            cluster.wait_ready(240)
            yield cluster
            cluster.stop()

    with shared(made) as made_once:
        yield made_once
