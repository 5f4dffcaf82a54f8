"""What happens to networks and to SSH: every fault that a link can have, provoked for real.

A fault is done to one worker's link. What it changed is put right by its own undoing, so that
several may go on at once at different machines. Nothing here knows rayfwd: the same is done to
whatever connects a worker to the head by SSH.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

from tests.lab.machines import NETWORK, Lab, Machine
from tests.lab.process import began, until

OTHERS = 100
"""A machine's further addresses: the last number of its own, and this."""


@dataclass(frozen=True)
class Connection:
    """An SSH connection that stands at both ends."""

    peer: str
    port: int
    """At the worker's end."""
    pids: tuple[int, ...]
    """Of the sshd processes that serve it; host-side ids."""


class Faults:
    """The faults of a lab's machines: of the connections that machines make to one sshd, which is
    the head's unless another `server` is named. Its `worker` is whoever dials."""

    def __init__(self, lab: Lab, sshd_options: tuple[str, ...] = (), server: str = "head") -> None:
        self.lab = lab
        self.head = lab.machine(server)
        self.sshd_options = sshd_options

    def connections(self, worker: Machine) -> list[Connection]:
        """That worker's SSH connections, the oldest sshd process first.

        As the worker has them: what it gave up while it was cut off stands on at the head.
        """
        established = ("state", "established")
        mine = worker.network_command("ss", "-Htn", *established, "dport = :22").splitlines()
        ports = {line.split()[2].rpartition(":")[2] for line in mine}
        text = self.head.network_command("ss", "-Htnp", *established, "sport = :22")
        found = []
        for line in text.splitlines():
            peer, _, port = line.split()[3].rpartition(":")
            if peer == worker.address and port in ports:
                pids = tuple(sorted(set(map(int, re.findall(r"pid=(\d+)", line)))))
                found.append(Connection(peer, int(port), pids))
        # By when they began: numbers of processes are used again, from the smallest on.
        return sorted(found, key=lambda connection: [began(pid) for pid in connection.pids])

    # Faults that are over at once

    def kill_sshd(self, worker: Machine) -> None:
        """SIGKILL to every sshd process that serves a connection of that worker."""
        for connection in self.connections(worker):
            kill(connection)

    def reset(self, worker: Machine) -> None:
        """A TCP reset, to both ends of every connection between that worker and the head."""
        self.head.network_command("ss", "-HKtn", "dst", worker.address)

    def forget_connections(self, worker: Machine) -> None:
        """The firewalls of that worker and of the head forget every connection they let through.

        They are strict (`strict_firewalls`): what they do not know, and is no beginning, they drop.
        Those of the network between machines: the overlay's redirects within one live in the same
        table, and are cut where all of it is flushed (docs/faults.md).
        """
        for machine in (worker, self.head):
            try:
                machine.network_command("conntrack", "-D", "--proto", "tcp", "--orig-src", NETWORK)
            except RuntimeError as exc:
                if "0 flow entries" not in str(exc):  # there is nothing to forget
                    raise

    def restart_sshd(self, worker: Machine) -> None:
        """sshd and all that serves a connection, of every worker, are ended; 1 s later it is back.

        (Restarted by systemd, Debian's sshd leaves connections alone.)
        """
        self.head.stop_sshd()
        for machine in self.lab.machines:
            if machine is self.head:
                continue
            for connection in self.connections(machine):
                kill(connection, signal.SIGTERM)
        time.sleep(1.0)
        self.head.start_sshd(self.sshd_options)

    def change_address(self, worker: Machine) -> None:
        """The worker has another address from now on, as after another DHCP lease."""
        network, _, last = worker.address.rpartition(".")
        new = f"{network}.{(int(last) + OTHERS) % (2 * OTHERS)}"
        worker.network_command("ip", "addr", "del", f"{worker.address}/24", "dev", "eth0")
        worker.network_command("ip", "addr", "add", f"{new}/24", "dev", "eth0")
        worker.address = new
        for machine, other in permutations(self.lab.machines, 2):
            if worker in {machine, other}:
                machine.meet(other)

    # Faults that last: each returns what undoes it

    def swallow(self, worker: Machine) -> Callable[[], None]:
        """No packet comes through, to or from that worker; nobody is told."""
        self.lab.cut(worker)
        return lambda: self.lab.heal(worker)

    def swallow_from(self, worker: Machine) -> Callable[[], None]:
        """What the worker sends is lost; what is sent to it arrives."""
        return self._filter(worker, "output", [f"ip saddr {NETWORK} drop"])

    def swallow_to(self, worker: Machine) -> Callable[[], None]:
        """What is sent to the worker is lost; what it sends arrives."""
        return self._filter(worker, "input", [f"ip saddr {NETWORK} drop"])

    def swallow_lane(self, worker: Machine, connection: Connection) -> Callable[[], None]:
        """One of a worker's connections goes silent; the others live."""
        port = connection.port
        rules = [f"tcp sport {port} drop", f"tcp dport {port} drop"]
        undo = [self._filter(worker, chain, rules) for chain in ("output", "input")]

        def undo_all() -> None:
            for call in undo:
                call()

        return undo_all

    def slow_lane(
        self, worker: Machine, connection: Connection, rate: str = "64kbit"
    ) -> Callable[[], None]:
        """One of a worker's connections has that rate in each direction; the others are free."""
        for machine, field in ((worker, "sport"), (self.head, "dport")):
            tc = ("tc", "qdisc", "replace", "dev", "eth0")
            machine.network_command(*tc, "root", "handle", "1:", "htb", "default", "10")
            for number, allowed in (("10", "10gbit"), ("20", rate)):
                word = ("tc", "class", "add", "dev", "eth0", "parent", "1:", "classid")
                machine.network_command(*word, f"1:{number}", "htb", "rate", allowed)
            machine.network_command(
                *("tc", "filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip"),
                *("u32", "match", "ip", field, str(connection.port), "0xffff", "flowid", "1:20"),
            )

        def undo() -> None:
            for machine in (worker, self.head):
                machine.network_command("tc", "qdisc", "del", "dev", "eth0", "root")

        return undo

    def _filter(self, machine: Machine, chain: str, rules: list[str]) -> Callable[[], None]:
        """Rules of a table of their own in a machine's network."""
        table = f"fault_{chain}"
        hook = f"type filter hook {chain} priority -10; policy accept"
        lines = [f"table inet {table} {{", f"chain {chain} {{", hook, *rules, "}", "}"]
        text = "\n".join(lines) + "\n"
        machine.network_command("nft", text)

        def undo() -> None:
            machine.network_command("nft", f"delete table inet {table}")

        return undo


def kill(connection: Connection, number: int = signal.SIGKILL) -> None:
    """End the sshd processes that serve a connection."""
    for pid in connection.pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


@dataclass(frozen=True)
class Cut:
    """A fault of the mix: what was done to whom, and how long it lasted (0: over at once)."""

    name: str
    worker: str
    seconds: float


MIX: dict[str, tuple[float, float]] = {
    "kill_sshd": (0, 0),
    "reset": (0, 0),
    "forget_connections": (0, 0),
    "restart_sshd": (0, 0),
    "change_address": (0, 0),
    "kill_lane": (0, 0),
    "swallow": (0.5, 20),
    "swallow_from": (0.5, 12),
    "swallow_to": (0.5, 12),
    "swallow_lane": (2, 8),
    "slow_lane": (3, 8),
}
"""The faults that are mixed: how long each lasts, seconds."""


def schedule(
    seed: int,
    cuts: int,
    workers: list[str],
    longest: float = 20.0,
    without: Sequence[str] = (),
) -> list[Cut]:
    """So many faults, every kind about equally often, in an order and of lengths by the seed."""
    rng = random.Random(seed)
    names = [name for name in MIX if name not in without]
    found: list[Cut] = []
    while len(found) < cuts:
        rng.shuffle(names)
        for name in names:
            least, most = MIX[name]
            # Short ones are more frequent, as they are in life.
            seconds = least + (min(most, longest) - least) * rng.random() ** 2 if most else 0.0
            found.append(Cut(name, rng.choice(workers), round(seconds, 1)))
    return found[:cuts]


def provoke(faults: Faults, cut: Cut, chance: random.Random) -> None:
    """Do it, wait as long as it lasts, and put it right."""
    worker = faults.lab.machine(cut.worker)
    if cut.name in {"kill_lane", "swallow_lane", "slow_lane"}:
        connections = until(
            lambda: faults.connections(worker), 60, lambda: f"{cut.worker} has no connection"
        )
        connection = chance.choice(connections)
        if cut.name == "kill_lane":
            kill(connection)
            return
        undo = getattr(faults, cut.name)(worker, connection)
    else:
        undo = getattr(faults, cut.name)(worker)
    if cut.seconds:
        try:
            time.sleep(cut.seconds)
        finally:
            undo()


def strict_firewalls(lab: Lab, servers: Sequence[str] = ("head",)) -> None:
    """Firewalls that drop whatever belongs to no connection that they saw begin; SSH comes in at
    the `servers`."""
    for machine in lab.machines:
        # The kernel's own default picks connections up in the middle. Written from within: what
        # this file stands for is decided by the network of whoever opens it.
        loose = "/proc/sys/net/netfilter/nf_conntrack_tcp_loose"
        machine.run(["sh", "-c", f"echo 0 > {loose} && grep -qx 0 {loose}"], user="root")
        machine.firewall([22] if machine.name in servers else [], strict=True)
