"""Process 1 of a container is told to end, in every state that a node may be in: within 8 s.

`docker stop` kills after 10 s. A spot machine has 30 s, for which `--stop-timeout 28` is said. Ray,
rayfwd and the head are real; what hangs is stopped by a signal, what is silent is cut off.
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
from tests.lab.test_join import CONTAINER, LONG, STATE, InFront, children, command_line, heading

pytestmark = [pytest.mark.ray, pytest.mark.thorough]

WITHIN = 8.5


@pytest.fixture(scope="module")
def head(module_lab: Lab) -> Iterator[InFront]:
    module_lab.machine("head").start_sshd()
    with heading(module_lab.machine("head")) as head:
        yield head
        head.process.signal(signal.SIGCONT)


@pytest.fixture
def node(head: InFront) -> Iterator[InFront]:
    """As process 1, not waited for."""
    node = joining(head, "w1")
    yield node
    node.machine.lab.heal(node.machine)
    is_killed(node)


@pytest.fixture
def given_up(head: InFront) -> None:
    """Ray has given up the nodes of earlier tests. Until then it knows several at one address: a
    task may go to one that is gone, and Ray may take the newest for that one."""

    def others() -> list[str]:
        nodes = (head.status()["cluster"] or {"nodes": []})["nodes"]
        return [n["address"] for n in nodes if n["state"] == "ALIVE" and not n["is_head"]]

    until(lambda: not others(), 150, lambda: f"alive: {others()}")


@pytest.fixture
def spot(head: InFront, given_up: None) -> Iterator[InFront]:
    """The same, as somebody starts it whose machine has 30 s."""
    node = joining(head, "w1", "--stop-timeout", "28")
    yield node
    is_killed(node)


def joining(head: InFront, name: str, *more: str, under: tuple[str, ...] = CONTAINER) -> InFront:
    argv = shlex.split(head.said()[0].split(": ", 1)[1])[1:]
    argv[1] = f"ray@{head.machine.address}"
    return InFront(head.machine.lab.machine(name), [*argv, *more], under)


def is_killed(node: InFront) -> None:
    """With the container, if it runs."""
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


def driver(head: InFront, program: str, *words: str) -> Process:
    """A program of a user's on the head; it has said `runs`."""
    argv = [str(head.machine.lab.rayfwd), "exec", "--", str(head.machine.ray_python()), "-c"]
    started = head.machine.popen([*argv, program, *words])
    until(lambda: "runs" in started.log.read_text(), 60, started.log.read_text)
    return started


def ends(node: InFront, first: int, code: int = 0, within: float = WITHIN) -> float:
    """Tell process 1; how long it took."""
    began = time.monotonic()
    os.kill(first, signal.SIGTERM)
    found = node.process.wait(30)
    took = time.monotonic() - began
    print(f"{took:.1f} s, exit code {found}")
    assert found == code, node.tail()
    assert took < within, node.tail()
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
    busy = driver(head, LONG)
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


TASK = """
import ray, sys, time
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1, max_retries=0)
def work(seconds):
    time.sleep(seconds)
    return "done"
here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
    next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == sys.argv[1]),
    soft=False)
ref = work.options(scheduling_strategy=here).remote(float(sys.argv[2]))
time.sleep(2)
print("runs", flush=True)
try:
    print(ray.get(ref), flush=True)
except ray.exceptions.RayError as exc:
    print("lost", type(exc).__name__, flush=True)
"""
"""One task on the node with that address, of so many seconds; 2 s of it are over at `runs`."""


def test_a_spot_machines_task_of_ten_seconds_is_done_in_its_notice(
    spot: InFront, head: InFront
) -> None:
    """SIGTERM, and 30 s later the machine is gone. With docker's 10 s the task would be lost."""
    address = spot.wait_ready()["node"]["address"]
    task = driver(head, TASK, address, "12")
    took = ends(spot, first_of(spot), within=28)
    assert task.wait(30) == 0
    assert task.log.read_text().splitlines()[-1] == "done"
    assert took > 8
    was_told_at_once(head)


def test_a_spot_machine_leaves_in_its_notice_with_a_task_that_takes_longer(
    spot: InFront, head: InFront
) -> None:
    address = spot.wait_ready()["node"]["address"]
    task = driver(head, TASK, address, "300")
    ends(spot, first_of(spot), within=28)
    task.wait(30)
    assert "lost" in task.log.read_text()
    was_told_at_once(head)


def test_killed_before_its_time_is_over_it_is_no_lost_link(
    given_up: None, node: InFront, head: InFront
) -> None:
    """`docker stop -t 2`, with a task that runs on: the head knows that it was leaving."""
    address = node.wait_ready()["node"]["address"]
    before = len(head.events("node_leaving"))
    task = driver(head, TASK, address, "300")
    os.kill(first_of(node), signal.SIGTERM)
    time.sleep(2)
    assert node.process.poll() is None, "it was done in 2 s"
    is_killed(node)
    until(lambda: len(head.events("node_leaving")) > before, 5, lambda: "node_leaving")
    time.sleep(8)  # a silent peer is noticed in 6 s
    status = head.status()
    (left,) = [w for w in status["workers"] if w["name"] == "w1"]
    assert (left["left"], left["state"]) == (True, "down")
    assert not [c for c in status["conditions"] if c["subject"].startswith("w1")]
    task.signal(signal.SIGKILL)
    task.wait(20)


def test_killed_alone_it_finds_its_ray_again(head: InFront, given_up: None) -> None:
    """Not as process 1, with which all would end: the same command adopts the Ray that goes on."""
    node = joining(head, "w1", under=())
    again = None
    try:
        address = node.wait_ready()["node"]["address"]
        raylet = node.machine.run(["pgrep", "-f", "raylet/raylet"]).stdout
        task = driver(head, TASK, address, "12")
        node.kill()
        again = joining(head, "w1", under=())
        again.wait_event("ray_adopted")
        again.wait_ready()
        assert node.machine.run(["pgrep", "-f", "raylet/raylet"]).stdout == raylet
        assert task.wait(120) == 0
        print(task.log.read_text())
        assert again.stop(20) == 0
    finally:
        for one in filter(None, (node, again)):
            is_killed(one)


def was_told_at_once(head: InFront) -> None:
    """Of the last one that left: before its tasks had their time, and Ray's table after them."""
    told = head.events("node_leaving")[-1]
    ended = head.wait_event("session_ended", 5, {"node": told["node"], "level": "info"}, told)
    assert not [e for e in head.events("link_parked") if told["_index"] < e["_index"]]
    print(f"{told['timestamp']} {ended['timestamp']}")


def test_a_head_that_is_told_to_end_right_after_a_worker_was_killed(module_lab: Lab) -> None:
    """It ends within its 8 s, and nothing of it is left: its process namespace has ended, too."""
    machine, w1 = module_lab.machine("w2"), module_lab.machine("w1")
    machine.authorize(w1.public_key)
    machine.firewall([22])
    machine.start_sshd()
    w1.know(f"{machine.address} {machine.host_key}")
    head = InFront(machine, ["head"], CONTAINER)
    worker = None
    try:
        head.wait_ready()
        worker = joining(head, "w1")
        address = worker.wait_ready()["node"]["address"]
        task = driver(head, TASK, address, "300")
        first = first_of(head)
        is_killed(worker)
        ends(head, first)
        task.signal(signal.SIGKILL)
        task.wait(20)
        left = machine.run(["pgrep", "-fa", "-u", "ray", "rayfwd|raylet|gcs_server"], check=False)
        assert left.stdout == ""
        kept = machine.run(["find", "/dev/shm", "-user", "ray", "-type", "f"]).stdout
        assert kept == "", "plasma's memory"
    finally:
        for node in filter(None, (worker, head)):
            is_killed(node)
