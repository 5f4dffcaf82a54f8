"""The command line: what each verb prints and returns, with the real daemon parts behind it."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pytest

from rayfwd import __version__
from rayfwd.cli import VERBS
from rayfwd.cli.screen import duration, size
from rayfwd.cluster.plan import NodePlan, allocate, head_plan
from rayfwd.daemon.forgotten import Forgotten
from rayfwd.daemon.resources import lock
from rayfwd.hub.roster import Roster
from rayfwd.ray import token
from rayfwd.ray.token import RayAuth
from rayfwd.session import session
from rayfwd.session.frames import Kind, encode
from rayfwd.session.preamble import MARKER
from rayfwd.system import build
from rayfwd.system.control import ControlServer
from tests.commands import main

NETWORK = "127.77.0.0/16"
KEY = "k" * 32


@pytest.fixture(autouse=True)
def _no_logging_left_behind() -> Iterator[None]:
    yield
    import io

    from rayfwd.config import LogConfig
    from rayfwd.system import logs

    logs.setup(LogConfig(), io.StringIO())


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rayfwd.toml"
    dirs = f'state_dir = "{tmp_path}"\nruntime_dir = "{tmp_path}"\n'
    path.write_text(dirs + text)
    return path


@pytest.fixture
def head_file(tmp_path: Path) -> Path:
    return write(tmp_path, 'role = "head"\nname = "h"\n[ray]\nnum_cpus = 2\ncommand = "/none/ray"')


@pytest.fixture
def worker_file(tmp_path: Path) -> Path:
    text = 'role = "worker"\nname = "w1"\n[head]\nssh = "ray@head"\n[ray]\ncommand = "/none/ray"'
    return write(tmp_path, text)


@contextmanager
def daemon(directory: Path, **answers: dict[str, Any]) -> Iterator[None]:
    """A control socket that gives these answers, from a thread of its own."""

    def verb(answer: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
        async def give(args: dict[str, Any]) -> dict[str, Any]:
            return answer | ({"asked": args} if args else {})

        return give

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = ControlServer(directory / "control.sock", {k: verb(v) for k, v in answers.items()})
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def rayfwd(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "rayfwd", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


# -- the whole --------------------------------------------------------


def test_help_documents_exit_codes_and_verbs() -> None:
    done = rayfwd("--help")
    assert done.returncode == 0
    assert "exit codes:" in done.stdout
    assert all(f"    {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("run", "demo")])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: rayfwd {verb}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rayfwd {__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("jion", "did you mean join?"),
        ("stauts", "did you mean status?"),
        ("frobnicate", "`rayfwd --help` lists all"),
    ],
)
def test_a_verb_that_does_not_exist(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([word, "x"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith(f"rayfwd: error: the verb {word} does not exist; {hint}\n")


@pytest.mark.runs("rayfwd --version --verbose")
def test_version_with_what_it_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert main(["--verbose", "--version"]) == 0
    assert capsys.readouterr().out == said
    version, code, python = said.splitlines()
    assert version == f"rayfwd {__version__}"
    pure = str(session.__file__).endswith(".py")
    assert code == f"code: {'pure Python' if pure else 'compiled'}"
    assert python.startswith(f"Python: {platform.python_version()}, built with")
    assert python.endswith(f"optimizations ({sys.executable})")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"CONFIG_ARGS": "'--enable-optimizations' '--with-lto'"}, "with"),
        ({"CONFIG_ARGS": "", "PGO_PROF_USE_FLAG": "-fprofile-use"}, "without"),
        (
            {"CONFIG_ARGS": "'--enable-shared'", "PGO_PROF_USE_FLAG": ""},
            "with",
        ),  # Debian's, Ubuntu's
        ({}, "without"),
    ],
)
def test_whether_this_python_is_optimized(
    record: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_config_vars", lambda: record)
    assert build.python.__wrapped__().endswith(f"built {said} optimizations")


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["status", "--loud"], ["forget"], ["--verbose"], ["--verbose", "status"]]
)
def test_a_wrong_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: rayfwd" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["run", "check", "plan", "status", "forget"])
def test_a_mistake_in_the_file_is_one_line_and_no_traceback(verb: str, tmp_path: Path) -> None:
    path = write(tmp_path, 'role = "head"\nname = "h"\n[ray]\nport = "x"\nprot = 1')
    words: list[str | Path] = [verb, "--config", path]
    words += ["w1"] if verb == "forget" else []
    done = rayfwd(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f'{path}: ray.port = "x": must be a whole number',
        f"{path}: ray.prot: unknown key; did you mean port?",
    ]


def test_config_goes_before_and_after_the_verb(
    head_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(head_file), "check"]) == 0
    before = capsys.readouterr().out
    assert main(["check", "--config", str(head_file)]) == 0
    assert capsys.readouterr().out == before
    assert main(["--config", str(tmp_path / "none"), "check", "--config", str(head_file)]) == 0


def test_a_closed_pipe_is_quiet(head_file: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "rayfwd", "check", "--config", str(head_file)],
            stdout=out,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (141, b"")


# -- run --------------------------------------------------------


def test_a_daemon_that_cannot_begin_says_so_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "rayfwd.toml"
    path.write_text(
        f'role = "head"\nname = "h"\nstate_dir = "{path}/x"\nruntime_dir = "{tmp_path}"'
    )
    done = rayfwd("run", "--config", path)
    assert (done.returncode, done.stdout) == (1, "")
    event = json.loads(done.stderr.splitlines()[-1])
    assert (event["event"], event["level"]) == ("directory_unusable", "error")
    assert event["remedy"]


# -- check --------------------------------------------------------


@pytest.mark.runs("rayfwd check")
def test_check_of_a_head(head_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", str(head_file)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"{head_file}: valid"
    assert "network 127.77.0.0/16; this head is 127.77.0.1" in lines
    assert "ports 20000-20077 are this head's; the workers' follow" in lines
    assert any(line.startswith('ray ray_not_found: ray.command = "/none/ray"') for line in lines)


def test_check_of_a_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = tmp_path / "id"
    identity.touch(mode=0o644)
    path = write(
        tmp_path,
        f"""
        role = "worker"
        name = "w1"
        expose = [9000]
        [head]
        ssh = "ray@head:2222"
        via = "exec"
        identity = "{identity}"
        known_hosts = "{tmp_path}/none"
        [ray]
        command = "/none/ray"
        port = 7000
        advertise = "203.0.113.7"
        """,
    )
    assert main(["check", "--config", str(path)]) == 0
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    dials = "head ray@head, port 2222, 2 SSH connections (and up to 5 more)"
    assert f"{dials}, running `rayfwd attach` there" in lines
    assert "forward 127.0.0.1:8265 here is head:8265" in lines
    assert "advertise others reach this worker directly at 203.0.113.7" in lines
    assert (
        "expose [[forward]] of other nodes may lead to these ports of this machine: 9000" in lines
    )
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert (
        f"warning: head.identity = {identity}: other users may read it; run `chmod 600 {identity}`"
        in (warnings)
    )
    assert any("known_hosts = " in line and "no such file" in line for line in warnings)
    assert "warning: ray.port has an effect only on a head, not on a worker" in warnings


def test_check_warns_of_ephemeral_ports_in_the_blocks(
    head_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ports, reserved = tmp_path / "range", tmp_path / "reserved"
    monkeypatch.setattr("rayfwd.doctor.settings._EPHEMERAL", ports)
    monkeypatch.setattr("rayfwd.doctor.settings._RESERVED", reserved)
    ports.write_text("32768\t60999\n")
    assert main(["check", "--config", str(head_file)]) == 0
    assert "uses ephemeral ports" not in capsys.readouterr().out
    ports.write_text("16384\t60999\n")
    assert main(["check", "--config", str(head_file)]) == 0
    shown = capsys.readouterr().out
    assert "uses ephemeral ports from 16384 on" in shown
    assert "Ray's ports 20000-32767 are among them" in shown
    ports.write_text("1024\t65535\n")
    reserved.write_text("8080,30000-32767\n")
    assert main(["check", "--config", str(head_file)]) == 0
    shown = capsys.readouterr().out
    assert "Ray's ports 6379,8265,10001,20000-29999 are among them" in shown
    wanted = "6379,8080,8265,10001,20000-32767"
    assert f"`sysctl -w net.ipv4.ip_local_reserved_ports={wanted}`" in shown
    reserved.write_text(f"{wanted}\n")
    assert main(["check", "--config", str(head_file)]) == 0
    assert "uses ephemeral ports" not in capsys.readouterr().out, "the kernel takes none of them"


def test_check_warns_of_a_path_too_long_for_a_socket(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rayfwd.toml"
    path.write_text(f'role = "head"\nname = "h"\nruntime_dir = "/tmp/{"x" * 120}"')
    assert main(["check", "--config", str(path)]) == 0
    assert "bytes; Linux allows 107" in capsys.readouterr().out


def test_a_head_whose_ports_do_not_fit(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, 'role = "head"\nname = "h"\n[hub]\nport_base = 32760')
    assert main(["check", "--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: hub.port_base = 32760: ")


# -- plan --------------------------------------------------------

HEAD = head_plan("h", NETWORK, 20000, 70, {"gcs": 6379, "dashboard": 8265, "client": 10001})
WORKER = allocate([HEAD], "w1", NETWORK, 20000, 92, None)
PLAN = {
    "own": WORKER.to_wire(),
    "head": HEAD.to_wire(),
    "nodes": [HEAD.to_wire(), WORKER.to_wire()],
    "network": NETWORK,
    "ride_through": 120.0,
}


@pytest.mark.runs("rayfwd plan")
def test_plan_of_a_head_from_the_roster(head_file: Path, tmp_path: Path, capsys: Any) -> None:
    Roster(tmp_path / "roster.json", HEAD, NETWORK, 20000).join("w1", KEY, 92, None)
    before = (tmp_path / "roster.json").stat().st_mtime_ns
    assert main(["plan", "--config", str(head_file)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()[1:3]]
    assert rows[0][:4] == ["h", "head", "127.77.0.1", "20000-20077"]
    assert rows[1] == ["w1", "worker", "127.77.0.2", "20078-20177", "listeners"]
    assert "178 of 12768 ports from 20000 on are taken" in text
    assert "its Ray is restarted once" in text
    assert "/none/ray start --head --port=6379" in text
    assert "--node-ip-address=127.77.0.1" in text
    assert (tmp_path / "roster.json").stat().st_mtime_ns == before


def test_plan_of_a_worker_before_the_first_run(worker_file: Path, capsys: Any) -> None:
    assert main(["plan", "--config", str(worker_file)]) == 1
    assert "reaches the head for the first time" in capsys.readouterr().out


def test_plan_of_a_worker_as_kept(worker_file: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    assert main(["plan", "--config", str(worker_file)]) == 0
    text = capsys.readouterr().out
    assert "no daemon runs" in text
    assert "/none/ray start --address=127.77.0.1:6379" in text
    assert "--node-ip-address=127.77.0.2" in text


def test_plan_of_a_worker_from_its_daemon(worker_file: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "plan.json").write_text("damaged")
    with daemon(tmp_path, plan=PLAN):
        assert main(["plan", "--config", str(worker_file)]) == 0
    assert f"the daemon on {tmp_path}/control.sock" in capsys.readouterr().out
    with daemon(tmp_path, plan={"own": None, "head": None, "nodes": []}):
        assert main(["plan", "--config", str(worker_file)]) == 1


# -- status --------------------------------------------------------


def condition(code: str, subject: str = "gpu-1", **fields: Any) -> dict[str, Any]:
    """A condition of a status, as docs/status.md has it."""
    plain = {"severity": "error", "since": 940.0, "cause": "c", "remedy": "r", "seen_by": "gpu-1"}
    row = {"code": code, "subject": subject, "explained_by": None, "blocks_ready": False}
    return {"id": f"{code}:{subject}:gpu-1", **row, **plain, **fields}


STATUS: dict[str, Any] = {
    "schema": 2,
    "version": "0.1.0",
    "role": "worker",
    "name": "gpu-1",
    "pid": 4242,
    "uptime": 7260.0,
    "state": "waiting",
    "summary": "waiting: Ray ended",
    "conditions": [
        condition("ray_node_without_resources", "gpu-2", cause="no \x1b[31mresources"),
        condition("ray_died", cause="Ray ended", remedy="see its log", blocks_ready=True),
        condition("listener_blocked", "gpu-1/127.0.0.1:1", cause="port 1 is taken"),
    ],
    "node": WORKER.to_wire(),
    "link": {
        "state": "up",
        "head": "ray@head",
        "since": 940.0,
        "cuts": 2,
        "ridden_through": 1,
        "last_cut": None,
        "conditions": [],
        "lanes": [
            {
                "lane": 1,
                "class": "bulk",
                "state": "up",
                "rtt_ms": 1.234,
                "since": 990.0,
                "bytes_in": 1234,
                "bytes_out": 5_600_000_000,
            }
        ],
    },
    "workers": None,
    "clients": None,
    "streams": {"open": 12, "parked": 1},
    "bytes": {"in": 0, "out": 999_999},
    "listeners": {
        "open": 140,
        "blocked": 1,
        "conditions": ["listener_blocked:gpu-1/127.0.0.1:1:gpu-1"],
        "refused": [{"user": "mallory", "connections": 3}],
    },
    "ray": {
        "state": "failed",
        "since": 400.0,
        "version": "2.60.0",
        "python": "3.11.7",
        "pid": 77,
        "adopted": True,
        "restarts": 3,
        "conditions": ["ray_died:gpu-1:gpu-1"],
        "command": None,
    },
    "cluster": {
        "as_of": 995.0,
        "nodes": [],
        "totals": {"CPU": [1.5, 12.0], "object_store_memory": [0.0, 3.2e9]},
    },
    "canary": None,
    "roster": [
        {
            "name": "h",
            "role": "head",
            "address": "127.77.0.1",
            "ports": "1-2",
            "advertised": False,
            "state": None,
            "listeners": {"open": 46, "blocked": 1},
        },
        {
            "name": "gpu-1",
            "role": "worker",
            "address": "203.0.113.7",
            "ports": "20078-20177",
            "advertised": True,
            "state": None,
            "listeners": {"open": 0, "blocked": 0},
        },
    ],
}


def test_status_exit_codes(worker_file: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["status", "--config", str(worker_file)]
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("rayfwd: daemon_not_running: no rayfwd answers on ")
    with daemon(tmp_path, status=STATUS):
        assert main(words) == 3
        assert "WAITING" in capsys.readouterr().out
    with daemon(tmp_path, status=STATUS | {"state": "ready"}):
        assert main(words) == 0
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS | {"state": "ready"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h 0 min"),
        (172_799, "47 h 59 min"),
        (172_800, "2 d 0 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (10**18, "1000.0 PB"),
    ],
)
def test_sizes(number: float, text: str) -> None:
    assert size(number) == text


# -- forget --------------------------------------------------------


def test_forget_without_a_daemon(head_file: Path, tmp_path: Path, capsys: Any) -> None:
    Roster(tmp_path / "roster.json", HEAD, NETWORK, 20000).join("w1", KEY, 92, None)
    assert main(["forget", "w1", "--config", str(head_file)]) == 0
    assert "w1 is forgotten" in capsys.readouterr().out
    assert json.loads((tmp_path / "roster.json").read_text())["nodes"] == []
    assert main(["forget", "w1", "--config", str(head_file)]) == 1
    assert "no worker is named w1" in capsys.readouterr().out


@pytest.mark.runs("rayfwd forget *", "rayfwd forget")
def test_forget_asks_a_running_daemon(head_file: Path, tmp_path: Path, capsys: Any) -> None:
    Roster(tmp_path / "roster.json", HEAD, NETWORK, 20000).join("w1", KEY, 92, None)
    told = Forgotten(node="w1", token="turned", restarted=("h", "w2"), away=("w3",)).to_wire()
    with daemon(tmp_path, forget={"forgotten": told}):
        assert main(["forget", "w1", "--config", str(head_file)]) == 0
    said = capsys.readouterr().out
    assert "restarted now: Ray on h, w2\n" in said
    assert "away: w3;" in said
    assert "w1" in (tmp_path / "roster.json").read_text(), "the daemon's own business"
    named = Forgotten(node="w1", token="named", variable="RAY_AUTH_TOKEN").to_wire()
    with daemon(tmp_path, forget={"forgotten": named}):
        assert main(["forget", "w1", "--config", str(head_file)]) == 1
    assert "is set by RAY_AUTH_TOKEN" in capsys.readouterr().out
    with daemon(tmp_path, forget={"forgotten": None}):
        assert main(["forget", "w1", "--config", str(head_file)]) == 1
    with daemon(tmp_path, forget={"forgotten": True}):
        assert main(["forget", "w1", "--config", str(head_file)]) == 0
    assert "Ray keeps its token" in capsys.readouterr().out.splitlines()[-1], "as it once did"


@pytest.mark.parametrize("words", [[], ["--keep-token"]])
def test_forget_without_a_daemon_turns_the_token_over(
    head_file: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    old = RayAuth("token", "old")
    token.keep(old, tmp_path)
    Roster(tmp_path / "roster.json", HEAD, NETWORK, 20000).join("w1", KEY, 92, None)
    assert main(["forget", "w2", "--config", str(head_file)]) == 1
    assert token.kept_auth(tmp_path) == old, "nobody was forgotten"
    assert main(["forget", *words, "w1", "--config", str(head_file)]) == 0
    said = capsys.readouterr().out
    assert ("when rayfwd is started here" in said) == (token.kept_auth(tmp_path) != old)
    assert ("keeps its token" in said) == bool(words) == (token.kept_auth(tmp_path) == old)


def test_forget_leaves_the_roster_of_a_daemon_that_does_not_answer(
    head_file: Path, tmp_path: Path, capsys: Any
) -> None:
    Roster(tmp_path / "roster.json", HEAD, NETWORK, 20000).join("w1", KEY, 92, None)
    with lock(tmp_path / "lock", tmp_path):
        assert main(["forget", "w1", "--config", str(head_file)]) == 1
    assert "already_running" in capsys.readouterr().err
    assert "w1" in (tmp_path / "roster.json").read_text()
    assert main(["forget", "w1", "--config", str(head_file)]) == 0


def test_forget_is_for_the_head(worker_file: Path, capsys: Any) -> None:
    assert main(["forget", "w1", "--config", str(worker_file)]) == 2
    assert "`forget` runs on the head" in capsys.readouterr().err


# -- attach --------------------------------------------------------


@contextmanager
def attached(
    path: Path, *words: str, stdin: int | IO[bytes] = subprocess.PIPE
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """`rayfwd attach` and the hub's end of its connection."""
    with socket.socket(socket.AF_UNIX) as hub:
        hub.bind(str(path))
        hub.listen(1)
        hub.settimeout(30)
        process = subprocess.Popen(
            [sys.executable, "-m", "rayfwd", "attach", *(words or ("--socket", str(path)))],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "SSH_ORIGINAL_COMMAND": "rm -rf /"},
        )
        try:
            end, _ = hub.accept()
            end.settimeout(30)
            with end:
                yield process, end
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is None:
                    continue
                with suppress(BrokenPipeError):  # what was not sent any more
                    pipe.close()


def pipes(process: subprocess.Popen[bytes]) -> tuple[Any, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def read_all(end: socket.socket) -> bytes:
    out = bytearray()
    while part := end.recv(65536):
        out += part
    return bytes(out)


@pytest.mark.runs("rayfwd attach", "rayfwd attach --socket *")
def test_attach_carries_bytes_both_ways_at_once(tmp_path: Path) -> None:
    up, down = os.urandom(5_000_000), os.urandom(7_000_000)
    with attached(tmp_path / "hub.sock") as (process, end):
        stdin, stdout = pipes(process)

        def send_up() -> None:
            stdin.write(up)
            stdin.close()

        def send_down() -> None:
            end.sendall(down)
            end.shutdown(socket.SHUT_WR)

        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(stdout.read()))
        threads = [threading.Thread(target=send_up), threading.Thread(target=send_down), reader]
        for thread in threads:
            thread.start()
        assert read_all(end) == up
        for thread in threads:
            thread.join(30)
        assert got == [MARKER + down]
        assert process.wait(30) == 0


def test_attach_half_closed_by_the_client(tmp_path: Path) -> None:
    with attached(tmp_path / "hub.sock") as (process, end):
        stdin, stdout = pipes(process)
        stdin.write(b"question")
        stdin.close()
        assert read_all(end) == b"question"
        end.sendall(b"answer")
        end.shutdown(socket.SHUT_WR)
        assert stdout.read() == MARKER + b"answer"
        assert process.wait(30) == 0


def test_attach_half_closed_by_the_hub(tmp_path: Path) -> None:
    with attached(tmp_path / "hub.sock") as (process, end):
        stdin, stdout = pipes(process)
        end.sendall(b"first")
        end.shutdown(socket.SHUT_WR)
        assert stdout.read() == MARKER + b"first", "the end is seen while the other way is open"
        assert process.poll() is None
        stdin.write(b"still here")
        stdin.close()
        assert read_all(end) == b"still here"
        assert process.wait(30) == 0


def test_attach_ends_when_the_hub_goes(tmp_path: Path) -> None:
    with attached(tmp_path / "hub.sock") as (process, end):
        end.close()
        assert process.wait(30) == 0, "although standard input is still open"
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_attach_ends_when_nobody_reads_its_output(tmp_path: Path) -> None:
    with attached(tmp_path / "hub.sock") as (process, end):
        _, stdout = pipes(process)
        stdout.close()
        end.sendall(b"x")
        assert process.wait(30) == 0
        assert end.recv(10) == b""


HELLO = encode(Kind.HELLO, 0, 1, b"{}")


def passed_to(end: socket.socket) -> tuple[int, int]:
    """The command's standard input and output, as a hub takes them with a hello."""
    said, descriptors, _, _ = socket.recv_fds(end, 65536, 3)
    assert said == HELLO
    end.sendall(b"\0")
    stdin, stdout = descriptors
    return stdin, stdout


def test_attach_hands_its_pipes_over_and_waits(tmp_path: Path) -> None:
    with attached(tmp_path / "hub.sock") as (process, end):
        stdin, stdout = pipes(process)
        stdin.write(HELLO)
        stdin.flush()
        reading, writing = passed_to(end)
        os.write(writing, b"answer")
        os.close(writing)
        assert stdout.read() == MARKER + b"answer", "its end is seen: the hub had the only one"
        stdin.write(b"and more")
        stdin.flush()
        assert os.read(reading, 100) == b"and more"
        os.close(reading)
        assert process.poll() is None
        end.close()
        assert process.wait(30) == 0


def test_attach_of_a_worker_of_0_1_0_sends_frames_alone(tmp_path: Path) -> None:
    """It knows no marker, and would take it for a frame. It does not prove its key."""
    older = encode(Kind.HELLO, 0, 1, b'{"node": "w1", "key": "abababababababab", "features": []}')
    with attached(tmp_path / "hub.sock") as (process, end):
        stdin, stdout = pipes(process)
        stdin.write(older)
        stdin.flush()
        assert end.recv(65536) == older
        end.sendall(b"\x02 welcome")
        end.close()
        assert stdout.read() == b"\x02 welcome"
        assert process.wait(30) == 0


def test_attach_says_that_it_is_there_before_a_hello_that_does_not_come(tmp_path: Path) -> None:
    with attached(tmp_path / "hub.sock") as (process, _):
        _, stdout = pipes(process)
        assert stdout.read(len(MARKER)) == MARKER


def test_attach_with_a_hub_that_takes_no_pipes(tmp_path: Path) -> None:
    """One of an earlier version: what is passed it does not see, and answers with a frame."""
    with attached(tmp_path / "hub.sock") as (process, end):
        stdin, stdout = pipes(process)
        stdin.write(HELLO)
        stdin.flush()
        assert end.recv(65536) == HELLO
        end.sendall(b"\x02 welcome")
        stdin.write(b"and more")
        stdin.close()
        assert read_all(end) == b"and more"
        end.close()
        assert stdout.read() == MARKER + b"\x02 welcome"
        assert process.wait(30) == 0


def test_attach_with_a_hub_that_goes_as_it_is_handed_the_pipes(tmp_path: Path) -> None:
    with attached(tmp_path / "hub.sock") as (process, end):
        stdin, stdout = pipes(process)
        stdin.write(HELLO)
        stdin.flush()
        assert end.recv(65536) == HELLO
        end.close()
        assert stdout.read() == MARKER
        assert process.wait(30) == 0


def test_attach_of_files_copies(tmp_path: Path) -> None:
    """A hub could not wait for them."""
    path, begun = tmp_path / "hub.sock", tmp_path / "begun"
    begun.write_bytes(HELLO)
    with begun.open("rb") as file, attached(path, stdin=file) as (process, end):
        said, descriptors, _, _ = socket.recv_fds(end, 65536, 3)
        assert (said, descriptors) == (HELLO, [])
        end.close()
        assert process.wait(30) == 0


def test_attach_without_a_hub(tmp_path: Path) -> None:
    done = rayfwd("attach", "--socket", tmp_path / "hub.sock")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"rayfwd attach: hub_absent: no hub answers on {tmp_path}/hub.sock (No such file or "
        "directory); start rayfwd on the head (`systemctl start rayfwd`), or correct the "
        "socket's path\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_attach_that_may_not(tmp_path: Path) -> None:
    from rayfwd.cli import attach

    with socket.socket(socket.AF_UNIX) as hub:
        path = tmp_path / "hub.sock"
        hub.bind(str(path))
        hub.listen(1)
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:  # not by exec: the checkout may be closed to the other user
            code = 99
            try:
                os.dup2(send, 2)
                sys.stderr = os.fdopen(2, "w")
                os.setresuid(12345, 12345, 12345)
                import argparse

                code = attach.run(
                    argparse.Namespace(
                        socket=path, config=None, cluster=None, node=None, client=False, peer=False
                    )
                )
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(send)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(receive) as said:
            assert said.read() == (
                "rayfwd attach: hub_not_permitted: user id 12345 may not connect to "
                f"{path}; add this user to hub.users in the head's file (`rayfwd head --users "
                "USER`), then restart rayfwd there\n"
            )
        assert os.waitstatus_to_exitcode(status) == 1


@pytest.mark.parametrize(
    ("text", "socket_name"),
    [('[hub]\nsocket = "{}/a.sock"', "a.sock"), ('runtime_dir = "{}"\nrole = 5', "hub.sock")],
)
def test_attach_takes_the_socket_from_the_file(tmp_path: Path, text: str, socket_name: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text.format(tmp_path))
    with attached(tmp_path / socket_name, "--config", str(path)) as (process, end):
        end.close()
        assert process.wait(30) == 0


def test_attach_with_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    done = rayfwd("attach", "--config", tmp_path / "none.toml")
    assert done.returncode == 2
    assert done.stderr == (f"{tmp_path}/none.toml: cannot be read: No such file or directory\n")


def test_attach_imports_nothing_but_the_standard_library(tmp_path: Path) -> None:
    code = (
        "import sys; from rayfwd.cli import main; before = set(sys.modules)\n"
        f"main(['attach', '--socket', {str(tmp_path / 'none')!r}])\n"
        "heavy = {'asyncio', 'asyncssh', 'pydantic', 'structlog', 'logging'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"


def test_a_head_that_dials_nobody_loads_no_ssh(tmp_path: Path) -> None:
    """Nor what draws on terminals: its start takes half the time, and less memory."""
    config = tmp_path / "rayfwd.toml"
    config.write_text(f'role = "head"\nstate_dir = "{tmp_path}"\nruntime_dir = "{tmp_path}"\n')
    code = (
        "import sys; from pathlib import Path; from rayfwd.cli import run\n"
        "from rayfwd.config import load; from rayfwd.daemon.main import role_of\n"
        f"print(type(role_of(load(Path({str(config)!r})))).__name__)\n"
        "print(sorted({'asyncssh', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "HeadRole\n[]\n", done.stderr


def test_garbage_is_collected_once_the_verb_is_loaded() -> None:
    """And what was loaded is left out: a daemon looks through its own things only."""
    code = (
        "import gc, sys; from rayfwd.cli import main; sys.argv = ['rayfwd', '--version']; main()\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[1:] == ["True True"], done.stderr


def test_node_plans_of_the_wire_are_what_the_screen_shows() -> None:
    assert NodePlan.from_wire(STATUS["node"]).last_worker_port == 20177


# -- env and exec --------------------------------------------------------

TOLD = {
    "RAY_ADDRESS": "127.77.0.1:6379",
    "GLOO_SOCKET_IFNAME": "rayfwd0",
    "NO_PROXY": "localhost,127.77.0.0/16",
    "VLLM_HOST_IP": "it's 127.77.0.2",
}


@pytest.mark.runs("rayfwd env", "eval *")
def test_env_is_for_a_shell(tmp_path: Path) -> None:
    """What the shell has stays, but for hosts without a proxy, which come together."""
    file = write(tmp_path, 'role = "head"\n')
    mine = {**os.environ, "GLOO_SOCKET_IFNAME": "eth7", "NO_PROXY": "intranet,localhost"}
    for name in ("RAY_ADDRESS", "VLLM_HOST_IP"):
        mine.pop(name, None)
    program = shlex.join([sys.executable, "-m", "rayfwd"])
    shell = f'rayfwd() {{ {program} "$@" --config {shlex.quote(str(file))}; }}\n'
    shell += 'eval "$(rayfwd env)"\n'
    shell += 'printf "%s|" "$RAY_ADDRESS" "$GLOO_SOCKET_IFNAME" "$NO_PROXY" "$VLLM_HOST_IP"'
    with daemon(tmp_path, environment=TOLD):
        said = rayfwd("env", "--config", file, env=mine)
        ran = subprocess.run(["sh", "-c", shell], env=mine, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("|")[:4] == [
        "127.77.0.1:6379",
        "eth7",
        "intranet,localhost,127.77.0.0/16",
        "it's 127.77.0.2",
    ]


@pytest.mark.runs("rayfwd exec", "rayfwd exec -- python *")
def test_exec_becomes_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in an environment that is active: Debian's own Python is `python3` alone.
    # Without directories that are closed to us: what is not found there is "not permitted".
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    file = write(tmp_path, 'role = "head"\n')
    code = "import os, sys; print(os.environ['RAY_ADDRESS'], sys.argv[1:]); sys.exit(7)"
    with daemon(tmp_path, environment=TOLD):
        words = ["--", "python", "-c", code, "--config", "x"]
        said = rayfwd("exec", "--config", file, *words)
        assert (said.returncode, said.stdout) == (7, "127.77.0.1:6379 ['--config', 'x']\n")
        said = rayfwd("exec", "--config", file, "--", "no-such-command")
    assert said.returncode == 2
    assert "no-such-command: No such file" in said.stderr


def test_exec_finds_what_is_beside_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python` on a Debian, which has `python3` alone; what is active goes first."""
    active, beside = tmp_path / "active", tmp_path / "ray" / "bin"
    for folder, names in ((active, ["python"]), (beside, ["python", "rllib"])):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(f"#!/bin/sh\necho {folder.name} {name}\n")
            (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{active}{os.pathsep}{os.defpath}")
    file = write(tmp_path, f'role = "head"\nray.command = "{beside}/ray"\n')
    with daemon(tmp_path, environment=TOLD):
        said = [rayfwd("exec", "--config", file, "--", name) for name in ("python", "rllib")]
    assert [each.stdout for each in said] == ["active python\n", "bin rllib\n"]


@pytest.mark.parametrize("verb", ["env", "exec"])
def test_env_without_a_daemon(tmp_path: Path, verb: str) -> None:
    file = write(tmp_path, 'role = "head"\n')
    said = rayfwd(verb, "--config", file, *(["--", "true"] if verb == "exec" else []))
    assert said.returncode == 1
    assert "no rayfwd answers" in said.stderr


def test_who_reads_ascii_only_is_told_all_the_same() -> None:
    """As in LC_ALL=de_DE.ISO-8859-1: what cannot be written is written otherwise."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "rayfwd", "add", "--help"]
    ran = subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=30)
    assert "--fingerprint SHA256:\\u2026" in ran.stdout
