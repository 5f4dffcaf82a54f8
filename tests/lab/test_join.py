"""`rayfwd head` and `rayfwd join`: a cluster without a file, root or systemd, for an hour.

Everything is said as docs/join.md has it, by an ordinary user, on machines that have Python, Ray
and rayfwd. The second worker is process 1 of a process namespace, as in a container.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayfwd.system.control import ask
from tests import shown
from tests.lab.daemon import Daemon
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, state, until
from tests.need import tool

pytestmark = [pytest.mark.ray, pytest.mark.story]

SMALL = ("--num-cpus", "1", "--worker-ports", "40", "--object-store-memory", "100000000")
"""What nodes on one small computer need besides."""

STATE = f"{HOME}/.local/state/rayfwd"

TASK = """
import json, ray, time
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def where():
    time.sleep(0.5)
    return ray.util.get_node_ip_address()
alive = {n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
seen, end = set(), time.monotonic() + 60
while not seen >= alive and time.monotonic() < end:
    seen |= set(ray.get([where.remote() for _ in range(8)]))
print(json.dumps(sorted(seen)))
"""
"""On which nodes tasks run. A node that has just come still starts its first worker process while
the others do all of the first tasks."""


class InFront(Daemon):
    """`rayfwd head` or `rayfwd join`, which has no file of ours."""

    def __init__(
        self,
        machine: Machine,
        argv: Sequence[str],
        under: Sequence[str] = (),
        cluster: str | None = None,
        ray: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.sockets = f"{STATE}/run" + (f"/clusters/{cluster}" if cluster else "")
        assert machine.lab.rayfwd is not None
        words = [*under, str(machine.lab.rayfwd), *argv, "--ray", ray or str(machine.ray()), *SMALL]
        user = "root" if under else "ray"
        self.began = time.monotonic()
        super().__init__(
            machine, machine.popen(words, user=user, env={"HOME": HOME, **(env or {})})
        )

    def _ask(self) -> dict[str, Any]:
        return ask(self.machine.host_path(f"{self.sockets}/control.sock"), "status")

    def said(self) -> list[str]:
        """What it has printed, beside the log."""
        return [event["line"] for event in self.events("not_json")]


@contextlib.contextmanager
def heading(machine: Machine) -> Iterator[InFront]:
    """`rayfwd head` there, ready; it ends in good time."""
    head = InFront(machine, ["head"])
    head.wait_ready()
    yield head
    head.stop(30)


@pytest.fixture(scope="module")
def machines(module_lab: Lab) -> Lab:
    """As they are rented: they have keys, the head's sshd, and nothing of a cluster's."""
    module_lab.machine("head").start_sshd()
    return module_lab


@pytest.fixture(scope="module")
def nodes(machines: Lab) -> Iterator[dict[str, InFront]]:
    found: dict[str, InFront] = {}
    yield found
    for node in reversed(found.values()):
        if node.process.poll() is None:
            node.stop(30)


def worker(head: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((w for w in head["workers"] if w["name"] == name), None)


@pytest.mark.runs("rayfwd head", "rayfwd join", "rayfwd join *", "rayfwd join * --socket *")
def test_from_nothing_to_a_task_on_a_second_machine(
    machines: Lab, nodes: dict[str, InFront]
) -> None:
    began = time.monotonic()
    head = nodes["head"] = InFront(machines.machine("head"), ["head"])
    head.wait_ready()
    shown.compare("README.md", "To add a machine", "\n".join(head.said()))
    told, _, page = head.said()
    assert page == "The page in the browser: http://127.0.0.1:9480/"
    what, join = told.split(": ", 1)
    assert what == "To add a machine, run there"

    argv = shlex.split(join)
    argv[2] = f"ray@{machines.machine('head').address}"  # it knows no name of the lab's
    w1 = nodes["w1"] = InFront(machines.machine("w1"), [*argv[1:], "--wait-for", "120"])
    w1.wait_ready()
    assert w1.said()[0].startswith("To run a job from here (127.77.0.2, 2 nodes): rayfwd exec -- ")

    ran = task(machines.machine("w1"))
    assert ran == ["127.77.0.1", "127.77.0.2"]
    print(f"from nothing to a task on a second machine: {time.monotonic() - began:.1f} s")


def task(machine: Machine, cluster: str | None = None) -> list[str]:
    """The nodes on which a driver's tasks ran."""
    assert machine.lab.rayfwd is not None
    which = ["--cluster", cluster] if cluster else []
    argv = [str(machine.lab.rayfwd), "exec", *which, "--", str(machine.ray_python()), "-c", TASK]
    found: list[str] = json.loads(machine.run(argv, timeout=120).stdout.splitlines()[-1])
    return found


def test_it_leaves_within_its_time_and_the_cluster_is_told_at_once(
    machines: Lab, nodes: dict[str, InFront]
) -> None:
    """With a task that would take a minute more."""
    head, w1 = nodes["head"], nodes["w1"]
    argv = [str(machines.rayfwd), "exec", "--", str(w1.machine.ray_python()), "-c", LONG]
    busy = w1.machine.popen(argv)
    until(lambda: "runs" in busy.log.read_text(), 60, busy.log.read_text)
    began = time.monotonic()
    assert w1.stop(20) == 0
    took = time.monotonic() - began
    head.wait_event("node_leaving", 5, {"node": "w1"})
    head.wait_event("session_ended", 5, {"node": "w1", "level": "info"})
    status = head.status()
    left = worker(status, "w1")
    assert left is not None
    assert (left["left"], left["state"]) == (True, "down")
    assert not [c for c in status["conditions"] if c["subject"].startswith("w1")]
    assert took < 8.5, f"{took:.1f} s"
    until(lambda: dead(head, "127.77.0.2"), 5, lambda: json.dumps(head.status()["cluster"]))
    print(f"left in {took:.1f} s, {time.monotonic() - began:.1f} s until Ray had it")
    busy.signal(signal.SIGKILL)


LONG = """
import ray, time
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
def long():
    time.sleep(60)
here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
    next(n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == "127.77.0.2"), soft=False)
ref = long.options(scheduling_strategy=here).remote()
time.sleep(2)
print("runs", flush=True)
ray.get(ref)
"""


def dead(head: InFront, address: str) -> bool:
    """Whether Ray's own table has the node as dead."""
    ran = head.machine.run(
        [str(head.machine.lab.rayfwd), "exec", "--", str(head.machine.ray_python()), "-c", TABLE],
        timeout=60,
    )
    states = json.loads(ran.stdout.splitlines()[-1])
    return states.get(address) is False


TABLE = """
import json, ray
ray.init(log_to_driver=False)
print(json.dumps({n["NodeManagerAddress"]: n["Alive"] for n in ray.nodes()}))
"""


def test_as_process_1_it_reaps_and_its_name_is_given_back(
    machines: Lab, nodes: dict[str, InFront]
) -> None:
    head, machine = nodes["head"], machines.machine("w2")
    argv = shlex.split(head.said()[0].split(": ", 1)[1])[1:]
    argv[1] = f"ray@{machines.machine('head').address}"
    w2 = nodes["w2"] = InFront(machine, [*argv, "--ephemeral", "--name", "spot"], CONTAINER)
    w2.wait_ready()
    (first,) = children(w2.process.pid)
    assert worker(head.status(), "spot") is not None
    assert task(head.machine) == ["127.77.0.1", "127.77.0.3"]

    orphan = ["bash", "-c", "(exec -a orphan sleep 600 &)"]
    enter = [tool("nsenter"), f"--target={first}", "--pid", "--mount", "--", *orphan]
    subprocess.run(enter, check=True, timeout=20)
    (left,) = [pid for pid in children(first) if b"orphan" in command_line(pid)]
    os.kill(left, signal.SIGKILL)
    until(lambda: state(left) is None, 20, lambda: f"it is {state(left)}, and not reaped")

    began = time.monotonic()
    os.kill(first, signal.SIGTERM)
    assert w2.process.wait(20) == 0
    assert time.monotonic() - began < 8.5
    head.wait_event("node_given_back", 5, {"node": "spot"})
    status = head.status()
    assert worker(status, "spot") is None
    assert "spot" not in [row["name"] for row in status["roster"]]


@pytest.mark.runs("rayfwd head --cluster *", "rayfwd status --cluster *")
def test_a_second_head_of_the_same_user_is_another_cluster(
    machines: Lab, nodes: dict[str, InFront]
) -> None:
    first, machine = nodes["head"], machines.machine("head")
    second = nodes["blue"] = InFront(machine, ["head", "--cluster", "blue"], cluster="blue")
    second.wait_ready()
    plans = [node.status()["node"] for node in (first, second)]
    assert [plan["address"] for plan in plans] == ["127.77.0.1", "127.78.0.1"]
    assert not set(ports_of(plans[0])) & set(ports_of(plans[1]))
    assert task(machine, "blue") == ["127.78.0.1"]
    told = json.loads(machine.run([str(machines.rayfwd), "env", "--json"]).stdout)
    assert told["RAY_ADDRESS"] == "127.77.0.1:6379"
    ask_for = [str(machines.rayfwd), "status", "--json", "--cluster", "blue"]
    assert json.loads(machine.run(ask_for).stdout)["node"]["address"] == "127.78.0.1"
    assert second.said()[1].endswith("rayfwd exec --cluster blue -- python your_job.py")

    machine.write(f"{HOME}/third.toml", 'role = "head"\n')
    third = ["run", "--config", f"{HOME}/third.toml"]
    places = {"STATE_DIRECTORY": f"{HOME}/third", "RUNTIME_DIRECTORY": f"{HOME}/third"}
    ran = machine.run([str(machines.rayfwd), *third], env=places, check=False, timeout=30)
    assert ran.returncode == 1
    assert "network_in_use" in ran.stderr
    assert "127.79.0.0/16" in ran.stderr
    assert second.stop(20) == 0
    assert first.status()["state"] == "ready"


def ports_of(plan: dict[str, Any]) -> list[int]:
    return [*plan["head_services"].values(), *range(plan["base"], plan["base"] + 48)]


def children(pid: int) -> list[int]:
    """On the host's side."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


CONTAINER = (
    *("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--"),
    *("setpriv", "--reuid=ray", "--regid=ray", "--init-groups", "--"),
    *("env", f"--chdir={HOME}"),
)


# -- `rayfwd add` ----------------------------------------------------------------------------------

SETS = ["--set", "ray.num_cpus=1", "--set", "ray.worker_ports=40"]
SETS += ["--set", "ray.object_store_memory=100000000"]


@pytest.mark.runs("rayfwd add *", "rayfwd add -f hosts.txt", "rayfwd add")
def test_two_machines_are_added_from_the_head(machines: Lab, nodes: dict[str, InFront]) -> None:
    """They have neither rayfwd nor a package index. One dials the head. To the other the head's
    sshd is shut, as a laptop's is, so that the head dials."""
    head, w1, w2 = nodes["head"], machines.machine("w1"), machines.machine("w2")
    for machine in (w1, w2):
        machine.authorize(head.machine.public_key)
        machine.firewall([22])
        machine.start_sshd()
    head.machine.know(*(f"{m.address} {m.host_key}" for m in (w1, w2)))
    from_w2 = f"ip saddr {w2.address} tcp dport 22"
    head.machine.nft(f"insert rule inet firewall input {from_w2} reject with tcp reset\n")
    hosts = f"ray@{w1.address} --via worker  # as it is\nray@{w2.address}:22 --name two\n"
    head.machine.write(f"{HOME}/hosts.txt", hosts)
    began = time.monotonic()
    ran = said_on(head, "add", "-f", "hosts.txt", *SETS)
    print(f"two machines added in {time.monotonic() - began:.1f} s")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "2 of 2 in the cluster"
    names = (f"ray@{w1.address} ", "w1 ")
    alone = [line for line in ran.stdout.splitlines() if line.startswith(names)]
    shown.compare(
        "docs/add.md", "ray@gpu-1.example.org  look", "\n".join([*alone, "1 of 1 in the cluster"])
    )
    assert (
        "two  way       the head dials the machine, because the machine does not reach "
        in ran.stdout
    )
    assert len(task(w2)) == 3
    line = head.machine.host_path(f"{HOME}/.ssh/authorized_keys").read_text().splitlines()[-1]
    assert re.match(r'restrict,command="\S+ attach --socket \S+ --node w1" ssh-ed25519 ', line)


def test_added_again_nothing_changes(nodes: dict[str, InFront]) -> None:
    head = nodes["head"]
    before = {w["name"]: w["since"] for w in head.status()["workers"] if not w["left"]}
    ran = said_on(head, "add", "-f", "hosts.txt", *SETS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "2 of 2 in the cluster; 2 unchanged"
    assert {w["name"]: w["since"] for w in head.status()["workers"] if not w["left"]} == before


def test_machines_that_have_lost_their_state_are_added_again_as_who_they_were(
    machines: Lab, nodes: dict[str, InFront]
) -> None:
    """While their daemons run, whose sockets have gone with it: one that dials the head, with a
    new SSH key, and one that the head dials. Their keys of rayfwd's are new, too."""
    head, added = nodes["head"], [machines.machine(name) for name in ("w1", "w2")]
    before = roster(head)
    for machine in added:
        machine.run(["rm", "-r", STATE])
    ran = said_on(head, "add", "-f", "hosts.txt", *SETS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "2 of 2 in the cluster"
    assert roster(head) == before
    assert {e["node"] for e in head.events("node_key_renewed")} == {"w1", "two"}
    assert len(task(head.machine)) == 3
    for machine in added:
        daemons = machine.run(["pgrep", "-fc", "rayfwd run --config"]).stdout
        assert daemons == "1\n", "the one that had lost its state has ended"


def roster(head: InFront) -> dict[str, str]:
    return {row["name"]: row["address"] for row in head.status()["roster"]}


@pytest.mark.runs("rayfwd remove *", "rayfwd remove --gone *", "rayfwd remove")
def test_what_was_added_is_removed(machines: Lab, nodes: dict[str, InFront]) -> None:
    head, w1, w2 = nodes["head"], machines.machine("w1"), machines.machine("w2")
    ran = said_on(head, "remove", "w1", f"ray@{w2.address}:22")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [row["name"] for row in head.status()["roster"]] == ["head"]
    for machine in (w1, w2):
        left = machine.run(["find", HOME, "-name", "*rayfwd*"]).stdout
        assert not left.splitlines()
        assert "attach" not in machine.host_path(f"{HOME}/.ssh/authorized_keys").read_text()
    keys = head.machine.host_path(f"{HOME}/.ssh/authorized_keys").read_text()
    assert "rayfwd-add" not in keys
    assert w1.public_key in keys
    again = said_on(head, "remove", "--gone", "w1")
    assert "add_blocked: w1 was not added from here" in again.stdout


def test_what_keeps_a_machine_out_is_said_of_each(machines: Lab, nodes: dict[str, InFront]) -> None:
    """A wrong host key, no Python, nobody there: together, each with what to do."""
    head, w1, w2 = nodes["head"], machines.machine("w1"), machines.machine("w2")
    head.machine.know(f"{w1.address} {w2.host_key}", f"{w2.address} {w2.host_key}")
    interpreter = os.path.realpath("/usr/bin/python3")
    w2.run(["mount", "--bind", "/dev/null", interpreter], user="root")
    ran = said_on(head, "add", *(f"ray@{a}" for a in (w1.address, w2.address, "198.51.100.99")))
    assert ran.returncode == 1
    assert f"{w1.address}  FAILED    at `log in`: host_key_mismatch: " in ran.stdout
    assert "w2  FAILED    at `install`: add_no_python: it has no Python 3.11" in ran.stdout
    assert "198.51.100.99  FAILED    at `log in`: ssh_unreachable: " in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("0 of 3 in the cluster; 3 failed: ")


def said_on(head: InFront, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    argv = [str(head.machine.lab.rayfwd), *words]
    ran = head.machine.run(argv, timeout=timeout, check=False)
    print(ran.stdout, ran.stderr)
    return ran
