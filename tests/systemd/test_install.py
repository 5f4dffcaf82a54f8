"""Ways of installing it: in a place of its own, by pipx, and beside Ray in one environment."""

from __future__ import annotations

import pytest

from rayfwd import __version__
from tests.systemd.machines import RAY, Machine

CONFIG = "/home/ray/.config/rayfwd.toml"
BY_HAND = "start = false\n"
"""A line for [ray]: what is installed here is not Ray."""


@pytest.fixture
def wheel(head: Machine) -> str:
    (path,) = head.run(["sh", "-c", "ls /wheels/rayfwd-*.whl"]).stdout.split()
    return path


def serve(machine: Machine, rayfwd: str, *ray: str) -> None:
    """`rayfwd init head` with that command, its service up, seen by the same command."""
    machine.run(["loginctl", "enable-linger", "ray"])
    said = machine.run([rayfwd, "init", "head", *ray], user="ray").stdout
    assert f"found     {RAY}: Ray 2.60.0" in said
    text = machine.read(CONFIG)
    machine.host_path(CONFIG).write_text(text.replace("[ray]\n", "[ray]\n" + BY_HAND))
    machine.systemctl("enable", "--now", "--no-block", "rayfwd", user="ray")
    shown = machine.wait_for(user="ray", ActiveState="active")
    assert rayfwd in shown["ExecStart"]
    assert machine.run([rayfwd, "status"], user="ray").returncode == 0
    machine.run([rayfwd, "uninstall", "--purge"], user="ray")


def test_in_opt_by_root_for_everybody(head: Machine) -> None:
    for user in ("root", "ray"):
        assert head.run(["rayfwd", "--version"], user=user).stdout == f"rayfwd {__version__}\n"
    theirs = head.run(["find", "/opt/rayfwd", "!", "-user", "root", "-o", "-perm", "/022"])
    assert [line for line in theirs.stdout.splitlines() if not is_link(head, line)] == []


def is_link(machine: Machine, path: str) -> bool:
    return machine.host_path(path).is_symlink()


def test_by_pipx(head: Machine, wheel: str) -> None:
    head.run(["pipx", "install", wheel], user="ray", timeout=150)
    serve(head, "/home/ray/.local/bin/rayfwd", "--ray", RAY)


def test_beside_ray(worker: Machine, wheel: str) -> None:
    """Its own Ray is found without a word."""
    pip = "/home/ray/venv/bin/pip"
    before = worker.run([pip, "freeze"], user="ray").stdout.splitlines()
    worker.run([pip, "install", wheel], user="ray", timeout=150)
    assert "No broken requirements" in worker.run([pip, "check"], user="ray").stdout
    after = worker.run([pip, "freeze"], user="ray").stdout.splitlines()
    assert set(before) <= set(after), "nothing of Ray's is exchanged"
    serve(worker, "/home/ray/venv/bin/rayfwd")
