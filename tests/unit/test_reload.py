"""Another file for a daemon that runs: what takes effect, what is kept, what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfwd.cli import main
from rayfwd.config import SECTIONS, Config, parse
from rayfwd.daemon.reload import LIVE, merge
from rayfwd.system.control import ask


def config(**keys: Any) -> Config:
    base = {"role": "worker", "name": "w", "head": {"ssh": "h"}}
    return parse({**base, **keys})


def test_every_live_key_is_a_key() -> None:
    for key in LIVE:
        section, dot, name = key.partition(".")
        assert section in Config.model_fields
        assert not dot or name in SECTIONS[section].model_fields


def test_the_same_file_changes_nothing() -> None:
    same = merge(config(), config())
    assert (same.changed, same.kept) == ((), ())
    assert same.config == config()


def test_what_is_live_holds_and_the_rest_is_kept() -> None:
    forward = [{"listen": "127.0.0.1:9000", "to": "head:9000"}]
    new = config(
        name="other",
        ride_through=60.0,
        forward=forward,
        expose=[9000],
        log={"level": "debug"},
        ray={"status_interval": 5.0, "num_cpus": 3},
        head={"ssh": "other", "bulk_lanes": 2},
    )
    old = config()
    merged = merge(old, new)
    assert merged.changed == ("expose", "log.level", "ray.status_interval", "forward")
    assert merged.kept == ("name", "ride_through", "head.ssh", "head.bulk_lanes", "ray.num_cpus")
    assert merged.config == config(
        forward=forward, expose=[9000], log={"level": "debug"}, ray={"status_interval": 5.0}
    )
    assert merged.config.path == old.path


def test_a_whole_section_that_belongs_to_the_other_role() -> None:
    merged = merge(config(), parse({"role": "head", "name": "w"}))
    assert merged.kept == ("role", "head")
    assert merged.config == config()


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Running:
    """`rayfwd run` of a head whose Ray is by hand, so that there is none."""

    def __init__(self, folder: Path, stdin: int = subprocess.DEVNULL) -> None:
        self.file = folder / "r.toml"
        self.log = folder / "log"
        self.text = (
            f'role = "head"\nname = "h"\nstate_dir = "{folder}/s"\nruntime_dir = "{folder}/r"\n'
        )
        self.ray = '[ray]\nstart = false\ncommand = "/none"\n'
        self.socket = folder / "r" / "control.sock"
        self.write("")
        argv = [sys.executable, "-m", "rayfwd", "--config", str(self.file), "run"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, stderr=log, stdin=stdin)
        self.wait("hub_listening")

    def write(self, further: str, above: str = "") -> None:
        self.file.write_text(self.text + above + self.ray + further)

    def wait(self, word: str, times: int = 1) -> str:
        deadline = time.monotonic() + 20
        while (said := self.log.read_text()).count(f'"{word}"') < times:
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        return next(x for x in reversed(said.splitlines()) if f'"{word}"' in x)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    try:
        yield made
    finally:
        made.process.terminate()
        assert made.process.wait(20) == 0


def say(*words: str) -> int:
    return main(words)


def test_a_daemon_takes_what_it_can(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = running.file.parent / "m.sock"
    running.write(f'[metrics]\nlisten = "{metrics}"\n[log]\nlevel = "debug"\n')
    assert say("--config", str(running.file), "reload") == 0
    assert capsys.readouterr().out.split() == ["changed", "log.level", "changed", "metrics.listen"]
    running.wait("metrics_listening")
    assert metrics.is_socket()

    running.write("", above="ride_through = 30.0\nexpose = [9000]\n")
    os.kill(running.process.pid, signal.SIGHUP)
    kept = running.wait("config_kept")
    assert "ride_through" in kept
    until(lambda: not metrics.exists(), "its end is seen on disk")
    assert say("--config", str(running.file), "reload") == 0
    assert (
        capsys.readouterr().out
        == "  kept      ride_through: takes effect after a restart (`systemctl restart rayfwd`)\n"
    )


def test_a_mistake_is_refused_and_all_stays(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    running.write('[log]\nlevel = "loud"\n', above='expose = "x"\nride_through = 6.0\n')
    assert say("--config", str(running.file), "reload") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "expose" in said[0]
    assert "log.level" in said[1]
    answer = ask(running.socket, "reload")
    assert answer["mistakes"] == said
    running.wait("config_refused", times=2)
    running.file.unlink()
    os.kill(running.process.pid, signal.SIGHUP)
    running.wait("config_refused", times=3)
    assert ask(running.socket, "status")["name"] == "h"


def test_users_of_listeners_hold_at_once_if_there_are_such(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    running.write('[listeners]\nusers = ["no-such-user"]\n')
    assert say("--config", str(running.file), "reload") == 2
    assert 'listeners.users: this machine has no user "no-such-user"' in capsys.readouterr().err
    running.wait("config_refused")
    running.write('[listeners]\nusers = ["nobody"]\n')
    assert say("--config", str(running.file), "reload") == 0
    assert capsys.readouterr().out.split() == ["changed", "listeners.users"]
    assert ask(running.socket, "status")["listeners"]["refused"] == []


@pytest.mark.parametrize("terminal", [True, False])
def test_the_end_of_a_terminal_is_no_wish_to_go_on(terminal: bool, tmp_path: Path) -> None:
    controller, inner = os.openpty()
    running = Running(tmp_path, inner if terminal else subprocess.DEVNULL)
    try:
        running.process.send_signal(signal.SIGHUP)
        if terminal:
            assert running.process.wait(20) == 0
        else:
            running.wait("config_reloaded")
            assert running.process.poll() is None
    finally:
        running.process.terminate()
        running.process.wait(20)
        os.close(controller)
        os.close(inner)
