"""Ways between two machines of tests/lab, a head and a worker: rayfwd's levels, and what else is.

Each is a context manager that yields how programs there reach each other. Needs root, as the lab
does; Ray does not run, so that nothing else is about.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab.cluster import Cluster
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, until
from tests.need import tool
from tests.setup_envs import LIBRARIES

HERE = Path(__file__).parent
PORT = 20005
"""Of the server on the head: of its plan, and Ray does not have it here."""
STORE = 20006
"""Of torch's store there."""
CHOSEN = range(45001, 45240, 2)
"""Those of the ports from 45000 on that are forwarded by name, where each has to be: the kernel
gives a program that listens an odd one first, and one that dials an even one."""


@dataclass(frozen=True, slots=True)
class Between:
    """How the two reach each other."""

    lab: Lab
    addresses: tuple[str, str]
    """Under which each is known: the head's, the worker's."""
    interface: str
    """Which has the machine's own."""


Way = Callable[[Lab], contextlib.AbstractContextManager[Between]]


def address_of(machine: Machine, interface: str, *addresses: str) -> None:
    """Give it an interface with these addresses."""
    machine.network_command("ip", "link", "add", interface, "type", "veth", "peer", "name", "far0")
    for address in addresses:
        machine.network_command("ip", "addr", "add", f"{address}/32", "dev", interface)
    for name in ("far0", interface):
        machine.network_command("ip", "link", "set", name, "up")


@contextlib.contextmanager
def by_rayfwd(lab: Lab, level: str) -> Iterator[Between]:
    """The daemons of the two at that level."""
    cluster = Cluster(lab, workers=("w1",), ray={"start": False}, network={"level": level})
    lab.machine("head").start_sshd()
    for name in cluster.names:
        cluster.start_node(name, net_admin=level == "overlay")
    cluster.wait_ready()
    for daemon in cluster.daemons:
        found = daemon.status()["network"]["level"]
        assert found == level, f"{daemon.machine.name}: {found}"
    addresses = [daemon.status()["node"]["address"] for daemon in cluster.daemons]
    yield Between(lab, (addresses[0], addresses[1]), "rayfwd0")
    cluster.stop()


@contextlib.contextmanager
def by_ssh(lab: Lab) -> Iterator[Between]:
    """One `ssh` of the worker's with `-L` and `-R` for every port that there may be."""
    head, worker = lab.machine("head"), lab.machine("w1")
    own = ("10.99.0.1", "10.99.0.2")
    address_of(head, "way0", *own)
    address_of(worker, "way0", *reversed(own))
    few = f"net.ipv4.ip_local_port_range={CHOSEN[0] - 1} {CHOSEN[-1]}"
    for machine in (head, worker):
        machine.run(["sysctl", "-qw", few], user="root")
    head.start_sshd(("-o", "GatewayPorts=clientspecified"))
    # torch's store listens on every address of the head, so nobody else can at its port there.
    forwards = [f"-L{own[0]}:{port}:{own[0]}:{port}" for port in (PORT, STORE, *CHOSEN)]
    forwards += [f"-R{own[1]}:{port}:{own[1]}:{port}" for port in CHOSEN]
    worker.popen([tool("ssh"), "-N", *forwards, f"ray@{head.address}"])
    there = f"src {own[0]}:{PORT}"
    until(lambda: worker.network_command("ss", "-Hltn", there).strip(), 30, lab.tails)
    yield Between(lab, own, "way0")


@contextlib.contextmanager
def by_wireguard(lab: Lab) -> Iterator[Between]:
    """wireguard-go on both, by the one UDP port that the head's firewall lets in."""
    head, worker = lab.machine("head"), lab.machine("w1")
    own = ("10.98.0.1", "10.98.0.2")
    secret = [_said("wg", "genkey") for _ in own]
    public = [_said("wg", "pubkey", text=key) for key in secret]
    head.nft("add rule inet firewall input udp dport 51820 accept")
    for number, machine in enumerate((head, worker)):
        other = 1 - number
        machine.host_path("/run/wireguard").mkdir(exist_ok=True)
        machine.write("/run/wireguard/key", secret[number])
        peer = ["peer", public[other], "allowed-ips", f"{own[other]}/32"]
        peer += [] if machine is head else ["endpoint", f"{head.address}:51820"]
        machine.popen([tool("wireguard-go"), "-f", "wg0"], user="root")
        there = machine.host_path("/run/wireguard/wg0.sock")
        until(there.exists, 20, lab.tails)
        port = ["listen-port", "51820"] if machine is head else []
        line = ["wg", "set", "wg0", *port, "private-key", "/run/wireguard/key", *peer]
        machine.run(line, user="root")
        machine.network_command("ip", "addr", "add", f"{own[number]}/24", "dev", "wg0")
        machine.network_command("ip", "link", "set", "wg0", "up")
        machine.nft("insert rule inet firewall input iifname wg0 accept")
    yield Between(lab, own, "wg0")


@contextlib.contextmanager
def by_sshuttle(lab: Lab) -> Iterator[Between]:
    """sshuttle on the worker; it leads to the head, and nothing leads back."""
    head, worker = lab.machine("head"), lab.machine("w1")
    own = "10.97.0.1"
    address_of(head, "way0", own)
    head.start_sshd()
    keys = f"{HOME}/.ssh"
    ssh = f"ssh -i {keys}/id_ed25519 -o UserKnownHostsFile={keys}/known_hosts"
    argv = ["sshuttle", "--method", "nft", "-e", ssh, "-r", f"ray@{head.address}", f"{own}/32"]
    running = worker.popen(argv, user="root")
    until(lambda: "Connected" in running.log.read_text(), 30, running.log.read_text)
    # sshuttle takes what the machine would send somewhere; others have a default route for it.
    worker.network_command("ip", "route", "add", own, "via", head.address)
    yield Between(lab, (own, ""), "")


def _said(*argv: str, text: str | None = None) -> str:
    ran = subprocess.run(argv, input=text, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


WAYS: dict[str, Way] = {
    "ssh -L": by_ssh,
    "rayfwd, overlay": lambda lab: by_rayfwd(lab, "overlay"),
    "rayfwd, listeners": lambda lab: by_rayfwd(lab, "listeners"),
    "WireGuard (wireguard-go)": by_wireguard,
    "sshuttle": by_sshuttle,
}


PROGRAMS = {"WireGuard (wireguard-go)": ("wg", "wireguard-go"), "sshuttle": ("sshuttle",)}
"""What a way takes that the tests do not install."""


def missing(way: str) -> list[str]:
    """The programs that this machine lacks for it."""
    return [name for name in PROGRAMS.get(way, ()) if shutil.which(tool(name)) is None]


def measure(between: Between, size: int, seconds: float) -> dict[str, float]:
    """What the client on the worker finds of a server on the head."""
    lab = between.lab
    server = lab.machine("head").popen(
        [*_script(lab, "head", "peers.py"), "serve", between.addresses[0], str(PORT)]
    )
    until(lambda: "listening" in server.log.read_text(), 20, server.log.read_text)
    words = [between.addresses[0], PORT, size, seconds]
    argv = [*_script(lab, "w1", "peers.py"), "measure", *map(str, words)]
    found: dict[str, float] = json.loads(lab.machine("w1").run(argv, timeout=300).stdout)
    return found


def train(between: Between, steps: int) -> dict[str, float]:
    """What a training takes that has a rank on each."""
    lab, python = between.lab, lab_python(between.lab)
    running = []
    for rank, name in enumerate(("head", "w1")):
        script = _script(lab, name, "ddp_step.py")[1]
        words = [rank, between.addresses[0], STORE, steps]
        env = {"GLOO_SOCKET_IFNAME": between.interface}
        argv = [python, script, *map(str, words)]
        running.append(lab.machine(name).popen(argv, env=env))
    for process in running:
        assert process.wait(240) == 0, process.log.read_text()[-4000:]
    found: dict[str, float] = json.loads(running[0].log.read_text().splitlines()[-1])
    return found


def lab_python(lab: Lab) -> str:
    """The Python that has torch."""
    return str(lab.machine("head").ray_python(LIBRARIES))


def _script(lab: Lab, name: str, script: str) -> list[str]:
    """A command of that file on that machine, to which words may follow."""
    machine = lab.machine(name)
    machine.write(f"{HOME}/{script}", (HERE / script).read_text())
    assert lab.rayfwd is not None
    return [str(lab.rayfwd.with_name("python")), f"{HOME}/{script}"]
