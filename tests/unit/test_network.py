"""The overlay's rules as text, what libraries are told, and which level a node takes."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import pytest

from rayfwd import codes
from rayfwd.cli import main
from rayfwd.cluster.environment import library_environment
from rayfwd.config import NetworkConfig
from rayfwd.network import manager, overlay_keeper
from rayfwd.network import overlay as network
from rayfwd.network.announced import Announced, PortNews, applied, change_of
from rayfwd.network.held_dials import HeldDials
from rayfwd.network.last_rules import LastRules
from rayfwd.network.manager import Overlay, Wanted
from rayfwd.network.named_users import named_users
from rayfwd.network.open_ports import LOOKS_AT_ONCE, SHORT, OpenPortsWatch
from rayfwd.network.overlay_client import KEEPER, OverlayClient
from rayfwd.network.overlay_keeper import OverlayKeeper
from rayfwd.network.ruleset import MOST_RANGES, Rules, port_ranges, removal, ruleset, update
from rayfwd.problems import ProblemError
from rayfwd.session.frames import MAX_MESSAGE
from rayfwd.session.messages import MOST_OPEN_PORTS, OpenPorts, OpenPortsOf, encode
from rayfwd.system.control import ask
from rayfwd.system.sockdiag import ListeningSocket, SockDiag, UnixName
from tests.unit.other_user import OTHER, child, needs_root

RULES = Rules(
    interface="rayfwd0",
    network="127.77.0.0/16",
    own="127.77.0.1",
    port=19977,
    uids=frozenset({0, 1000}),
    open_ports={"127.77.0.2": ((20000, 20010), (41000, 41000)), "127.77.0.3": ()},
    guarded=((20020, 20040),),
)


def test_over_the_wire_and_back() -> None:
    assert Rules.from_wire(RULES.to_wire()) == RULES


def test_friends_are_let_in_and_an_older_keeper_shuts_out_nobody() -> None:
    rules = replace(RULES, friends=("203.0.113.7/32", "10.0.0.0/8"))
    wire = rules.to_wire()
    assert Rules.from_wire(wire) == rules
    assert wire["guarded"] == [], "which is all that one knows of"
    text = ruleset(rules)
    assert "add element inet rayfwd0 friends { 10.0.0.0/8, 203.0.113.7/32 }" in text
    assert text.index("ip saddr @friends accept") < text.index("tcp dport @guarded")
    assert "flush set inet rayfwd0 friends\n" in update(RULES)
    for wrong in ("10.0.0.1/8", "anywhere", "0.0.0.0/0 } accept"):
        with pytest.raises(ValueError):
            Rules.from_wire({**wire, "guarded_but_from": [[wrong], []]})


NEEDED = [key for key in RULES.to_wire() if key != "guarded_but_from"]


@pytest.mark.parametrize("key", NEEDED)
def test_a_key_that_is_missing(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Rules.from_wire({k: v for k, v in RULES.to_wire().items() if k != key})


def test_a_node_with_no_open_port_is_known_all_the_same() -> None:
    """It refuses, as a machine does on which nothing listens; it is not unreachable."""
    text = ruleset(RULES)
    assert "add element inet rayfwd0 nodes { 127.77.0.2, 127.77.0.3 }" in text
    assert "127.77.0.3 ." not in text


def test_an_update_leaves_chains_alone() -> None:
    text = update(RULES)
    assert "chain" not in text
    assert text.startswith("flush set inet rayfwd0 nodes\n")
    opened = "127.77.0.0 . 19977, 127.77.0.2 . 20000-20010, 127.77.0.2 . 41000"
    assert f"add element inet rayfwd0 open {{ {opened} }}" in text


def test_both_tables_guard_the_same_ports() -> None:
    """The one beside does so while the first is gone, as its owner was restarted or killed."""
    for text in (ruleset(RULES), update(RULES)):
        for table in ("rayfwd0", "rayfwd0-shut"):
            assert f"flush set inet {table} guarded\n" in text
            assert f"add element inet {table} guarded {{ 20020-20040 }}\n" in text
    assert ruleset(RULES).count("tcp dport @guarded ct state new") == 2


def test_without_ports() -> None:
    """nft takes no empty list of elements; the daemon's own probe is there always."""
    bare = replace(RULES, open_ports={}, guarded=())
    added = [line for line in ruleset(bare).splitlines() if "add element" in line]
    assert added == ["add element inet rayfwd0 open { 127.77.0.0 . 19977 }"]


def test_both_tables_are_removed_whether_they_are_there_or_not() -> None:
    words = ["table inet rayfwd0 {}", "delete table inet rayfwd0"]
    shut = ["table inet rayfwd0-shut", "delete table inet rayfwd0-shut"]
    assert removal("rayfwd0").splitlines() == words + shut
    assert removal("rayfwd0", shut=False).splitlines() == words
    owned = removal("rayfwd0", owned=True).splitlines()
    assert owned == ["table inet rayfwd0 { flags owner; }", *words[1:], *shut]
    assert ruleset(RULES, owned=True).count("flags owner") == 2


def test_a_table_that_stands_keeps_what_it_remembers() -> None:
    """It is not deleted when the rules are said again, as after a restart of the daemon."""
    text = ruleset(RULES, owned=True, stands=True)
    assert "delete table inet rayfwd0\n" not in text
    assert "flush table inet rayfwd0\n" in text
    assert "flush set inet rayfwd0 open\n" in text
    assert text.count("map back {") == 1


def test_what_is_not_redirected_is_dropped_by_a_table_of_its_own() -> None:
    """Other nodes' addresses are this machine's own: it would else be the one that answers."""
    text = ruleset(RULES).partition("table inet rayfwd0-shut {")[2].partition("\n}\n")[0]
    ours = "ip daddr 127.77.0.0/16 ip daddr != 127.77.0.1"
    assert f"{ours} tcp flags & (syn | ack) == syn drop" in text
    assert f"{ours} ct direction original ct status dnat drop" in text


LISTED = """\
table inet rayfwd0 { # progname python3
\tflags owner

\tcounter guarded_in {
\t\tpackets 7 bytes 420
\t}

\tchain dial {
\t\ttype nat hook output priority dstnat; policy accept;
\t\tmeta skuid 0 redirect to :19977
\t}

\tchain refuse {
\t\ttype filter hook output priority filter; policy accept;
\t}
}
"""


def test_what_stands_is_read_from_what_nft_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that somebody has emptied does not stand."""
    answers = {"rayfwd0": LISTED, "rayfwd0-shut": ""}
    monkeypatch.setattr(network, "_run", lambda argv, _=None: answers.get(argv[-1], "[]"))
    found = network.found(RULES)
    assert (found.table, found.refused) == (False, {"guarded_in": 7})
    rule = "\t\tmeta skuid 0 drop\n"

    def chains(*names: str) -> str:
        return "".join(f"\tchain {name} {{\n{rule}\t}}\n" for name in names)

    filled = LISTED.replace("filter; policy accept;\n", f"filter;\n{rule}")
    answers["rayfwd0"] = filled + chains("refused", "unknown", "guard")
    assert not network.found(RULES).table, "the one beside is missing"
    answers["rayfwd0-shut"] = "table inet rayfwd0-shut {\n}\n"
    assert not network.found(RULES).table, "it is empty"
    answers["rayfwd0-shut"] = chains("out", "guard")
    assert network.found(RULES).table


def test_tables_of_others_are_named_those_of_iptables_legacy_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = [
        {"chain": {"family": "ip", "table": "nat", "name": "OUTPUT", "hook": "output"}},
        {"chain": {"family": "inet", "table": "rayfwd0", "name": "dial", "hook": "output"}},
    ]
    monkeypatch.setattr(network, "_run", lambda argv, _=None: json.dumps({"nftables": chains}))
    monkeypatch.setattr(network, "_LEGACY_TABLES", tmp_path / "names")
    assert network.beside("rayfwd0") == ["ip nat"]
    (tmp_path / "names").write_text("nat\nfilter\n")
    legacy = ["iptables-legacy filter", "iptables-legacy nat"]
    assert network.beside("rayfwd0") == ["ip nat", *legacy]


def test_too_many_ranges() -> None:
    ranges = tuple((port, port) for port in range(1, 20002, 2))
    with pytest.raises(ValueError, match=f"over {MOST_RANGES}"):
        replace(RULES, open_ports={"127.77.0.2": ranges, "127.77.0.3": ranges})


@pytest.mark.parametrize(
    ("ports", "ranges"),
    [([], ()), ([5], ((5, 5),)), ([3, 1, 2, 2], ((1, 3),)), ([9, 7, 8, 1], ((1, 1), (7, 9)))],
)
def test_port_ranges(ports: list[int], ranges: tuple[tuple[int, int], ...]) -> None:
    assert port_ranges(ports) == ranges


def test_libraries_are_told_interface_and_address() -> None:
    told = library_environment("127.77.0.2", "rayfwd0", {"NCCL_SOCKET_IFNAME": "ib0"})
    assert told["GLOO_SOCKET_IFNAME"] == "rayfwd0"
    assert told["VLLM_HOST_IP"] == told["PET_LOCAL_ADDR"] == "127.77.0.2"
    assert "NCCL_SOCKET_IFNAME" not in told, "the user's word stands"
    assert "SERVE_SOCKET_REUSE_PORT_ENABLED" not in told, "no listener is in Serve's way"


def test_without_an_interface() -> None:
    told = library_environment("127.77.0.2", None, {})
    assert "GLOO_SOCKET_IFNAME" not in told
    assert told["VLLM_HOST_IP"] == "127.77.0.2"
    assert told["SERVE_SOCKET_REUSE_PORT_ENABLED"] == "1", "it shares its ports with listeners"


def test_changes_lead_from_one_to_the_other() -> None:
    before, after = frozenset({29500, 41000}), frozenset({41000, 41001})
    change = change_of(before, after)
    assert change == OpenPorts(False, (41001,), (29500,))
    assert applied(before, change) == after
    anew = change_of(None, after)
    assert anew == OpenPorts(True, (41000, 41001), ())
    assert applied(before, anew) == applied(None, anew) == after
    assert change_of(before, None) is None
    assert applied(None, change) is None, "what it had before was never heard"


def test_a_node_cannot_say_more_than_is_kept() -> None:
    announced = Announced()
    first = OpenPorts(True, tuple(range(1024, 1024 + MOST_OPEN_PORTS)), ())
    assert announced.hear("w1", first)
    assert announced.hear("w1", OpenPorts(False, (60000,), ()))
    assert announced.ports("w1") is None
    assert len(announced.last("w1")) == MOST_OPEN_PORTS


def test_the_head_tells_what_has_changed_and_newcomers_all() -> None:
    news = PortNews()
    assert news.put("w1", frozenset({29500}))
    assert not news.put("w2", None)
    assert list(news.news()) == [OpenPortsOf({"w1": OpenPorts(True, (29500,), ())})]
    assert not news.put("w1", frozenset({29500}))
    assert list(news.news()) == []
    news.put("w1", frozenset({29501}))
    assert list(news.news()) == [OpenPortsOf({"w1": OpenPorts(False, (29501,), (29500,))})]
    assert list(news.whole()) == [OpenPortsOf({"w1": OpenPorts(True, (29501,), ())})]
    news.put("w2", frozenset())
    assert list(news.news()) == [OpenPortsOf({"w2": OpenPorts(True, (), ())})]
    (whole,) = news.whole()
    assert whole.nodes["w2"] == OpenPorts(True, (), ()), "that nothing is open is known, too"
    news.put("w2", None)
    assert list(news.news()) == [OpenPortsOf({"w2": None})]
    assert news.keep({"w2"}), "its link is not up"
    assert list(news.news()) == [OpenPortsOf({"w1": None})]
    assert list(news.whole()) == []


def test_much_news_takes_several_messages() -> None:
    news = PortNews()
    for number in range(60):
        news.put(f"w{number}", frozenset(range(2000, 2000 + MOST_OPEN_PORTS)))
    messages = list(news.news())
    assert len(messages) == 4
    assert max(len(encode(message)) for message in messages) < MAX_MESSAGE
    assert len({name for message in messages for name in message.nodes}) == 60


def test_which_ports_are_told() -> None:
    """On the node's address or on all, of Ray's user; but root's, Ray's own and denied ones not,
    nor what takes connections by another interface alone."""
    own, uid = "127.77.0.2", 1000
    sockets = [
        ListeningSocket(own, 29500, uid, 1),
        ListeningSocket("0.0.0.0", 29501, uid, 2),
        ListeningSocket("::", 29502, uid, 3),
        ListeningSocket("127.0.0.1", 29503, uid, 4),
        ListeningSocket("127.77.0.3", 29504, uid, 5),
        ListeningSocket("0.0.0.0", 29505, 0, 6),
        ListeningSocket("0.0.0.0", 22, uid, 7),
        ListeningSocket("0.0.0.0", 20046, uid, 8),
        ListeningSocket("127.0.0.1", 8000, 0, 9),
        ListeningSocket("0.0.0.0", 29506, uid, 10, interface=7),
        ListeningSocket("0.0.0.0", 29507, uid, 11, interface=8),
    ]
    found: list[tuple[frozenset[int] | None, frozenset[int]]] = []

    async def scene() -> None:
        watch = OpenPortsWatch(
            lambda _: sockets,
            uid,
            lambda: {20046},
            lambda: (8000, 8001, 29500),
            lambda: found.append((watch.ports, watch.of_user)),
            lambda: 7,
        )
        watch.look()
        watch.address = own
        watch.look()
        watch.look()

    asyncio.run(scene())
    own_programs = frozenset({29500, 29501, 29502, 29506})
    assert found == [(own_programs | {8000}, own_programs)]


class Word:
    """A node whose programs have opened a port since the last look."""

    def __init__(self) -> None:
        self.sockets: list[ListeningSocket] = []
        self.looks = 0
        self.wanted = True
        self.watch = OpenPortsWatch(self._listening, 1000, tuple, tuple, lambda: None)
        self.herald = self.watch.herald(lambda: self.wanted)

    def _listening(self, _: str) -> list[ListeningSocket]:
        self.looks += 1
        return self.sockets

    def opens(self, port: int) -> None:
        self.sockets.append(ListeningSocket("0.0.0.0", port, 1000, port))

    def told(self) -> frozenset[int] | None:
        return self.watch.ports


def test_a_port_is_told_before_the_words_that_may_name_it() -> None:
    """Long words are data, and name none; where no node has listeners nobody needs it."""

    async def scene() -> None:
        node = Word()
        node.herald(10)
        assert node.looks == 0, "it has no address yet"
        node.watch.address = "127.77.0.2"
        node.opens(41000)
        node.herald(SHORT + 1)
        assert node.told() is None
        node.herald(10)
        assert node.told() == frozenset({41000})
        node.opens(41001)
        node.wanted = False
        node.herald(10)
        assert node.told() == frozenset({41000})

    asyncio.run(scene())


def test_looks_before_words_are_bounded() -> None:
    """Who talks much costs no more; another kind of connection has looks of its own."""

    async def scene() -> None:
        node = Word()
        node.watch.address = "127.77.0.2"
        for _ in range(20 * LOOKS_AT_ONCE):
            node.herald(10)
        assert LOOKS_AT_ONCE <= node.looks < 5 * LOOKS_AT_ONCE
        before = node.looks
        node.watch.herald(lambda: True)(10)
        assert node.looks == before + 1

    asyncio.run(scene())


IMPOSSIBLE = codes.OVERLAY_IMPOSSIBLE.problem("there is no right to", "ask for it")


def settled(
    level: Literal["auto", "overlay", "listeners"], directory: Path, env: dict[str, str]
) -> Overlay:
    """An overlay that knows its level."""
    config = NetworkConfig(level=level)
    overlay = Overlay(config, directory, frozenset, lambda: None, lambda *_: None, env)
    asyncio.run(overlay.settle())
    return overlay


@pytest.mark.parametrize("level", ["auto", "overlay", "listeners"])
def test_a_machine_without_the_right(
    level: Literal["auto", "overlay", "listeners"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto` takes the next level and says why; who asks for the overlay is warned."""
    monkeypatch.setattr(manager, "possible", lambda: IMPOSSIBLE)
    overlay = settled(level, tmp_path, {})
    assert (overlay.level, overlay.interface, overlay.port) == ("listeners", None, None)
    assert overlay.problem == (IMPOSSIBLE if level == "overlay" else None)
    asked = 'network.level = "listeners"'
    assert overlay.why == (asked if level == "listeners" else IMPOSSIBLE.cause)


@pytest.mark.parametrize(
    ("name", "package"), [("ip", "iproute2"), ("nft", "nftables")], ids=["ip", "nft"]
)
def test_a_command_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    """Also where there is a service for it; and the node takes the next level."""
    monkeypatch.setattr(network, "_PATH", str(tmp_path))
    for other in {"ip", "nft"} - {name}:
        (tmp_path / other).touch(mode=0o755)
    overlay = settled("auto", tmp_path, {KEEPER: str(tmp_path / "overlay.sock")})
    assert (overlay.level, overlay.remedy) == ("listeners", f"install the package {package}")
    assert overlay.why == f"the command {name} is missing"


def test_a_kernel_without_nftables_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is there, and the kernel's part of it is not; the node takes the next level."""
    said = "Error: Could not process rule: Operation not supported"
    for name in ("ip", "nft"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(network, "_PATH", str(tmp_path))
    monkeypatch.setattr(network, "capable", lambda: True)
    overlay = settled("overlay", tmp_path, {})
    assert overlay.level == "listeners"
    assert overlay.problem is not None
    assert overlay.problem.code is codes.OVERLAY_IMPOSSIBLE
    assert "nftables does not answer" in overlay.why
    assert said in overlay.why
    assert "a kernel with nf_tables" in (overlay.remedy or "")


def test_a_service_that_does_not_answer(tmp_path: Path) -> None:
    overlay = settled("auto", tmp_path, {KEEPER: str(tmp_path / "overlay.sock")})
    assert overlay.level == "listeners"
    assert "does not answer" in overlay.why or "is not there" in overlay.why


def test_what_the_plan_cannot_ask_for_is_a_problem_and_no_fault(tmp_path: Path) -> None:
    """As of a head of another version: the daemon goes on, and says so."""
    overlay = settled("listeners", tmp_path, {})
    with pytest.raises(ProblemError, match=r"203\.0\.113\.7 is not in the network"):
        overlay._rules(Wanted("127.77.0.0/16", "203.0.113.7"))


class NoTables(OverlayClient):
    """A keeper that finds no other table."""

    async def beside(self) -> list[str]:
        return []


@pytest.mark.parametrize(("count", "full"), [("96", True), ("94", False), (None, False)])
def test_a_full_table_of_connections_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str | None, full: bool
) -> None:
    """New connections are dropped then, and no other table is in the way."""
    monkeypatch.setattr(network, "_TRACKING", tmp_path)
    (tmp_path / "nf_conntrack_max").write_text("100\n")
    if count is not None:
        (tmp_path / "nf_conntrack_count").write_text(count)
    overlay = settled("listeners", tmp_path, {})
    with socket.socket() as nobodys:
        nobodys.bind(("127.77.0.0", 0))
        rules = replace(RULES, port=nobodys.getsockname()[1])
        with pytest.raises(ProblemError) as caught:
            asyncio.run(overlay._probe(NoTables(tmp_path), rules))
    problem = caught.value.problem
    assert problem.code is codes.OVERLAY_BLOCKED
    assert ("96 of 100" in problem.cause) == full
    assert ("nf_conntrack_max" in problem.remedy) == full
    assert ("nft list ruleset" in problem.remedy) != full


def test_users_who_may_not_dial_are_told_as_long_as_they_may_not(tmp_path: Path) -> None:
    """As rayfwd-net says; one that is older says nothing."""
    changes: list[bool] = []
    overlay = settled("listeners", tmp_path, {})
    overlay._on_change = lambda: changes.append(overlay.left_out is None)
    cause = "the file cannot be trusted: /etc/rayfwd.toml: others"
    said = {"users": ["ann", "bob"], "cause": cause}
    for now in (said, said, None, None):
        overlay._set_left_out(now)
        if now is not None:
            assert overlay.left_out is not None
            assert overlay.left_out.code is codes.USERS_LEFT_OUT
            assert "programs of ann, bob cannot connect" in overlay.left_out.cause
            assert cause in overlay.left_out.cause
            assert "systemctl restart rayfwd-net rayfwd" in overlay.left_out.remedy
    assert changes == [False, True], "each change is told once"


class Standing:
    """In place of what changes the machine's network."""

    def __init__(self, interface: str) -> None:
        self.now: Rules | None = None
        self.said: list[str] = []

    def hear_dials(self, group: int) -> HeldDials:
        raise PermissionError(group)

    def up(self, wanted: Rules) -> None:
        self.now = wanted
        self.said.append("up")

    def update(self, wanted: Rules) -> None:
        self.now = wanted
        self.said.append("update")

    def down(self) -> None:
        self.now = None
        self.said.append("down")


@needs_root
@needs_root
@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('[listeners]\nusers = ["nobody", "nobody", "no-such-user"]', {"nobody"}),
        ("", set()),
        ('listeners = "nobody"', set()),
        ('[listeners]\nusers = "nobody"', set()),
        ('[listeners]\nusers = [1, ["nobody"], "\\u0000"]', set()),
    ],
)
def test_whom_roots_file_names(tmp_path: Path, content: str, named: set[str]) -> None:
    file = tmp_path / "rayfwd.toml"
    file.write_text(content)
    assert named_users(file) == {pwd.getpwnam(name).pw_uid for name in named}


@needs_root
@pytest.mark.parametrize("fault", ["absent", "no TOML", "theirs", "a link of theirs", "a pipe"])
def test_a_file_that_names_nobody(tmp_path: Path, fault: str) -> None:
    """The privileged process reads nothing that another user has put there."""
    file = tmp_path / "rayfwd.toml"
    says = '[listeners]\nusers = ["nobody"]\n'
    if fault == "no TOML":
        file.write_text("[listeners\n")
    elif fault == "theirs":
        file.write_text(says)
        os.chown(file, OTHER, OTHER)
    elif fault == "a link of theirs":
        (tmp_path / "roots").write_text(says)
        file.symlink_to(tmp_path / "roots")
        os.lchown(file, OTHER, OTHER)
    elif fault == "a pipe":
        os.mkfifo(file)
    with pytest.raises(ValueError, match=r"rayfwd\.toml"):
        named_users(file)


def test_no_other_user_keeps_a_keeper_from_its_interface(tmp_path: Path) -> None:
    """Who has made the name that would be its, listening or not; root's own keeper does."""
    name = "rayfwd-test0"
    script = f"""
with socket.socket(socket.AF_UNIX) as s:
    s.bind("\\0rayfwd-overlay-{name}")
    print("held", flush=True)
    sys.stdin.read()
"""

    def keeper() -> OverlayKeeper:
        return OverlayKeeper(tmp_path / "keeper.sock", name, until_eof=True)

    with child(script, uid=OTHER) as stranger:
        assert stranger.says() == "held"
        with closing(keeper()._claim()):
            with pytest.raises(ProblemError) as caught:
                keeper()._claim()
            assert caught.value.problem.code == codes.OVERLAY_IMPOSSIBLE
        keeper()._claim().close()
    with closing(keeper()._claim()), pytest.raises(ProblemError):
        keeper()._claim()
    keeper()._claim().close()


@pytest.mark.parametrize("said", [True, False], ids=["the kernel says whose", "it does not"])
def test_a_keeper_of_an_earlier_checkout_which_does_not_listen_has_its_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bool
) -> None:
    def absent(_: SockDiag) -> list[UnixName]:
        raise OSError("no unix_diag")

    if not said:
        monkeypatch.setattr(SockDiag, "unix_names", absent)
    keeper = OverlayKeeper(tmp_path / "keeper.sock", "rayfwd-test1", until_eof=True)
    with socket.socket(socket.AF_UNIX) as earlier:
        earlier.bind("\0rayfwd-overlay-rayfwd-test1")
        with pytest.raises(ProblemError) as caught:
            keeper._claim()
        assert caught.value.problem.code == codes.OVERLAY_IMPOSSIBLE
    keeper._claim().close()


@dataclass
class Service:
    """Keepers one after the other at the same place, as systemd runs them."""

    directory: Path
    restarts: bool = False
    """systemd stops it in order to start it again."""
    table: bool = True
    """The rules stand."""
    keeper: OverlayKeeper | None = None
    """The last one."""

    @property
    def socket(self) -> Path:
        return self.directory / "overlay.sock"

    async def run(self, *work: Callable[[], None]) -> Standing:
        """One of them, from its start until SIGTERM; `work` is done while it listens."""
        self.keeper = keeper = OverlayKeeper(self.socket, "rayfwd0")
        running = asyncio.create_task(keeper.run())
        while not self.socket.exists():
            assert not running.done(), running.result()
            await asyncio.sleep(0.001)
        for step in work:
            await asyncio.to_thread(step)
        os.kill(os.getpid(), signal.SIGTERM)
        await running
        assert isinstance(keeper._overlay, Standing)
        return keeper._overlay

    def ask(self, verb: str, rules: Rules = RULES) -> Callable[[], None]:
        def asked() -> None:
            ask(self.socket, verb, {"rules": rules.to_wire()})

        return asked

    def down(self) -> None:
        """Until the keeper has removed the rules by itself."""
        assert self.keeper is not None
        deadline = time.monotonic() + 20
        while "down" not in cast(Standing, self.keeper._overlay).said:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service(tmp_path)

    async def being_restarted(env: object) -> bool:
        return made.restarts

    monkeypatch.setattr(network, "OverlayMaker", Standing)
    monkeypatch.setattr(network, "check_tools", lambda: None)
    monkeypatch.setattr(network, "orphaned", lambda _: False)
    monkeypatch.setattr(network, "found", lambda _: network.Found(True, True, made.table, {}))
    monkeypatch.setattr(overlay_keeper, "being_restarted", being_restarted)
    return made


def test_a_keeper_that_is_restarted_leaves_what_stands_to_the_next(service: Service) -> None:
    later = replace(RULES, open_ports={"127.77.0.2": ((29500, 29500),)})

    async def scene() -> None:
        service.restarts = True
        first = await service.run(service.ask("up"), service.ask("update", later))
        assert first.said == ["up", "update"]
        second = await service.run()
        assert (second.said, second.now) == (["up"], later), "before the daemon has asked"
        service.restarts = False
        third = await service.run(service.ask("found"))
        assert (third.said, third.now) == (["up", "down"], None)
        fourth = await service.run()
        assert fourth.said == ["down"], "it was stopped, and nothing is made again"

    asyncio.run(scene())


def test_rules_that_are_gone_are_made_again_before_the_daemon_is_told(service: Service) -> None:
    """The kernel's word that they were removed may come later."""

    async def scene() -> None:
        service.table = False
        assert (await service.run(service.ask("up"), service.ask("found"))).said[:2] == ["up"] * 2

    asyncio.run(scene())


def test_what_the_daemon_has_taken_down_is_not_made_again(service: Service) -> None:
    async def scene() -> None:
        service.restarts = True
        await service.run(service.ask("up"), service.ask("down"))
        assert (await service.run()).said == ["down"]

    asyncio.run(scene())


def test_what_a_daemon_that_is_gone_had_is_removed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlay_keeper, "LEFT_SECONDS", 0.01)

    async def scene() -> None:
        service.restarts = True
        await service.run(service.ask("up"))
        second = await service.run(service.down)
        assert second.said == ["up", "down", "down"]

    asyncio.run(scene())


@pytest.mark.parametrize("spoilt", ["theirs", "cut", "another interface"])
def test_rules_in_which_others_had_a_hand_are_not_made_again(service: Service, spoilt: str) -> None:
    last = LastRules(service.socket)
    last.keep(replace(RULES, interface="eth0" if spoilt == "another interface" else "rayfwd0"))
    if spoilt == "theirs":
        last.path.chmod(0o666)
    elif spoilt == "cut":
        last.path.write_bytes(last.path.read_bytes()[:-9])
    assert asyncio.run(service.run()).said == ["down"]


@pytest.mark.parametrize(
    ("result", "kept", "follows"),
    [
        ("signal", False, True),
        ("success", True, True),
        ("success", False, False),
        ("timeout", True, False),
        (None, True, False),
    ],
)
def test_what_is_left_for_the_next_keeper_is_not_removed(
    result: str | None,
    kept: bool,
    follows: bool,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the command that systemd runs after each end, and by hand."""
    removed: list[str] = []
    monkeypatch.setattr(Standing, "down", lambda self: removed.append("down"))
    monkeypatch.delenv("SERVICE_RESULT", raising=False)
    if result is not None:
        monkeypatch.setenv("SERVICE_RESULT", result)
    if kept:
        LastRules(service.socket).keep(RULES)
    assert main(["overlay", "--remove", str(service.socket)]) == 0
    assert bool(removed) is not follows
    assert LastRules(service.socket).path.exists() is (kept and follows)
