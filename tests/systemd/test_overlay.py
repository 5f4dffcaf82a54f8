"""The overlay network as a service: `rayfwd-net`, which `rayfwd init` makes where rayfwd is root's.

One cluster for all tests, which run in the order of this file.
"""

from __future__ import annotations

import pytest

from tests.lab.process import until
from tests.systemd.cluster import BOTH, Cluster
from tests.systemd.machines import Lab, Machine

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400), pytest.mark.story]

UNIT = "rayfwd-net"
SOCKET = "/run/rayfwd-net/overlay.sock"
ECHO = """
import socket
with socket.create_server(("127.77.0.2", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        sock, peer = server.accept()
        with sock:
            sock.sendall(peer[0].encode())
"""
"""A port of a program's own, on the worker: it says from where it was dialled."""
DIAL = """
import socket, sys
try:
    with socket.create_connection(("127.77.0.2", int(sys.argv[1])), 10) as sock:
        print(sock.recv(99).decode())
except OSError as exc:
    print(type(exc).__name__)
"""


@pytest.fixture(scope="module")
def auto(lab: Lab) -> Cluster:
    """Set up, and started at the best level that each machine allows."""
    cluster = Cluster(lab, level=None)
    cluster.set_up()
    cluster.start()
    cluster.wait_ready()
    return cluster


@pytest.fixture(scope="module")
def port(auto: Cluster) -> int:
    """Of `ECHO`, run by Ray's user."""
    server = auto.worker.popen(["python3", "-c", ECHO], user="ray")
    until(lambda: server.log.read_text().strip(), 20, lambda: "the program listens")
    return int(server.log.read_text())


def dialled(head: Machine, port: int, user: str = "ray") -> str:
    """What somebody on the head gets from that port of the worker."""
    argv = ["runuser", "-u", user, "--", "python3", "-c", DIAL, str(port)]
    return head.run(argv).stdout.strip()


def wait_dialled(head: Machine, port: int) -> None:
    """Until Ray's user gets through."""
    until(lambda: dialled(head, port) == BOTH[0], 30, lambda: f"it is {dialled(head, port)}")


def left(machine: Machine) -> list[str]:
    """What there is of the overlay: the interface, and the table."""
    links = machine.run(["ip", "-brief", "link"]).stdout
    tables = machine.run(["nft", "list", "tables"]).stdout
    assert "table inet firewall" in tables, "the machine's own"
    return [line for line in f"{links}{tables}".splitlines() if "rayfwd" in line]


def test_init_has_made_it_and_the_service_starts_it(auto: Cluster) -> None:
    for machine in auto.lab.machines:
        shown = machine.wait_for(UNIT, ActiveState="active", SubState="running")
        assert "User" not in shown, "it is root's"
        assert shown["StatusText"] == f"the overlay of {machine.status()['node']['address']} is up"
        network = machine.status()["network"]
        assert (network["level"], network["interface"]) == ("overlay", "rayfwd0"), network
        assert machine.status()["conditions"] == []
        *links, one, other = left(machine)  # two of a pair where the kernel has no `dummy`
        assert links
        assert {one, other} == {"table inet rayfwd0", "table inet rayfwd0-shut"}
    assert auto.addresses_that_work() == BOTH


def test_it_has_one_right_of_roots(auto: Cluster) -> None:
    for machine in auto.lab.machines:
        pid = machine.show(UNIT)["MainPID"]
        lines = machine.read(f"/proc/{pid}/status").splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        assert int(status["CapEff"], 16) == 1 << 12 | 1 << 0  # CAP_NET_ADMIN, CAP_CHOWN
        assert status["CapBnd"] == status["CapEff"]
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        asked = ["systemd-analyze", "security", "--no-pager", "--threshold=20", UNIT]
        ran = machine.run(asked, check=False)
        assert ran.returncode == 0, ran.stdout
        owned = machine.run(["stat", "-c", "%a %U", SOCKET]).stdout
        assert owned == "600 ray\n"


def test_it_carries_every_port_of_rays_user(auto: Cluster, port: int) -> None:
    assert dialled(auto.head, port) == BOTH[0]
    assert dialled(auto.head, port, "nobody") == "ConnectionRefusedError"
    refused = auto.head.status
    until(lambda: refused()["network"]["refused"]["refused_user"], 30, lambda: f"{refused()}")


def test_a_restart_of_the_daemon_leaves_it_as_it_is(auto: Cluster, port: int) -> None:
    before = [machine.show(UNIT)["MainPID"] for machine in auto.lab.machines]
    for machine in auto.lab.machines:
        assert auto.restart(machine)["RESET"] == "0"
        assert machine.status()["network"]["level"] == "overlay"
    assert [machine.show(UNIT)["MainPID"] for machine in auto.lab.machines] == before
    wait_dialled(auto.head, port)


def test_a_firewall_that_is_loaded_anew_takes_it_away_for_a_moment(
    auto: Cluster, port: int
) -> None:
    """Debian's nftables.conf begins with `flush ruleset`."""
    auto.head.systemctl("restart", "nftables")
    until(lambda: auto.head.events("overlay_restored", unit=UNIT), 30, lambda: "it is seen")
    wait_dialled(auto.head, port)


def test_killed_it_leaves_nothing_and_is_there_again(auto: Cluster, port: int) -> None:
    before = auto.head.show(UNIT)["NRestarts"]
    auto.head.systemctl("kill", "--signal=SIGKILL", UNIT)
    again = str(int(before) + 1)
    auto.head.wait_for(UNIT, NRestarts=again, ActiveState="active")
    wait_dialled(auto.head, port)


@pytest.mark.runs("systemctl stop rayfwd-net", "systemctl start rayfwd-net")
def test_stopped_it_leaves_nothing(auto: Cluster, port: int) -> None:
    """The daemon says so, and goes on with it as soon as it is started."""
    head = auto.head
    head.systemctl("stop", UNIT)
    assert head.show(UNIT)["Result"] == "success"
    assert left(head) == []

    def codes() -> list[str]:
        return [condition["code"] for condition in head.status()["conditions"]]

    until(lambda: "overlay_keeper_absent" in codes(), 30, lambda: f"it is said: {codes()}")
    head.systemctl("start", UNIT)
    wait_dialled(head, port)
    until(lambda: not codes(), 60, lambda: f"it is over: {codes()}")


def test_a_stop_of_the_daemon_takes_it_down(auto: Cluster) -> None:
    for machine in reversed(auto.lab.machines):
        machine.systemctl("stop", "rayfwd")
        assert left(machine) == []
        assert not machine.events("overlay_left")


def test_uninstall_takes_the_unit_away(auto: Cluster) -> None:
    for machine in auto.lab.machines:
        machine.run(["rayfwd", "uninstall", "--purge"], timeout=150)
        assert machine.show(UNIT)["LoadState"] == "not-found"
        assert left(machine) == []
        assert machine.run(["find", "/run", "-name", "rayfwd-net*"]).stdout == ""
