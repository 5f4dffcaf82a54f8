"""The units in systemd/: systemd accepts them, and they fit what daemon and keeper do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from rayfwd import cli
from rayfwd.network import overlay_client
from rayfwd.ray import launcher
from rayfwd.system import watchdog

UNITS = Path(__file__).parents[2] / "systemd"
DAEMON, KEEPER = "rayfwd.service", "rayfwd-ray.service"

OVERLAY = "rayfwd-net.service"

ADDED_UP = {"SystemCallFilter", "Environment"}
"""Settings that may be there more than once; their lines are kept together."""


def settings(unit: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in (UNITS / unit).read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            assert name not in found or name in ADDED_UP, f"{name} is there twice"
            found[name] = f"{found[name]}\n{value}" if name in found else value
    return found


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_them(tmp_path: Path) -> None:
    copies = [tmp_path / DAEMON, tmp_path / KEEPER, tmp_path / OVERLAY]
    for copy in copies:
        text = (UNITS / copy.name).read_text()
        assert "/opt/rayfwd/bin/rayfwd" in text
        copy.write_text(text.replace("/opt/rayfwd/bin/rayfwd", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, copies)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "rayfwd" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_part_that_talks_to_the_network_is_confined() -> None:
    asked = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager"]
    done = subprocess.run([*asked, str(UNITS / DAEMON)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-300:]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_part_that_is_roots_is_confined() -> None:
    asked = ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager"]
    path = str(UNITS / OVERLAY)
    done = subprocess.run([*asked, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-300:]


def variables(unit: dict[str, str]) -> dict[str, str]:
    return dict(line.split("=", 1) for line in unit["Environment"].splitlines())


def test_they_fit_daemon_and_overlay() -> None:
    unit, overlay = settings(DAEMON), settings(OVERLAY)
    socket = variables(unit)[overlay_client.KEEPER]
    assert overlay["ExecStart"].endswith(f"/rayfwd overlay --user {unit['User']} {socket}")
    assert overlay["ExecStopPost"].endswith(f"/rayfwd overlay --remove {socket}")
    assert socket.startswith(f"%t/{overlay['RuntimeDirectory']}/")
    assert "User" not in overlay, "it is root's, with one right of root's"
    assert OVERLAY in unit["Wants"].split()
    assert OVERLAY in unit["After"].split()


def test_they_fit_daemon_and_keeper() -> None:
    unit, keeper = settings(DAEMON), settings(KEEPER)
    assert unit["ExecStart"].endswith("/rayfwd run")
    socket = variables(unit)[launcher.KEEPER]
    assert keeper["ExecStart"].endswith(f"/rayfwd keeper {socket}")
    assert socket.startswith(f"%t/{keeper['RuntimeDirectory']}/")
    assert unit["User"] == keeper["User"]
    assert unit["RestartPreventExitStatus"] == str(cli.MISTAKE)
    assert unit["Type"] == keeper["Type"] == "notify"
    assert unit["ExecReload"].endswith("/rayfwd reload")
    extended = float(unit["TimeoutStartSec"])
    assert extended == watchdog.START_EXTENSION, "READY waits for a head that may be away"
    assert float(unit["WatchdogSec"]) == watchdog.DEFAULT_PERIOD
    for each in (unit, keeper):
        assert int(each["TimeoutStopSec"]) > 30 + 30, "Ray's drain time, and ending what is left"
        assert each["StartLimitIntervalSec"] == "0", "transient faults are never given up"
    assert unit["RuntimeDirectory"] == unit["StateDirectory"] == "rayfwd"
    assert KEEPER in unit["Wants"].split()
    assert KEEPER in unit["After"].split(), "it is there before, and stopped after"


def test_ray_stop_does_not_take_the_keeper_for_ray() -> None:
    """`ray stop` kills by words in names and command lines (RAY_PROCESSES, Ray 2.60.0)."""
    words = "raylet plasma_store monitor.py ray.util.client.server _worker.py ray:: reporter.py "
    words += "agent.py dashboard.py reaper.py gcs_server"
    for unit in (DAEMON, KEEPER):
        assert not [w for w in words.split() if w in settings(unit)["ExecStart"]]
