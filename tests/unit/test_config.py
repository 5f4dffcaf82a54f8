"""The configuration file: what it accepts, and the one line that each mistake gives."""

from __future__ import annotations

import socket
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rayfwd.config import ConfigError, load, parse
from rayfwd.system.paths import (
    default_runtime_dir,
    default_state_dir,
    find_socket,
    named_clusters,
    running_config,
)

WORKER = 'role = "worker"\nname = "w1"\n[head]\nssh = "ray@head"\n'
HEAD = 'role = "head"\nname = "h"\n'


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(tomllib.loads(text), Path("/etc/rayfwd.toml"))
    return caught.value.problems


MISTAKES = {
    "role missing": ("name = 'x'", ['role: must be given: "head", "worker" or "client"']),
    "role unknown": ('role = "boss"', ['role = "boss": must be "head", "worker" or "client"']),
    "role is a number": ("role = 1", ['role = 1: must be "head", "worker" or "client"']),
    "unknown key, near": (
        HEAD + "[ray]\nnum_cpu = 1",
        ["ray.num_cpu: unknown key; did you mean num_cpus?"],
    ),
    "unknown key, far": (
        HEAD + "[log]\nzzz = 1",
        ["log.zzz: unknown key; the keys here are level, format"],
    ),
    "unknown section": (
        HEAD + "[heads]\nssh = 'x'",
        ["heads: unknown key; did you mean head?"],
    ),
    "unknown key in a list": (
        HEAD + '[[forward]]\nlisten = "127.0.0.1:1"\nto = "head:1"\nfrom = 1',
        ["forward[0].from: unknown key; the keys here are listen, to"],
    ),
    "bad name": (
        'role = "head"\nname = "a b"',
        [
            "name = \"a b\": must be 1 to 63 letters, digits, '.', '_' or '-', and begin and end "
            "with a letter or digit"
        ],
    ),
    "name with an escape": (
        'role = "head"\nname = "a\\u001b[31m"',
        [
            "name = \"a\\u001b[31m\": must be 1 to 63 letters, digits, '.', '_' or '-', and begin "
            "and end with a letter or digit"
        ],
    ),
    "worker called head": (
        WORKER.replace("w1", "head"),
        ['name = "head": must be another name on a worker'],
    ),
    "denied and offered": (
        HEAD + "expose = [8000]\n[network]\ndeny = [8000, 9000, 8265]",
        [
            "network.deny = [8000]: must not name this port, which is in expose, too",
            "network.deny = [8265]: must not name this port, which is ray.dashboard_port",
        ],
    ),
    "worker without head": (
        'role = "worker"\nname = "w1"',
        ["head: must be given on a worker: a [head] section with ssh in it"],
    ),
    "worker with hub": (
        WORKER + "[hub]\nport_base = 2000",
        ['hub: belongs to a head, and this file has role = "worker"'],
    ),
    "head with head": (
        HEAD + '[head]\nssh = "a@b"',
        ['head: belongs to a worker, and this file has role = "head"'],
    ),
    "head with advertise": (
        HEAD + '[ray]\nadvertise = "203.0.113.7"',
        ['ray.advertise: belongs to a worker, and this file has role = "head"'],
    ),
    "head without ssh": ('role = "worker"\nname = "w1"\n[head]', ["head.ssh: must be given"]),
    "ssh without user": (
        WORKER.replace("ray@head", "@head"),
        [
            'head.ssh = "@head": must be user@host, user@host:port (a port from 1 to 65535) or an '
            "alias of ssh_config"
        ],
    ),
    "ssh port": (
        WORKER.replace("ray@head", "ray@head:0"),
        [
            'head.ssh = "ray@head:0": must be user@host, user@host:port (a port from 1 to 65535) '
            "or an alias of ssh_config"
        ],
    ),
    "string for a whole number": (
        HEAD + '[ray]\nnum_cpus = "5"',
        ['ray.num_cpus = "5": must be a whole number'],
    ),
    "fraction for a whole number": (
        HEAD + "[ray]\nport = 5.0",
        ["ray.port = 5.0: must be a whole number"],
    ),
    "true for a whole number": (
        HEAD + "[ray]\nnum_gpus = true",
        ["ray.num_gpus = true: must be a whole number"],
    ),
    "string for a number": (
        'role = "head"\nride_through = "120"',
        ['ride_through = "120": must be a number'],
    ),
    "infinite": (
        'role = "head"\nride_through = inf',
        ["ride_through = inf: must be a finite number"],
    ),
    "not a number": (
        'role = "head"\nride_through = nan',
        ["ride_through = nan: must be a finite number"],
    ),
    "too short": ('role = "head"\nride_through = 1', ["ride_through = 1: must be at least 5"]),
    "too long": (
        'role = "head"\nride_through = 1e9',
        ["ride_through = 1000000000.0: must be at most 86400"],
    ),
    "string for a switch": (
        HEAD + '[ray]\nstart = "yes"',
        ['ray.start = "yes": must be true or false'],
    ),
    "number for a switch": (HEAD + "[ray]\nstart = 1", ["ray.start = 1: must be true or false"]),
    "number for a string": (
        HEAD + "[ray]\ncommand = 7",
        ['ray.command = 7: must be a string, as in "…"'],
    ),
    "empty command": (HEAD + '[ray]\ncommand = ""', ['ray.command = "": must not be empty']),
    "number for a path": (
        'role = "head"\nstate_dir = 7',
        ['state_dir = 7: must be a path, as in "/…"'],
    ),
    "relative path": (
        'role = "head"\nstate_dir = "var"',
        ['state_dir = "var": must be an absolute path, or begin with ~/'],
    ),
    "relative socket on the head": (
        WORKER + 'socket = "hub.sock"',
        ['head.socket = "hub.sock": must be an absolute path (on the head)'],
    ),
    "via": (WORKER + 'via = "tcp"', ['head.via = "tcp": must be "socket", "exec" or "auto"']),
    "too many lanes": (WORKER + "bulk_lanes = 9", ["head.bulk_lanes = 9: must be at most 8"]),
    "log level": (
        HEAD + '[log]\nlevel = "loud"',
        ['log.level = "loud": must be "debug", "info", "warning" or "error"'],
    ),
    "port out of range": (
        HEAD + "[ray]\ndashboard_port = 65536",
        ["ray.dashboard_port = 65536: must be at most 65535"],
    ),
    "port base": (
        HEAD + "[hub]\nport_base = 32768",
        ["hub.port_base = 32768: must be less than 32768"],
    ),
    "network elsewhere": (
        HEAD + '[hub]\nnetwork = "11.0.0.0/16"',
        [
            'hub.network = "11.0.0.0/16": must be a network inside 127.0.0.0/8, /29 or larger, as '
            "in 127.77.0.0/16; if every node has the overlay, it may also be a private "
            "network, as in 10.77.0.0/16"
        ],
    ),
    "network that needs the overlay": (
        HEAD + '[hub]\nnetwork = "10.77.0.0/16"\n[network]\nlevel = "listeners"',
        [
            'hub.network = "10.77.0.0/16": outside of 127.0.0.0/8 it needs the overlay, and '
            'network.level is "listeners"'
        ],
    ),
    "network too small": (
        HEAD + '[hub]\nnetwork = "127.77.0.0/30"',
        [
            'hub.network = "127.77.0.0/30": must be a network inside 127.0.0.0/8, /29 or larger, '
            "as in 127.77.0.0/16; if every node has the overlay, it may also be a private "
            "network, as in 10.77.0.0/16"
        ],
    ),
    "network with 127.0.0.1": (
        HEAD + '[hub]\nnetwork = "127.0.0.0/16"',
        [
            'hub.network = "127.0.0.0/16": must not contain 127.0.0.1, which Ray replaces by '
            "another address"
        ],
    ),
    "one user for a list": (
        HEAD + '[hub]\nusers = "ray"',
        ['hub.users = "ray": must be a list, as in […]'],
    ),
    "number in a list": (
        HEAD + '[hub]\nusers = ["ray", 5]',
        ['hub.users[1] = 5: must be a string, as in "…"'],
    ),
    "expose": (
        HEAD.replace("name", "expose = [80, 0]\nname"),
        ["expose[1] = 0: must be at least 1"],
    ),
    "resource not a number": (
        HEAD + '[ray.resources]\n"a b" = "1"',
        ['ray.resources."a b" = "1": must be a number'],
    ),
    "resource negative": (
        HEAD + "[ray.resources]\nx = -1",
        ["ray.resources.x = -1: must be at least 0"],
    ),
    "env not a string": (
        HEAD + "[ray.env]\nRAY_x = 1",
        ['ray.env.RAY_x = 1: must be a string, as in "…"'],
    ),
    "secret not shown": (
        HEAD + "[ray.env]\nRAY_AUTH_TOKEN = 12345",
        ['ray.env.RAY_AUTH_TOKEN = [redacted]: must be a string, as in "…"'],
    ),
    "store too small": (
        HEAD + "[ray]\nobject_store_memory = 1",
        ["ray.object_store_memory = 1: must be at least 78643200"],
    ),
    "advertise is a name": (
        WORKER + '[ray]\nadvertise = "gpu.example.org"',
        ['ray.advertise = "gpu.example.org": must be an IPv4 address, not a name'],
    ),
    "advertise is loopback": (
        WORKER + '[ray]\nadvertise = "127.0.0.1"',
        [
            'ray.advertise = "127.0.0.1": must be an IPv4 address at which other machines reach '
            "this one"
        ],
    ),
    "listen not loopback": (
        WORKER + '[[forward]]\nlisten = "0.0.0.0:8265"\nto = "head:8265"',
        [
            'forward[0].listen = "0.0.0.0:8265": must be on an IPv4 loopback address, as in '
            "127.0.0.1:8265"
        ],
    ),
    "listen without port": (
        WORKER + '[[forward]]\nlisten = "127.0.0.1"\nto = "head:8265"',
        ['forward[0].listen = "127.0.0.1": must be host:port with a port from 1 to 65535'],
    ),
    "to a strange node": (
        WORKER + '[[forward]]\nlisten = "127.0.0.1:1"\nto = "he ad:1"',
        ['forward[0].to = "he ad:1": must be node:port, where node is head or a node\'s name'],
    ),
    "forward as one section": (
        WORKER + '[forward]\nlisten = "127.0.0.1:1"',
        ["forward = {…}: must be a list of sections, each written [[forward]]"],
    ),
    "two forwards on one port": (
        WORKER
        + '[[forward]]\nlisten = "127.0.0.1:1"\nto = "head:1"\n'
        + '[[forward]]\nlisten = "127.0.0.1:1"\nto = "head:2"\n',
        ['forward[1].listen = "127.0.0.1:1": must differ from forward[0].listen'],
    ),
    "two services on one port": (
        HEAD + "[ray]\nport = 8265",
        ["ray.dashboard_port = 8265: must differ from ray.port"],
    ),
    "section as a string": (HEAD + 'ray = "x"', ['ray = "x": must be a section']),
    "several at once, a line each": (
        WORKER + 'via = "x"\n[hub]\n[ray]\nport = 0\nnum_cpus = -1',
        [
            'head.via = "x": must be "socket", "exec" or "auto"',
            "ray.num_cpus = -1: must be at least 0",
            "ray.port = 0: must be at least 1",
            'hub: belongs to a head, and this file has role = "worker"',
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_each_mistake_is_one_line(text: str, expected: list[str]) -> None:
    found = problems(text)
    assert found == expected
    assert all(line.isprintable() for line in found)


def test_error_text_names_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({}, Path("/x/y.toml"))
    assert str(caught.value) == '/x/y.toml: role: must be given: "head", "worker" or "client"'


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file: write one"):
        load(tmp_path / "none.toml")


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("role = head\n")
    with pytest.raises(ConfigError, match=r"not TOML: Invalid value \(at line 1, column 8\)"):
        load(path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text: see its byte 1"):
        load(path)
    path.write_text("a = " + "[" * 5000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_least_worker() -> None:
    config = parse(tomllib.loads(WORKER))
    assert config.head is not None
    assert config.head.ssh_target() == ("ray", "head", None)
    assert [(f.listen, f.to) for f in config.forwards] == [("127.0.0.1:8265", "head:8265")]


def test_least_head() -> None:
    config = parse(tomllib.loads(HEAD + 'runtime_dir = "/run/x"'))
    assert config.forwards == ()
    assert config.hub_socket == Path("/run/x/hub.sock")
    assert config.control_socket == Path("/run/x/control.sock")
    own = config.own_head_plan()
    assert (own.address, own.base) == ("127.77.0.1", 20000)
    assert own.head_services == {"gcs": 6379, "dashboard": 8265, "client": 10001}


def test_no_forwards_where_the_list_is_empty() -> None:
    assert parse(tomllib.loads("forward = []\n" + WORKER)).forwards == ()


@pytest.mark.parametrize(
    ("ssh", "expected"),
    [
        ("head", (None, "head", None)),
        ("head:2222", (None, "head", 2222)),
        ("a@b@head", ("a@b", "head", None)),
        ("ray@192.0.2.1:22", ("ray", "192.0.2.1", 22)),
        ("ray@2001:db8::1", ("ray", "2001:db8::1", None)),
        ("ray@[2001:db8::1]:2222", ("ray", "2001:db8::1", 2222)),
        ("[2001:db8::1]", (None, "2001:db8::1", None)),
    ],
)
def test_ssh_targets(ssh: str, expected: tuple[str | None, str, int | None]) -> None:
    config = parse({"role": "worker", "name": "w", "head": {"ssh": ssh}})
    assert config.head is not None
    assert config.head.ssh_target() == expected


@pytest.mark.parametrize(
    "ssh",
    [
        "",
        "ray@",
        "-oProxyCommand=x",
        "ray@-x",
        "a b",
        "ssh://x",
        "h:",
        "h:x",
        "[::1]x",
        "u@h:99999",
    ],
)
def test_ssh_targets_refused(ssh: str) -> None:
    with pytest.raises(ConfigError, match=r"head\.ssh = .*must be user@host"):
        parse({"role": "worker", "name": "w", "head": {"ssh": ssh}})


def test_home_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ray")
    config = parse({"role": "worker", "name": "w", "head": {"ssh": "h", "identity": "~/.ssh/id"}})
    assert config.head is not None
    assert config.head.identity == Path("/home/ray/.ssh/id")


def test_directories_are_systemds_where_it_gives_some() -> None:
    env = {"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "RUNTIME_DIRECTORY": "/run/a:/run/b"}
    assert default_state_dir(env) == Path("/var/lib/a")
    assert default_runtime_dir(env) == Path("/run/a")


def test_directories_of_an_ordinary_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    env = {"HOME": "/home/u"}
    assert default_state_dir(env) == Path("/home/u/.local/state/rayfwd")
    monkeypatch.setattr("os.path.isdir", lambda path: False)
    assert default_runtime_dir(env) == Path("/home/u/.local/state/rayfwd/run")
    env |= {"XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/run/user/1000"}
    assert default_state_dir(env) == Path("/s/rayfwd")
    assert default_runtime_dir(env) == Path("/s/rayfwd/run"), "srun and containers keep the name"
    monkeypatch.setattr("os.path.isdir", lambda path: True)
    monkeypatch.setattr("rayfwd.system.paths.is_ours", lambda path: True)
    assert default_runtime_dir(env) == Path("/run/user/1000/rayfwd")


def test_a_daemon_of_another_environment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It began where there was no runtime directory of the session's; the shell that asks has one.
    What a daemon left there that was killed does not hide it."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("rayfwd.system.paths.stranger_in", lambda path, owners: None)
    # A socket's path may have 107 characters: pytest's own directory is too deep.
    with tempfile.TemporaryDirectory() as home, socket.socket(socket.AF_UNIX) as listener:
        session = Path(home) / "session"
        monkeypatch.setattr("rayfwd.system.paths.is_ours", lambda path: path == session)
        env = {"HOME": home, "XDG_STATE_HOME": home, "XDG_RUNTIME_DIR": str(session)}
        killed = session / "rayfwd/clusters/a/rayfwd.toml"
        lives = Path(home) / "rayfwd/run/clusters/a/rayfwd.toml"
        for record in (killed, lives):
            record.parent.mkdir(parents=True)
        killed.touch()
        assert running_config(env, "a") == killed
        lives.touch()
        listener.bind(str(lives.with_name("control.sock")))
        listener.listen()
        assert running_config(env, "a") == lives
        assert named_clusters(env) == ["a"]


def test_a_runtime_directory_of_another_user_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after su, which keeps the variable."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("rayfwd.system.paths.is_ours", lambda path: path == Path("/run/user/1000"))
    monkeypatch.setattr("os.path.isdir", lambda path: "machines" not in str(path))
    env = {"HOME": "/home/u", "XDG_RUNTIME_DIR": str(tmp_path)}
    assert default_runtime_dir(env) == Path("/run/user/1000/rayfwd")
    monkeypatch.setattr("rayfwd.system.paths.is_ours", lambda path: False)
    assert default_runtime_dir(env) == Path("/home/u/.local/state/rayfwd/run")


def test_a_services_socket_is_found_from_a_users_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, own = tmp_path / "service", tmp_path / "own"
    service.mkdir()
    monkeypatch.setattr("rayfwd.system.paths.SERVICE_RUNTIME_DIR", service)
    assert find_socket(own, "hub.sock") == own / "hub.sock"
    (service / "hub.sock").touch()
    assert find_socket(own, "hub.sock") == service / "hub.sock"
    own.mkdir()
    (own / "hub.sock").touch()
    assert find_socket(own, "hub.sock") == own / "hub.sock"


def test_worker_ports_follow_the_cpus() -> None:
    def ports(**ray: Any) -> int:
        return parse({"role": "head", "name": "h", "ray": ray}).worker_ports

    assert ports(num_cpus=8) == 64 + 24
    assert ports(num_cpus=0) == 64
    assert ports(num_cpus=8, worker_ports=500) == 500


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("gpu-1.example.org", "gpu-1"),
        ("x" * 64, "x" * 63),
        (f"{'x' * 62}-y", "x" * 62),
        ("_a", "a"),
        ("my machine", "my-machine"),
        ("...", "node"),
    ],
)
def test_any_host_name_makes_a_node(monkeypatch: pytest.MonkeyPatch, host: str, name: str) -> None:
    """Who has not said a name is not told that it is wrong."""
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert parse({"role": "worker", "head": {"ssh": "head"}}).name == name
