"""A plan's network outside of 127/8, which needs the overlay on every node: Ray, and a TCP job."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import Cluster
from tests.lab.machines import Lab
from tests.lab.process import until

NETWORK = "10.77.0.0/16"
CHECKS = ("small_tasks", "large_results", "actors", "worker_to_worker")
SERVE = """
import socket
with socket.create_server(("10.77.0.2", 0)) as server:
    print("listening", server.getsockname()[1], flush=True)
    while True:
        sock, peer = server.accept()
        with sock:
            sock.sendall(peer[0].encode())
"""
DIAL = """
import socket, sys
with socket.create_connection(("10.77.0.2", int(sys.argv[1])), 20) as sock:
    print(sock.recv(99).decode())
"""

pytestmark = [pytest.mark.lab, pytest.mark.ray]


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    made = Cluster(module_lab, workers=("w1",), head={"hub.network": NETWORK})
    module_lab.machine("head").start_sshd()
    for name in ("head", "w1"):
        made.start_node(name, net_admin=True)
    made.wait_ready(240)
    yield made
    made.stop()


def test_ray_works_there(cluster: Cluster) -> None:
    for daemon, address in zip(cluster.daemons, ("10.77.0.1", "10.77.0.2"), strict=True):
        status = daemon.status()
        assert (status["node"]["address"], status["conditions"]) == (address, [])
        route = daemon.machine.network_command("ip", "route", "show", "table", "local", NETWORK)
        assert "dev rayfwd0" in route, "every address is this machine's"
    argv = ["--nodes", "2", "--checks", ",".join(CHECKS)]
    lines = cluster.driver("w1", argv, env={"RAY_ADDRESS": "10.77.0.1:6379"})
    verify(lines, "w1", ["10.77.0.1", "10.77.0.2"], CHECKS)


def test_a_program_is_dialled_from_the_address_of_the_node_that_dials(cluster: Cluster) -> None:
    w1, head = cluster.lab.machine("w1"), cluster.lab.machine("head")
    server = w1.popen([str(w1.ray_python()), "-c", SERVE])
    until(lambda: "listening" in server.log.read_text(), 30, server.log.read_text)
    port = server.log.read_text().split()[1]
    assert head.run([str(head.ray_python()), "-c", DIAL, port]).stdout.strip() == "10.77.0.1"
    server.signal(9)
    server.wait(20)


def test_nothing_is_left_and_a_node_without_an_overlay_says_why(cluster: Cluster) -> None:
    w1 = cluster.worker("w1")
    assert w1.stop() == 0
    assert "10.77" not in w1.machine.network_command("ip", "route", "show", "table", "all")
    again = cluster.start_node("w1")
    status = again.wait_status(
        lambda s: any(c["code"] == "network_needs_overlay" for c in s["conditions"]), 60
    )
    assert status["state"] == "waiting"


def test_a_network_that_a_machine_has_a_way_to_is_refused(cluster: Cluster) -> None:
    w1 = cluster.worker("w1")
    assert w1.stop() == 0
    w1.machine.network_command("ip", "route", "add", "10.77.128.0/24", "dev", "lo")
    again = cluster.start_node("w1", net_admin=True)
    status = again.wait_status(
        lambda s: any(c["code"] == "overlay_refused" for c in s["conditions"]), 60
    )
    (cause,) = [c["cause"] for c in status["conditions"] if c["code"] == "overlay_refused"]
    assert "10.77.128.0/24" in cause
