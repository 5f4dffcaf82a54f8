"""What a test says it runs is held to what it ran."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import commands


@pytest.mark.parametrize(
    ("command", "ran", "is_it"),
    [
        ("rayfwd status", ["/opt/rayfwd/bin/rayfwd", "status"], True),
        ("rayfwd status", ["nsenter", "--", "env", "rayfwd", "--config", "x", "status"], True),
        ("rayfwd status", [sys.executable, "-m", "rayfwd", "status", "--json"], True),
        ("rayfwd status --json", ["rayfwd", "status"], False),
        ("rayfwd status", ["rayfwd", "stop"], False),
        ("rayfwd status", ["status", "rayfwd"], False),
        ("rayfwd init head --ray *", ["rayfwd", "init", "head", "--ray", "/x"], True),
        ("rayfwd init head --ray *", ["rayfwd", "init", "head", "--ray"], False),
        ("rayfwd init head --ray *", ["rayfwd", "init", "worker", "--ray", "/x"], False),
        ("systemctl stop rayfwd", ["systemctl", "stop", "rayfwd-ray"], False),
        ("pip install *", ["sh", "-c", "set -e; cd /x && /opt/bin/pip install . # it"], True),
        ("pip install *", ["sh", "-c", "echo 'pip\ninstall' x"], False),
    ],
)
def test_what_counts_as_run(command: str, ran: list[str], is_it: bool) -> None:
    assert commands.is_run(command, [["something", "else"], ran]) is is_it


@pytest.mark.parametrize(
    ("command", "name", "same"),
    [
        ("rayfwd forget gpu-1", "rayfwd forget *", True),
        ("rayfwd forget", "rayfwd forget *", False),
        ("rayfwd status", "rayfwd status --json", False),
    ],
)
def test_what_is_named(command: str, name: str, same: bool) -> None:
    assert commands.matches(command, name) is same


def test_what_is_started_is_written_down() -> None:
    start = commands.position()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    assert [sys.executable, "-c", "pass"] in commands.since(start)


def test_a_test_that_does_not_run_what_it_names_fails(tmp_path: object) -> None:
    """With this checkout's own conftest."""
    script = (
        "import subprocess, pytest\n"
        "@pytest.fixture(scope='module')\n"
        "def made():\n    subprocess.run(['true', 'by', 'fixture'])\n"
        "@pytest.mark.runs('true by fixture', 'true *')\n"
        "def test_by_a_fixture(made): pass\n"
        "@pytest.mark.runs('true by fixture')\n"
        "def test_another_of_it(made): pass\n"
        "@pytest.mark.runs('true by fixture')\n"
        "def test_without_it(): pass\n"
    )
    with open(f"{tmp_path}/test_it.py", "w") as file:
        file.write(script)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    argv += ["-p", "tests.conftest", f"--rootdir={tmp_path}", "-c", "/dev/null", file.name]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=50)
    assert "1 failed, 2 passed" in ran.stdout, ran.stdout + ran.stderr
    assert "test_without_it names `true by fixture`, and did not run it" in ran.stdout
