"""Three firewalled machines at the level `overlay`: what opens ports of its own works between them.

The head lets in SSH, the workers nothing. Ray's environment has torch (tests/setup_envs.py). Head
and w1 have a service that makes the overlay, w2 is as a container that may change its network. No
file names a level: the overlay is what `auto` takes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cluster import Cluster
from tests.lab.machines import Lab
from tests.lab.process import until
from tests.lab.training import Training
from tests.need import need_libraries
from tests.setup_envs import LIBRARIES

SOCKET = "/run/lab/overlay.sock"
AGAIN = 5.0
"""Seconds after a silence in which steps go on. (docs/faults.md promises 2 where nothing else runs
on the machine, and test_faults.py, which is alone, holds it.)"""

pytestmark = [pytest.mark.lab, pytest.mark.ray]


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    need_libraries("torch")
    made = Cluster(module_lab, LIBRARIES, ride_through=60)
    module_lab.machine("head").start_sshd()
    for machine in map(module_lab.machine, ("head", "w1")):
        argv = [str(module_lab.rayfwd), "overlay", SOCKET, "--user", "ray"]
        keeper = machine.popen(argv, user="root")
        until(
            lambda k=keeper: "overlay_keeper_listening" in k.log.read_text(),  # type: ignore[misc]
            30,
            keeper.log.read_text,
        )
        made.start_node(machine.name, under=["env", f"RAYFWD_OVERLAY={SOCKET}"])
    made.start_node("w2", net_admin=True)
    made.wait_ready(240)
    yield made
    made.stop()


def test_every_node_is_at_the_best_level(cluster: Cluster) -> None:
    for daemon in cluster.daemons:
        status = daemon.status()
        assert status["network"]["level"] == "overlay", status["network"]
        assert status["network"]["interface"] == "rayfwd0"
        assert status["conditions"] == []


@pytest.mark.parametrize("where", ["head", "w1"])
def test_torch_trains_between_machines(cluster: Cluster, where: str) -> None:
    ranks = Training(cluster.lab, where, 2).finish(60)
    assert ranks[0]["steps"] > 1


def test_a_dropped_link_costs_no_step(cluster: Cluster) -> None:
    """Every SSH connection is killed and one machine's packets are swallowed for 8 s."""
    training = Training(cluster.lab, "head", 20)
    lab = cluster.lab
    lab.reset_connections(lab.machine("head"))
    began = time.monotonic()
    lab.cut(lab.machine("w1"))
    time.sleep(8)
    lab.heal(lab.machine("w1"))
    silence = time.monotonic() - began
    for rank in training.finish(120):
        assert 7 < rank["longest"] < silence + AGAIN, f"about as long as {silence} s: {rank}"
        assert rank["after"] > 0, f"steps after the cut: {rank}"


def test_a_keeper_that_is_a_child_is_started_anew(cluster: Cluster) -> None:
    """It took interface and rules with it; nobody is told of a service that is not there."""
    w2 = cluster.worker("w2")
    machine = w2.machine
    argv = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in machine.pids()}
    (keeper,) = [pid for pid, words in argv.items() if b"\0overlay\0" in words]
    os.kill(keeper, signal.SIGTERM)
    said = w2.wait_event("overlay_keeper_absent", 30)
    assert "rayfwd-net" not in said["remedy"]
    w2.wait_status(lambda s: s["conditions"] == [] and s["state"] == "ready", 60)
    assert "rayfwd0" in machine.network_command("nft", "list", "tables")
    assert "127.77.0.3/32" in machine.network_command("ip", "addr", "show", "rayfwd0")


SAME_PORT = """
import socket, sys
held = []
for place in sys.argv[1:]:
    address, port = place.split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 50123))
    sock.settimeout(1)
    sock.connect((address, int(port)))
    held.append(sock)
for sock in held:
    try:
        sock.send(b"x")
        print("closed" if sock.recv(1) == b"" else "open")
    except TimeoutError:
        print("open")
    except ConnectionResetError:
        print("reset")
"""


def test_one_port_of_origin_leads_to_several_nodes(cluster: Cluster) -> None:
    """As any program's may: the kernel sees to it that connections to *different* places differ.
    Here all come to one listener, where they would be the same."""
    w1, w2 = cluster.worker("w1"), cluster.worker("w2").machine
    listening = w2.network_command("ss", "-Hltn", "src 127.77.0.3 or src 0.0.0.0")
    ports = sorted(int(line.split()[3].rpartition(":")[2]) for line in listening.splitlines())
    places = ["127.77.0.1:6379", "127.77.0.1:8265", f"127.77.0.3:{ports[0]}"]
    python = str(w1.machine.ray_python(LIBRARIES))
    said = w1.machine.run([python, "-c", SAME_PORT, *places]).stdout.split()
    assert said == ["open"] * 3, places
