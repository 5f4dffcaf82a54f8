"""How many connections a head's sshd sees: at start, in an outage, after it, and under a limit.

Three workers behind one address, as far as the head's firewall counts: the new connections of all
of them together. Nobody is to be barred for what rayfwd does by itself.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.lab.cluster import Cluster
from tests.lab.machines import Lab, Machine

WORKERS = ("w1", "w2", "w3")
GATE = "gate"
VERBOSE = ("-o", "LogLevel=VERBOSE")
EVERY = bool(os.environ.get("RAYFWD_EVERY_LIMIT"))
"""Also under limits that are easier to come back from, and until all lanes stand: six minutes."""
OVER = "limit rate over 12/minute burst 6 packets"
LIMITS = {
    "dropped": f"tcp dport 22 ct state new update @seen {{ ip saddr {OVER} }} drop",
    "rejected": f"tcp dport 22 ct state new update @seen {{ ip saddr {OVER} }}"
    " reject with tcp reset",
    # As `ufw limit` has it: who is over it is out until there was no knock for 30 s.
    "knocking counts": "tcp dport 22 ct state new ip saddr @out update @out { ip saddr } drop\n"
    "tcp dport 22 ct state new"
    " update @seen { ip saddr limit rate over 12/minute burst 5 packets }"
    " add @out { ip saddr } drop",
}
"""Rules of the head's firewall: 6 new connections in 30 s from an address."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without Ray, and workers behind a router that gives all of them its own address."""
    names = ("head", *WORKERS, GATE)
    with Lab(tmp_path_factory.mktemp("lab"), names=names) as lab:
        made = Cluster(lab, workers=WORKERS, every={"ray.start": False})
        head, gate = lab.machine("head"), lab.machine(GATE)
        masquerade(gate, [lab.machine(name) for name in WORKERS], head)
        head.start_sshd(VERBOSE)
        made.start(["head"])
        made.head.wait_event("hub_listening")
        yield made
        made.stop()


def masquerade(gate: Machine, inside: Sequence[Machine], head: Machine) -> None:
    """To the head, these machines have the gate's address."""
    gate.nft(
        "table ip gate {\nchain out {\ntype nat hook postrouting priority 100;\n"
        f"ip daddr {head.address} masquerade\n}}\n}}\n"
    )
    settings = ["net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"]
    settings.append("net.ipv4.conf.eth0.send_redirects=0")
    gate.network_command("sysctl", "-qw", *settings)
    for machine in inside:
        machine.network_command("ip", "route", "add", f"{head.address}/32", "via", gate.address)


@dataclass(frozen=True)
class Seen:
    """By the head's sshd."""

    connections: int
    logins: int

    @property
    def unauthenticated(self) -> int:
        """Connections that ended before a login, once none is under way."""
        return self.connections - self.logins

    def __sub__(self, other: Seen) -> Seen:
        return Seen(self.connections - other.connections, self.logins - other.logins)


def seen(cluster: Cluster) -> Seen:
    gate = cluster.lab.machine(GATE).address
    text = (cluster.lab.folder / "head-sshd.log").read_text()
    return Seen(
        text.count(f"Connection from {gate} "),
        len(re.findall(f"^Accepted publickey for ray from {gate} ", text, re.MULTILINE)),
    )


@contextmanager
def limited(head: Machine, rules: str) -> Iterator[None]:
    head.nft(
        "table inet limited {\n"
        "set seen { type ipv4_addr; flags dynamic; timeout 60s; }\n"
        "set out { type ipv4_addr; flags dynamic; timeout 30s; }\n"
        f"chain input {{\ntype filter hook input priority -1;\n{rules}\n}}\n}}\n"
    )
    try:
        yield
    finally:
        head.nft("delete table inet limited\n")


def all_lanes(cluster: Cluster, *names: str, within: float = 150) -> None:
    for name in names:
        cluster.worker(name).wait_status(
            lambda status: len(status["link"]["lanes"]) == 2 and status["state"] == "ready", within
        )


@pytest.mark.timeout(400)
def test_what_sshd_sees_of_one_worker(cluster: Cluster) -> None:
    lab, head, w1 = cluster.lab, cluster.lab.machine("head"), cluster.lab.machine("w1")
    before = seen(cluster)
    daemon = cluster.start_node("w1")
    all_lanes(cluster, "w1")
    assert seen(cluster) - before == Seen(connections=2, logins=2)

    # A path that swallows everything, for ten attempts.
    lab.cut(w1)
    parked = daemon.wait_event("link_parked", 30)
    before = seen(cluster)
    time.sleep(5)
    assert seen(cluster) == before
    lab.heal(w1)
    daemon.wait_event("link_resumed", 30)
    all_lanes(cluster, "w1")
    after = seen(cluster) - before
    assert after.logins == 2
    # Of attempts beside each other others may be let in at the same moment: two that the kernel
    # repeats with the newest, where this process does not run at once.
    assert after.unauthenticated <= 2, after

    # No sshd.
    before = seen(cluster)
    head.stop_sshd()
    lab.reset_connections(w1)
    parked = daemon.wait_event("link_parked", 30, after=parked)
    time.sleep(5)
    head.start_sshd(VERBOSE)
    all_lanes(cluster, "w1")
    assert seen(cluster) - before == Seen(connections=2, logins=2)

    # sshd, and no rayfwd behind it.
    before = seen(cluster)
    assert cluster.head.stop() == 0
    time.sleep(10)
    assert seen(cluster) - before == Seen(connections=1, logins=1)
    cluster.start_node("head")
    all_lanes(cluster, "w1")
    assert seen(cluster) - before == Seen(connections=2, logins=2)
    assert daemon.stop() == 0


@pytest.mark.timeout(400)
@pytest.mark.parametrize("limit", LIMITS if EVERY else ["knocking counts"])
def test_three_workers_behind_one_address_under_a_limit(cluster: Cluster, limit: str) -> None:
    lab = cluster.lab
    with limited(lab.machine("head"), LIMITS[limit]):
        before = seen(cluster)
        daemons = [cluster.start_node(name) for name in WORKERS]
        for daemon in daemons:
            daemon.wait_status(lambda status: status["state"] == "ready")
        if EVERY:
            all_lanes(cluster, *WORKERS)
        for name in WORKERS:
            lab.cut(lab.machine(name))
        for daemon in daemons:
            daemon.wait_event("link_parked", 30)
        if EVERY:
            time.sleep(30)
        for name in WORKERS:
            lab.heal(lab.machine(name))
        for daemon in daemons:
            daemon.wait_event("link_resumed", 60)
        if EVERY:
            all_lanes(cluster, *WORKERS)
        assert not any(daemon.events("session_ended") for daemon in daemons)
        found = seen(cluster) - before
        assert found.unauthenticated <= len(WORKERS), found
    for daemon in daemons:
        assert daemon.stop() == 0
