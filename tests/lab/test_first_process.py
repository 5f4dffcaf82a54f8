"""Process 1 of a container is told to end, in every state that a node may be in: within 8 s.

`docker stop` kills after 10 s. Ray, rayfwd and the head are real; what hangs is stopped by a
signal, what is silent is cut off.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator

import pytest

from tests.lab.machines import Lab
from tests.lab.process import Process, until
from tests.lab.test_join import CONTAINER, LONG, STATE, InFront, children, command_line

pytestmark = [pytest.mark.ray, pytest.mark.thorough]

WITHIN = 8.5


@pytest.fixture(scope="module")
def head(module_lab: Lab) -> Iterator[InFront]:
    module_lab.machine("head").start_sshd()
    head = InFront(module_lab.machine("head"), ["head"])
    head.wait_ready()
    yield head
    head.process.signal(signal.SIGCONT)
    head.stop(30)


@pytest.fixture
def node(module_lab: Lab, head: InFront) -> Iterator[InFront]:
    """As process 1, not waited for."""
    argv = shlex.split(head.said()[0].split(": ", 1)[1])[1:]
    argv[1] = f"ray@{head.machine.address}"
    node = InFront(module_lab.machine("w1"), argv, CONTAINER)
    yield node
    module_lab.heal(node.machine)
    if node.process.poll() is None:
        node.process.signal(signal.SIGKILL)
        node.process.wait(20)


def first_of(node: InFront) -> int:
    return until(lambda: children(node.process.pid), 20, lambda: "a first process")[0]


def below(pid: int, named: bytes) -> int:
    """A process in its namespace with this in its command line."""

    def look() -> int | None:
        waiting, found = [pid], None
        while waiting:
            for child in children(waiting.pop()):
                waiting.append(child)
                if named in command_line(child):
                    found = child
        return found

    return until(look, 20, lambda: f"a process {named!r}") or 0


def ends(node: InFront, first: int, code: int = 0) -> float:
    """Tell process 1; how long it took."""
    began = time.monotonic()
    os.kill(first, signal.SIGTERM)
    found = node.process.wait(30)
    took = time.monotonic() - began
    print(f"{took:.1f} s, exit code {found}")
    assert found == code, node.tail()
    assert took < WITHIN, node.tail()
    return took


def test_while_it_is_loading(node: InFront) -> None:
    """Before it has said anything: at once."""
    first = first_of(node)
    until(lambda: b"rayfwd" in command_line(first), 10, lambda: "rayfwd in the place of setpriv")
    time.sleep(0.2)  # Python itself has begun, and no handler is what is tested here
    assert not node.events("rayfwd_starting")
    assert ends(node, first, 128 + signal.SIGTERM) < 3


def test_while_ray_starts(node: InFront) -> None:
    node.wait_event("ray_starting")
    ends(node, first_of(node))


def test_when_it_is_ready(node: InFront) -> None:
    node.wait_ready()
    ends(node, first_of(node))


def test_while_it_is_parked(node: InFront) -> None:
    node.wait_ready()
    node.machine.lab.cut(node.machine)
    node.wait_event("link_parked")
    ends(node, first_of(node))


def test_while_ray_hangs(node: InFront) -> None:
    node.wait_ready()
    first = first_of(node)
    os.kill(below(first, b"raylet/raylet"), signal.SIGSTOP)
    ends(node, first)


def test_while_it_drains_and_is_told_again(node: InFront, head: InFront) -> None:
    node.wait_ready()
    machine = node.machine
    argv = [str(machine.lab.rayfwd), "exec", "--", str(head.machine.ray_python()), "-c", LONG]
    busy: Process = head.machine.popen(argv)
    until(lambda: "runs" in busy.log.read_text(), 60, busy.log.read_text)
    first = first_of(node)
    os.kill(first, signal.SIGTERM)
    node.wait_event("rayfwd_stopping")
    ends(node, first)
    busy.signal(signal.SIGKILL)


def test_while_the_head_hangs(node: InFront, head: InFront) -> None:
    node.wait_ready()
    head.process.signal(signal.SIGSTOP)
    ends(node, first_of(node))
    head.process.signal(signal.SIGCONT)


def test_where_no_head_is_reached(module_lab: Lab) -> None:
    machine = module_lab.machine("w2")
    nobody = ["join", "ray@198.51.100.99", "--socket", f"{STATE}/run/hub.sock"]
    node = InFront(machine, nobody, CONTAINER)
    node.wait_event("ssh_unreachable", 30)
    assert ends(node, first_of(node)) < 4
