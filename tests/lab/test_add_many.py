"""Twenty containers at once from one `rayfwd add -f`, with machines among them that hang; then what
becomes of them: the same again, some made anew, and their removal.

Their rayfwd is real, and starts no Ray: what takes long is twenty installations on one computer.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, UID
from tests.lab.test_join import InFront, heading, said_on

pytestmark = [
    pytest.mark.ray,
    pytest.mark.thorough,
    pytest.mark.story,
    pytest.mark.timeout(600),
]

CONTAINERS = tuple(f"c{number}" for number in range(1, 21))
HANG = ("silent", "shell", "stuck", "readonly", "full")
"""In this order before the others in the file, and more than there are places for two at once."""
JOBS = 4
ADD = ("add", "-f", "hosts.txt", "--jobs", str(JOBS), "--set", "ray.start=false")
ANEW = ("c3", "c11", "c20")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), names=("head", *CONTAINERS, *HANG)) as lab:
        head, *others = lab.machines
        for machine in others:
            machine.authorize(head.public_key)
            machine.firewall([22])
            machine.start_sshd()
            hang(machine)
        head.know(*(f"{machine.address} {machine.host_key}" for machine in others))
        head.start_sshd()
        yield lab


def hang(machine: Machine) -> None:
    """As machines do that are half alive, if it is one of HANG."""
    if machine.name == "silent":
        signal_sshd(machine, signal.SIGSTOP)
    elif machine.name == "shell":
        machine.write(f"{HOME}/.bashrc", "sleep 600\n")
    elif machine.name == "stuck":
        machine.write(f"{HOME}/bin/df", "#!/bin/sh\nexec sleep 600\n", 0o755)
        machine.write(f"{HOME}/.bashrc", "PATH=~/bin:$PATH\n")
    elif machine.name == "readonly":
        machine.run(["mount", "--bind", HOME, HOME], user="root")
        machine.run(["mount", "-o", "remount,bind,ro", HOME], user="root")
    elif machine.name == "full":
        machine.run(["mkdir", "-p", f"{HOME}/.local"])
        options = f"size=1m,uid={UID}"
        machine.run(["mount", "-t", "tmpfs", "-o", options, "full", f"{HOME}/.local"], user="root")


def signal_sshd(machine: Machine, number: int) -> None:
    """The kernel goes on accepting connections for one that is stopped."""
    assert machine._sshd is not None
    machine._sshd.signal(number)


@pytest.fixture(scope="module")
def head(many: Lab) -> Iterator[InFront]:
    with heading(many.machine("head")) as head:
        yield head


def hosts(lab: Lab, *names: str) -> str:
    return "".join(f"ray@{lab.machine(name).address} --name {name}\n" for name in names)


def test_twenty_at_once_and_what_hangs_holds_up_none(many: Lab, head: InFront) -> None:
    head.machine.write(f"{HOME}/hosts.txt", hosts(many, *HANG, *CONTAINERS))
    began = time.monotonic()
    ran = said_on(head, *ADD, timeout=500)
    print(f"{len(CONTAINERS)} containers in {time.monotonic() - began:.1f} s")
    assert ran.returncode == 1
    lines = ran.stdout.splitlines()
    assert lines[-1].startswith(f"{len(CONTAINERS)} of 25 in the cluster; 5 failed: ")
    failed = {line.split()[0]: line for line in lines if line.split()[1:2] == ["FAILED"]}
    assert set(failed) == {"silent", "shell", "stuck", "readonly", "full"}
    for name, said in (
        ("silent", "at `log in`: ssh_unreachable: "),
        ("shell", "at `look`: add_failed: "),
        ("stuck", "it hangs at the disk that has "),
        ("readonly", "at `install`: add_blocked: nothing can be written where "),
        ("full", "MB are free where "),
    ):
        assert said in failed[name]
        assert "to do: " in lines[lines.index(failed[name]) + 1]
    first = min(lines.index(line) for line in lines if line.split()[1:2] == ["done"])
    assert first < lines.index(failed["silent"]), "who hangs is not waited for"
    workers = head.status()["workers"]
    assert {w["name"] for w in workers if w["state"] == "up"} == set(CONTAINERS)


def roster(head: InFront) -> dict[str, Any]:
    """Who has which address and ports."""
    return {row["name"]: (row["address"], row["ports"]) for row in head.status()["roster"]}


def since(head: InFront) -> dict[str, Any]:
    """Since when each has its link: another time where it was restarted."""
    return {w["name"]: w["since"] for w in head.status()["workers"] if w["state"] == "up"}


def test_the_same_again_restarts_none(many: Lab, head: InFront) -> None:
    head.machine.write(f"{HOME}/hosts.txt", hosts(many, *CONTAINERS))
    before, plan = since(head), roster(head)
    ran = said_on(head, *ADD, timeout=300)
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[-1] == "20 of 20 in the cluster; 20 unchanged"
    assert (since(head), roster(head)) == (before, plan)


def test_those_that_are_made_anew_are_who_they_were(many: Lab, head: InFront) -> None:
    """Containers at the same addresses that have nothing but the key which lets the head in."""
    before, plan = since(head), roster(head)
    for name in ANEW:
        machine = many.machine(name)
        machine.kill_all()
        machine.run(["find", HOME, "-mindepth", "1", "-delete"], user="root")
        machine.authorize(head.machine.public_key)
        machine.start_sshd()
    head.wait_status(lambda s: {w["name"] for w in s["workers"] if w["state"] != "up"} >= set(ANEW))
    ran = said_on(head, *ADD, timeout=300)
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[-1] == "20 of 20 in the cluster; 17 unchanged"
    assert roster(head) == plan
    assert {e["node"] for e in head.events("node_key_renewed")} == set(ANEW)
    after = since(head)
    assert set(after) == set(CONTAINERS)
    assert {name for name in after if after[name] != before[name]} == set(ANEW)


def test_they_are_removed(many: Lab, head: InFront) -> None:
    ran = said_on(head, "remove", "-f", "hosts.txt", "--jobs", str(JOBS), timeout=300)
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[-1] == "20 of 20 removed"
    assert set(roster(head)) == {"head"}
    for name in CONTAINERS:
        machine = many.machine(name)
        assert machine.run(["find", HOME, "-name", "*rayfwd*"]).stdout == ""
        assert machine.run(["pgrep", "-u", "ray", "-fa", "rayfwd"], check=False).stdout == ""
