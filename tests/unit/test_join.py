"""`rayfwd join` and `rayfwd head` before they begin: options, places, the terminal, process 1."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import pytest

from rayfwd.cli import MistakeError, _parser, chosen, connect, front, head, join
from rayfwd.cli.chosen import PORT_BASES
from rayfwd.cli.front import StatusLine
from rayfwd.config import Config, load, parse
from rayfwd.daemon import claim as claim_module
from rayfwd.daemon.claim import MachineClaim, free_networks
from rayfwd.daemon.lifetime import Lifetime, Nobody
from rayfwd.daemon.resources import claimed, recorded
from rayfwd.status import Status
from rayfwd.system import network_lock
from rayfwd.system.paths import named_clusters, running_config
from rayfwd.system.sockdiag import SockDiag, UnixName
from rayfwd.system.steps import Steps
from tests import commands
from tests.need import tool
from tests.unit.daemons import site
from tests.unit.loops import log_events, of
from tests.unit.loops import run_on_fake_clock as run
from tests.unit.test_ownership import OTHER
from tests.unit.test_root_and_others import a_python, runs


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an ordinary user, or of a test that is root."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.delenv("RAYFWD_CLUSTER", raising=False)


def amounts_to(
    words: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Config, argparse.Namespace]:
    """The configuration that a command line is."""
    seen: list[Any] = []

    def hold(configured: Callable[[], Config], args: argparse.Namespace, _: object) -> int:
        seen.extend([configured(), args])
        return 0

    monkeypatch.setattr(front, "hold", hold)
    args = _parser().parse_args(list(words))
    assert args.module.run(args) == 0
    return seen[0], seen[1]


def test_join_has_the_keys_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["join", "ray@head", "-p", "2222", "--name", "w1", "-i", "key", "--via", "exec"]
    words += ["--ray", "/opt/ray", "--num-gpus", "2", "--resources", "disk=1", "--ephemeral"]
    words += ["--resources", '{"b": 0.5}', "--labels", "rack=7", "--no-start", "--expose", "8000"]
    words += ["--set", "canary.enabled=true", "--stop-timeout", "25", "--log-level", "debug"]
    config, args = amounts_to([*words, "--wait-for", "90", "--stop-after", "2h"], monkeypatch)
    assert (config.role, config.name, config.ephemeral, config.expose) == (
        *("worker", "w1", True, (8000,)),
    )
    assert config.head is not None
    assert (config.head.ssh, config.head.via) == ("ray@head:2222", "exec")
    assert config.head.identity == tmp_path / "key"
    assert (config.ray.command, config.ray.num_gpus, config.ray.start) == ("/opt/ray", 2, False)
    assert (config.ray.resources, config.ray.labels) == ({"disk": 1, "b": 0.5}, {"rack": "7"})
    assert (config.canary.enabled, config.stop_timeout, config.log.level) == (True, 25, "debug")
    assert (args.wait_for, args.stop_after) == (90, 7200)


def test_what_is_not_said_is_as_it_is_best_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    config, args = amounts_to(["join", "box"], monkeypatch)
    assert config.head is not None
    assert (config.head.via, config.stop_timeout) == ("auto", front.STOP_TIMEOUT)
    assert (args.wait_for, args.stop_after) == (None, None)
    assert config.path == config.runtime_dir / "rayfwd.toml"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-cpus", "many"], 'rayfwd join: --num-cpus = "many": must be a whole number'),
        (["--ride-through", "1"], "rayfwd join: --ride-through = 1: must be at least 5"),
        (["--set", "canary"], "--set canary: must be KEY=VALUE, as in canary.enabled=true"),
        (["--set", "ray=5"], "--set ray=5: ray is a section; name a key of it"),
        (["--set", "ray.auht=1"], "rayfwd join: ray.auht: unknown key; did you mean auth?"),
        (["--resources", "disk"], "--resources disk: must be NAME=VALUE"),
        (["--resources", "{"], "--resources {: must be a JSON object"),
        (["-p", "1", "--name", "a b"], 'rayfwd join: --name = "a b": must be 1 to 63 letters'),
        (["--direct", "gpu-2"], "--direct gpu-2: must be NODE=USER@HOST, or a JSON object"),
        (["--direct", "=ray@b"], "--direct =ray@b: must be NODE=USER@HOST, or a JSON object"),
        (["--direct", "{"], "--direct {: must be a JSON object"),
        (["--direct", "b=", "--set", "x=1"], "--direct b=: must be NODE=USER@HOST"),
        (["--direct", "a b=ray@b"], 'rayfwd join: --direct[0].node = "a b": must be 1 to 63'),
        (["--direct", '{"node": "b", "ssh": "b", "vai": 1}'], "rayfwd join: --direct[0].vai: "),
    ],
)
def test_a_mistake_names_the_option(words: list[str], said: str) -> None:
    args = _parser().parse_args(["join", "ray@head", *words])
    with pytest.raises(MistakeError) as exc:
        join.run(args)
    assert str(exc.value).startswith(said)


def test_a_meeting_place_is_named_on_every_side(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--meet", "ray@[2001:db8::9]:2222"]
    config, _ = amounts_to(["join", "ray@the-head", *words, "--meet-socket", "r"], monkeypatch)
    assert config.head is not None
    assert (config.head.meet, config.head.meet_socket) == ("ray@[2001:db8::9]:2222", "r")
    own = '{"ssh": "me@third", "sshd": "own"}'
    config, _ = amounts_to(["head", *words, "--meet", own, "--dial", "ray@w1"], monkeypatch)
    first, second = config.hub.meet
    assert (first.ssh, second.ssh, second.sshd_address()) == (words[1], "me@third", None)
    assert [dial.called for dial in config.hub.dial] == ["w1"]
    seen: list[Config] = []

    def hold(config: Config) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(connect, "hold", hold)
    args = _parser().parse_args(["connect", "ray@the-head", *words])
    assert args.module.run(args) == 0
    assert seen[0].head is not None
    assert seen[0].head.meet == words[1]


def test_other_workers_that_are_logged_in_to_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = '{"node": "c", "ssh": "c", "identity": "/k", "transport": "openssh", "bulk_lanes": 2}'
    words = ["join", "ray@head", "--name", "a", "-i", "key", "-F", "config"]
    given = ["--direct", "b=ray@b.example.org:2222", "--direct", more]
    config, _ = amounts_to([*words, *given], monkeypatch)
    b, c = config.direct
    assert (b.node, b.ssh, b.via, b.attach_command) == (
        *("b", "ray@b.example.org:2222", "exec", "rayfwd attach --peer"),
    )
    assert (b.identity, b.ssh_config) == (tmp_path / "key", tmp_path / "config")
    assert (c.node, c.transport, c.bulk_lanes) == ("c", "openssh", 2)
    assert (c.identity, c.ssh_config) == (Path("/k"), tmp_path / "config")
    listed = ["--set", 'direct=[{node = "b", ssh = "ray@b"}]']
    config, _ = amounts_to(["join", "ray@head", "--name", "a", *listed], monkeypatch)
    assert [(way.node, way.ssh, way.identity) for way in config.direct] == [("b", "ray@b", None)]


@pytest.mark.parametrize("text", ["", "0", "-1", "2w", "h", "1h30m"])
def test_a_time_is_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["join", "a@b", f"--stop-after={text}"])


# -- several clusters


def test_a_cluster_with_a_name_has_places_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blue, _ = amounts_to(["join", "a@b", "--cluster", "blue"], monkeypatch)
    assert blue.state_dir == tmp_path / "state" / "clusters" / "blue"
    assert blue.runtime_dir == tmp_path / "run" / "clusters" / "blue"
    assert blue.network.interface.startswith("rayfwd-")
    assert blue.network.port > 19977
    assert blue.ray.extra_args == (f"--temp-dir=/tmp/ray-{os.geteuid()}-blue",)
    monkeypatch.setenv("RAYFWD_CLUSTER", "green")
    args = _parser().parse_args(["status", "--cluster", "red"])
    assert args.cluster == "red"


def test_a_daemon_without_a_file_is_found_by_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blue, _ = amounts_to(
        ["join", "a@b", "--cluster", "blue", "--env", "X=1", "--num-cpus", "3"], monkeypatch
    )
    assert named_clusters(os.environ) == []
    with claimed(blue), recorded(blue):
        found = running_config(os.environ, "blue")
        assert found == blue.path
        again = load(found)
        assert (again.state_dir, again.ray, again.head) == (blue.state_dir, blue.ray, blue.head)
        assert found.stat().st_mode & 0o777 == 0o600
        assert named_clusters(os.environ) == ["blue"]
        assert running_config(os.environ) is None
        assert commands.main(["env"]) == 2
        assert "clusters of yours that run here: blue (--cluster NAME)" in capsys.readouterr().err
    assert commands.main(["env"]) == 2
    assert "no rayfwd of yours runs here: start one with `rayfwd head`" in capsys.readouterr().err
    plain, _ = amounts_to(["join", "a@b"], monkeypatch)
    with claimed(plain), recorded(plain):
        assert commands.main(["env", "--cluster", "red"]) == 2
        assert "without a name runs here: leave --cluster out" in capsys.readouterr().err
    assert running_config(os.environ, "blue") is None


def test_a_head_finds_what_is_free_and_keeps_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "reserve", lambda: "127.78.0.0/16")
    monkeypatch.setattr(chosen, "listening", lambda: {6379, 8265, 8266, 24001})
    config, _ = amounts_to(["head", "--dashboard-port", "9000"], monkeypatch)
    assert (config.hub.network, config.hub.port_base) == ("127.78.0.0/16", 28000)
    assert (config.ray.port, config.ray.dashboard_port, config.ray.client_port) == (
        *(6380, 9000, 10002),
    )
    assert config.ray.extra_args == (f"--temp-dir=/tmp/ray-{os.geteuid()}-127.78.0.0",)
    monkeypatch.setattr(chosen, "reserve", lambda: "127.90.0.0/16")
    again, _ = amounts_to(["head", "--dashboard-port", "9000"], monkeypatch)
    assert again.model_dump() == config.model_dump()
    without, _ = amounts_to(["head"], monkeypatch)
    assert without.ray.dashboard_port == 8309, "what was said once is said each time"


@pytest.fixture
def apart() -> Iterator[Sequence[str]]:
    """What runs a command in a network where nobody else listens; as root only."""
    if os.geteuid() != 0:
        yield []
        return
    holding = [tool("unshare"), "--net", "sh", "-c", "echo; read end"]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdout.readline()
        place = [tool("nsenter"), f"--net=/proc/{holder.pid}/ns/net"]
        subprocess.run([*place, tool("ip"), "link", "set", "lo", "up"], check=True)
        yield place
        holder.stdin.close()


@pytest.mark.parametrize("taken", [0, *PORT_BASES])
def test_heads_that_are_started_together_have_networks_and_ports_of_their_own(
    tmp_path: Path, apart: Sequence[str], taken: int
) -> None:
    """Before Ray of any listens; as root of two users, as two jobs of Slurm on a node. In the same
    moment; or right after each other, where another program has a port that one would have."""
    if taken and not apart:
        pytest.skip("only root has a network where nobody else listens")
    program = (
        "import json, os, sys, time; from pathlib import Path; from rayfwd.cli import chosen; "
        "from rayfwd.config import parse; "
        "print('ready', flush=True); sys.stdin.readline(); "
        "print(json.dumps(chosen._choose(parse({'role': 'head'}))), flush=True); sys.stdin.read()"
    )
    listener = (
        f"import socket, sys; taken = socket.create_server(('127.0.0.1', {taken + 100})); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    with contextlib.ExitStack() as stack:
        python = a_python()
        others = os.geteuid() == 0 and runs(OTHER, [*python, "-c", "import rayfwd.cli.status"])

        def started(code: str, uid: int | None = None) -> tuple[IO[str], IO[str]]:
            user = [] if uid is None else [f"--setuid={uid}", f"--setgid={uid}"]
            process = subprocess.Popen(
                [*apart, *user, *python, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={"PATH": os.defpath, "HOME": str(tmp_path)},
            )
            stack.enter_context(process)
            assert process.stdin is not None
            assert process.stdout is not None
            return process.stdin, process.stdout

        if taken:
            assert started(listener)[1].readline() == "ready\n"
        pipes = [started(program, OTHER if others and n % 2 else None) for n in range(4)]
        for _, out in pipes:
            assert out.readline() == "ready\n"
        found = []
        for asked, out in pipes:
            asked.write("go\n")
            asked.flush()
            found += [json.loads(out.readline())] if taken else []
        found = found or [json.loads(out.readline()) for _, out in pipes]
    for key in ("hub.network", "hub.port_base", "ray.port", "ray.dashboard_port"):
        assert len({each[key] for each in found}) == 4, (key, found)
    assert all(each["hub.port_base"] != taken for each in found)


@contextlib.contextmanager
def running(program: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]]:
    """A Python program in a process of its own, its standard input and output."""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process, process.stdin, process.stdout


def test_two_daemons_do_not_have_one_network() -> None:
    program = (
        "import sys; from rayfwd.system.network_lock import NetworkLock; "
        "lock = NetworkLock('127.118.0.0/17'); print('held', flush=True); sys.stdin.read()"
    )
    with running(program) as (other, stdin, stdout):
        stdout.readline()
        claim = MachineClaim()
        assert not claim.take("127.118.0.0/16")
        assert claim.problem is not None
        assert claim.problem.code.name == "network_in_use"
        assert f"pid {other.pid}) has 127.118.0.0/17" in claim.problem.cause
        assert "hub.network" in claim.problem.remedy
        assert not any("127.118.0.0/16" in networks for networks in free_networks())
        stdin.close()
    later = MachineClaim()
    assert later.take("127.118.0.0/16")
    assert later.problem is None
    assert later.take("127.118.0.0/16"), "as it has it"
    (held,) = network_lock.holders_of("127.118.0.0/16")
    assert held.by.uid == os.geteuid()
    later.close()
    assert network_lock.holders_of("127.118.0.0/16") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_a_network_that_another_user_takes_after_the_look_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both would have it otherwise: one looked before the other came, and one after."""
    program = (
        "import os, socket, sys; os.setgid(4242); os.setuid(4242); sys.stdin.readline(); "
        "s = socket.socket(socket.AF_UNIX); "
        "s.bind('\\0rayfwd-network-127.117.0.0-16-4242'); s.listen(1); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with running(program) as (_, stdin, stdout):

        def looked() -> tuple[list[str], list[str]]:
            stdin.write(b"now\n")
            stdin.flush()
            stdout.readline()
            return ["127.117.0.0/16", "127.116.0.0/16"], []

        monkeypatch.setattr(claim_module, "free_networks", looked)
        try:
            assert claim_module.reserve() == "127.116.0.0/16"
        finally:
            claim_module._Reserved.taken("")
            stdin.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize("name", ["127.117.0.0-16-0", "127.117.0.0-17-4242", "127.117.0.0-16-x"])
def test_no_other_user_keeps_a_daemon_from_its_network(name: str) -> None:
    """Who has made the name that would be ours, or another: the kernel says whose it is."""
    program = (
        "import os, socket, sys; os.setgid(4242); os.setuid(4242); "
        "s = socket.socket(socket.AF_UNIX); "
        f"s.bind('\\0rayfwd-network-{name}'); s.listen(0); print('held', flush=True); "
        "[socket.socket(socket.AF_UNIX).connect(s.getsockname()) for _ in range(1)]; "
        "sys.stdin.read()"
    )
    with running(program) as (stranger, stdin, stdout):
        stdout.readline()
        first, second = MachineClaim(), MachineClaim()
        with log_events() as log:
            assert first.take("127.117.0.0/16")
        assert first.problem is None
        assert f"pid {stranger.pid}" in of(log, "network_shared")[0]["who"]
        assert not second.take("127.117.0.0/16"), "it is still held against our own"
        assert not any("127.117.0.0/16" in networks for networks in free_networks())
        first.close()
        free, shared = free_networks()
        assert "127.117.0.0/16" not in free, "others come first"
        assert "127.117.0.0/16" in shared
        stdin.close()


def test_a_network_is_held_where_the_kernel_has_no_module_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(_: SockDiag) -> list[UnixName]:
        raise OSError("no unix_diag")

    monkeypatch.setattr(SockDiag, "unix_names", absent)
    first, second = MachineClaim(), MachineClaim()
    assert first.take("127.116.0.0/16")
    assert not second.take("127.116.0.0/17")
    first.close()
    assert second.take("127.116.0.0/17")
    second.close()


def test_another_network_is_named_where_the_holder_has_gone_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A remedy never names the network that was in use."""
    first, second = MachineClaim(), MachineClaim()
    assert first.take("127.76.0.0/15")
    free = claim_module.free_networks

    def gone() -> tuple[list[str], list[str]]:
        first.close()
        return free()

    monkeypatch.setattr(claim_module, "free_networks", gone)
    assert not second.take("127.76.0.0/15")
    assert second.problem is not None
    assert "127.77." not in second.problem.remedy


def test_names_that_are_none_hold_nothing() -> None:
    ours = set()
    with contextlib.ExitStack() as held:
        for name in ("999.0.0.0-16-0", "127.117.0.1-16-0", "127.117.0.0-99-0", "", "\udcff"):
            sock = held.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(b"\0rayfwd-network-" + os.fsencode(name))
            sock.listen()
            ours.add(os.fstat(sock.fileno()).st_ino)
        assert not [h for h in network_lock.holders_of("0.0.0.0/0") if h.by.inode in ours]


# -- the terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_below_the_log_changes_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    out = Terminal()
    screen = StatusLine(out)
    screen.show("waiting")
    screen.write("an event\n")
    screen.show("ready: and more than there is room for")
    screen.show("")
    assert out.getvalue() == (
        "\x1b[1mwaiting\x1b[0m"
        "\r\x1b[2Kan event\n\x1b[1mwaiting\x1b[0m"
        "\r\x1b[2K\x1b[1mready: and more tha\x1b[0m"
        "\r\x1b[2K"
    )


def test_where_there_is_no_terminal_there_is_no_line() -> None:
    out = io.StringIO()
    screen = StatusLine(out)
    screen.show("waiting")
    screen.write("an event\n")
    assert out.getvalue() == "an event\n"


def test_it_says_where_a_logout_may_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: pwd.getpwnam("nobody").pw_uid)
    monkeypatch.setattr(front, "LINGER", tmp_path)
    uid = os.geteuid()
    here = parse({"role": "head", "name": "h", "runtime_dir": f"/run/user/{uid}/rayfwd"})
    elsewhere = parse({"role": "head", "name": "h", "runtime_dir": "/var/tmp/rayfwd"})
    with log_events() as events:
        front._say_of_logout(elsewhere)
        assert of(events, "linger_off") == []
        front._say_of_logout(here)
        (said,) = of(events, "linger_off")
        assert "loginctl enable-linger" in said["remedy"]
        (tmp_path / "nobody").touch()
        front._say_of_logout(here)
        assert len(of(events, "linger_off")) == 1


def test_the_head_says_how_others_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "198.51.100.7 4711 203.0.113.5 22")
    assert head.own_address() == "203.0.113.5"
    monkeypatch.delenv("SSH_CONNECTION")
    socket.inet_aton(head.own_address())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_who_has_no_name_comes_as_far_as_who_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `docker run --user 4242`, and nothing in the environment."""
    program = "import sys; from rayfwd.cli import main; sys.exit(main(sys.argv[1:]))"
    python = a_python()
    if not runs(OTHER, [*python, "-c", "import rayfwd.cli.join"]):
        pytest.skip("no Python here that another user may run")
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))
        os.chown(place, OTHER, OTHER)
        nobody_listens = stack.enter_context(socket.socket())
        nobody_listens.bind(("127.0.0.1", 0))
        words = ["join", f"ray@127.0.0.1:{nobody_listens.getsockname()[1]}"]
        words += ["--state-dir", f"{place}/state", "--runtime-dir", f"{place}/run"]
        joining = stack.enter_context(
            subprocess.Popen(
                [*python, "-c", program, *words, "--name", "a"],
                stderr=subprocess.PIPE,
                text=True,
                env={"PATH": os.defpath},
                user=OTHER,
                group=OTHER,
                extra_groups=[],
            )
        )
        assert joining.stderr is not None
        said = []
        for line in joining.stderr:
            said.append(line)
            if '"event": "ssh_' in line:
                break
        joining.terminate()
        assert "ssh_unreachable" in said[-1], "".join(said)
        joining.stderr.read()
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    config, status = parse({"role": "head"}), cast(Status, SimpleNamespace(node=None, page=None))
    assert f"rayfwd join {OTHER}@" in head.what_next(config, status)[0]


# -- how long


def test_it_gives_up_where_it_is_not_ready_in_time() -> None:
    ended: list[tuple[str, int]] = []

    async def main() -> None:
        await Lifetime(wait_for=30).run(lambda: False, lambda *how: ended.append(how))

    run(main)
    assert ended == [("--wait-for", 3)]


def test_it_leaves_after_its_time() -> None:
    ended: list[tuple[str, int]] = []

    async def main() -> None:
        await Lifetime(30, 3600).run(lambda: True, lambda *how: ended.append(how))

    run(main, 4000)
    assert ended == [("--stop-after", 0)]


# -- process 1

FIRST = """
import os, signal, sys, time
from rayfwd.system import first_process
first_process.SPARE = 0.1
os.getpid = lambda: 1
def work():
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.1)
        os._exit(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    if len(sys.argv) > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("works", flush=True)
    time.sleep(60)
    return 0
sys.exit(first_process.run(work, float(sys.argv[1]) if len(sys.argv) > 1 else None))
"""


def test_process_1_passes_signals_on_and_has_its_childs_exit_code() -> None:
    with subprocess.Popen([sys.executable, "-c", FIRST], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"works\n"
        first.terminate()
        assert first.wait(20) == 7


def test_process_1_ends_in_its_time_whatever_its_child_is_about() -> None:
    """The kernel ends the child with it; in the place of a container it is killed."""
    with subprocess.Popen([sys.executable, "-c", FIRST, "0.5"], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"works\n"
        first.terminate()
        assert first.wait(20) == 128 + 9


STUCK = """
import signal, sys, time
from rayfwd.config import LogConfig
from rayfwd.daemon import lifetime
from rayfwd.system import logs
from rayfwd.system.steps import Steps
lifetime.CUT_BEFORE = 0.1
logs.setup(LogConfig(format="json"), sys.stdout)
def kill():
    print("killed", flush=True)
    return 2
steps = Steps("asked")
steps.begin("ray_tasks")
lifetime.cut_short_after(0.5, kill, steps, 3)
time.sleep(60)
"""


def test_a_daemon_ends_in_its_time_though_its_loop_does_not_turn() -> None:
    """And its Ray with it."""
    ran = subprocess.run([sys.executable, "-c", STUCK], timeout=30, capture_output=True, text=True)
    killed, said = ran.stdout.splitlines()
    assert (ran.returncode, killed) == (3, "killed")
    told = json.loads(said)
    assert (told["event"], told["seconds"], told["killed"]) == ("stop_cut_short", 0.5, 2)
    assert (told["step"], list(told["steps"])) == ("ray_tasks", ["asked", "ray_tasks"])
    assert 0.3 < told["steps"]["ray_tasks"] <= 1.0, "with the 0.4 s that it had"


class Watching(Nobody):
    """What it is told of a daemon's end."""

    steps: Steps

    def stopping(self, kill: Callable[[], int], steps: Steps, code: int) -> None:
        self.steps = steps


def test_a_daemon_tells_the_steps_of_its_end(tmp_path: Path) -> None:
    watching = Watching()

    async def scenario() -> None:
        async with site(tmp_path) as s:
            s.head.front = watching
            await s.head.start()
            await s.head.ready()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert list(watching.steps.seconds()) == ["asked", "ray_tasks", "link", "overlay", "rest"]


def test_a_step_that_comes_again_has_all_its_time() -> None:
    now = 0.0
    steps = Steps("asked", lambda: now)
    for name, at in (("link", 1.0), ("asked", 3.0), ("rest", 3.5)):
        now = at
        steps.begin(name)
    now = 4.04
    assert (steps.now, steps.seconds()) == ("rest", {"asked": 1.5, "link": 2.0, "rest": 0.5})


def test_process_1_ends_when_it_is_told_while_it_is_still_loading() -> None:
    """The kernel spares process 1 a signal that it has no handler for."""
    program = "import os, signal; os.getpid = lambda: 1; from rayfwd.cli import main\n"
    program += "from rayfwd.cli import explain; explain.run = lambda _: signal.raise_signal(15)\n"
    program += "signal.signal(15, signal.SIG_IGN); main(['explain', 'link_down'])"
    ran = subprocess.run([sys.executable, "-c", program], timeout=30, capture_output=True)
    assert (ran.returncode, ran.stderr) == (128 + 15, b"")


def test_the_daemon_of_a_file_has_no_other_file(tmp_path: Path) -> None:
    config = parse({"role": "head", "name": "h"}, tmp_path / "rayfwd.toml")
    with claimed(config), recorded(config):
        assert not (config.runtime_dir / "rayfwd.toml").exists()
