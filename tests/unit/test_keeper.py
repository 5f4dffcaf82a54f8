"""The keeper, a process of its own, and what the daemon makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.problems import ProblemError
from rayfwd.ray import procfs
from rayfwd.ray.install import Versions
from rayfwd.ray.launcher import OUTPUT, ByKeeper, DirectLauncher, Launcher, launcher_of
from rayfwd.ray.process import RECORD, RayProcess

ENV = {"PATH": os.defpath}


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    socket = tmp_path / "k.sock"
    argv = [sys.executable, "-m", "rayfwd", "keeper", str(socket)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(argv, stderr=log)
    try:
        until(socket.exists, "the keeper listens")
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(20)


def start(script: str, state_dir: Path, launcher: Launcher) -> RayProcess:
    return RayProcess.spawn(
        ["/bin/sh", "-c", script],
        ENV,
        state_dir,
        digest="d",
        versions=Versions("2.60.0", "3.11.7"),
        command="c",
        launcher=launcher,
    )


@pytest.mark.parametrize("by_keeper", [False, True])
def test_started_and_its_end_is_known(
    by_keeper: bool, keeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    launcher = ByKeeper(tmp_path / "k.sock") if by_keeper else DirectLauncher()
    process = start("echo $RAYFWD_NODE; echo wrong >&2; read x; exit 7", tmp_path, launcher)
    until(lambda: not process.alive(), "it ends: it has nothing to read")
    assert process.exit_code == 7
    assert (tmp_path / OUTPUT).stat().st_mode & 0o777 == 0o600
    assert process.read_output() == [process.record.token, "wrong"]


@pytest.mark.runs("rayfwd keeper")
def test_whose_child_it_is(keeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    process = start("kill -9 $$", tmp_path, ByKeeper(tmp_path / "k.sock"))
    until(lambda: not process.alive(), "it ends")
    assert process.exit_code == -signal.SIGKILL
    process = start("sleep 60", tmp_path, ByKeeper(tmp_path / "k.sock"))
    seen = procfs.look_up(process.pid)
    assert seen is not None
    assert (seen.parent, seen.session) == (keeper.pid, process.pid)


def test_what_cannot_be_started(keeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    for launcher in (DirectLauncher(), ByKeeper(tmp_path / "k.sock")):
        with pytest.raises(FileNotFoundError):
            launcher.spawn(["/no/such/ray"], ENV, tmp_path)
        with pytest.raises(FileNotFoundError):
            launcher.spawn(["/bin/true"], ENV, tmp_path / "nowhere")


def test_an_environment_that_is_large(keeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    launcher = ByKeeper(tmp_path / "k.sock")
    launcher.spawn(["/usr/bin/env"], {"LONG": "x" * 100_000}, tmp_path)
    until(lambda: (tmp_path / OUTPUT).stat().st_size > 100_000, "all of it arrives")


@pytest.mark.parametrize("way", ["done", "SIGTERM"])
def test_its_end_is_the_end_of_all_that_it_started(
    way: str, keeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    launcher = ByKeeper(tmp_path / "k.sock")
    process = start("setsid -f sleep 60; exec sleep 60", tmp_path, launcher)
    marker = f"RAYFWD_NODE={process.record.token}"
    until(lambda: len(procfs.offspring(None, marker)) == 2, "both are there")
    if way == "done":
        launcher.done()
    else:
        keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(20) == 0
    assert procfs.offspring(None, marker) == []
    assert not (tmp_path / RECORD).exists()
    assert not (tmp_path / "k.sock").exists()


def test_the_daemon_that_comes_back_learns_how_it_ended(
    keeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    launcher = ByKeeper(tmp_path / "k.sock")
    first = start("sleep 60", tmp_path, launcher)
    second = RayProcess.recover(tmp_path, launcher)
    assert second is not None
    assert second.alive()
    os.kill(first.pid, signal.SIGTERM)
    until(lambda: not second.alive(), "it ends")
    assert second.exit_code == -signal.SIGTERM


def test_a_keeper_that_is_not_there_or_does_not_answer(
    keeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    with pytest.raises(ProblemError) as caught:
        ByKeeper(tmp_path / "none.sock").spawn(["/bin/true"], ENV, tmp_path)
    assert caught.value.problem.code == codes.KEEPER_ABSENT
    keeper.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(ProblemError) as caught:
        ByKeeper(tmp_path / "k.sock").spawn(["/bin/true"], ENV, tmp_path)
    assert caught.value.problem.code == codes.KEEPER_SILENT
    assert time.monotonic() - began < 5, "the daemon's loop waits for it"
    assert ByKeeper(tmp_path / "k.sock").exit_code(1) is None


def test_the_environment_says_which() -> None:
    assert isinstance(launcher_of({}), DirectLauncher)
    assert isinstance(launcher_of({"RAYFWD_KEEPER": "/x"}), ByKeeper)
