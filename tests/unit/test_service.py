"""systemd/rayfwd.service: systemd accepts it, and it fits what the daemon does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from rayfwd import cli

UNIT = Path(__file__).parents[2] / "systemd" / "rayfwd.service"


def settings() -> dict[str, str]:
    found: dict[str, str] = {}
    for line in UNIT.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            assert name not in found, f"{name} is there twice"
            found[name] = value
    return found


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_it(tmp_path: Path) -> None:
    copy = tmp_path / "rayfwd.service"
    text = UNIT.read_text()
    assert "/opt/rayfwd/bin/rayfwd" in text
    copy.write_text(text.replace("/opt/rayfwd/bin/rayfwd", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "rayfwd" in line]
    assert (done.returncode, ours) == (0, [])


def test_it_fits_the_daemon() -> None:
    unit = settings()
    assert unit["ExecStart"].endswith("/rayfwd run")
    assert unit["RestartPreventExitStatus"] == str(cli.MISTAKE)
    assert unit["Type"] == "notify"
    assert unit["TimeoutStartSec"] == "infinity", "READY waits for a head that may be away"
    assert int(unit["TimeoutStopSec"]) > 30 + 30, "Ray's drain time, and ending what is left"
    assert unit["RuntimeDirectory"] == unit["StateDirectory"] == "rayfwd"
