"""The supervisor's parts that need no Ray; `tests/ray` has the rest."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.cluster.plan import head_plan
from rayfwd.config import parse
from rayfwd.problems import ProblemError
from rayfwd.ray import ports, procfs
from rayfwd.ray import process as process_module
from rayfwd.ray import starter as starter_module
from rayfwd.ray.install import RayInstall, Versions
from rayfwd.ray.install import find as find_ray
from rayfwd.ray.launcher import DirectLauncher
from rayfwd.ray.output import SILENCE, OutputLog
from rayfwd.ray.process import RayProcess, clean_lines
from rayfwd.ray.starter import check_versions
from rayfwd.ray.supervisor import RaySupervisor
from rayfwd.system.coalesce import WAKE_INTERVAL
from tests.unit.loops import Log, log_events, of, run_on_fake_clock

OWN = RayInstall("/env/bin/ray", "/env/bin/python", Versions("2.60.0", "3.11.7"))
HEAD = head_plan("h", "127.77.0.0/16", 20000, 8, {"gcs": 6379, "dashboard": 8265, "client": 10001})


@pytest.mark.parametrize(
    ("head", "level", "code"),
    [
        (None, None, None),
        (Versions("2.60.0", "3.11.7"), None, None),
        (Versions("2.59.1", "3.11.7"), None, "ray_version_differs"),
        (Versions("2.59.1", "3.12.1"), None, "ray_version_differs"),
        (Versions("2.60.0", "3.11.8"), None, "python_version_differs"),
        (Versions("2.60.0", "3.11.8"), "patch", "python_version_differs"),
        (Versions("2.60.0", "3.11.8"), "minor", None),
        (Versions("2.60.0", "3.12.7"), "minor", "python_version_differs"),
    ],
)
def test_versions_must_be_the_heads(
    head: Versions | None, level: str | None, code: str | None
) -> None:
    env = {"RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": level} if level else {}
    if code is None:
        check_versions(OWN, head, env)
        return
    with pytest.raises(ProblemError) as caught:
        check_versions(OWN, head, env)
    assert caught.value.problem.code.name == code


def test_a_missing_ray_is_told_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 1, 2, 4 s, and at once where there is a new plan."""
    attempts: list[float] = []

    async def find(command: str, env: Mapping[str, str]) -> RayInstall:
        attempts.append(asyncio.get_running_loop().time())
        return await find_ray(command, env)

    monkeypatch.setattr(starter_module, "find", find)
    config = parse(
        {
            "role": "head",
            "state_dir": str(tmp_path / "state"),
            "ray": {"command": str(tmp_path / "ray")},
        }
    )

    async def scenario() -> None:
        now = asyncio.get_running_loop().time
        supervisor = RaySupervisor(config, "127.77.0.0/16", lambda: None)
        task = asyncio.create_task(supervisor.run())
        await asyncio.sleep(60)
        states = [supervisor.now.state]
        assert attempts == [], "it has no plan"
        supervisor.set_plan(HEAD, HEAD, None, 60.0)
        began = now()
        await asyncio.sleep(10)
        assert [at - began for at in attempts] == pytest.approx([0, 1, 3, 7], abs=WAKE_INTERVAL)
        states.append(supervisor.now.state)
        assert supervisor.now.problem is not None
        assert supervisor.now.problem.code == codes.RAY_NOT_FOUND
        attempts.clear()
        for ride_through in (61.0, 62.0):
            supervisor.set_plan(HEAD, HEAD, None, ride_through)
            began = now()
            await asyncio.sleep(0.1)
            assert attempts.pop() == began
            assert attempts == []
        await supervisor.stop()
        await task
        states.append(supervisor.now.state)
        assert states == ["waiting", "failed", "off"]

    with log_events() as logs:
        run_on_fake_clock(scenario)
    assert [e["event"] for e in logs] == ["ray_not_found"]
    assert str(tmp_path / "ray") in logs[0]["cause"]


def test_port_in_use_names_the_port_and_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ProblemError) as caught:
            ports.check_free([port])
    problem = caught.value.problem
    assert problem.code == codes.PORT_IN_USE
    assert f"{port} (held by " in problem.cause
    assert f"pid {os.getpid()}" in problem.cause
    ports.check_free([port])


def test_offspring_by_session_and_by_marker_and_nothing_else() -> None:
    marker = f"RAYFWD_NODE=test-{os.getpid()}-{time.monotonic_ns()}"
    name, _, value = marker.partition("=")
    script = "sleep 60 & setsid -f sleep 60; env -u RAYFWD_NODE sleep 60 & wait"
    env = {"PATH": os.defpath, name: value}
    leader = subprocess.Popen(["sh", "-c", script], env=env, start_new_session=True)
    stranger = subprocess.Popen(["sleep", "60"])
    started = procfs.look_up(leader.pid)
    assert started is not None
    try:
        deadline = time.monotonic() + 10
        while len(procfs.offspring(started, marker)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        found = {p.pid for p in procfs.offspring(started, marker)}
        assert len(found) == 4
        assert leader.pid in found
        assert not found & {stranger.pid, os.getpid()}
        assert len(procfs.offspring(None, marker)) == 3
        # A namesake that began at another time leads another session.
        namesake = procfs.Process(leader.pid, 0, started.start + 1, leader.pid, "sh")
        assert procfs.offspring(namesake, "RAYFWD_NODE=nobody") == []
        assert not procfs.send(namesake, signal.SIGKILL)
    finally:
        for process in procfs.offspring(started, marker):
            assert procfs.send(process, signal.SIGKILL)
        leader.wait()
        stranger.kill()
        stranger.wait()
    # A signal is on its way when it is sent; only our own children can be waited for.
    deadline = time.monotonic() + 10
    while procfs.offspring(started, marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert procfs.offspring(started, marker) == []
    assert not procfs.is_alive(started)


DEAF = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def test_what_hears_no_signal_is_killed_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray's agent, which waits in C++ for a GCS that has gone."""
    monkeypatch.setattr(process_module, "DRAIN_MARGIN", 0.2)
    monkeypatch.setattr(process_module, "SETTLE_TIMEOUT", 0.2)
    agent = tmp_path / "dashboard" / "agent.py"
    agent.parent.mkdir()
    agent.write_text(DEAF)
    command = f"{sys.executable} {agent} --password=sesame & wait"

    async def scenario() -> tuple[int, int]:
        process = RayProcess.spawn(
            ["/bin/sh", "-c", command],
            os.environ,
            tmp_path / "state",
            digest="",
            versions=Versions("2.60.0", "3.11.7"),
            command="",
            launcher=DirectLauncher(),
        )
        seen: list[str] = []
        while "ready" not in seen:
            seen += process.read_output()
            await asyncio.sleep(0.05)
        (child,) = procfs.children(process.pid)
        return child.pid, await process.end(lambda: None, drain=False)

    with log_events() as logs:
        pid, killed = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert killed == 1
    assert procfs.look_up(pid) is None
    (told,) = [e for e in logs if e["event"] == "ray_process_killed"]
    assert (told["pid"], told["title"]) == (pid, "dashboard/agent.py")
    assert not (tmp_path / "state" / "ray.json").exists()


def deaf(state_dir: Path) -> RayProcess:
    """A `ray start` that takes no SIGTERM."""
    return RayProcess.spawn(
        ["/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"],
        os.environ,
        state_dir,
        digest="",
        versions=Versions("2.60.0", "3.11.7"),
        command="",
        launcher=DirectLauncher(),
    )


def test_what_cannot_be_killed_is_not_waited_for_beyond_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process that the kernel keeps for a disk: signals reach it later."""
    monkeypatch.setattr(process_module, "KILL_RESERVE", 0.2)
    steps: list[str] = []

    async def scenario() -> float:
        process = deaf(tmp_path / "state")
        with monkeypatch.context() as patch:
            patch.setattr(procfs, "send", lambda process, number: True)
            began = time.monotonic()
            await process.end(lambda: None, within=1.0, begin=steps.append)
            took = time.monotonic() - began
        while process.alive():
            process.kill_now()
            await asyncio.sleep(0.02)
        return took

    took = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert took < process_module.KILL_TIMEOUT / 2
    assert steps == ["ray_start", "ray_processes"], "it had not said that it is up"


def test_what_is_left_of_it_can_be_killed_at_once(tmp_path: Path) -> None:
    async def scenario() -> int:
        process = deaf(tmp_path / "state")
        killed = process.kill_now()
        while process.alive():
            await asyncio.sleep(0.02)
        return killed

    assert asyncio.run(asyncio.wait_for(scenario(), 20)) >= 1


def test_output_is_cleaned() -> None:
    data = b"\x1b[1m\x1b[32mRay runtime started.\x1b[0m\r\n\n 10%\r 20%\r 30%\nlast \xff"
    assert clean_lines(data) == ["Ray runtime started.", " 30%", "last \ufffd"]


def test_a_record_that_is_a_pipe_is_none(tmp_path: Path) -> None:
    """Root asks with the rights of the service's user, who may have put anything there: reading a
    pipe would wait for ever."""
    os.mkfifo(tmp_path / process_module.RECORD)
    assert RayProcess.recover(tmp_path) is None


RAYS_WORDS = "Ray runtime started.\\n  ray start --address=127.77.0.1:6379\\n  ray stop\\n"


def said_by(logs: Log, level: str) -> list[str]:
    return [e["line"] for e in of(logs, "ray_output") if e["log_level"] == level]


def a_ray_that(script: str, state_dir: Path) -> RayProcess:
    return RayProcess.spawn(
        ["/bin/sh", "-c", f"printf '{RAYS_WORDS}'; {script}"],
        os.environ,
        state_dir,
        digest="",
        versions=Versions("2.60.0", "3.11.7"),
        command="",
        launcher=DirectLauncher(),
    )


def test_what_ray_says_while_it_starts_is_for_who_asks(tmp_path: Path) -> None:
    """It names commands that nobody needs beside rayfwd. What it says later is news."""

    async def scenario() -> None:
        process = a_ray_that("exec sleep 60", tmp_path)
        while not process.said_started:
            process.log_output()
            await asyncio.sleep(0.05)
        process.mark_ready()
        await asyncio.sleep(SILENCE + 0.1)
        process.log_output()
        with (tmp_path / "ray.log").open("a") as output:
            output.write("a raylet has ended\n")
        process.log_output()
        await process.end(process.log_output, drain=False)

    with log_events() as logs:
        asyncio.run(asyncio.wait_for(scenario(), 20))
    assert "  ray stop" in said_by(logs, "debug")
    assert said_by(logs, "info") == ["a raylet has ended"]


def test_a_start_that_goes_on_saying_something_is_not_over() -> None:
    now = 0.0
    told = OutputLog(up=False, clock=lambda: now)
    with log_events() as logs:
        for now in (1.0, 1.5, 2.0, 2.9):
            told.add(["To terminate, run ray stop"] if now in {1.0, 2.0} else [], up=True)
        told.add(["a last line"], up=True)
        now = 2.9 + SILENCE
        told.add([], up=False)
        told.add(["not up yet"], up=True)
    assert said_by(logs, "info") == []


def test_what_a_ray_said_that_failed_is_in_the_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = a_ray_that("exit 1", tmp_path)
        while process.alive():
            await asyncio.sleep(0.02)
        process.log_output()
        process.log.failed()
        process.log.failed()

    with log_events() as logs:
        asyncio.run(asyncio.wait_for(scenario(), 20))
    assert said_by(logs, "info") == said_by(logs, "debug")
    assert "  ray stop" in said_by(logs, "info")


def test_a_ray_that_ran_before_has_told_of_its_start() -> None:
    with log_events() as logs:
        OutputLog(up=True).add(["a raylet has ended"], up=True)
    assert said_by(logs, "info") == ["a raylet has ended"]


@pytest.mark.parametrize(
    ("path", "given", "seen"),
    [
        ("/usr/bin:/bin", {}, "{folder}:/usr/bin:/bin"),
        ("/usr/bin:{folder}", {}, "/usr/bin:{folder}"),  # whoever started us has it so
        ("/usr/bin:/bin", {"PATH": "/mine"}, "/usr/bin:/bin"),
    ],
)
def test_jobs_find_the_python_that_has_ray(
    tmp_path: Path, path: str, given: dict[str, str], seen: str
) -> None:
    """As where its environment is activated: `ray job submit -- python job.py`."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    install = replace(OWN, command=str(folder / "ray"))
    env = {"PATH": path.format(folder=folder)}
    ray = parse({"role": "head", "ray": {"env": given}}).ray
    assert starter_module._with_its_python(env, install, ray) == env, "it has no `python`"
    (folder / "python").touch(mode=0o755)
    told = starter_module._with_its_python(env, install, ray)
    assert told["PATH"] == seen.format(folder=folder)
