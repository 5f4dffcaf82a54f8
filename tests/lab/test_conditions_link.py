"""What can be wrong with a link or a machine is named in time, at both ends, and is over again.

One cluster without Ray, and one story: w1's lanes flap, which is over only after a minute; in the
meantime it is w2 that has everything else.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy

import pytest

from rayfwd.watch.links import FLAPPING_LOSSES, LINKS_INTERVAL, SLOW_SAMPLES
from tests.lab.cluster import HUB_SOCKET, STATE_DIR, Cluster, change
from tests.lab.daemon import Daemon
from tests.lab.faults import Faults, kill
from tests.lab.machines import Lab
from tests.lab.named import named, of, over, said_at, waited_for
from tests.lab.process import HOME, until

pytestmark = [pytest.mark.ray, pytest.mark.story]

WITHIN = 10.0
RIDE_THROUGH = 20.0
SMALL = f"{HOME}/small"
"""A disk of 20 MB in w2."""
SOURCE_PORT = 7999
SOURCE = f"""
import socket, threading
def pour(sock):
    try:
        while True:
            sock.sendall(bytes(65536))
    except OSError:
        pass
with socket.create_server(("127.0.0.1", {SOURCE_PORT})) as server:
    print("listening", flush=True)
    while True:
        threading.Thread(target=pour, args=(server.accept()[0],), daemon=True).start()
"""
"""Sends without end to whoever connects."""
ECHO_PORT = 7998
ECHO = f"""
import socket
with socket.create_server(("127.0.0.1", {ECHO_PORT})) as server:
    print("listening", flush=True)
    sock = server.accept()[0]
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := sock.recv(65536):
        sock.sendall(data)
"""
CHATTER = f"""
import socket, time
with socket.create_connection(("127.0.0.1", {ECHO_PORT})) as sock:
    sock.setblocking(False)
    while True:
        sock.send(b"x")
        time.sleep(0.1)
        try:
            sock.recv(65536)
        except BlockingIOError:
            pass
"""
"""Small messages, ten a second, there and back."""
FILES = 150
"""What w2's daemon may have open: enough for its listeners, and fewer than its plan needs."""


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    every = {"ray.start": False, "ride_through": RIDE_THROUGH}
    source, echo = (
        {"listen": f"127.0.0.1:{port}", "to": f"head:{port}"} for port in (SOURCE_PORT, ECHO_PORT)
    )
    cluster = Cluster(
        module_lab,
        every=every,
        head={"expose": [SOURCE_PORT, ECHO_PORT]},
        w1={"ray.advertise": module_lab.machine("w1").address, "forward": [echo]},
        w2={"forward": [source]},
    )
    cluster.start(["head"])
    cluster.head.wait_event("hub_listening")
    cluster.start(["w1"])
    both_lanes(cluster.worker("w1"))
    yield cluster
    cluster.stop()


@pytest.fixture
def w2(cluster: Cluster) -> Iterator[Daemon]:
    """The second worker with its link up; what a test changed is put back."""
    kept = deepcopy(cluster.configs["w2"])
    worker = cluster.start_node("w2")
    both_lanes(worker)
    yield worker
    last = cluster.worker("w2")
    if last.process.poll() is None:
        assert last.stop() == 0
    cluster.configs["w2"] = kept
    restart_sshd(cluster)


def both_lanes(worker: Daemon) -> None:
    worker.wait_status(lambda s: len(s["link"]["lanes"]) == 2, 60)


def began(daemon: Daemon) -> float:
    """When it was loaded: how long that takes is the machine's."""
    return said_at(daemon.wait_event("rayfwd_starting", 60))


def restart_sshd(cluster: Cluster, *options: str) -> None:
    """sshd with these options from now on; what stands is left alone."""
    head = cluster.lab.machine("head")
    head.stop_sshd()
    head.start_sshd([word for option in options for word in ("-o", option)])


def test_link_down(cluster: Cluster) -> None:
    w1, machine = cluster.worker("w1"), cluster.lab.machine("w1")
    cut = time.time()
    cluster.lab.cut(machine)
    for row in named([cluster.head, w1], "link_parked", "w1", WITHIN, cut):
        assert row["severity"] == "note"
        assert f"held for {RIDE_THROUGH:g} s" in row["cause"]
    ends = [d.wait_event("session_ended", 2 * RIDE_THROUGH) for d in (cluster.head, w1)]
    since = max(said_at(end) for end in ends)
    (row,) = named([cluster.head], "link_down", "w1", WITHIN, since)
    assert row["severity"] == "error"
    assert "its connections are lost" in row["cause"]
    # Named while the streams were held, as a note: each attempt has 10 s for an answer.
    (row,) = named([w1], "ssh_unreachable", "w1", 2 * WITHIN, cut)
    assert row["severity"] == "error"
    assert cluster.lab.machine("head").address in row["cause"]
    cluster.lab.heal(machine)
    over([cluster.head, w1], 60)


def flap(daemons: Sequence[Daemon]) -> bool:
    """Each has said so, or does when it has looked."""
    time.sleep(LINKS_INTERVAL + 1)
    return all(of(d.status(), "lane_flapping", "w1/interactive") for d in daemons)


def test_lane_flapping(cluster: Cluster) -> None:
    faults, w1 = Faults(cluster.lab), cluster.worker("w1")
    both = [cluster.head, w1]
    lost = 0
    # Losses of one look are one, and on a busy machine a look may come late.
    while lost < FLAPPING_LOSSES or (lost < 2 * FLAPPING_LOSSES and not flap(both)):
        time.sleep(LINKS_INTERVAL + 0.5)
        last, since = w1.events()[-1], time.time()
        faults.reset(w1.machine)
        w1.wait_event("lane_up", 60, where={"lane": "interactive"}, after=last)
        lost += 1
    for row in named(both, "lane_flapping", "w1/interactive", WITHIN, since):
        assert "times in the last 120 s" in row["cause"]
        assert "sshd's log" in row["remedy"]


def test_less_throughput(cluster: Cluster, w2: Daemon) -> None:
    """Its bulk lane has 80 Mbit/s, and one day 4; short messages are as quick as ever."""
    faults = Faults(cluster.lab)
    bulk = faults.connections(w2.machine)[1]  # the interactive lane is dialled first
    usual = faults.slow_lane(w2.machine, bulk, "80mbit")
    source = cluster.head.machine.popen([str(cluster.head.machine.ray_python()), "-c", SOURCE])
    until(lambda: "listening" in source.log.read_text(), 20, lambda: "the source")
    # One alone has not the credit to fill the lane for its first ten seconds or more, and of a
    # link that is not full nothing is learnt.
    take = ["bash", "-c", f"exec cat </dev/tcp/127.0.0.1/{SOURCE_PORT} >/dev/null"]
    sinks = [w2.machine.popen(take) for _ in range(6)]
    time.sleep(20)  # its past
    usual()
    faults.slow_lane(w2.machine, bulk, "4mbit")
    since = time.time()
    for row in named([cluster.head, w2], "link_throughput_low", "w2", WITHIN, since):
        assert "MB/s are usual" in row["cause"]
        assert row["explained_by"] is None
    assert of(w2.status(), "link_slow", "w2") is None
    usual()
    over([cluster.head, w2], 20, subject="w2")
    for process in (*sinks, source):
        process.signal(signal.SIGKILL)


def test_a_short_silence_makes_no_slow_link(cluster: Cluster) -> None:
    """The PINGs of its time were answered late, which says nothing of the time after it.

    Silent are the sshds of w1's connections. Where packets are lost, TCP chooses when it tries
    again, which may be after a lane is given up.
    """
    w1 = cluster.worker("w1")
    lanes = [lane["lane"] for lane in w1.status()["link"]["lanes"]]
    since = time.time()
    connections = Faults(cluster.lab).connections(w1.machine)
    for connection in connections:
        kill(connection, signal.SIGSTOP)
    time.sleep(2.8)
    for connection in connections:
        kill(connection, signal.SIGCONT)
    time.sleep(2 * SLOW_SAMPLES * LINKS_INTERVAL)  # twice the looks that would name it
    assert [lane["lane"] for lane in w1.status()["link"]["lanes"]] == lanes, "no silence: a cut"
    for daemon in (cluster.head, w1):
        assert not [e for e in daemon.events("link_slow") if said_at(e) >= since]


def test_longer_round_trips(cluster: Cluster) -> None:
    """The way to w1 is one day longer than it was. (On a link without traffic it is asked for
    its round-trip time more seldom, and named a second later.)"""
    head, w1 = cluster.head, cluster.worker("w1")
    python = str(head.machine.ray_python())
    echo = head.machine.popen([python, "-c", ECHO])
    until(lambda: "listening" in echo.log.read_text(), 20, lambda: "the echo")
    chatter = w1.machine.popen([python, "-c", CHATTER])
    undo = cluster.lab.lengthen(w1.machine, 0.3)
    since = time.time()
    try:
        for row in named([head, w1], "link_slow", "w1", WITHIN, since):
            assert "ms are usual" in row["cause"]
            assert "`ping`" in row["remedy"]
            assert row["severity"] == "warning"
            assert row["explained_by"] is None
    finally:
        undo()
    over([head, w1], 20, "link_slow")
    assert chatter.poll() is None, "nothing of it was lost"
    for process in (chatter, echo):
        process.signal(signal.SIGKILL)


def test_channel_kind_refused(cluster: Cluster, w2: Daemon) -> None:
    """As it happens: sshd's configuration is changed, and some day the connection breaks."""
    restart_sshd(cluster, "AllowStreamLocalForwarding=no")
    since = time.time()
    Faults(cluster.lab).reset(w2.machine)
    for row in named([w2], "channel_refused", "w2", WITHIN, since):
        assert 'via = "exec"' in row["remedy"]
    (row,) = named([cluster.head], "link_down", "w2", RIDE_THROUGH + WITHIN, since)
    assert row["severity"] == "error"
    status = w2.wait_status(lambda s: s["link"]["state"] == "down", 30)
    (waits,) = waited_for(status)
    assert (waits["code"], waits["severity"]) == ("channel_refused", "error")
    restart_sshd(cluster)
    over([cluster.head, w2], 60, subject="w2")


def test_max_sessions_reached(cluster: Cluster, w2: Daemon) -> None:
    assert w2.stop() == 0
    command = f"{cluster.lab.rayfwd} attach --socket {HUB_SOCKET}"
    change(cluster.configs["w2"], {"head": {"via": "exec", "attach_command": command}})
    restart_sshd(cluster, "MaxSessions=0")
    worker = cluster.start_node("w2")
    (row,) = named([worker], "channel_refused", "w2", WITHIN, began(worker))
    assert "MaxSessions" in row["remedy"]
    restart_sshd(cluster)
    over([cluster.head, worker], 60, subject="w2")
    both_lanes(worker)


def test_max_startups_reached(cluster: Cluster, w2: Daemon) -> None:
    """Once under a link that breaks, and once at a start: somebody else fills sshd's queue."""
    restart_sshd(cluster, "MaxStartups=1")
    address = cluster.lab.machine("head").address
    script = f"exec 3<>/dev/tcp/{address}/22; read -u 3 && echo there; sleep 300"
    idle = cluster.lab.machine("w1").popen(["bash", "-c", script])
    until(lambda: "there" in idle.log.read_text(), 60, lambda: "somebody in sshd's queue")
    since = time.time()
    Faults(cluster.lab).reset(w2.machine)
    (row,) = named([w2], "ssh_turned_away", "w2", WITHIN, since)
    assert "MaxStartups" in row["remedy"]
    assert w2.stop() == 0
    worker = cluster.start_node("w2")
    (row,) = named([worker], "ssh_turned_away", "w2", WITHIN, began(worker))
    assert row["severity"] == "error"
    idle.signal(signal.SIGKILL)
    over([cluster.head, worker], 60, subject="w2")


def test_disk_and_descriptors(cluster: Cluster, w2: Daemon) -> None:
    """Found at the start."""
    assert w2.stop() == 0
    machine = w2.machine
    machine.run(["install", "-d", "-o", "ray", SMALL], user="root")
    machine.run(["mount", "-t", "tmpfs", "-o", "size=20m,mode=1777", "tmpfs", SMALL], user="root")
    fill = f"head -c 20400000 /dev/zero >{SMALL}/filler"
    machine.run(["bash", "-c", fill])
    change(cluster.configs["w2"], {"ray.env": {"RAY_TMPDIR": SMALL}})
    worker = cluster.start_node("w2", ["prlimit", f"--nofile={FILES}:{FILES}"])
    both = [worker, cluster.head]
    since = began(worker)
    for row in named(both, "disk_nearly_full", "w2", WITHIN, since):
        assert f"{SMALL}/ray" in row["cause"]
        assert "remove Ray's old sessions" in row["remedy"]
    for row in named(both, "descriptors_low", "w2", WITHIN, since):
        assert f"may open {FILES} files" in row["cause"]
        assert "LimitNOFILE" in row["remedy"]
    machine.run(["rm", f"{SMALL}/filler"])
    over(both, 30, "disk_nearly_full")
    assert worker.stop() == 0
    worker = cluster.start_node("w2")
    both_lanes(worker)
    over([cluster.head, worker], 10, subject="w2")
    assert worker.stop() == 0
    machine.run(["umount", SMALL], user="root")


def test_two_with_one_name_and_two_with_one_address(cluster: Cluster, w2: Daemon) -> None:
    """They are refused; the first one goes on. It is over when nobody has tried for 45 s."""
    w1, address = cluster.worker("w1"), cluster.lab.machine("w1").address
    assert w2.stop() == 0
    for name, advertise, code, subject in (
        ("w1", None, "name_taken", "w1"),
        ("w2b", address, "address_taken", "w2b"),
    ):
        w2.machine.run(["rm", "-rf", STATE_DIR])
        change(cluster.configs["w2"], {"name": name, "ray.advertise": advertise})
        second = cluster.start_node("w2")
        since = began(second)
        for row in named([second, cluster.head, w1], code, subject, WITHIN, since):
            assert (address if advertise else "w1") in row["cause"]
        assert w1.status()["state"] == "ready"
        assert second.stop() == 0
    # Nor is w1's lane said to flap any more.
    over([cluster.head, w1], 75)
