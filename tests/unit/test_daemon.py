"""The daemon as a process: what it tells the service manager, its lock, its end.

Without Ray and without a head: what needs those is in the lab.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.daemon.resources import lock
from rayfwd.problems import ProblemError
from tests.unit.ports import free_port

NETWORK = f"127.{128 + os.getpid() % 64}.0.0/16"
"""Not the usual one, which a rayfwd of this machine, or of another test's, may have."""
HEAD = f"role = 'head'\nname = 'head'\nhub.network = '{NETWORK}'\n"
WORKER = "role = 'worker'\nname = 'w1'\n[head]\nssh = 'ray@127.0.0.1:{port}'\n"
NO_RAY = "[ray]\nstart = false\ncommand = 'there-is-none'\nworker_ports = 8\n"


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: a socket's may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="rf", dir="/tmp") as name:
        yield Path(name)


class Run:
    """`rayfwd run` with a notification socket of ours."""

    def __init__(self, place: Path, config: str) -> None:
        first, _, rest = config.partition("\n")
        (place / "rayfwd.toml").write_text(
            f"{first}\nstate_dir = '{place}/state'\nruntime_dir = '{place}/run'\n{rest}{NO_RAY}"
        )
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.bind(str(place / "notify"))
        self.notices.settimeout(20)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rayfwd", "run", "--config", str(place / "rayfwd.toml")],
            env={**os.environ, "NOTIFY_SOCKET": str(place / "notify")},
            stderr=subprocess.PIPE,
            text=True,
        )

    def notice(self) -> str:
        return self.notices.recv(4096).decode()

    def stop(self) -> str:
        """SIGTERM, and all that it had written."""
        self.process.send_signal(signal.SIGTERM)
        _, written = self.process.communicate(timeout=20)
        return written

    def close(self) -> None:
        self.notices.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    made: list[Run] = []
    yield made
    for run in made:
        run.close()


def test_ready_is_said_once_and_the_status_is_kept(place: Path, runs: list[Run]) -> None:
    run = Run(place, HEAD)
    runs.append(run)
    said: list[str] = []
    while not (said and said[-1].startswith("STATUS=ready")):
        said.append(run.notice())
    assert said.count("READY=1") == 1
    run.process.send_signal(signal.SIGTERM)
    while said[-1] != "STOPPING=1":
        said.append(run.notice())
    written = run.stop()
    assert run.process.returncode == 0
    assert "Traceback" not in written
    assert sorted(path.name for path in (place / "run").iterdir()) == []


def test_a_worker_without_a_head_is_not_ready(place: Path, runs: list[Run]) -> None:
    run = Run(place, WORKER.format(port=free_port()))
    runs.append(run)
    status = run.notice()
    while "nothing listens on the SSH port" not in status:
        status = run.notice()
        assert status != "READY=1"
    assert status.startswith("STATUS=waiting: ")
    written = run.stop()
    assert run.process.returncode == 0
    assert written.count('"ssh_unreachable"') == 1


HOLDS = """
import sys
from pathlib import Path
from rayfwd.daemon.resources import lock
place = Path(sys.argv[1])
with lock(place / "lock", place):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("machine", ["gpu-7", ""])
def test_who_has_the_state_directory_is_said_where_it_is_another_machine(
    tmp_path: Path, machine: str
) -> None:
    """As of a home on NFS: there is nothing here that could be stopped."""
    words = [sys.executable, "-c", HOLDS, str(tmp_path)]
    if machine:
        if os.geteuid() != 0:
            pytest.skip("only root gives a process another host name")
        named = f'hostname {machine}; exec "$@"'
        words = ["unshare", "--uts", "--", "sh", "-c", named, "sh", *words]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ProblemError) as told, lock(tmp_path / "lock", tmp_path):
            pass
        other.stdin.close()
    problem = told.value.problem
    assert problem.code is codes.ALREADY_RUNNING
    assert ("on the machine gpu-7" in problem.cause) == bool(machine)
    assert ("directories of this machine's own" in problem.remedy) == bool(machine)
    with lock(tmp_path / "lock", tmp_path):
        pass


def test_only_one_runs_with_one_state_directory(place: Path, runs: list[Run]) -> None:
    first = Run(place, HEAD)
    runs.append(first)
    while first.notice() != "READY=1":
        pass
    second = subprocess.run(
        [sys.executable, "-m", "rayfwd", "run", "--config", str(place / "rayfwd.toml")],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode == 1
    assert '"already_running"' in second.stderr
    assert "Traceback" not in second.stderr
    assert first.process.poll() is None
