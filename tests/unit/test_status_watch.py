"""`rayfwd status --watch` on a real terminal, beside a daemon that goes and comes back."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_cli import STATUS, daemon

WORKER = "role = 'worker'\nname = 'w1'\nruntime_dir = '{}'\n[head]\nssh = 'ray@head'\n"
ALTERNATE, USUAL = "\x1b[?1049h", "\x1b[?1049l"


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rf", dir="/tmp") as name:
        path = Path(name)
        (path / "rayfwd.toml").write_text(WORKER.format(path))
        yield path


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, place: Path, *words: str) -> None:
        self.fd, child = pty.openpty()
        termios.tcsetwinsize(child, (50, 100))
        argv = [sys.executable, "-m", "rayfwd", "status", *words]
        self.process = subprocess.Popen(
            [*argv, "--config", str(place / "rayfwd.toml")],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": ""},
            start_new_session=True,
        )
        os.close(child)
        self.written = ""
        self._at = 0

    def read_until(self, text: str) -> str:
        """What was written from the last time on, until `text` is in it."""
        deadline = time.monotonic() + 30
        while text not in self.written[self._at :]:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.written[self._at :]!r}"
            if not self._more():
                raise AssertionError(f"it ended without {text!r}: {self.written!r}")
        new = self.written[self._at :]
        self._at = len(self.written)
        return new

    def _more(self) -> bool:
        if not select.select([self.fd], [], [], 1)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # its other end is closed
            return False
        self.written += data.decode()
        return bool(data)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        while self._more():
            pass
        return self.process.wait(20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def opened() -> Iterator[list[Terminal]]:
    made: list[Terminal] = []
    yield made
    for one in made:
        one.close()


@pytest.mark.runs("rayfwd status --watch")
def test_it_refreshes_says_a_restart_and_ends_cleanly(place: Path, opened: list[Terminal]) -> None:
    with daemon(place, status=STATUS):
        seen = Terminal(place, "--watch", "0.2")
        opened.append(seen)
        assert ALTERNATE in seen.read_until("gpu-1")
        seen.read_until("gpu-1")  # once more: it refreshes
    first = seen.read_until("no answer for")
    assert "still asking" in first + seen.read_until("last known state:")
    with daemon(place, status=STATUS | {"pid": 4243, "state": "ready"}):
        assert "READY" in seen.read_until("pid 4243")
        seen.read_until("the daemon was restarted")
        assert seen.end(signal.SIGINT) == 0
    after = seen.written.rpartition(USUAL)[2]
    assert "Traceback" not in seen.written
    assert "READY" in after, "the last one stays to be read"


@pytest.mark.parametrize("at", [ALTERNATE, "gpu-1"])
def test_sigterm_puts_the_terminal_back(place: Path, opened: list[Terminal], at: str) -> None:
    with daemon(place, status=STATUS):
        seen = Terminal(place, "--watch")
        opened.append(seen)
        seen.read_until(at)
        assert seen.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert seen.written.count(USUAL) == seen.written.count(ALTERNATE) == 1
    assert seen.written.rindex(USUAL) > seen.written.rindex(ALTERNATE)


def test_it_may_begin_before_the_daemon(place: Path, opened: list[Terminal]) -> None:
    seen = Terminal(place, "--watch", "0.2")
    opened.append(seen)
    seen.read_until("no answer for")
    with daemon(place, status=STATUS):
        seen.read_until("gpu-1")


def test_colour_on_a_terminal_and_none_with_no_color(
    place: Path, opened: list[Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    with daemon(place, status=STATUS):
        seen = Terminal(place)
        opened.append(seen)
        assert "\x1b[1;33mWAITING" in seen.read_until("gpu-2")
        argv = [sys.executable, "-m", "rayfwd", "status", "--config", str(place / "rayfwd.toml")]
        piped = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"},
        )
    assert piped.returncode == 3
    assert piped.stdout.startswith("WAITING  worker gpu-1")
    assert "\x1b" not in piped.stdout


def test_lines_of_json(place: Path) -> None:
    argv = [sys.executable, "-m", "rayfwd", "status", "--json", "--watch", "0.2"]
    with (
        daemon(place, status=STATUS),
        subprocess.Popen(
            [*argv, "--config", str(place / "rayfwd.toml")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(2):
            assert json.loads(process.stdout.readline()) == STATUS
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=20)
        assert process.returncode == 0
        assert all(json.loads(line) == STATUS for line in rest.splitlines())
        assert said == ""


@pytest.mark.parametrize("value", ["0", "x", "-1", "nan", "99999"])
def test_an_interval_must_be_one(value: str, place: Path) -> None:
    argv = [sys.executable, "-m", "rayfwd", "status", f"--watch={value}"]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 2
    assert "must be a number of seconds from 0.2 to 3600" in ran.stderr
