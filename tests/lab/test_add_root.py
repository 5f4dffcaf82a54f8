"""`rayfwd add root@…` for a rented container: root without systemd, 64 MB of shared memory.

It is made anew under its name. What it writes outside of root's home is in overlays of the
machine's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.machines import Lab, Machine
from tests.lab.test_join import SETS, InFront, said_on, task

pytestmark = [pytest.mark.ray, pytest.mark.thorough, pytest.mark.story]

NAME = "rented"

DISK = """
set -e
umount -l /etc /opt /usr/local /var/lib 2>/dev/null || :
for own in passwd group shadow hosts hostname resolv.conf; do
  umount -l /etc/$own 2>/dev/null || :
done
rm -rf /run/disk /run/work /root/.ssh /root/.cache
for place in etc opt usr/local var/lib; do
  mkdir -p /run/disk/$place /run/work/$place
  mount -t overlay -o lowerdir=/$place,upperdir=/run/disk/$place,workdir=/run/work/$place \\
    disk /$place
done
for own in /run/lab/etc/*; do mount --bind $own /etc/${own##*/}; done
mount -o remount,size=64m /dev/shm
mkdir -m 700 -p /root/.ssh
echo 'umask 077; unset HISTFILE' >/root/.bashrc
"""
"""An image's, which has nothing of ours."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InFront]:
    with Lab(tmp_path_factory.mktemp("lab"), names=("head", NAME)) as lab:
        head, rented = lab.machines
        head.start_sshd()
        rented.firewall([22])
        make_anew(rented)
        head.know(f"{rented.address} {rented.host_key}")
        found = InFront(head, ["head"])
        found.wait_ready()
        yield found
        found.stop(30)


def make_anew(machine: Machine) -> None:
    if machine.sshd_runs:
        machine.kill_all()
    machine.run(["sh", "-c", DISK], user="root")
    keys = machine.host_path("/root/.ssh/authorized_keys")
    keys.touch(mode=0o600)
    keys.write_text(machine.lab.machine("head").public_key + "\n")
    machine.start_sshd()


def add(head: InFront) -> list[str]:
    reached = f"root@{head.machine.lab.machine(NAME).address}"
    ran = said_on(head, "add", reached, *SETS)
    assert ran.returncode == 0
    return ran.stdout.splitlines()


def plan(head: InFront) -> list[tuple[str, str]]:
    return [(r["address"], r["ports"]) for r in head.status()["roster"] if r["name"] == NAME]


def test_root_without_systemd(head: InFront) -> None:
    said = add(head)
    assert said[-1] == "1 of 1 in the cluster"
    assert (
        f"{NAME}  start     started: in the background, its log is /var/lib/rayfwd/rayfwd.log"
        in (said)
    )
    assert len(task(head.machine)) == 2
    log = head.machine.lab.machine(NAME).host_path("/var/lib/rayfwd/rayfwd.log").read_text()
    assert "shared_memory_small" in log
    assert add(head)[-1] == "1 of 1 in the cluster; 1 unchanged"


def test_made_anew_it_is_who_it_was(head: InFront) -> None:
    before = plan(head)
    make_anew(head.machine.lab.machine(NAME))
    assert add(head)[-1] == "1 of 1 in the cluster"
    assert plan(head) == before
    assert len(task(head.machine)) == 2


def test_nothing_of_it_is_left(head: InFront) -> None:
    machine = head.machine.lab.machine(NAME)
    ran = said_on(head, "remove", NAME)
    assert ran.returncode == 0
    left = machine.run(["find", "/run/disk", "/root", "-type", "f"], user="root").stdout
    assert set(left.split()) <= {"/root/.ssh/authorized_keys", "/root/.bashrc"}
    assert machine.run(["pgrep", "-fa", "rayfwd run|raylet"], user="root", check=False).stdout == ""
    assert plan(head) == []
