"""`rayfwd doctor --report`: with secrets planted everywhere, none is in the file; the rest is."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from rayfwd import __version__, codes
from rayfwd.cli import doctor
from rayfwd.doctor import report, scrubbing
from rayfwd.problems import ProblemError
from rayfwd.system.redact import REDACTED
from tests.unit.test_cli import STATUS, daemon, rayfwd

PLANTED = {
    name: f"Planted-{number:02d}-{name.replace(' ', '-')}"
    for number, name in enumerate(
        [
            *("node key", "kept token", "token file", "users token", "env token", "path token"),
            *("aws", "wandb", "proxy password", "config env", "harmless name", "argument"),
            *("assigned", "bearer", "attach", "label key", "quoted", "second proxy"),
            *("clients token",),
        ]
    )
}
NAMED_ONLY = {"assigned", "bearer", "quoted"}
"""Known to nobody, but for what stands before them in the log."""

LOG = f"""\
2026-11-24 10:00:00 [info     ] lane_up lane=interactive
curl -H "Authorization: Bearer {PLANTED["bearer"]}" http://127.0.0.1:8265/api/version
started with password={PLANTED["assigned"]} and "api_key": "{PLANTED["quoted"]}"
the key of this node is {PLANTED["node key"]} and nothing names it here: {PLANTED["harmless name"]}
"""


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, str]:
    """A worker's files, with secrets wherever one may be; the environment besides."""
    state, home = tmp_path / "state", tmp_path / "home"
    for directory in (state, home / ".ray"):
        directory.mkdir(parents=True)
    (state / "node.key").write_text(PLANTED["node key"] + "\n")
    kept = {"mode": "token", "token": PLANTED["kept token"]}
    (state / "ray_auth.json").write_text(json.dumps(kept))
    (state / "ray_token").write_text(PLANTED["token file"])
    (state / "clients" / "ray@head").mkdir(parents=True)
    (state / "clients" / "ray@head" / "ray_token").write_text(PLANTED["clients token"])
    (home / ".ray" / "auth_token").write_text(PLANTED["users token"])
    (tmp_path / "token").write_text(PLANTED["path token"])
    key = asyncssh.generate_private_key("ssh-ed25519").export_private_key().decode()
    (state / "ray.log").write_text(f"a line of Ray's\n{key}{LOG}")
    bare = [value for name, value in PLANTED.items() if name not in NAMED_ONLY]
    (tmp_path / "log").write_text(LOG + f"a line with {' and '.join(bare)}\n")
    (tmp_path / "rayfwd.toml").write_text(
        f"""
role = "worker"
name = "w1"
state_dir = "{state}"
runtime_dir = "{tmp_path}"
[head]
ssh = "ray@127.0.0.1:1"
via = "exec"
attach_command = "rayfwd attach --token {PLANTED["attach"]}"
[ray]
command = "/none/ray"
extra_args = ["--redis-password={PLANTED["argument"]}", "--temp-dir=/scratch"]
labels = {{"api-key" = "{PLANTED["label key"]}", "zone" = "north"}}
[ray.env]
RAY_SECRET = "{PLANTED["config env"]}"
DATABASE = "{PLANTED["harmless name"]}"
RAY_BACKEND_LOG_LEVEL = "debug"
https_proxy = "http://ann:{PLANTED["second proxy"]}@proxy.example:3128"
"""
    )
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "RAY_AUTH_TOKEN": PLANTED["env token"],
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "AWS_SECRET_ACCESS_KEY": PLANTED["aws"],
        "WANDB_API_KEY": PLANTED["wandb"],
        "http_proxy": f"http://ann:{PLANTED['proxy password']}@proxy.example:3128",
        "RAY_ADDRESS": "127.77.0.1:6379",
        "EDITOR": "vi",
    }


def parts(text: str) -> dict[str, str]:
    found = re.split(r"(?m)^== (.*)\n", text)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


@pytest.mark.runs("rayfwd doctor --report --with-logs")
def test_no_secret_is_in_it(tmp_path: Path, planted: dict[str, str]) -> None:
    out = tmp_path / "report.txt"
    status = STATUS | {
        "state": "ready",
        "summary": "ready",
        "pid": os.getpid(),
        "node": None,
        "conditions": [],
        "ray": STATUS["ray"] | {"state": "up", "command": f"ray start {PLANTED['kept token']}"},
        "listeners": {"open": 3, "blocked": 0, "conditions": [], "refused": []},
        "token": "short",
    }
    words = ["--config", str(tmp_path / "rayfwd.toml"), "doctor", "--report", str(out)]
    with daemon(tmp_path, status=status, plan={"network": "127.77.0.0/16"}):
        ran = rayfwd(*words, "--with-logs", "--log", str(tmp_path / "log"), env=planted)
    assert ran.returncode == 1, ran.stderr
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    text = out.read_text()
    left = [name for name, value in PLANTED.items() if value in text]
    assert left == []
    assert text.count(REDACTED) >= 30
    assert "PRIVATE KEY" not in text
    assert [name for name, value in PLANTED.items() if value in ran.stdout + ran.stderr] == []


def test_what_helps_is_in_it(tmp_path: Path, planted: dict[str, str]) -> None:
    out = tmp_path / "report.txt"
    words = ["--config", str(tmp_path / "rayfwd.toml"), "doctor", "--report", str(out), "--json"]
    words += ["--with-logs"]
    ran = rayfwd(*words, "--log", str(tmp_path / "log"), env=planted)
    assert f"written: {out}" in ran.stderr
    found = parts(out.read_text())
    assert f"rayfwd: {__version__}" in found["versions"]
    assert "asyncssh: 2." in found["versions"]
    checks = json.loads(found["doctor"])["checks"]
    assert checks == json.loads(ran.stdout)["checks"]
    assert {c["check"]: c["code"] for c in checks}["ssh"] == "ssh_unreachable"
    config = json.loads(found[f"configuration ({tmp_path / 'rayfwd.toml'})"])
    assert config["head"]["ssh"] == "ray@127.0.0.1:1"
    assert config["ray"]["extra_args"] == [f"--redis-password={REDACTED}", "--temp-dir=/scratch"]
    assert config["ray"]["labels"] == {"api-key": REDACTED, "zone": "north"}
    assert config["ray"]["env"]["RAY_BACKEND_LOG_LEVEL"] == "debug"
    assert config["ray"]["env"]["DATABASE"] == scrubbing.SET
    assert "daemon_not_running" in found["rayfwd status"]
    environment = found["environment"].split()
    assert f"http_proxy=http://ann:{REDACTED}@proxy.example:3128" in environment
    assert "RAY_ADDRESS=127.77.0.1:6379" in environment
    assert f"RAY_AUTH_TOKEN={REDACTED}" in environment
    assert not {word.split("=")[0] for word in environment} & {"EDITOR", "WANDB_API_KEY"}
    assert "lane_up lane=interactive" in found[f"log ({tmp_path / 'log'})"]
    assert "a line of Ray's" in found[f"Ray's output ({tmp_path / 'state' / 'ray.log'})"]
    assert "listening TCP ports: " in found["machine"]
    assert "journal" in found


def test_logs_are_in_it_when_asked_for(tmp_path: Path, planted: dict[str, str]) -> None:
    path = tmp_path / "rayfwd.toml"
    config = doctor.load_if_valid(path)
    found = parts(report.compose(report.Subject(path, config, None, planted), {}, report.Logs()))
    for part in ("journal", f"Ray's output ({tmp_path / 'state' / 'ray.log'})"):
        assert found[part].strip() == report.LEFT_OUT


def test_a_file_that_is_there_is_kept(tmp_path: Path, planted: dict[str, str]) -> None:
    out = tmp_path / "report.txt"
    out.write_text("mine")
    with pytest.raises(ProblemError) as caught:
        report.write(out, "x")
    assert caught.value.problem.code == codes.REPORT_UNWRITABLE
    assert out.read_text() == "mine"
    name = str(report.default_path("w1", 0.0))
    assert re.fullmatch(r"rayfwd-report-w1-\d{8}T\d{6}\.txt", name)


def test_a_configuration_that_is_none_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rayfwd.toml"
    path.write_text(f'role = \ntoken = "{PLANTED["assigned"]}"')
    of = report.Subject(path, None, None, {"HOME": str(tmp_path)})
    text = report.compose(of, {}, report.Logs())
    assert PLANTED["assigned"] not in text
    assert "it is not TOML" in text
    assert doctor.load_if_valid(path) is None


def test_links_and_pipes_of_a_lesser_user_are_not_read(tmp_path: Path) -> None:
    """Root writes the report, and the state directory is the service's user's."""
    (tmp_path / "rayfwd.toml").write_text(f'role = "head"\nname = "h"\nstate_dir = "{tmp_path}"\n')
    (tmp_path / "shadow").write_text("root:hash")
    (tmp_path / "ray.log").symlink_to(tmp_path / "shadow")
    os.mkfifo(tmp_path / "node.key")
    config = doctor.load_if_valid(tmp_path / "rayfwd.toml")
    logs = report.Logs(True, tmp_path / "node.key")
    text = report.compose(report.Subject(tmp_path / "rayfwd.toml", config, None, {}), {}, logs)
    assert "root:hash" not in text
    assert "not a regular file" in text


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("a sesame b", f"a {REDACTED} b"),
        ("open-sesame, sesame", f"{REDACTED}, {REDACTED}"),
        ("http://ann:x@host/ and ann:x", f"http://ann:{REDACTED}@host/ and ann:x"),
        ("http://ann@host:22/x", "http://ann@host:22/x"),
        ("127.0.0.1:8265 is head:8265", "127.0.0.1:8265 is head:8265"),
        ("-----BEGIN PRIVATE KEY-----\nMII", REDACTED),
    ],
)
def test_scrubbing(text: str, scrubbed: str) -> None:
    assert scrubbing.scrub(text, {"sesame", "open-sesame"}) == scrubbed


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({}, set()),
        ({"token": "secret-1"}, {"secret-1"}),
        ({"token": "short"}, set()),
        ({"keys": {"a": ["secret-1", {"b": "secret-2"}]}}, {"secret-1", "secret-2"}),
        ({"ray": {"env": {"X": "harmless", "RAY_x": "kept on"}}}, {"harmless"}),
        ({"ray": 5, "identity": "/a/path"}, set()),
    ],
)
def test_secrets_that_are_known(data: dict[str, Any], found: set[str]) -> None:
    assert scrubbing.known(data, {"EDITOR": "vi-the-editor"}, ["  x  "]) == found
    more = scrubbing.known(data, {"MY_PASSWORD": "a password"}, [" another-one\n"])
    assert more == found | {"a password", "another-one"}
