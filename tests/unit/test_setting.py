"""How a message names a key: as whoever reads it can set it (`system/setting.py`)."""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rayfwd.cli import head, join
from rayfwd.config import HEAD, SECTIONS
from rayfwd.system import setting
from rayfwd.system.paths import RECORD_BEGINS
from tests.commands import main

SOURCES = Path(setting.__file__).parents[1]

OPEN = {
    "config.py": "mistakes of a file, or of options, which `as_option` words",
    "cli/attach.py": "the head's: the option is beside it",
    "cli/connect.py": "the head's file, in the help",
    "cli/flags.py": "--set itself",
    "cli/front.py": "the same",
    "cli/init.py": "writes a file",
    "cli/overlay.py": "a service's, which has a file",
    "cli/screen.py": "what the guard is, not what to do",
    "client.py": "the head's",
    "direct/reserve.py": "another worker's",
    "doctor/head_checks.py": "names a section that is empty; the workers' key has its option",
    "doctor/reachability.py": "the head's",
    "doctor/settings.py": "the head's: the option is beside it",
    "network/dials.py": "another node's",
    "network/manager.py": "of a file that is root's, whatever this node has",
    "network/overlay_keeper.py": "a service's, which has a file",
    "ray/token.py": "both nodes': the option is beside it",
    "ssh/hop_problems.py": "the head's",
    "ssh/meeting.py": "what `--meet` describes as well",
    "transport/awaited.py": "the head's: the option is beside it",
    "watch/flapping.py": "another node's",
}
"""Modules with a message that names a key as it is, and why that is right."""


def test_no_message_names_a_key_in_its_own_way() -> None:
    """Else whoever has no file is told to change one."""
    keys = {f"{name}.{key}" for name, cls in SECTIONS.items() for key in cls.model_fields}
    keys |= {"state_dir", "runtime_dir", "ride_through", "stop_timeout"}
    named = re.compile(rf"(?<![\w./$])({'|'.join(map(re.escape, sorted(keys)))})(?![\w(])")
    found: set[str] = set()
    for path in SOURCES.rglob("*.py"):
        module = str(path.relative_to(SOURCES))
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in docs
                and " " in node.value  # a sentence
                and named.search(node.value)
            ):
                found.add(module)
    assert found == set(OPEN)


def test_a_key_in_a_file_by_an_option_and_of_another_node() -> None:
    assert setting.key("ray.command") == "ray.command"
    assert setting.value("ray.auth", "token") == 'ray.auth = "token"'
    assert setting.value("ray.start", False) == "ray.start = false"
    assert HEAD.set_to("via", "exec") == 'via = "exec" in [head]'
    head.speak()
    assert setting.keys("state_dir", "hub.socket", "ray.command") == (
        "--state-dir, --socket and --ray"
    )
    assert setting.value("hub.network", "127.78.0.0/16") == "--network 127.78.0.0/16"
    assert setting.value("network.guard", False) == "--set network.guard=false"
    assert setting.value("network.level", "listeners") == "--set network.level=listeners"
    assert setting.value("ray.start", False) == "--no-start"
    assert setting.key("head.identity") == "head.identity", "a worker's, which may have a file"
    assert setting.theirs("head.bulk_lanes") == "head.bulk_lanes (`rayfwd join --bulk-lanes`)"
    join.speak()
    assert HEAD.key("identity") == "--identity"
    assert HEAD.set_to("via", "exec") == "--via exec"
    assert setting.key("hub.network") == "hub.network"
    assert setting.either("runtime_dir", "hub.socket") == "--runtime-dir"
    assert setting.theirs("hub.network") == "hub.network (`rayfwd head --network`)"
    assert setting.how_to_start() == "run `rayfwd join` again"


@pytest.mark.parametrize("verb", [head, join])
def test_every_option_that_is_named_there_is(verb: object) -> None:
    """`theirs` has no list of them: it follows the rule by which they are made."""
    flags = {flag.key: flag.option for flag in verb._flags()}  # type: ignore[attr-defined]
    for key, option in flags.items():
        if "." in key and not key.startswith("log."):
            assert option in setting.theirs(key) or option.startswith("--no-")
    verb.speak()  # type: ignore[attr-defined]
    assert {key: setting.key(key) for key in flags} == flags


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["head", "--state-dir", "/proc/x"], "set --state-dir and --runtime-dir to directories"),
        (["join", "ray@127.0.0.1", "--state-dir", "/proc/x"], "set --state-dir and --runtime-dir"),
        (
            [
                *("head", "--state-dir", "{}/s", "--runtime-dir", "{}/r", "--ray", "/none/ray"),
                *("--wait-for", "5", "--set", "network.level=listeners"),
            ],
            "--ray /none/ray: no such file",
        ),
        (
            ["connect", "ray@127.0.0.1:{port}", "-i", "{}/none"],
            "correct --identity",
        ),
        (["join", ""], 'HEAD "": must be user@host'),
        (
            ["head", "--state-dir", "{}/s", "--runtime-dir", "/etc/passwd/x"],
            "/etc/passwd/x cannot be made: /etc/passwd is no directory",
        ),
        (
            ["head", "--state-dir", "{}/b\udcffd"],
            "b\\udcffd is no UTF-8, and such a path cannot be written into a file of text; set "
            "--state-dir",
        ),
    ],
)
def test_who_has_no_file_is_told_of_options(
    tmp_path: Path,
    words: list[str],
    said: str,
) -> None:
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = str(nobody.getsockname()[1])
        given = [word.replace("{port}", port).replace("{}", str(tmp_path)) for word in words]
        ended = subprocess.run(
            [sys.executable, "-m", "rayfwd", *given],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
        )
    assert ended.returncode in {1, 2, 3}
    told = ended.stdout + ended.stderr
    assert said in told
    for key in ("state_dir", "runtime_dir", "ray.command", "head.identity", "head.ssh "):
        assert key not in told


@pytest.mark.parametrize("verb", ["check", "doctor"])
def test_verbs_that_look_at_a_node_without_a_file_name_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """Its configuration is in its runtime directory. Who has a file is told of keys."""
    text = (
        f'role = "head"\nname = "h"\nstate_dir = "{tmp_path}/s"\nruntime_dir = "{tmp_path}"\n'
        '[ray]\ncommand = "/none/ray"\n'
    )
    path = tmp_path / "rayfwd.toml"
    for begins, named in (("", 'ray.command = "/none/ray"'), (RECORD_BEGINS, "--ray /none/ray")):
        path.write_text(f"{begins}\n{text}")
        main([verb, "--config", str(path)])
        assert f"{named}: no such file" in capsys.readouterr().out
