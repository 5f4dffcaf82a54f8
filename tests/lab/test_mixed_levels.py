"""Nodes of both levels in one cluster: what a program of one opens is reached from each other one.

Head and w1 have the overlay, w2 and w3 have listeners. Ray is not started: every port here is a
program's own, and in nobody's plan.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from itertools import permutations

import pytest

from tests.lab import kinds
from tests.lab.cluster import Cluster
from tests.lab.daemon import Daemon
from tests.lab.machines import Lab
from tests.lab.process import Process, until

pytestmark = pytest.mark.ray

RIDE_THROUGH = 60
PAIRS = [("w1", "w2"), ("head", "w2"), ("w2", "w1"), ("w2", "head"), ("w3", "w2")]
"""Who dials whom: the overlay a node with listeners, by the hub and from it; the other way round;
and one node with listeners another."""
TAKEN = 29700
REOPENED = 29701
CONNECTIONS = 2000
LOW = 81
"""A port that only root may open; w1's file has it in `expose`."""
APART = (29800, 29899)
"""Ports of every node's file, under `network.apart`."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Lab(tmp_path_factory.mktemp("lab"), names=("head", "w1", "w2", "w3")) as lab:
        every = {"ray.start": False, "ride_through": RIDE_THROUGH, **kinds.FILE}
        every["network.apart"] = ["{}-{}".format(*APART)]
        low = {"expose": [*kinds.FILE["expose"], LOW]}
        made = Cluster(lab, workers=("w1", "w2", "w3"), every=every, w1=low)
        lab.machine("head").start_sshd()
        for name in made.names:
            made.start_node(name, net_admin=name in {"head", "w1"})
            if name == "head":
                made.head.wait_event("hub_listening")
        made.wait_ready()
        for daemon in made.daemons:
            daemon.wait_status(lambda s: len(s["roster"]) == 4 and not s["conditions"], 30)
        yield made
        made.stop()


@pytest.fixture(params=PAIRS, ids=[f"from {a} to {b}" for a, b in PAIRS])
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


def daemon(cluster: Cluster, name: str) -> Daemon:
    return cluster.head if name == "head" else cluster.worker(name)


def address(cluster: Cluster, name: str) -> str:
    return str(daemon(cluster, name).status()["node"]["address"])


def program(cluster: Cluster, name: str, script: str, *args: object) -> Process:
    """Of Ray's user there."""
    machine = cluster.lab.machine(name)
    return machine.popen([str(machine.ray_python()), "-c", script, *map(str, args)])


@pytest.fixture(autouse=True)
def no_program_is_left(cluster: Cluster) -> Iterator[None]:
    """Also where a test has failed."""
    before = len(cluster.lab.processes)
    yield
    for process in cluster.lab.processes[before:]:
        end(process)


def end(process: Process) -> None:
    process.signal(signal.SIGKILL)
    process.wait(20)


SERVE = """
import socket, sys
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("listening", server.getsockname()[1], flush=True)
while True:
    sock, peer = server.accept()
    with sock:
        sock.sendall(f"{peer[0]} {sock.getsockname()[0]}".encode())
"""


def serving(cluster: Cluster, name: str, at: str = "", port: int = 0) -> tuple[Process, int]:
    """A program that says who dials it and where, and its port."""
    server = program(cluster, name, SERVE, at, port)
    until(lambda: "listening" in server.log.read_text(), 30, server.log.read_text)
    return server, int(server.log.read_text().split()[1])


DIAL = """
import json, socket, sys, time
print("dialling", flush=True)
at, began = (sys.argv[1], int(sys.argv[2])), time.monotonic()
while True:
    try:
        with socket.create_connection(at, 30) as sock:
            said = sock.recv(99).decode()
            there = "{}:{}".format(*sock.getpeername())
        break
    except ConnectionResetError:
        said = there = "reset"
        break
    except ConnectionRefusedError:
        said = there = "refused"
        if time.monotonic() > began + float(sys.argv[3]):
            break
        time.sleep(0.05)
print(json.dumps([said, there, time.monotonic() - began]))
"""


def dialled(
    cluster: Cluster, name: str, at: str, port: int, patience: float = 0
) -> tuple[str, str, float]:
    """What a program there gets, to whom it is connected by its own kernel, and after how long."""
    dialling = program(cluster, name, DIAL, at, port, patience)
    assert dialling.wait(90) == 0, dialling.log.read_text()
    return outcome(dialling)


def outcome(dialling: Process) -> tuple[str, str, float]:
    """What `DIAL` has said last."""
    said, there, seconds = json.loads(dialling.log.read_text().splitlines()[-1])
    return said, there, seconds


def test_each_node_has_its_level_and_says_the_others(cluster: Cluster) -> None:
    levels = {"head": "overlay", "w1": "overlay", "w2": "listeners", "w3": "listeners"}
    found = {d.machine.name: d.status()["network"]["level"] for d in cluster.daemons}
    assert found == levels


def test_a_port_that_opens_and_closes(cluster: Cluster, pair: tuple[str, str]) -> None:
    """Both ends have the addresses that they would have on a LAN."""
    here, there = pair
    own, at = (address(cluster, name) for name in pair)
    took: list[float] = []
    while not took or (took[-1] >= 3 and len(took) < 3):  # one may fall into a busy moment
        server, port = serving(cluster, there)
        said, peer, seconds = dialled(cluster, here, at, port, 10)
        assert (said, peer) == (f"{own} {at}", f"{at}:{port}")
        took.append(seconds)
        end(server)
    assert took[-1] < 3, took

    def closed() -> bool:
        return dialled(cluster, here, at, port)[0] == "refused"

    until(closed, 20, lambda: "it is still taken")
    again, _ = serving(cluster, there, at, port)
    assert dialled(cluster, here, at, port, 10)[0] == f"{own} {at}"
    end(again)


def test_every_kind_of_listener(cluster: Cluster, pair: tuple[str, str]) -> None:
    here, there = pair
    kinds.check(cluster, here, there)


def test_a_port_that_is_taken_where_listeners_are_is_named_there(cluster: Cluster) -> None:
    """The nodes with the overlay share no ports with anybody; and the program that has it is
    reached at its own node's address."""
    w1, w2 = address(cluster, "w1"), address(cluster, "w2")
    taken, _ = serving(cluster, "w2", "", TAKEN)
    server, _ = serving(cluster, "w1", "", TAKEN)
    status = cluster.worker("w2").wait_status(lambda s: s["conditions"], 20)
    (condition,) = status["conditions"]
    assert (condition["code"], condition["severity"]) == ("open_port_taken", "note")
    assert f"the node {w1} listens on port {TAKEN}," in condition["cause"]
    assert "by user ray" in condition["cause"]
    assert dialled(cluster, "w1", w2, TAKEN, 10)[0] == f"{w1} {w2}"
    for name in ("head", "w3"):
        own = address(cluster, name)
        assert dialled(cluster, name, w1, TAKEN, 10)[0] == f"{own} {w1}"
        assert not daemon(cluster, name).status()["conditions"]
    end(taken)
    cluster.worker("w2").wait_status(lambda s: not s["conditions"], 30)
    assert dialled(cluster, "w2", w1, TAKEN, 10)[0] == f"{w2} {w1}"
    end(server)


LOOK_FOR_A_PORT = """
import socket, sys, time
while time.time() < float(sys.argv[3]):
    time.sleep(0.001)
for port in range(int(sys.argv[1]), int(sys.argv[2]) + 1):
    server = socket.socket()
    try:
        server.bind(("", port))
        break
    except OSError:
        server.close()
server.listen()
print("listening", port, flush=True)
while True:
    sock, peer = server.accept()
    with sock:
        sock.sendall(f"{peer[0]} {sock.getsockname()[0]}".encode())
"""
"""As Serve's replicas do: the lowest free port, on all addresses, shared with nobody."""


def test_programs_that_look_for_a_port_at_once_find_different_ones(cluster: Cluster) -> None:
    """And each is reached from every other node, and not the dialling node's own in its place."""
    together = (*APART, time.time() + 3)
    servers = {n: program(cluster, n, LOOK_FOR_A_PORT, *together) for n in cluster.names}
    for server in servers.values():
        until(lambda s=server: "listening" in s.log.read_text(), 30, server.log.read_text)  # type: ignore[misc]
    ports = {name: int(s.log.read_text().split()[1]) for name, s in servers.items()}
    assert len(set(ports.values())) == len(servers), ports
    for here, there in permutations(servers, 2):
        own, at = address(cluster, here), address(cluster, there)
        assert dialled(cluster, here, at, ports[there], 10)[0] == f"{own} {at}", (here, there)
    assert not [c for d in cluster.daemons for c in d.status()["conditions"]]


def test_a_port_below_1024_is_offered_by_expose(cluster: Cluster) -> None:
    """Where a node has listeners and may not open such ports, it says so. Another user has it."""
    w1, w1_address = cluster.worker("w1"), address(cluster, "w1")
    assert dialled(cluster, "head", w1_address, LOW)[0] == "refused"
    argv = [str(w1.machine.ray_python()), "-c", SERVE, "", str(LOW)]
    server = w1.machine.popen(argv, user="root")
    until(lambda: "listening" in server.log.read_text(), 30, server.log.read_text)
    assert dialled(cluster, "head", w1_address, LOW, 10)[0] == "127.0.0.1 127.0.0.1"
    for name in ("w2", "w3"):
        conditions = cluster.worker(name).wait_status(lambda s: s["conditions"], 20)["conditions"]
        assert {c["code"] for c in conditions} == {"open_port_taken"}
        assert "may be opened only by root" in conditions[0]["cause"]
        assert dialled(cluster, name, w1_address, LOW)[0] == "refused"
    w1.machine.nft("table inet firewall\ndelete table inet firewall\n")
    argv = [str(cluster.lab.machine("w2").ray_python()), "-c", DIAL, w1.machine.address]
    said = cluster.lab.machine("w2").run([*argv, str(LOW), "0"]).stdout
    assert w1.machine.address in said, "what another user serves to the network is not guarded"
    w1.machine.firewall()
    end(server)
    for each in cluster.daemons:
        each.wait_status(lambda s: not s["conditions"], 30)


AGAIN_AND_AGAIN = """
import socket, sys
for number in range(20):
    with socket.create_server(("", int(sys.argv[1]))) as server:
        if not number:
            print("listening", sys.argv[1], flush=True)
        with server.accept()[0] as sock:
            sock.sendall(str(number).encode())
"""
"""A server that takes one connection, and begins anew on the same port."""
IN_VAIN_AT_TIMES = """
import json, socket, sys
found = []
while len(found) < 20:
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), 30) as sock:
            found += filter(None, [sock.recv(9).decode()])
    except ConnectionError:
        pass
print(json.dumps(found))
"""


def test_a_port_that_closes_and_opens_again_at_once(
    cluster: Cluster, pair: tuple[str, str]
) -> None:
    """Whoever is refused or reset tries again, as on a LAN, and gets through."""
    here, there = pair
    server = program(cluster, there, AGAIN_AND_AGAIN, REOPENED)
    until(lambda: "listening" in server.log.read_text(), 30, server.log.read_text)
    dialling = program(cluster, here, IN_VAIN_AT_TIMES, address(cluster, there), REOPENED)
    assert dialling.wait(90) == 0, dialling.log.read_text()
    assert json.loads(dialling.log.read_text()) == [str(number) for number in range(20)]
    assert server.wait(20) == 0


ECHO = """
import socket
with socket.create_server(("", 0), backlog=512) as server:
    print("listening", server.getsockname()[1], flush=True)
    while True:
        with server.accept()[0] as sock:
            while said := sock.recv(100):
                sock.sendall(said)
"""
SHORT = """
import socket, sys, time
for _ in range(100):
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), 30).close()
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
for number in range(int(sys.argv[3])):
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 30) as sock:
        sock.sendall(b"%d" % number)
        sock.shutdown(socket.SHUT_WR)
        heard = b""
        while more := sock.recv(100):
            heard += more
        assert heard == b"%d" % number, (number, heard)
print("all")
"""


@pytest.mark.parametrize("pair", [("w1", "w2"), ("w2", "w1")], ids=str)
def test_thousands_of_short_connections(cluster: Cluster, pair: tuple[str, str]) -> None:
    """One after the other, to one port, once it is known: none is refused, reset or given another's
    bytes."""
    here, there = pair
    server = program(cluster, there, ECHO)
    until(lambda: "listening" in server.log.read_text(), 30, server.log.read_text)
    port = server.log.read_text().split()[1]
    calling = program(cluster, here, SHORT, address(cluster, there), port, CONNECTIONS)
    assert calling.wait(120) == 0, calling.log.read_text()
    assert calling.log.read_text().split() == ["all"]
    end(server)


@pytest.mark.parametrize("away", ["w1", "w2"])
def test_what_is_dialled_of_a_node_that_is_away_is_held(cluster: Cluster, away: str) -> None:
    """From a node of each level, of a node of each."""
    at = address(cluster, away)
    server, port = serving(cluster, away)
    others = ["head", "w3"]
    for name in others:
        assert dialled(cluster, name, at, port, 10)[0] == f"{address(cluster, name)} {at}"
    machine = cluster.lab.machine(away)
    cluster.lab.cut(machine)
    cluster.head.wait_event("link_parked", 30, {"node": away})
    held = [program(cluster, name, DIAL, at, port, 0) for name in others]
    for process in held:
        until(lambda p=process: "dialling" in p.log.read_text(), 30, process.log.read_text)  # type: ignore[misc]
    time.sleep(3)
    assert [process.poll() for process in held] == [None, None], [p.log.read_text() for p in held]
    cluster.lab.heal(machine)
    for name, process in zip(others, held, strict=True):
        assert process.wait(60) == 0
        said, _, seconds = outcome(process)
        assert (said, seconds > 2) == (f"{address(cluster, name)} {at}", True)
    end(server)
    cluster.wait_ready()


def test_another_user_reaches_nothing_by_either_level(cluster: Cluster) -> None:
    """Nor by an address of IPv6 that stands for one of IPv4."""
    for here, there in (("w1", "w2"), ("w2", "w1")):
        at = address(cluster, there)
        server, port = serving(cluster, there)
        assert dialled(cluster, here, f"::ffff:{at}", port, 10)[0].endswith(at)
        machine = cluster.lab.machine(here)
        for place in (at, f"::ffff:{at}"):
            argv = [str(machine.ray_python()), "-c", STRANGER, place, str(port)]
            nobody = ["setpriv", "--reuid=65534", "--clear-groups", *argv]
            assert machine.run(nobody, user="root").stdout.strip() == "shut out", place
        end(server)


STRANGER = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as sock:
        print(sock.recv(99).decode() or "closed")
except (ConnectionRefusedError, ConnectionResetError):
    print("shut out")
"""
"""What is refused, or reset at once: a listener takes a connection before it knows whose it is."""
