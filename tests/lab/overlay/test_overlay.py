"""The level `overlay`: what opens ports of its own works between firewalled machines."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import kinds
from tests.lab.cluster import Cluster
from tests.lab.process import until
from tests.lab.shared import Shared
from tests.lab.training import Training
from tests.setup_envs import LIBRARIES

AGAIN = 5.0
"""Seconds after a silence in which steps go on. (docs/faults.md promises 2 where nothing else runs
on the machine, and test_faults.py, which is alone, holds it.)"""

pytestmark = [pytest.mark.lab, pytest.mark.ray]


@pytest.fixture(scope="module")
def cluster(with_overlay: Shared) -> Cluster:
    return with_overlay.whole()


def test_every_node_is_at_the_best_level(cluster: Cluster) -> None:
    for daemon in cluster.daemons:
        status = daemon.status()
        assert status["network"]["level"] == "overlay", status["network"]
        assert status["network"]["interface"] == "rayfwd0"
        assert status["conditions"] == []


@pytest.mark.thorough  # test_libraries.py has Ray Train from both, and this job through faults
@pytest.mark.parametrize("where", ["head", "w1"])
def test_torch_trains_between_machines(cluster: Cluster, where: str) -> None:
    ranks = Training(cluster.lab, where, 2).finish(60)
    assert ranks[0]["steps"] > 1


@pytest.mark.thorough  # test_libraries.py has a training through more than one cut
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
    address = w2.status()["node"]["address"]  # of two that come together, either may be the first
    assert f"{address}/32" in machine.network_command("ip", "addr", "show", "rayfwd0")


SAME_PORT = """
import socket, sys
held, own = [], 0
for place in sys.argv[1:]:
    address, port = place.split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", own))
    own = sock.getsockname()[1]
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
    address = cluster.worker("w2").status()["node"]["address"]
    listening = w2.network_command("ss", "-Hltn", f"src {address} or src 0.0.0.0")
    ports = sorted(int(line.split()[3].rpartition(":")[2]) for line in listening.splitlines())
    places = ["127.77.0.1:6379", "127.77.0.1:8265", f"{address}:{ports[0]}"]
    python = str(w1.machine.ray_python(LIBRARIES))
    said = w1.machine.run([python, "-c", SAME_PORT, *places]).stdout.split()
    assert said == ["open"] * 3, places


DIAL = """
import socket, sys, time
began = time.monotonic()
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
    print("connected", time.monotonic() - began)
except OSError as exc:
    print(type(exc).__name__, time.monotonic() - began)
"""


def dialled(cluster: Cluster, where: str, address: str, port: int) -> tuple[str, float]:
    """What a program of Ray's user there gets, and after how long."""
    machine = cluster.lab.machine(where)
    argv = [str(machine.ray_python(LIBRARIES)), "-c", DIAL, address, str(port)]
    said, seconds = machine.run(argv, timeout=60).stdout.split()
    return said, float(seconds)


NOBODYS = 29_597
"""A port that is no node's, and that the kernel gives nobody."""


def test_what_nobody_serves_is_refused_and_told_on_both_sides(cluster: Cluster) -> None:
    head, w1 = cluster.head, cluster.worker("w1")
    address = w1.status()["node"]["address"]
    said, seconds = dialled(cluster, "head", address, NOBODYS)
    assert said == "ConnectionRefusedError"
    assert seconds < 3, "where nobody answered it would be three"
    assert dialled(cluster, "head", "127.77.99.99", NOBODYS)[0] == "OSError", "no such node"
    for daemon, side, other in ((head, "there", "w1"), (w1, "here", "head")):
        told = daemon.wait_event("dial_refused", 30, {"side": side, "port": NOBODYS})
        assert (told["node"], told["count"]) == (other, 1)
        row = {"node": other, "port": NOBODYS, "connections": 1}
        assert row in daemon.status()["network"][f"refused_{side}"]


OPENING = """
import socket
held = []
with socket.create_server(("", 0)) as server:
    print("listening", server.getsockname()[1], flush=True)
    while True:
        sock, _ = server.accept()
        with sock:
            while sock.recv(1):
                opened, closed = socket.create_server(("", 0)), socket.socket()
                closed.bind(("", 0))
                held += [opened, closed]
                ports = opened.getsockname()[1], closed.getsockname()[1]
                sock.sendall(b"%d %d\\n" % ports)
"""
"""Opens a port each time it is asked for one, and keeps another one on which nobody listens."""
NEW_PORTS = """
import socket, struct, sys
ask = socket.create_connection((sys.argv[1], int(sys.argv[2])), 60)
heard = ask.makefile("r")
for _ in range(12):
    ask.sendall(b"x")
    for kind, port in zip(("open", "closed"), heard.readline().split()):
        with socket.socket() as sock:
            sock.settimeout(30)
            error = sock.connect_ex((sys.argv[1], int(port)))
            about = sock.getsockopt(socket.SOL_TCP, socket.TCP_INFO, 104)
        print(kind, error, struct.unpack_from("=I", about, 100)[0])
"""
"""Dials both at once; how often the kernel sent the first packet again."""


def test_a_port_that_has_just_opened_is_dialled_as_on_a_lan(cluster: Cluster) -> None:
    """The node that is dialled is asked: no first packet is lost, for which the kernel waits a
    second. (It does where the answer takes longer than that, as on a busy machine.)"""
    server = cluster.lab.machine("w1")
    opening = server.popen([str(server.ray_python(LIBRARIES)), "-c", OPENING])
    until(lambda: "listening" in opening.log.read_text(), 30, opening.log.read_text)
    port = opening.log.read_text().split()[1]
    address = cluster.worker("w1").status()["node"]["address"]
    try:
        for where in ("head", "w2"):
            machine = cluster.lab.machine(where)
            argv = [str(machine.ray_python(LIBRARIES)), "-c", NEW_PORTS, address, port]
            rows = [line.split() for line in machine.run(argv, timeout=240).stdout.splitlines()]
            assert {error for kind, error, _ in rows if kind == "open"} == {"0"}, rows
            assert {error for kind, error, _ in rows if kind == "closed"} == {"111"}, rows
            for kind in ("open", "closed"):
                assert "0" in [again for k, _, again in rows if k == kind], f"{where}: {rows}"
    finally:
        opening.signal(signal.SIGKILL)
        opening.wait(20)


def test_every_kind_of_listener(cluster: Cluster) -> None:
    kinds.check(cluster, "w2")


UDP = """
import socket, sys
with socket.socket(type=socket.SOCK_DGRAM) as here, socket.socket(type=socket.SOCK_DGRAM) as there:
    here.bind(("", int(sys.argv[2])))
    here.settimeout(0.5)
    there.connect((sys.argv[1], int(sys.argv[2])))
    try:
        there.send(b"x")
        there.send(b"x")
        print("sent")
    except OSError as exc:
        print(type(exc).__name__)
    try:
        print(here.recv(10))
    except TimeoutError:
        print("heard nothing")
"""


def test_udp_is_not_sent_and_reaches_nobody_here(cluster: Cluster) -> None:
    """Who sends it to another node is told, and no program of this machine gets it instead."""
    head = cluster.lab.machine("head")
    address = cluster.worker("w1").status()["node"]["address"]
    argv = [str(head.ray_python(LIBRARIES)), "-c", UDP, address, "45679"]
    assert head.run(argv).stdout.splitlines() == ["PermissionError", "heard nothing"]


LATE = """
import signal, socket
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
with socket.socket() as server:
    server.bind(("", 0))
    print("bound", server.getsockname()[1], flush=True)
    signal.sigwait([signal.SIGUSR1])
    server.listen()
    sock, _ = server.accept()
    sock.sendall(sock.recv(4))
"""
TRYING = """
import socket, sys, time
while True:
    try:
        sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 60)
        break
    except ConnectionRefusedError:
        time.sleep(0.2)
sock.sendall(b"rank")
print("answered" if sock.recv(4) == b"rank" else "closed")
"""


def test_who_dials_before_a_program_listens_is_not_reset(cluster: Cluster) -> None:
    """As LightGBM's ranks dial each other: what is refused is tried again, what is taken and then
    reset ends the training."""
    w1, head = cluster.worker("w1"), cluster.lab.machine("head")
    late = w1.machine.popen([str(w1.machine.ray_python(LIBRARIES)), "-c", LATE])
    until(lambda: "bound" in late.log.read_text(), 30, late.log.read_text)
    port = late.log.read_text().split()[1]
    address = w1.status()["node"]["address"]
    trying = head.popen([str(head.ray_python(LIBRARIES)), "-c", TRYING, address, port])

    def dropped() -> bool:
        held = head.network_command("nft", "list", "set", "inet", "rayfwd0", "held")
        return f"{address} . {port} . " in held

    until(dropped, 30, trying.log.read_text)
    late.signal(signal.SIGUSR1)
    assert trying.wait(60) == 0, trying.log.read_text()
    assert trying.log.read_text().split() == ["answered"]
    assert late.wait(20) == 0


SCAN = """
import select, socket, sys, time

family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
ports, waiting, poll = list(range(65535, 0, -1)), {}, select.poll()
while ports or waiting:
    while ports and len(waiting) < 400:
        sock, port = socket.socket(family), ports.pop()
        sock.setblocking(False)
        sock.connect_ex((sys.argv[1], port))
        waiting[sock.fileno()] = sock, port, time.monotonic() + 5
        poll.register(sock, select.POLLOUT)
    answered = {number for number, _ in poll.poll(100)}
    now = time.monotonic()
    late = {number for number, (_, _, until) in waiting.items() if not answered and until < now}
    for number in answered | late:
        poll.unregister(number)
        with waiting[number][0] as sock:
            if number in answered and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                print(waiting[number][1], flush=True)
        del waiting[number]
"""
STORE = """
import socket, time
with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
    print("listening", server.getsockname()[1], flush=True)
    time.sleep(600)
"""


@pytest.fixture
def by_ipv6(cluster: Cluster) -> Iterator[str]:
    """The head's address of IPv6 on the network that it shares with w2."""
    head, outside = cluster.lab.machine("head"), cluster.lab.machine("w2")
    made = {head: "fd00::1", outside: "fd00::3"}
    for machine, other in ((head, outside), (outside, head)):
        own = (f"{made[machine]}/64", "dev", "eth0")
        machine.network_command("ip", "-6", "addr", "add", *own, "nodad")
        known = (made[other], "lladdr", other.hardware, "dev", "eth0", "nud", "permanent")
        machine.network_command("ip", "-6", "neigh", "replace", *known)
    yield made[head]
    for machine, address in made.items():
        machine.network_command("ip", "-6", "addr", "del", f"{address}/64", "dev", "eth0")


def test_a_scan_from_another_machine_finds_sshd_alone(cluster: Cluster, by_ipv6: str) -> None:
    """Without a firewall, by IPv4 and IPv6: neither Ray nor what its programs have opened shows."""
    head, outside = cluster.lab.machine("head"), cluster.lab.machine("w2")
    store = head.popen([str(head.ray_python(LIBRARIES)), "-c", STORE])
    until(lambda: "listening" in store.log.read_text(), 30, store.log.read_text)
    port = int(store.log.read_text().split()[1])
    cluster.head.wait_status(lambda s: port in s["network"]["open"], 20)
    assert dialled(cluster, "w2", "127.77.0.1", port)[0] == "connected"
    head.nft("table inet firewall\ndelete table inet firewall\n")
    try:
        for address in (head.address, by_ipv6):
            argv = [str(outside.ray_python(LIBRARIES)), "-c", SCAN, address]
            assert outside.run(argv, timeout=240).stdout.split() == ["22"], address
    finally:
        head.firewall([22])
        store.signal(signal.SIGKILL)
        store.wait(20)


def test_another_table_in_the_way_is_seen(cluster: Cluster) -> None:
    w1 = cluster.worker("w1")
    w1.machine.nft(
        "table inet other { chain out { type filter hook output priority 10; policy accept;\n"
        "oifname lo tcp dport 19977 reject with tcp reset\n}\n}\n"
    )
    w1.wait_status(lambda s: "overlay_blocked" in [c["code"] for c in s["conditions"]], 40)
    w1.machine.nft("delete table inet other\n")
    w1.wait_status(lambda s: s["state"] == "ready" and not s["conditions"], 60)


@pytest.mark.parametrize("what", ["removed", "renamed"])
def test_an_interface_that_is_gone_is_made_again(cluster: Cluster, what: str) -> None:
    """Which is told; and what is dialled meanwhile arrives."""
    w1 = cluster.worker("w1")
    w1.wait_status(lambda s: not s["conditions"], 40)
    before = w1.events("overlay_gone")
    if what == "removed":
        w1.machine.network_command("ip", "link", "del", "rayfwd0")
    else:
        w1.machine.network_command("ip", "link", "set", "rayfwd0", "down")
        w1.machine.network_command("ip", "link", "set", "rayfwd0", "name", "other0")
        w1.machine.network_command("ip", "link", "set", "other0", "up")
    assert dialled(cluster, "w1", "127.77.0.1", 6379)[0] == "connected"
    gone = w1.wait_event("overlay_gone", 40, after=before[-1] if before else None)
    assert "the interface" in gone["cause"]
    w1.wait_status(lambda s: not s["conditions"], 40)
    address = w1.status()["node"]["address"]
    assert f"{address}/32" in w1.machine.network_command("ip", "addr", "show", "rayfwd0")


def test_rules_that_another_program_removes_are_there_at_once(cluster: Cluster) -> None:
    """As a firewall does that is loaded anew. One of the two tables is the keeper's own."""
    machine = cluster.lab.machine("w1")
    with pytest.raises(RuntimeError, match="not permitted"):
        machine.nft("delete table inet rayfwd0\n")
    machine.nft("delete table inet rayfwd0-shut\n")

    def there() -> bool:
        return "rayfwd0-shut" in machine.network_command("nft", "list", "tables")

    began = time.monotonic()
    until(there, 5, lambda: "the table is not there")
    assert time.monotonic() - began < 5, "before the daemon looks"
    assert dialled(cluster, "w1", "127.77.0.1", 6379)[0] == "connected"
