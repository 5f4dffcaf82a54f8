"""The overlay network as a service: `rayfwd-net`, which `rayfwd init` makes where rayfwd is root's.

One cluster for all tests, which run in the order of this file. The worker begins with the units of
0.1.0, which had no overlay.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.process import Process, until
from tests.systemd import install
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


CLOSED = """
import errno, socket, struct
for _ in range(10):
    with socket.socket() as sock:
        assert sock.connect_ex(("127.77.0.2", 15678)) == errno.ECONNREFUSED
        about = sock.getsockopt(socket.SOL_TCP, socket.TCP_INFO, 104)
        print(*struct.unpack_from("=I", about, 100))
"""
"""How often the kernel had to send the first packet again, each time a closed port is dialled."""


STANDING = """
import socket, sys, time
with socket.create_connection(("127.77.0.2", int(sys.argv[1])), 60) as sock:
    while True:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        print("x", end="", flush=True)
        time.sleep(0.1)
"""
ANSWER = """
import socket
with socket.create_server(("127.77.0.2", 0)) as server:
    print(server.getsockname()[1], flush=True)
    sock, _ = server.accept()
    while word := sock.recv(100):
        sock.sendall(word)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Machines that have ufw, firewalld and iptables, all of them switched off."""
    with Lab(tmp_path_factory.mktemp("lab"), install.with_firewalls()) as made:
        made.boot()
        yield made


OLD_UNITS = Path(__file__).parents[1] / "fixtures" / "units-0.1.0"
"""As `rayfwd init` of 0.1.0 made them on these machines."""
MANIFEST = "/var/lib/rayfwd-init.json"


def give_units_of_0_1_0(machine: Machine) -> None:
    """And the record that it kept of them. Its configuration was the same."""
    machine.run(["rm", f"/etc/systemd/system/{UNIT}.service"])
    made = json.loads(machine.read(MANIFEST))
    entries = {e["id"]: e for e in made["made"] if not e["id"].endswith(f"{UNIT}.service")}
    for path in OLD_UNITS.iterdir():
        text, place = path.read_text(), f"/etc/systemd/system/{path.name}"
        machine.write(place, text)
        entries[place]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    machine.write(MANIFEST, json.dumps({**made, "made": list(entries.values())}), mode=0o600)
    machine.systemctl("daemon-reload")


@pytest.fixture(scope="module")
def auto(lab: Lab) -> Cluster:
    """Set up, and started at the best level that each machine allows."""
    cluster = Cluster(lab, level=None)
    cluster.set_up()
    give_units_of_0_1_0(cluster.worker)
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


@pytest.fixture(scope="module")
def standing(auto: Cluster) -> Process:
    """A connection from the head to the worker that says something all the time."""
    server = auto.worker.popen(["python3", "-c", ANSWER], user="ray")
    until(lambda: server.log.read_text().strip(), 20, lambda: "the program listens")
    return auto.head.popen(["python3", "-c", STANDING, server.log.read_text().strip()], user="ray")


def goes_on(standing: Process) -> None:
    """It is not broken, and gets further."""
    before = len(standing.log.read_text())
    until(
        lambda: standing.poll() is not None or len(standing.log.read_text()) > before + 3,
        60,
        standing.log.read_text,
    )
    assert standing.poll() is None, standing.log.read_text()


def left(machine: Machine) -> list[str]:
    """What there is of the overlay: the interface, and the table."""
    links = machine.run(["ip", "-brief", "link"]).stdout
    tables = machine.run(["nft", "list", "tables"]).stdout
    assert "table inet firewall" in tables, "the machine's own"
    return [line for line in f"{links}{tables}".splitlines() if "rayfwd" in line]


def test_with_the_units_of_0_1_0_it_says_what_is_missing(auto: Cluster) -> None:
    """It works as before, beside a head with the overlay."""
    network = auto.worker.status()["network"]
    assert network["level"] == "listeners"
    assert "there is no service rayfwd-net" in network["why"]
    assert "`rayfwd init`" in network["remedy"]
    assert f"to get the overlay: {network['remedy']}" in doctor(auto.worker)
    assert auto.head.status()["network"]["level"] == "overlay"
    assert left(auto.worker) == []


def doctor(machine: Machine) -> str:
    """Its row on the network."""
    rows = json.loads(machine.run(["rayfwd", "doctor", "--json"], check=False).stdout)["checks"]
    (row,) = [row for row in rows if row["check"] == "network"]
    return str(row["said"])


@pytest.mark.runs("rayfwd init worker", "systemctl restart rayfwd")
def test_one_step_upgrades_it_and_restarts_its_ray_once(auto: Cluster) -> None:
    """Which is said before it happens."""
    worker, before = auto.worker, auto.raylets()
    said = worker.run(["rayfwd", "init", "worker"]).stdout
    assert "renewed   /etc/systemd/system/rayfwd.service\n" in said
    assert f"created   /etc/systemd/system/{UNIT}.service\n" in said
    assert "This node's Ray is then restarted once" in said
    assert said.splitlines()[-1].strip() == "systemctl restart rayfwd"
    assert "restarts this node's Ray once" in doctor(worker)
    assert (auto.raylets(), left(worker)) == (before, []), "nothing has happened yet"
    worker.systemctl("restart", "rayfwd")
    worker.wait_for(ActiveState="active", SubState="running")
    status = worker.status()
    assert (status["network"]["level"], status["node"]["level"]) == ("overlay", "overlay")
    after = auto.raylets()
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    assert len(worker.events("ray_restarting")) == 1
    assert len(worker.events("ray_started")) == 2
    assert "Nothing had to be done" in worker.run(["rayfwd", "init", "worker"]).stdout


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


def test_after_a_reboot_it_is_there_again(auto: Cluster) -> None:
    """And between the two boots there is nothing of it, in a network that outlives the machine."""
    worker = auto.worker
    node = worker.status()["node"]
    worker.poweroff()
    for what in (("ip", "-brief", "link"), ("nft", "list", "tables")):
        assert "rayfwd" not in worker.network_command(*what)
    worker.boot()
    auto.wait_ready()
    status = worker.status()
    assert status["node"] == node
    assert status["network"]["level"] == node["level"] == "overlay"
    assert worker.show(UNIT)["StatusText"] == f"the overlay of {node['address']} is up"
    assert auto.addresses_that_work() == BOTH
    until(lambda: not worker.status()["conditions"], 30, lambda: f"{worker.status()['conditions']}")


def test_it_has_few_rights_of_roots(auto: Cluster) -> None:
    for machine in auto.lab.machines:
        pid = machine.show(UNIT)["MainPID"]
        lines = machine.read(f"/proc/{pid}/status").splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        # CAP_NET_ADMIN, CAP_NET_RAW, CAP_CHOWN
        assert int(status["CapEff"], 16) == 1 << 12 | 1 << 13 | 1 << 0
        assert status["CapBnd"] == status["CapEff"]
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        # 2.1: it sends packets, on loopback only.
        asked = ["systemd-analyze", "security", "--no-pager", "--threshold=21", UNIT]
        ran = machine.run(asked, check=False)
        assert ran.returncode == 0, ran.stdout
        owned = machine.run(["stat", "-c", "%a %U", SOCKET]).stdout
        assert owned == "600 ray\n"


def test_it_carries_every_port_of_rays_user(auto: Cluster, port: int) -> None:
    assert dialled(auto.head, port) == BOTH[0]
    assert dialled(auto.head, port, "nobody") == "ConnectionRefusedError"
    refused = auto.head.status
    until(lambda: refused()["network"]["refused"]["refused_user"], 30, lambda: f"{refused()}")


def test_a_closed_port_is_refused_at_once(auto: Cluster) -> None:
    """The service may send what it has held up, and does so when the other node has answered."""
    asked = ["runuser", "-u", "ray", "--", "python3", "-c", CLOSED]
    assert "0" in auto.head.run(asked).stdout.split()


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


UFW = (("ufw", "allow", "22/tcp"), ("ufw", "--force", "enable"), ("ufw", "reload"))
FIREWALLD = (
    ("systemctl", "start", "firewalld"),
    ("firewall-cmd", "--reload"),
    ("firewall-cmd", "--complete-reload"),
)
DOCKER = (
    ("iptables-nft", "-t", "nat", "-N", "DOCKER"),
    ("iptables-nft", "-t", "nat", "-A", "DOCKER", "-i", "docker0", "-j", "RETURN"),
    (
        *("iptables-nft", "-t", "nat", "-A", "OUTPUT", "!", "-d", "127.0.0.0/8"),
        *("-m", "addrtype", "--dst-type", "LOCAL", "-j", "DOCKER"),
    ),
    ("iptables-nft", "-P", "FORWARD", "DROP"),
    ("iptables", "-F"),
    ("iptables-nft", "-t", "nat", "-F"),
    ("nft", "flush", "ruleset"),
)


@pytest.mark.parametrize(
    ("switched", "off"),
    [
        # Its three commands call iptables a hundred times.
        pytest.param(
            UFW,
            ("ufw", "disable"),
            marks=[pytest.mark.thorough, pytest.mark.runs("ufw enable", "ufw reload")],
        ),
        pytest.param(
            FIREWALLD,
            ("systemctl", "stop", "firewalld"),
            marks=pytest.mark.runs("firewall-cmd --reload", "firewall-cmd --complete-reload"),
        ),
        pytest.param(
            DOCKER,
            ("systemctl", "restart", "nftables"),
            marks=pytest.mark.runs("iptables -F"),
        ),
    ],
    ids=["ufw", "firewalld", "iptables"],
)
def test_firewalls_are_switched_underneath(
    auto: Cluster,
    port: int,
    standing: Process,
    switched: tuple[tuple[str, ...], ...],
    off: tuple[str, ...],
) -> None:
    """On the machine that dials and on the one that is dialled; what stands goes on."""
    for machine in auto.lab.machines:
        for command in switched:
            machine.run(command, timeout=90)
            wait_dialled(auto.head, port)
            goes_on(standing)
            assert dialled(auto.head, port, "nobody") == "ConnectionRefusedError"
        machine.run(off, timeout=90)
        machine.systemctl("restart", "nftables")  # the machine's own, which they put aside
        wait_dialled(auto.head, port)
    goes_on(standing)
    for machine in auto.lab.machines:
        conditions = machine.status()["conditions"]
        assert not [c for c in conditions if c["code"].startswith("overlay")], conditions


def test_killed_it_is_there_again_and_what_stands_goes_on(
    auto: Cluster, port: int, standing: Process
) -> None:
    before = auto.head.show(UNIT)["NRestarts"]
    auto.head.systemctl("kill", "--signal=SIGKILL", UNIT)
    again = str(int(before) + 1)
    auto.head.wait_for(UNIT, NRestarts=again, ActiveState="active")
    wait_dialled(auto.head, port)
    goes_on(standing)


@pytest.mark.runs("systemctl restart rayfwd-net", "systemctl restart rayfwd-net rayfwd")
def test_restarted_it_costs_nothing(auto: Cluster, port: int, standing: Process) -> None:
    """Alone, and with the daemon as in an upgrade, on both sides of what stands."""
    for machine in auto.lab.machines:
        before = machine.show(UNIT)["MainPID"]
        machine.systemctl("restart", UNIT)
        assert dialled(auto.head, port) == BOTH[0]
        goes_on(standing)
        machine.systemctl("restart", UNIT, "rayfwd")
        machine.wait_for(ActiveState="active", SubState="running")
        assert machine.show(UNIT)["MainPID"] != before
        goes_on(standing)
        assert len(machine.events("overlay_handed_on", unit=UNIT)) == 2
        assert len(machine.events("overlay_taken_over", unit=UNIT)) >= 2
        conditions = machine.status()["conditions"]
        assert not [c for c in conditions if c["code"].startswith("overlay")], conditions
    wait_dialled(auto.head, port)


ANOTHER = "10.77.0.0/16"


def unit_for_another_network() -> str:
    """What docs/overlay.md says to enter."""
    text = (Path(__file__).parents[2] / "docs" / "overlay.md").read_text()
    _, block = text.split("`systemctl edit rayfwd-net` and enter:\n\n")
    return inspect.cleandoc(block.partition("\n\n")[0]) + "\n"


@pytest.mark.runs("systemctl stop rayfwd-net", "systemctl start rayfwd-net")
@pytest.mark.runs("systemctl edit rayfwd-net")
def test_stopped_it_leaves_nothing(auto: Cluster, port: int) -> None:
    """The daemon says so, and goes on with it as soon as it is started."""
    head = auto.head
    head.systemctl("stop", UNIT)
    assert head.show(UNIT)["Result"] == "success"
    assert left(head) == []

    def codes() -> list[str]:
        return [condition["code"] for condition in head.status()["conditions"]]

    until(lambda: "overlay_keeper_absent" in codes(), 30, lambda: f"it is said: {codes()}")
    head.edit_unit(UNIT, unit_for_another_network())
    head.systemctl("start", UNIT)
    arguments = head.read(f"/proc/{head.show(UNIT)['MainPID']}/cmdline").split("\0")
    assert arguments[arguments.index("--network") + 1] == ANOTHER
    head.systemctl("revert", UNIT)
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
