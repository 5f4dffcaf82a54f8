"""What is wrong with a node's Ray is one event with cause and remedy, and heals by itself.

As test_problems.py, with a head that runs Ray.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rayfwd.ray.supervisor import BACKOFF_FIRST
from tests.lab.cluster import Cluster
from tests.lab.daemon import Daemon
from tests.lab.machines import Lab, Machine
from tests.lab.named import waited_for
from tests.lab.process import HOME
from tests.lab.test_problems import check_said_once, errors, squat

RAY = f"{HOME}/bin/ray"
"""The command that the workers of the tests below are told to use."""
PRETENDER = f"{HOME}/pretender"
"""A Python environment whose versions are as a test wants them."""


@pytest.fixture(scope="module")
def with_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head with Ray; its workers are told to use a `ray` that is not there yet."""
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        commands: dict[str, Any] = {name: {"ray.command": RAY} for name in ("w1", "w2")}
        cluster = Cluster(lab, **commands)
        cluster.start(["head"])
        cluster.head.wait_ready()
        yield cluster
        cluster.stop()


@pytest.mark.ray
def test_ray_missing_unsupported_ports_in_use_and_a_start_that_fails(with_ray: Cluster) -> None:
    w1 = with_ray.lab.machine("w1")
    worker = with_ray.start_node("w1")
    worker.wait_event("ray_not_found")
    time.sleep(3 * BACKOFF_FIRST + 1)  # tried again after one of them, and after two more
    check_said_once(worker, "ray_not_found", RAY, "ray.command")

    # No Ray of that age is installed: the environment only says that it is one.
    pretend(w1, ray="2.8.1")
    event = worker.wait_event("ray_version_unsupported", 60)
    assert "2.8.1" in event["cause"]
    assert "2.9" in event["remedy"]
    waits(worker, "ray_version_unsupported")

    port = worker.status()["node"]["base"]
    squatter = squat(w1, port)
    use(w1, "2.60.0")
    event = worker.wait_event("port_in_use", 60)
    assert f"{port} (held by python" in event["cause"]
    assert "hub.port_base" in event["remedy"]
    waits(worker, "port_in_use")

    # Ray cannot make its session directory.
    w1.run(["chmod", "0755", "/tmp"], user="root")
    squatter.signal(signal.SIGKILL)
    event = worker.wait_event("ray_start_failed", 90)
    assert "`ray start` ended: exit code 1" in event["cause"]
    assert "/tmp/ray" in event["cause"]
    said = [e["line"] for e in worker.events("ray_output")]
    assert any("Permission denied" in line and "/tmp/ray" in line for line in said), said
    waits(worker, "ray_start_failed")
    told = {"node": "w1", "seen_by": "w1"}
    with_ray.head.wait_event("ray_start_failed", 30, where=told)
    w1.run(["chmod", "1777", "/tmp"], user="root")

    worker.wait_ready(120)
    codes = [event["event"] for event in errors(worker)]
    assert codes == ["ray_not_found", "ray_version_unsupported", "port_in_use", "ray_start_failed"]
    with_ray.head.wait_status(lambda status: not status["conditions"], 60)


@pytest.mark.ray("2.60.0", "2.40.0")
def test_other_versions_than_the_heads(with_ray: Cluster) -> None:
    w2 = with_ray.lab.machine("w2")
    use(w2, "2.40.0")
    worker = with_ray.start_node("w2")
    event = worker.wait_event("ray_version_differs")
    assert "Ray 2.40.0" in event["cause"]
    assert "the head has Ray 2.60.0" in event["cause"]
    assert "install Ray 2.60.0 here" in event["remedy"]
    told = {"node": "w2", "seen_by": "w2"}
    with_ray.head.wait_event("ray_version_differs", 30, where=told)
    waits(worker, "ray_version_differs")

    pretend(w2, ray="2.60.0", python="3.9.1")
    event = worker.wait_event("python_version_differs", 60)
    own = with_ray.head.status()["ray"]["python"]
    assert "Python 3.9.1" in event["cause"]
    assert f"the head with Python {own}" in event["cause"]
    assert f"use Python {own}" in event["remedy"]
    with_ray.head.wait_event("python_version_differs", 30, where=told)
    waits(worker, "python_version_differs")

    use(w2, "2.60.0")
    worker.wait_ready(120)
    codes = [event["event"] for event in errors(worker)]
    assert codes == ["ray_version_differs", "python_version_differs"]
    for code in codes:
        with_ray.head.wait_event("problem_over", 30, where={"node": "w2", "code": code})
    assert with_ray.head.events("ray_exited") == []


@pytest.mark.ray
def test_ray_is_not_started_towards_who_has_the_heads_port(with_ray: Cluster) -> None:
    """Nor is anything sent there: whoever listens for GCS would have this machine's Ray."""
    w1 = with_ray.lab.machine("w1")
    for daemon in with_ray.daemons:
        if daemon.machine is w1:
            assert daemon.stop() == 0
    use(w1, "2.60.0")
    squatter = squat(w1, 6379)
    worker = with_ray.start_node("w1")
    event = worker.wait_event("listener_blocked")
    assert "port 6379 is in use on this machine by user ray (python" in event["cause"]
    time.sleep(10)  # it would have been started by then
    assert not worker.events("ray_starting")
    status = worker.status()
    assert (status["state"], status["ray"]["state"]) == ("waiting", "waiting")
    assert {row["code"]: row["cause"] for row in waited_for(status)} == {
        "listener_blocked": event["cause"],
        "ray_starting": "Ray on this node waits until it can reach the head's Ray: "
        f"{event['cause']}",
    }
    assert event["cause"] in status["summary"]
    squatter.signal(signal.SIGKILL)
    worker.wait_event("listener_unblocked", 30)
    worker.wait_ready()


def waits(daemon: Daemon, code: str) -> None:
    status = daemon.status()
    assert status["state"] == "waiting"
    assert [problem["code"] for problem in waited_for(status)] == [code]


def use(machine: Machine, version: str) -> None:
    """Make the worker's `ray` the one of that version."""
    put(machine, machine.host_path(str(machine.ray(version))).read_text())


def pretend(machine: Machine, ray: str, python: str | None = None) -> None:
    """Make it one of an environment that says that it has these versions."""
    machine.run(["rm", "-rf", PRETENDER])
    real = str(machine.ray_python())
    machine.run([real, "-m", "venv", "--without-pip", PRETENDER])
    # Debian's Python knows further places, which are no environment's.
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    where = machine.run([f"{PRETENDER}/bin/python", "-c", ask])
    packages = where.stdout.strip()
    machine.write(f"{packages}/ray-{ray}.dist-info/METADATA", f"Name: ray\nVersion: {ray}\n")
    if python is not None:
        # Not by sitecustomize: Debian's Python has one of its own.
        text = f"import platform; platform.python_version = lambda: {python!r}\n"
        machine.write(f"{packages}/pretend.pth", text)
    put(machine, f"#!{PRETENDER}/bin/python\n")


def put(machine: Machine, script: str) -> None:
    machine.write(f"{RAY}.new", script, 0o755)
    machine.run(["mv", f"{RAY}.new", RAY])
