"""The watchdog is fed by loops that turn, and by nothing else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayfwd.cluster.plan import head_plan
from rayfwd.config import parse
from rayfwd.ray import starter as starter_module
from rayfwd.ray import supervisor as supervisor_module
from rayfwd.ray.supervisor import RaySupervisor
from rayfwd.session.session import Limits, Session
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.notify import Notifier
from rayfwd.system.watchdog import DEFAULT_PERIOD, Late, Watchdog, period
from rayfwd.transport.mux import Mux
from tests.unit.fake_clock import FakeClockLoop
from tests.unit.loops import log_events, run_on_fake_clock


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_loop_is_late_when_its_turn_has_not_come() -> None:
    clock = Clock()
    loop = Heartbeat("x", clock)
    assert loop.late() == 0, "it has not begun"
    loop.beat(5)
    clock.now += 5
    assert loop.late() == 0
    clock.now += 2
    assert loop.late() == 2
    loop.beat(1)
    assert loop.late() == 0
    loop.idle()
    clock.now += 1e6
    assert loop.late() == 0


def test_how_often_systemd_wants_it() -> None:
    assert period({}, 7) == DEFAULT_PERIOD
    assert period({"WATCHDOG_USEC": "8000000"}, 7) == 8
    assert period({"WATCHDOG_USEC": "8000000", "WATCHDOG_PID": "7"}, 7) == 8
    assert period({"WATCHDOG_USEC": "8000000", "WATCHDOG_PID": "8"}, 7) == DEFAULT_PERIOD
    assert period({"WATCHDOG_USEC": "soon"}, 7) == DEFAULT_PERIOD


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(0.05)
        yield listener


def heard(manager: socket.socket) -> list[str]:
    found = []
    try:
        while True:
            found.append(manager.recv(4096).decode())
    except TimeoutError:
        return found


def test_fed_while_all_loops_turn(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Late] = []
    ready = False
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    notifier = Notifier()
    watchdog = Watchdog(lambda: late, lambda: ready, notifier, 10)
    watchdog.feed()
    assert heard(manager) == ["WATCHDOG=1\nEXTEND_TIMEOUT_USEC=90000000"]
    ready = True
    watchdog.feed()
    assert heard(manager) == ["WATCHDOG=1"]
    late.append(("ray", 3.0))
    with log_events() as logs:
        watchdog.feed()
        watchdog.feed()
    assert heard(manager) == []
    assert logs == [
        {"event": "loop_stuck", "log_level": "error", "loop": "ray", "late_seconds": 3.0}
    ]
    late.clear()
    watchdog.feed()
    assert heard(manager) == ["WATCHDOG=1"]
    notifier.close()


def test_a_supervisor_that_waits_is_not_late_and_one_that_hangs_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse({"role": "head", "state_dir": str(tmp_path), "ray": {"command": "/none"}})
    services = {"gcs": 6379, "dashboard": 8265, "client": 10001}
    own = head_plan("h", "127.77.0.0/16", 20000, 8, services)

    async def hangs(*_: object) -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        supervisor = RaySupervisor(config, "127.77.0.0/16", lambda: None)
        heartbeat = supervisor.heartbeat = Heartbeat("ray", asyncio.get_running_loop().time)
        task = asyncio.create_task(supervisor.run())
        await asyncio.sleep(1e6)
        assert heartbeat.late() == 0, "it has no plan, and waits for one"
        supervisor.set_plan(own, own, None, 60.0)
        for _ in range(1000):
            await asyncio.sleep(7)
            assert heartbeat.late() == 0, "it tries again and again"
        monkeypatch.setattr(starter_module, "find", hangs)
        supervisor.set_plan(own, own, None, 61.0)
        await asyncio.sleep(supervisor_module.BUSY_TURN_TIMEOUT)
        assert heartbeat.late() == pytest.approx(0, abs=1)
        await asyncio.sleep(100)
        assert heartbeat.late() == pytest.approx(100, abs=1)
        await supervisor.stop()
        await task
        await asyncio.sleep(1e6)
        assert heartbeat.late() == 0, "it was told to end"

    run_on_fake_clock(scenario, 4e6)


def test_a_session_whose_timer_does_not_come_is_late() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, FakeClockLoop)
        mux = Mux(
            Session("worker", 60.0, Limits(), loop.time()),
            lambda *_: None,
            lambda _: None,
            lambda _: None,
        )
        mux.flush()
        assert mux.late() == 0
        loop.jump(67.0)  # nothing turns meanwhile; one that is parked has an end
        assert mux.late() == pytest.approx(7, abs=0.2)
        mux.close("done")
        assert mux.late() == 0

    run_on_fake_clock(scenario)
