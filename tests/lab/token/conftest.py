"""A head with Ray's token, two workers, and a laptop that is no node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab.cluster import HUB_SOCKET, Cluster
from tests.lab.machines import NAMES, Lab
from tests.lab.shared import Shared, shared


@pytest.fixture(scope="package")
def with_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """The head alone is started. w2's key may run `rayfwd attach` and nothing else."""

    @contextmanager
    def made() -> Iterator[Cluster]:
        with Lab(tmp_path_factory.mktemp("lab"), names=(*NAMES, "laptop")) as lab:
            head, w1, w2, laptop = lab.machines
            restricted = f'restrict,command="{lab.rayfwd} attach --socket {HUB_SOCKET}"'
            key, _, _ = w2.public_key.rpartition(" ")
            head.authorize(w1.public_key, f"{restricted} {key} rayfwd w2", laptop.public_key)
            exec_ = {"head": {"via": "exec", "socket": None}}
            cluster = Cluster(lab, head={"ray.auth": "token"}, w2=exec_)
            cluster.start(["head"])
            cluster.wait_ready()
            yield cluster
            cluster.stop()

    with shared(made) as made_once:
        yield made_once
