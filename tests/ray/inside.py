"""Tests that `test_ray.py` runs one by one, each as the only thing in a namespace of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config
from rayfwd.problems import ProblemError
from rayfwd.ray import nodes, procfs, status_text
from rayfwd.ray.supervisor import RaySupervisor
from rayfwd.session.target import Target
from rayfwd.transport.endpoints import Endpoint
from tests.ray.machines import HEAD, NETWORK, WORKER, head_config, ray_command, worker_config

pytestmark = pytest.mark.ray

assert os.environ.get("RAYFWD_INSIDE") == "1", "run tests/ray/test_ray.py instead"

PATIENCE = 90.0
RAY = str(ray_command("2.60.0"))

Logs = list[Any]


@pytest.fixture
def logs() -> Iterator[Logs]:
    with capture_logs() as captured:
        yield captured


def events(logs: Logs, name: str) -> Logs:
    return [entry for entry in logs if entry["event"] == name]


async def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {PATIENCE:.0f} s: {what}")
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def supervised(
    config: Config, own: NodePlan, ride_through: float = 120.0
) -> AsyncIterator[RaySupervisor]:
    supervisor = RaySupervisor(config, NETWORK, lambda: None)
    supervisor.set_plan(own, HEAD, None, ride_through)
    task = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def state(supervisor: RaySupervisor) -> str:
    return supervisor.now.state


async def up(supervisor: RaySupervisor) -> None:
    await until(lambda: supervisor.now.state == "up", f"up; {supervisor.now}")


async def node_table() -> list[nodes.NodeSeen]:
    """With both nodes; it takes a dashboard a moment to know them."""
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(ProblemError):
            seen = await nodes.fetch(Endpoint(Target(HEAD.address, 8265)))
            if len(seen) == 2 or time.monotonic() > deadline:
                return seen
        assert time.monotonic() < deadline, "no node table in 30 s"
        await asyncio.sleep(0.5)


def others() -> set[int]:
    """Processes beside the namespace's first and this test."""
    pids = {int(p) for p in os.listdir("/proc") if p.isdigit() and procfs.look_up(int(p))}
    return pids - {1, os.getpid()}


def named(name: str, command_line: str = "") -> int:
    found = []
    for pid in others():
        with contextlib.suppress(OSError):  # it has ended
            process = procfs.look_up(pid)
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if process and name in process.name and command_line in line:
                found.append(process)
    # Until a process that was forked becomes another program, it is called as its parent.
    pids = {process.pid for process in found}
    first = [process.pid for process in found if process.parent not in pids]
    assert len(first) == 1, (name, found)
    return first[0]


def listening() -> set[tuple[str, int]]:
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {
        (address, int(port, 16))
        for address, _, port in (row[1].partition(":") for row in rows if row[3] == procfs.LISTEN)
    }


@pytest.mark.parametrize("version", ["2.9.3", "2.40.0", "2.60.0"])
def test_start_and_stop(version: str, tmp_path: Path, logs: Logs) -> None:
    command = str(ray_command(version))
    declared = {"resources": {"tape": 2}, "labels": {"zone": "a"}}
    # Its arguments are such as `ray stop` looks for; a stop of ours must not touch it.
    words = [sys.executable, "-c", "import time; time.sleep(600)", "raylet", "default_worker.py"]
    bystander = subprocess.Popen(words)

    async def scenario() -> None:
        async with (
            supervised(head_config(tmp_path, command), HEAD) as head,
            supervised(worker_config(tmp_path, command, **declared), WORKER) as worker,
        ):
            worker.set_link_up(False)
            await up(head)
            assert state(worker) == "waiting"
            worker.set_link_up(True)
            await up(worker)
            allowed = {*HEAD.ports, *WORKER.ports}
            strangers = {port for _, port in listening() if port < 32768} - allowed
            assert not strangers
            seen = await node_table()
            assert {(n.address, n.is_head, n.state) for n in seen} == {
                ("127.77.0.1", True, "ALIVE"),
                ("127.77.0.2", False, "ALIVE"),
            }
            env = head.environment
            assert env is not None
            totals: dict[str, tuple[float, float]] = {}
            deadline = time.monotonic() + 40
            while "tape" not in totals and time.monotonic() < deadline:
                totals = (await status_text.ask(command, f"{HEAD.address}:6379", env)).totals
            assert totals["tape"] == (0.0, 2.0)
            told = await status_text.fetch(Endpoint(Target(HEAD.address, 8265)))
            assert told is not None
            assert told.totals["tape"] == (0.0, 2.0)
            worker.set_link_up(False)
            await asyncio.sleep(1.5)
            assert state(worker) == "up"
            if version == "2.60.0":
                await joins_another_start(worker)
            await worker.stop()
            await head.stop()
            assert (state(head), state(worker)) == ("off", "off")

    asyncio.run(scenario())
    assert others() == {bystander.pid}
    bystander.kill()
    bystander.wait()
    again = [e["reason"] for e in events(logs, "ray_restarting")]
    assert again == (["the head's Ray was restarted"] if version == "2.60.0" else [])
    assert not events(logs, "ray_exited")
    # A head's agent that sees its raylet go tells the GCS (report_raylet_error_logs), and while
    # it waits, in C++, for one that has gone as well, it hears no signal.
    killed = events(logs, "ray_process_killed")
    assert {e["title"] for e in killed} <= {"dashboard/agent.py"}
    assert sum(e["killed"] for e in events(logs, "ray_stopped")) == len(killed)
    said = events(logs, "ray_output")
    assert any("Ray runtime started" in e["line"] for e in said)
    assert not [e for e in said if "\x1b" in e["line"]]
    # What is to be typed where nobody has rayfwd.
    commands = [e for e in said if re.search(r"ray (stop|start)\b", e["line"])]
    assert commands
    assert {e["log_level"] for e in commands} == {"debug"}


async def joins_another_start(worker: RaySupervisor) -> None:
    """Its Ray is started again once the head's is another than it had joined, and not before."""
    worker.set_link_up(True)
    ray = worker.now.pid
    for start in ("first", None, "first"):
        worker.set_head_start(start)
        await asyncio.sleep(1.5)
        assert (worker.now.pid, state(worker)) == (ray, "up")
    worker.set_head_start("second")
    await until(lambda: worker.now.pid not in (ray, None), "a new Ray")
    await up(worker)


def test_a_life_of_a_head(tmp_path: Path, logs: Logs) -> None:
    """Started, adopted after the daemon was killed, died, restarted, changed, stopped."""
    daemon = subprocess.Popen(
        [sys.executable, "-m", "tests.ray.supervise", str(tmp_path), RAY],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert daemon.stdout is not None
    with daemon.stdout:
        lines = iter(daemon.stdout.readline, "")
        states = dict(line.split() for line in takewhile(lambda x: not x.startswith("up"), lines))
        assert "starting" in states
        ray = int(states["starting"])
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
    config = head_config(tmp_path, RAY)

    async def scenario() -> None:
        async with supervised(config, HEAD) as head:
            await up(head)
            assert (head.now.pid, head.now.adopted, head.now.restarts) == (ray, True, 0)
            assert head.now.versions is not None
            assert head.now.versions.ray == "2.60.0"
            start = head.own_start
        # The daemon's end, in whatever way, is not Ray's.
        assert procfs.look_up(ray)
        async with supervised(config, HEAD) as head:
            await up(head)
            assert head.now.pid == ray
            assert head.own_start == start
            starts = [start]

            # `ray start --block` takes an end by SIGTERM for graceful and goes on blocking.
            os.kill(named("raylet"), signal.SIGTERM)
            await until(lambda: head.now.state == "failed", "failed after SIGTERM")
            assert head.now.problem is not None
            assert head.now.problem.code == codes.RAY_DIED
            assert "raylet" in head.now.problem.cause
            await up(head)
            second = head.now.pid
            assert (second != ray, head.now.adopted, head.now.restarts) == (True, False, 1)
            assert events(logs, "ray_started")[-1]["pid"] == second
            starts.append(head.own_start)

            os.kill(named("gcs_server"), signal.SIGKILL)
            await until(lambda: head.now.state == "failed", "failed after SIGKILL")
            assert head.now.problem is not None
            assert "gcs_server" in head.now.problem.cause
            await up(head)
            third = head.now.pid
            starts.append(head.own_start)
            assert len({*starts, None}) == 4, "a text for each start"

            head.set_plan(HEAD, HEAD, None, 121.0)
            await until(lambda: head.now.pid not in (third, None), "a new Ray")
            await up(head)
            assert head.now.restarts == 3
            environ = Path(f"/proc/{named('raylet')}/environ").read_bytes()
            assert b"RAY_gcs_rpc_server_reconnect_timeout_s=151" in environ
            await head.stop()

    asyncio.run(scenario())
    assert not others()
    assert not (tmp_path / "head" / "ray.json").exists()
    assert (tmp_path / "head" / "ray.log").stat().st_mode & 0o777 == 0o600
    assert len(events(logs, "ray_died")) == 2
    assert len(events(logs, "ray_adopted")) == 2
    # Adopting told nothing a second time: what the first daemon had logged stays logged.
    first = logs.index(events(logs, "ray_exited")[0])
    assert not [e for e in logs[:first] if "runtime started" in str(e.get("line"))]


def test_port_in_use_and_stop_while_starting(tmp_path: Path, logs: Logs) -> None:
    holder = socket.create_server(("127.0.0.1", HEAD.services["object_manager"]))

    async def scenario() -> None:
        async with supervised(head_config(tmp_path, RAY), HEAD) as head:
            await until(lambda: head.now.state == "failed", "failed")
            problem = head.now.problem
            assert problem is not None
            assert problem.code == codes.PORT_IN_USE
            assert "20001 (held by" in problem.cause
            assert f"pid {os.getpid()}" in problem.cause
            await asyncio.sleep(4)  # two tries more
            assert not others()
            holder.close()
            await until(lambda: head.now.state == "starting", "starting")
            await until(lambda: len(others()) > 3, "some of Ray's processes")
            await head.stop()

    with holder:
        asyncio.run(scenario())
    assert not others()
    assert len(events(logs, "port_in_use")) == 1


def test_started_by_hand(tmp_path: Path, logs: Logs) -> None:
    async def scenario() -> None:
        async with supervised(head_config(tmp_path, RAY, start=False), HEAD) as head:
            await until(lambda: head.now.state == "by_hand", "by_hand")
            command = head.now.command
            assert command is not None
            shell = await asyncio.create_subprocess_shell(
                command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
            )
            await up(head)
            assert await shell.wait() == 0
            assert head.now.adopted
            await head.stop()
        assert procfs.look_up(named("raylet"))

        # Nor does a daemon that would start Ray itself touch one that is not its own.
        raylet = named("raylet")
        async with supervised(head_config(tmp_path, RAY), HEAD) as head:
            await up(head)
            assert (head.now.pid, head.now.adopted) == (raylet, True)
            await head.stop()
        assert procfs.look_up(raylet)

    asyncio.run(scenario())
    told = events(logs, "ray_start_by_hand")
    assert len(told) == 1
    assert shlex.split(told[0]["command"])[0] == "env"
    assert not events(logs, "ray_starting")
