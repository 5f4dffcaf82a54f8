"""Machines that share a home, as in a laboratory where it is on NFS: `rayfwd join` by hand, and
`rayfwd add` and `remove` from the head. Each machine has a place of its own in that home.

Their home is one directory of this computer's. So rayfwd does not see that its disk is a network's
(`tests/unit/test_one_home.py` has that), only that another machine has been there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.machines import Lab
from tests.lab.process import HOME, UID
from tests.lab.test_join import STATE, InFront, heading, said_on, task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

WORKERS = ("w1", "w2")


class OneHome(Lab):
    """Its workers have one, with one SSH key."""

    def _trees(self) -> list[str]:
        return [*super()._trees(), str(self.home)]

    @property
    def home(self) -> Path:
        return self.folder / "home"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneHome]:
    made = OneHome(tmp_path_factory.mktemp("lab") / "lab")
    made.home.mkdir(parents=True)
    os.chown(made.home, UID, UID)
    with made:
        head = made.machine("head")
        for name in WORKERS:
            machine = made.machine(name)
            machine.run(["mount", "--bind", str(made.home), HOME], user="root")
            machine.firewall([22])
            machine.start_sshd()
        w1 = made.machine("w1")
        w1.give_keys()
        w1.know(f"{head.address} {head.host_key}")
        w1.authorize(head.public_key)
        workers = [made.machine(name) for name in WORKERS]
        head.know(*(f"{m.address} {m.host_key}" for m in workers))
        head.start_sshd()
        yield made


@pytest.fixture
def head(lab: OneHome, request: pytest.FixtureRequest) -> Iterator[InFront]:
    """With Ray where the test is `thorough`."""
    machine = lab.machine("head")
    if request.node.get_closest_marker("thorough") is not None:
        with heading(machine) as head:
            yield head
        return
    head = InFront(machine, ["head", "--no-start"])
    head.wait_ready()
    yield head
    head.stop(30)


def node(head: InFront, name: str) -> dict[str, Any]:
    return next((w for w in head.status()["workers"] if w["name"] == name), {})


def up(head: InFront) -> set[str]:
    return {w["name"] for w in head.status()["workers"] if w["state"] == "up"}


def roster(head: InFront) -> dict[str, Any]:
    return {row["name"]: (row["address"], row["ports"]) for row in head.status()["roster"]}


@pytest.mark.thorough
def test_join_by_hand_at_the_same_time(lab: OneHome, head: InFront) -> None:
    """Whoever comes second is not there yet when it looks: it finds out when it begins."""
    words = ["join", f"ray@{lab.machine('head').address}", "--socket", f"{head.sockets}/hub.sock"]
    nodes = {name: InFront(lab.machine(name), words) for name in WORKERS}
    head.wait_status(
        lambda s: {w["name"] for w in s["workers"] if w["state"] == "up"} >= set(WORKERS)
    )
    apart = [
        name for name in WORKERS if (lab.home / f".local/state/rayfwd/machines/{name}").exists()
    ]
    assert len(apart) == 1, "who was first keeps the usual directory"
    nodes[apart[0]].sockets = f"{STATE}/machines/{apart[0]}/run"
    for each in nodes.values():
        each.wait_ready()
    assert len(task(lab.machine("head"))) == 3
    for name in WORKERS:
        told = lab.machine(name).run([str(lab.rayfwd), "status"]).stdout
        assert told.startswith(f"READY  worker {name} at ")
    before = roster(head)
    for each in nodes.values():
        assert each.stop(30) == 0

    nodes = {name: InFront(lab.machine(name), words) for name in apart}
    nodes[apart[0]].sockets = f"{STATE}/machines/{apart[0]}/run"
    nodes[apart[0]].wait_ready()
    assert roster(head) == before, "alone, it is who it was"
    assert nodes[apart[0]].stop(30) == 0
    for name in WORKERS:
        said_on(head, "forget", "--keep-token", name)
    lab.machine("w1").run(["rm", "-r", STATE])


def add(head: InFront, lab: OneHome, *more: str, names: tuple[str, ...] = WORKERS) -> list[str]:
    """The lines, where all went well."""
    hosts = [f"ray@{lab.machine(name).address}" for name in names]
    ran = said_on(head, "add", *hosts, "--set", "ray.start=false", *more, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.parametrize("via", [pytest.param("worker", marks=pytest.mark.thorough), "head"])
def test_both_are_added_and_removed(lab: OneHome, head: InFront, via: str) -> None:
    more = ["--via", via]
    assert add(head, lab, *more)[-1] == "2 of 2 in the cluster"
    assert up(head) == set(WORKERS)
    before = roster(head)
    for name in WORKERS:
        told = lab.machine(name).run([f"{HOME}/.local/bin/rayfwd", "status"]).stdout
        assert told.startswith(f"READY  worker {name} at ")
    assert add(head, lab, *more)[-1] == "2 of 2 in the cluster; 2 unchanged"

    since = node(head, "w2")["since"]
    ran = said_on(head, "remove", "w1")
    assert ran.returncode == 0
    assert "stays: other machines have the same home" in ran.stdout
    assert set(roster(head)) == {"head", "w2"}
    assert node(head, "w2")["since"] == since
    told = lab.machine("w2").run([f"{HOME}/.local/bin/rayfwd", "status"]).stdout
    assert told.startswith("READY  worker w2 at ")

    assert add(head, lab, *more, names=("w1",))[-1] == "1 of 1 in the cluster"
    assert roster(head)["w2"] == before["w2"]
    assert up(head) == set(WORKERS)
    ran = said_on(head, "remove", *WORKERS)
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[-1] == "2 of 2 removed"
    for name in WORKERS:
        machine = lab.machine(name)
        assert machine.run(["find", HOME, "-path", "*rayfwd*"]).stdout == ""
        assert "rayfwd" not in machine.run(["cat", f"{HOME}/.ssh/authorized_keys"]).stdout
        assert machine.run(["pgrep", "-u", "ray", "-fa", "rayfwd"], check=False).stdout == ""
