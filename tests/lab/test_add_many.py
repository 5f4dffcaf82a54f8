"""Twenty containers at once from one `rayfwd add -f`, with machines among them that hang.

Their rayfwd is real, and starts no Ray: what takes long is twenty installations on one computer.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, UID
from tests.lab.test_join import InFront, said_on

pytestmark = [pytest.mark.ray, pytest.mark.thorough]

CONTAINERS = tuple(f"c{number}" for number in range(1, 21))
HANG = ("silent", "shell", "stuck", "readonly", "full")
"""In this order before the others in the file, and more than there are places for two at once."""
JOBS = 4


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
    head = InFront(many.machine("head"), ["head"])
    head.wait_ready()
    yield head
    head.stop(30)


def hosts(lab: Lab, *names: str) -> str:
    return "".join(f"ray@{lab.machine(name).address} --name {name}\n" for name in names)


def test_twenty_at_once_and_what_hangs_holds_up_none(many: Lab, head: InFront) -> None:
    head.machine.write(f"{HOME}/hosts.txt", hosts(many, *HANG, *CONTAINERS))
    words = ["add", "-f", "hosts.txt", "--jobs", str(JOBS), "--set", "ray.start=false"]
    began = time.monotonic()
    ran = said_on(head, *words)
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
