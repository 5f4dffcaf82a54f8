"""`rayfwd join` on two machines that share a home, as in a laboratory where it is on NFS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.machines import Lab
from tests.lab.process import HOME, UID
from tests.lab.test_join import InFront, task

pytestmark = [pytest.mark.ray, pytest.mark.thorough]


class OneHome(Lab):
    """Its workers have one, with one SSH key."""

    def _trees(self) -> list[str]:
        return [*super()._trees(), str(self.home)]

    @property
    def home(self) -> Path:
        return self.folder / "home"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[OneHome]:
    made = OneHome(tmp_path / "lab")
    made.home.mkdir(parents=True)
    os.chown(made.home, UID, UID)
    with made:
        for name in ("w1", "w2"):
            machine = made.machine(name)
            machine.run(["mount", "--bind", str(made.home), HOME], user="root")
        w1, head = made.machine("w1"), made.machine("head")
        w1.give_keys()
        w1.know(f"{head.address} {head.host_key}")
        head.start_sshd()
        yield made


def test_the_second_one_is_told_what_to_do(lab: OneHome) -> None:
    head = InFront(lab.machine("head"), ["head"])
    head.wait_ready()
    words = ["join", f"ray@{lab.machine('head').address}", "--socket", f"{head.sockets}/hub.sock"]
    first = InFront(lab.machine("w1"), words)
    first.wait_ready()
    refused = InFront(lab.machine("w2"), words)
    assert refused.process.wait(30) == 1
    told = refused.tail()
    assert "already_running" in told
    assert ", on the machine w1, which has the same directory" in told
    assert "export XDG_STATE_HOME=~/.local/state/$(uname -n)" in told

    second = InFront(lab.machine("w2"), words, env={"XDG_STATE_HOME": f"{HOME}/.local/state/w2"})
    second.sockets = f"{HOME}/.local/state/w2/rayfwd/run"
    second.wait_ready()
    assert len(task(lab.machine("head"))) == 3
    assert first.status()["state"] == "ready"
    for node in (second, first, head):
        assert node.stop(30) == 0
