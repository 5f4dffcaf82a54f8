"""The overlay's interface and rules on one machine, made by the real keeper with the real nft."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from rayfwd.network.ruleset import Rules
from rayfwd.system.control import ask
from tests.lab.machines import Lab, Machine
from tests.lab.process import UID, Process, until

pytestmark = pytest.mark.lab

SOCKET = "/run/overlay.sock"
"""Where root alone may write, as in the service."""
OWN, OTHER, UNKNOWN = "127.77.0.1", "127.77.0.2", "127.77.0.9"
PORT = 19977
RULES = Rules(
    interface="rayfwd0",
    network="127.77.0.0/16",
    own=OWN,
    port=PORT,
    uids=frozenset({0, UID}),
    open_ports={OTHER: ((20000, 20010), (41000, 41000))},
    guarded=((20020, 20040),),
)

ASK = """
import json, sys
from pathlib import Path
from rayfwd.problems import ProblemError
from rayfwd.system.control import ask
try:
    answer = ask(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), 30)
except ProblemError as exc:
    answer = {"error": exc.problem.code.name, "cause": exc.problem.cause}
print(json.dumps(answer))
"""

DIAL = """
import json, socket, sys
sock = socket.socket()
sock.settimeout(10)
if len(sys.argv) > 3:
    sock.bind((sys.argv[3], 0))
print("dialling", flush=True)
try:
    sock.connect((sys.argv[1], int(sys.argv[2])))
    print(sock.recv(100).decode() or "reset")
except OSError as exc:
    print(type(exc).__name__, exc.errno)
"""

ECHO = """
import socket, struct
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("127.0.0.1", 19977))
server.listen()
print("listening", flush=True)
while True:
    sock, _ = server.accept()
    raw = sock.getsockopt(socket.SOL_IP, 80, 16)
    port, address = struct.unpack(">2xH4s8x", raw)
    sock.sendall(f"{socket.inet_ntoa(address)}:{port}".encode())
    sock.close()
"""

PAIR = """
import socket, threading, time
server = socket.create_server(("127.0.0.1", 19977))
program = socket.create_connection(("127.77.0.2", 20005), 60)
daemon, _ = server.accept()
daemon.settimeout(60)
own = socket.create_server(("", 20006))
def stand_in():
    while True:
        own.accept()
        print("own", flush=True)
threading.Thread(target=stand_in, daemon=True).start()
while True:
    for near, far in ((program, daemon), (daemon, program)):
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        print("x", end="", flush=True)
        time.sleep(0.05)
"""
"""A redirected connection, both ends of which say something in turn; and a program of this machine
that listens on a port which other nodes have as well."""


HELLO = """
import socket, sys
server = socket.create_server(("", int(sys.argv[1])))
print("listening", flush=True)
while True:
    sock, _ = server.accept()
    sock.sendall(b"hello")
    sock.close()
"""


class Overlay:
    """A keeper in a machine, and what its rules do to who dials there."""

    def __init__(self, machine: Machine, rayfwd: Path) -> None:
        self.machine = machine
        self.python = str(rayfwd.with_name("python"))
        self.rayfwd = str(rayfwd)
        self.keeper = self.start()

    def start(self, *further: str) -> Process:
        argv = [self.rayfwd, "overlay", SOCKET, "--user", "ray", *further]
        keeper = self.machine.popen(argv, user="root")
        until(
            lambda: "overlay_keeper_listening" in keeper.log.read_text(), 30, keeper.log.read_text
        )
        return keeper

    def ask(self, verb: str, rules: dict[str, Any] | None = None, user: str = "ray") -> Any:
        args = {} if rules is None else {"rules": rules}
        argv = [self.python, "-c", ASK, SOCKET, verb, json.dumps(args)]
        return json.loads(self.machine.run(argv, user=user).stdout)

    def dial(self, address: str, port: int, *, user: str = "ray", source: str = "") -> str:
        argv = [self.python, "-c", DIAL, address, str(port), *([source] if source else [])]
        if user == "nobody":
            argv, user = ["setpriv", "--reuid=65534", "--clear-groups", *argv], "root"
        return self.machine.run(argv, user=user).stdout.removeprefix("dialling").strip()

    def held_again(self, port: int) -> bool:
        """Whether the second packet of a connection to that port of another node was dropped."""
        listed = self.machine.network_command("nft", "list", "set", "inet", "rayfwd0", "held_again")
        return f"{OTHER} . {port} . " in listed

    def tables(self) -> str:
        return self.machine.network_command("nft", "list", "tables")

    def left(self) -> tuple[bool, bool]:
        """Whether interface and table are there."""
        links = self.machine.network_command("ip", "-o", "link")
        return "rayfwd0" in links, "rayfwd0" in self.machine.network_command(
            "nft", "list", "tables"
        )


@pytest.fixture(scope="module")
def overlay(module_lab: Lab, rayfwd: Path) -> Overlay:
    machine = module_lab.machine("w1")
    made = Overlay(machine, rayfwd)
    server = machine.popen([made.python, "-c", ECHO])
    until(lambda: "listening" in server.log.read_text(), 20, server.log.read_text)
    assert made.ask("up", RULES.to_wire()) == {}
    return made


def test_an_open_port_leads_here_with_its_destination(overlay: Overlay) -> None:
    assert overlay.dial(OTHER, 20005) == f"{OTHER}:20005"
    assert overlay.dial(OTHER, 41000, user="root") == f"{OTHER}:41000"
    assert overlay.dial(OTHER, 20005, source=OWN) == f"{OTHER}:20005"


def test_connect_fails_as_on_a_lan(overlay: Overlay) -> None:
    """Refused where nothing listens; unreachable where there is no such node."""
    assert overlay.dial(OTHER, 22) == "ConnectionRefusedError 111"
    assert overlay.dial(UNKNOWN, 20005) == "OSError 113"


def test_a_port_that_opens_a_moment_later_is_not_refused(overlay: Overlay) -> None:
    """What is not known to be open is held twice, until the kernel tries a third time: on a busy
    machine the news that a port has opened may be late."""
    # As before Linux 6.5: the third packet comes two seconds after the second one, and not one.
    argv = ["sysctl", "-w", "net.ipv4.tcp_syn_linear_timeouts=0"]
    overlay.machine.run(argv, user="root", check=False)
    dialling = overlay.machine.popen([overlay.python, "-c", DIAL, OTHER, "45000"])
    wire = {**RULES.to_wire(), "open_ports": {OTHER: [[20000, 20010], [45000, 45000]]}}
    until(lambda: overlay.held_again(45000), 20, dialling.log.read_text)
    # From this process: a command may take more than the two seconds to start.
    assert ask(overlay.machine.host_path(SOCKET), "update", {"rules": wire}) == {}
    assert dialling.wait(20) == 0
    assert dialling.log.read_text().split()[-1] == f"{OTHER}:45000"
    assert overlay.ask("update", RULES.to_wire()) == {}
    before = overlay.ask("found")["refused"]["refused_port"]
    assert overlay.dial(OTHER, 45000) == "ConnectionRefusedError 111", "and one that does not is"
    assert overlay.ask("found")["refused"]["refused_port"] == before + 1


ANSWER = """
import sys
from pathlib import Path
from rayfwd.system.control import ask
path = Path(sys.argv[1])
while True:
    for address, port in ask(path, "dialled", {}, 60)["places"]:
        ask(path, "decide", {"places": [[address, port, port == 45001]]}, 30)
"""
"""In the daemon's place: of all ports that are not known, 45001 is open."""
RETRANSMITTED = """
import socket, struct, sys
for _ in range(10):
    with socket.socket() as sock:
        sock.settimeout(10)
        error = sock.connect_ex((sys.argv[1], int(sys.argv[2])))
        said = "" if error else sock.recv(100).decode()
        about = sock.getsockopt(socket.SOL_TCP, socket.TCP_INFO, 104)
        (again,) = struct.unpack_from("=I", about, 100)
        if again == 0:
            print(error, said)
            break
"""
"""What the first connection gives whose first packet is not sent again by the kernel: that happens
a second later, when whoever is asked has had no turn by then."""


def test_who_is_asked_about_a_port_decides_at_once(overlay: Overlay) -> None:
    """Nothing is to be sent twice by who dials, neither where it is open nor where it is not."""
    answering = overlay.machine.popen([overlay.python, "-c", ANSWER, SOCKET])
    try:
        for port, met in ((45001, f"0 {OTHER}:45001"), (45002, "111")):
            argv = [overlay.python, "-c", RETRANSMITTED, OTHER, str(port)]
            before = overlay.ask("found")["refused"]["refused_port"]
            assert overlay.machine.run(argv, timeout=120).stdout.strip() == met, port
            refused = overlay.ask("found")["refused"]["refused_port"] - before
            assert refused > 0 or port == 45001, "it is counted"
    finally:
        answering.signal(signal.SIGKILL)
        answering.wait(20)


def test_another_user_is_refused(overlay: Overlay) -> None:
    assert overlay.dial(OTHER, 20005, user="nobody") == "ConnectionRefusedError 111"
    assert overlay.ask("found")["refused"]["refused_user"] >= 1


def test_whose_connections_are_redirected_is_roots_to_say(overlay: Overlay) -> None:
    """Not the daemon's, whose user might be somebody else by now: it asks for everybody's here."""
    file, nobody = "/run/rayfwd.toml", 65534
    stop(overlay)
    overlay.keeper = overlay.start("--config", file)
    everybodys = {**RULES.to_wire(), "uids": [0, UID, nobody]}
    says = '[listeners]\nusers = ["nobody", "who-is-not-known-here"]\n'
    try:
        for mode, theirs in ((None, False), ("664", False), ("640", True)):
            if mode is not None:
                written = f"printf '%s' '{says}' >{file}; chgrp ray {file}; chmod {mode} {file}"
                overlay.machine.run(["sh", "-c", written], user="root")
            for verb in ("up", "update"):
                assert overlay.ask(verb, everybodys) == {}
            assert overlay.dial(OTHER, 20005) == f"{OTHER}:20005"
            said = f"{OTHER}:20005" if theirs else "ConnectionRefusedError 111"
            assert overlay.dial(OTHER, 20005, user="nobody") == said, mode
            left_out = overlay.ask("found")["left_out"]
            if theirs:
                assert left_out is None
            else:
                assert left_out["users"] == ["nobody"]
                assert file in left_out["cause"]
        said = overlay.keeper.log.read_text()
        assert "No such file or directory" in said
        assert "other users can write to" in said
        assert said.count("overlay_users_left_out") == 2, "each cause is said once"
    finally:
        stop(overlay)
        overlay.keeper = overlay.start()
        assert overlay.ask("up", RULES.to_wire()) == {}


def stop(overlay: Overlay) -> None:
    overlay.keeper.signal(signal.SIGTERM)
    assert overlay.keeper.wait(20) == 0


def test_who_binds_another_nodes_address_hears_nothing(overlay: Overlay) -> None:
    """A redirect comes before any listener."""
    squat = "import socket,time\ns=socket.socket(); s.bind(('127.77.0.2', 20003)); s.listen()\n"
    argv = [overlay.python, "-c", squat + "print('listening', flush=True); time.sleep(60)"]
    squatter = overlay.machine.popen(argv)
    until(lambda: "listening" in squatter.log.read_text(), 20, squatter.log.read_text)
    assert overlay.dial(OTHER, 20003) == f"{OTHER}:20003"
    squatter.signal(signal.SIGKILL)
    squatter.wait(20)


def test_the_interface_has_the_nodes_address(overlay: Overlay) -> None:
    found = overlay.ask("found")
    assert (found["interface"], found["address"], found["table"]) == (True, True, True)
    assert f"inet {OWN}/32" in overlay.machine.network_command("ip", "addr", "show", "rayfwd0")


NAMED = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.connect(("127.77.0.2", 9))
    print(sock.getsockname()[0])
"""
"""As programs find out which address of theirs another node reaches."""


def test_who_asks_which_address_leads_to_another_node_gets_the_nodes(overlay: Overlay) -> None:
    assert overlay.machine.run([overlay.python, "-c", NAMED]).stdout.strip() == OWN


def test_ports_are_updated_without_a_gap(overlay: Overlay) -> None:
    wire = {**RULES.to_wire(), "open_ports": {OTHER: [[20000, 20010], [43210, 43210]]}}
    assert overlay.dial(OTHER, 43210) == "ConnectionRefusedError 111"
    assert overlay.ask("update", wire) == {}
    assert overlay.dial(OTHER, 43210) == f"{OTHER}:43210"
    assert overlay.dial(OTHER, 41000) == "ConnectionRefusedError 111"
    assert overlay.ask("update", RULES.to_wire()) == {}


UNTRACKED = "table ip raw { chain in { type filter hook prerouting priority -300; notrack; }; }\n"
"""As for servers with very many connections: of none of them the kernel knows whether it is new."""


@pytest.mark.parametrize("beside", ["", UNTRACKED], ids=["alone", "without connection tracking"])
def test_guarded_ports_show_nothing_to_other_machines(
    overlay: Overlay, module_lab: Lab, beside: str
) -> None:
    machine, outside = overlay.machine, module_lab.machine("w2")
    machine.nft("table inet firewall\ndelete table inet firewall\n")  # a machine without any
    machine.nft(beside)
    serve = (
        "import socket,time\n"
        "for port in (20030, 20050):\n"
        "    globals()[f's{port}'] = s = socket.socket(); s.bind(('', port)); s.listen()\n"
        "print('listening', flush=True); time.sleep(60)"
    )
    server = machine.popen([overlay.python, "-c", serve])
    until(lambda: "listening" in server.log.read_text(), 20, server.log.read_text)
    dial = "import socket; socket.create_connection(({!r}, {}), 2)"
    for port, reached in ((20030, False), (20050, True)):
        argv = [overlay.python, "-c", dial.format(machine.address, port)]
        assert (outside.run(argv, check=False).returncode == 0) is reached, port
        argv = [overlay.python, "-c", dial.format(OWN, port)]
        assert machine.run(argv, check=False).returncode == 0, "the machine itself does"
    server.signal(signal.SIGKILL)
    server.wait(20)
    if beside:
        machine.nft("delete table ip raw\n")
    machine.firewall()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"network": "10.0.0.0/8", "own": "10.0.0.1", "open_ports": {}}, "10.0.0.0/8"),
        ({"network": "127.0.0.0/16", "own": "127.0.0.53", "open_ports": {}}, "127.0.0.0/16"),
        ({"guarded": [[22, 22]]}, "port 22"),
        ({"port": 80}, "port 80"),
        ({"interface": "eth0"}, "eth0"),
        ({"interface": "a;flush"}, "a;flush"),
        ({"own": "127.77.0.1; flush ruleset"}, "flush"),
        ({"uids": ["0 } accept"]}, "accept"),
        ({"open_ports": {"127.77.0.2": [["1 }", 2]]}}, "1 }"),
        ({"open_ports": {OTHER: [[5, 4]]}}, "5 to 4"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_it_may_not_have_is_refused(
    overlay: Overlay, change: dict[str, Any], said: str
) -> None:
    answer = overlay.ask("up", {**RULES.to_wire(), **change})
    assert answer["error"] == "overlay_refused"
    assert said in answer["cause"]
    assert overlay.dial(OTHER, 20005) == f"{OTHER}:20005", "and what stands goes on"


def test_others_may_not_ask(overlay: Overlay) -> None:
    ask = ["setpriv", "--reuid=65534", "--clear-groups", overlay.python, "-c", ASK, SOCKET, "down"]
    answer = json.loads(overlay.machine.run([*ask, "{}"], user="root").stdout)
    assert answer["error"] == "daemon_not_permitted"


def test_beside_other_tables(overlay: Overlay) -> None:
    """What iptables-nft and others have made stays, and is not in the way."""
    other = (
        "table ip nat { chain OUTPUT { type nat hook output priority -100; policy accept;\n"
        "ip daddr != 127.0.0.0/8 tcp dport 1 redirect to :2\n}\n}\n"
    )
    overlay.machine.nft(other)
    assert overlay.dial(OTHER, 20005) == f"{OTHER}:20005"
    assert overlay.ask("down") == {}
    assert "chain OUTPUT" in overlay.machine.network_command("nft", "list", "table", "ip", "nat")
    assert overlay.ask("up", RULES.to_wire()) == {}


@pytest.mark.runs("conntrack -F", "nft flush ruleset")
def test_what_stands_outlives_all_that_is_done_to_the_kernels_tables(
    module_lab: Lab, rayfwd: Path
) -> None:
    """They are flushed, and the keeper is killed; and at no moment does this machine answer in
    another node's place."""
    machine = module_lab.machine("w2")
    overlay = Overlay(machine, rayfwd)
    assert overlay.ask("up", RULES.to_wire()) == {}
    pair = machine.popen([overlay.python, "-c", PAIR])

    def goes_on() -> None:
        before = len(pair.log.read_text())
        until(
            lambda: pair.poll() is not None or len(pair.log.read_text()) > before + 4,
            30,
            pair.log.read_text,
        )
        assert pair.poll() is None, pair.log.read_text()

    goes_on()
    for command in (("conntrack", "-F"), ("nft", "flush", "ruleset"), ("conntrack", "-F")):
        machine.network_command(*command)
        goes_on()
    assert machine.run(
        ["nft", "delete", "table", "inet", "rayfwd0"], user="root", check=False
    ).returncode, "it is the keeper's own"
    until(lambda: "rayfwd0-shut" in overlay.tables(), 20, overlay.tables)
    overlay.keeper.signal(signal.SIGKILL)
    overlay.keeper.wait(20)
    assert "rayfwd0-shut" in overlay.tables()
    assert "inet rayfwd0\n" not in overlay.tables()
    assert overlay.dial(OTHER, 20006) == "TimeoutError None", "nobody answers"
    guarded = machine.popen([overlay.python, "-c", HELLO, "20030"])
    until(lambda: "listening" in guarded.log.read_text(), 20, guarded.log.read_text)
    assert overlay.dial(OWN, 20030) == "hello"
    outside = [overlay.python, "-c", DIAL, machine.address, "20030"]
    assert "TimeoutError" in module_lab.machine("head").run(outside).stdout, "nor to the outside"
    overlay.start()
    assert overlay.ask("found")["table"], "before the daemon has asked for it"
    goes_on()
    pair.signal(signal.SIGKILL)
    pair.wait(20)
    assert "own" not in pair.log.read_text()
    guarded.signal(signal.SIGKILL)
    guarded.wait(20)
    machine.firewall()


@pytest.mark.runs("rayfwd overlay")
def test_nothing_is_left_when_it_ends(overlay: Overlay) -> None:
    assert overlay.left() == (True, True)
    overlay.keeper.signal(signal.SIGTERM)
    assert overlay.keeper.wait(20) == 0
    assert overlay.left() == (False, False)


@pytest.mark.runs("rayfwd overlay --remove *")
def test_a_killed_keepers_overlay_is_removed_by_the_next_command(overlay: Overlay) -> None:
    keeper = overlay.start()
    assert overlay.ask("up", RULES.to_wire()) == {}
    keeper.signal(signal.SIGKILL)
    keeper.wait(20)
    assert overlay.left() == (True, True)
    argv = [overlay.rayfwd, "overlay", "--remove", SOCKET]
    overlay.machine.run(argv, user="root")
    assert overlay.left() == (False, False)
