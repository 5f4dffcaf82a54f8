"""0.1.0 itself, upgraded whole on booted machines while programs go on: the head first.

It is built of its own commit, and set up by its own `init`. Twenty connections stand each way, and
a job counts every call. The units are renewed when all is over.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.loadgen import Job
from tests.lab.process import Process, until
from tests.need import CHECKOUT, need
from tests.systemd import install
from tests.systemd.cluster import BOTH, Cluster
from tests.systemd.machines import Lab, Machine

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.story,
    # test_cluster.py upgrades under a job, and test_overlay.py the units of 0.1.0.
    pytest.mark.thorough,
]

COMMIT = "4844c1c"
"""The last one of 0.1.0."""
OLD = "/root/rayfwd-0.1.0-py3-none-any.whl"
PIP = "/opt/rayfwd/bin/pip install --upgrade --force-reinstall --no-deps"
STREAMS = 20
EXPOSED, LISTENS = 15000, 16000
"""Of each machine: where its echoes are, and where the other's are."""

ECHOES = f"""
import socket, threading

def echo(sock):
    while word := sock.recv(100):
        sock.sendall(word)

server = socket.create_server(("127.0.0.1", {EXPOSED}), backlog=50)
print("listening", flush=True)
while True:
    threading.Thread(target=echo, args=server.accept()[:1], daemon=True).start()
"""
TALK = f"""
import socket, time
socks = [socket.create_connection(("127.0.0.1", {LISTENS}), 120) for _ in range({STREAMS})]
while True:
    for number, sock in enumerate(socks):
        sock.sendall(b"%03d" % number)
    for number, sock in enumerate(socks):
        assert sock.recv(3, socket.MSG_WAITALL) == b"%03d" % number
    print("x", end="", flush=True)
    time.sleep(0.1)
"""


def built(folder: Path) -> bytes:
    """The wheel of 0.1.0."""
    argv = ["git", "-C", str(CHECKOUT), "archive", COMMIT]
    archive = subprocess.run(argv, capture_output=True, check=False)
    need(None if archive.returncode == 0 else f"this checkout has no commit {COMMIT}")
    (folder / "sources").mkdir()
    unpack = ["tar", "--extract", "--directory", str(folder / "sources")]
    subprocess.run(unpack, input=archive.stdout, check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps"]
    subprocess.run([*pip, f"--wheel-dir={folder}", str(folder / "sources")], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel.read_bytes()


def prepare(machine: Machine, config: str) -> None:
    """Have its echoes reached by the other machine."""
    other = "head" if machine.name == "worker" else "worker"
    text = machine.read(config)
    forward = f'[[forward]]\nlisten = "127.0.0.1:{LISTENS}"\nto = "{other}:{EXPOSED}"\n'
    machine.host_path(config).write_text(f"expose = [{EXPOSED}]\n{text}\n{forward}")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of 0.1.0."""
    wheel = built(tmp_path_factory.mktemp("old"))
    with Lab(tmp_path_factory.mktemp("lab"), install.installed("bookworm")) as lab:
        lab.boot()
        for machine in lab.machines:
            machine.host_path(OLD).write_bytes(wheel)
            machine.run(["sh", "-c", f"{PIP} {OLD}"], timeout=120)
        cluster = Cluster(lab, level=None)
        cluster.set_up()
        for machine in lab.machines:
            prepare(machine, cluster.config)
        cluster.start()
        cluster.wait_ready()
        yield cluster


@pytest.fixture(scope="module")
def job(old: Cluster) -> Job:
    return old.job()


@pytest.fixture(scope="module")
def talks(old: Cluster) -> list[Process]:
    """Programs that hold connections to the other machine, and say something all the time."""
    for machine in old.lab.machines:
        server = machine.popen(["python3", "-c", ECHOES], user="ray")
        until(lambda s=server: "listening" in s.log.read_text(), 20, server.log.read_text)  # type: ignore[misc]
    return [m.popen(["python3", "-c", TALK], user="ray") for m in old.lab.machines]


def go_on(talks: list[Process]) -> None:
    """None is broken, and all get further."""
    for talk in talks:
        before = len(talk.log.read_text())
        until(
            lambda t=talk, b=before: t.poll() is not None or len(t.log.read_text()) > b + 5,  # type: ignore[misc]
            60,
            talk.log.read_text,
        )
        assert talk.poll() is None, talk.log.read_text()


def test_no_call_and_no_connection_is_lost(old: Cluster, job: Job, talks: list[Process]) -> None:
    raylets = old.raylets()
    for machine in (old.head, old.worker):
        assert "network" not in machine.status(), "it is 0.1.0"
        machine.run(["sh", "-c", f"{PIP} /wheels/rayfwd-*.whl"], timeout=120)
        taken = old.restart(machine)
        assert taken["RESET"] == "0", taken
        assert int(taken["STREAMS"]) >= 2 * STREAMS
        assert machine.status()["network"]["level"] == "listeners"
        old.goes_on(job)
        go_on(talks)
        job.check()
    assert old.raylets() == raylets
    go_on(talks)
    job.finish_whole(least=5)


def test_one_step_more_gives_each_the_overlay(old: Cluster) -> None:
    """And each node's Ray is restarted once, which `init` says before."""
    for machine in (old.worker, old.head):
        said = machine.run(["rayfwd", "init", machine.name]).stdout
        assert "Ray is then restarted once" in said
        machine.systemctl("restart", "rayfwd")
        machine.wait_for(ActiveState="active", SubState="running")
        assert machine.status()["network"]["level"] == "overlay"
        assert len(machine.events("ray_restarting")) == 1
    assert old.addresses_that_work() == BOTH
    for machine in old.lab.machines:
        until(lambda m=machine: not m.status()["conditions"], 60, lambda: "nothing is wrong")  # type: ignore[misc]
