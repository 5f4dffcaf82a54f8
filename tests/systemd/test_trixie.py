"""On Debian trixie: Python 3.13, another systemd, sshd and libc; the cluster and the unit tests."""

from __future__ import annotations

import shutil

import pytest

from tests.need import CHECKOUT
from tests.systemd.cluster import Cluster
from tests.systemd.machines import Machine

SUITE = "trixie"

pytestmark = pytest.mark.timeout(400)

UNITS = (
    "test_control.py",
    "test_fastpath.py",
    "test_fdstore.py",
    "test_journal.py",
    "test_listeners.py",
    "test_logs.py",
    "test_notify.py",
    "test_sockdiag.py",
    "test_unixsocket.py",
    "test_endpoints.py",
    "test_writev.py",
)
"""Those where Python, asyncio or the system's libraries take part. (What AsyncSSH is like inside
is the same on each.)"""
MANY = "thousand or hundred"
"""Tests of many connections, which say nothing of Python."""


def test_unit_tests(head: Machine) -> None:
    for name in ("tests", "pyproject.toml", "docs", "systemd", "config.example.toml"):
        source, target = CHECKOUT / name, head.host_path(f"/root/checkout/{name}")
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    script = (
        "python3 -m venv --system-site-packages /root/venv && "
        "/root/venv/bin/pip install --quiet /wheels/rayfwd-*.whl pytest pytest-timeout hypothesis "
        f"&& cd /root/checkout && exec /root/venv/bin/python -m pytest -q -k 'not ({MANY})' "
    )
    ran = head.run(
        ["sh", "-c", script + " ".join(f"tests/unit/{name}" for name in UNITS)],
        timeout=300,  # the list takes less than a minute where nothing else runs
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr
    assert " passed" in ran.stdout.splitlines()[-1]


def test_a_cluster(cluster: Cluster) -> None:
    assert cluster.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]
    for machine in cluster.lab.machines:
        assert machine.status()["ray"]["python"].startswith("3.13.")
        assert machine.show()["StatusText"].startswith("ready")
