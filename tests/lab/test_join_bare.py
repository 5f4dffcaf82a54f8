"""`rayfwd join` in containers that have next to nothing: as process 1, and to the result of a task.

One is a user id without a name, without HOME, on a disk that is read-only. One is root without
systemd. Both have 64 MB of shared memory.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME
from tests.lab.test_join import InFront, children, heading, task

pytestmark = [pytest.mark.ray, pytest.mark.thorough]

NOBODYS = 7777
"""A user id that the machine does not know."""
PLACE = "/tmp/rayfwd"
KEYS = "/tmp/keys"

BARE = (
    *("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--"),
    *("setpriv", "--reuid={uid}", "--regid={uid}", "--clear-groups", "--no-new-privs", "--"),
    *("env", "-i", "--chdir=/", "PATH=/usr/bin:/bin", "LC_ALL=POSIX"),
    *("sh", "-c", 'umask 077; exec "$@"', "sh"),
)


@pytest.fixture(scope="module")
def head(module_lab: Lab) -> Iterator[InFront]:
    module_lab.machine("head").start_sshd()
    with heading(module_lab.machine("head")) as head:
        yield head


def make_bare(machine: Machine, uid: int) -> None:
    """Nothing can be written but below /tmp, /run and /dev/shm."""
    machine.run(["mount", "-o", "remount,size=64m", "/dev/shm"], user="root")
    machine.host_path(KEYS).mkdir()
    for name in ("id_ed25519", "known_hosts"):
        text = machine.host_path(f"{HOME}/.ssh/{name}").read_text()
        path = machine.host_path(f"{KEYS}/{name}")
        path.touch(mode=0o600)
        path.write_text(text)
        os.chown(path, uid, uid)
    machine.run(["mount", "-o", "remount,bind,ro", "/"], user="root")
    for place in ("/home", "/root", "/var/tmp"):
        machine.run(["mount", "-o", "remount,ro", place], user="root")


@pytest.mark.parametrize(("name", "uid"), [("w1", NOBODYS), ("w2", 0)])
def test_to_the_result_of_a_task(head: InFront, name: str, uid: int) -> None:
    machine = head.machine.lab.machine(name)
    make_bare(machine, uid)
    socket = f"{head.sockets}/hub.sock"
    words = ["join", f"ray@{head.machine.address}", "--socket", socket, "--name", name]
    words += ["-i", f"{KEYS}/id_ed25519", "--known-hosts", f"{KEYS}/known_hosts", "--ephemeral"]
    words += ["--state-dir", PLACE, "--runtime-dir", f"{PLACE}/run"]
    node = InFront(machine, words, [word.format(uid=uid) for word in BARE])
    node.sockets = f"{PLACE}/run"
    try:
        status = node.wait_ready()
        codes = {c["code"] for c in status["conditions"]}
        print(json.dumps(status["conditions"], indent=1))
        assert "shared_memory_small" in codes
        assert status["node"]["address"] in task(head.machine)
        (first,) = children(node.process.pid)
        os.kill(first, signal.SIGTERM)
        assert node.process.wait(20) == 0
        head.wait_event("node_given_back", 5, {"node": name})
    finally:
        if node.process.poll() is None:
            node.process.signal(signal.SIGKILL)
            node.process.wait(20)
