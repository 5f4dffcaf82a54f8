"""`via = "exec"`: a key that may run `rayfwd attach` and nothing else is enough."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import HUB_SOCKET, Cluster
from tests.lab.machines import Lab
from tests.lab.process import HOME


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    head, w1 = module_lab.machine("head"), module_lab.machine("w1")
    command = f"{module_lab.rayfwd} attach --socket {HUB_SOCKET}"
    head.authorize(f'restrict,command="{command}" {w1.public_key}')
    cluster = Cluster(module_lab, workers=("w1",), w1={"head": {"via": "exec", "socket": None}})
    cluster.start()
    cluster.wait_ready()
    yield cluster
    cluster.stop()


@pytest.mark.ray
def test_work_is_done(cluster: Cluster) -> None:
    addresses = [node["address"] for node in cluster.head.status()["roster"]]
    checks = ("small_tasks", "large_results", "large_arguments", "nested_tasks")
    for driver in ("head", "w1"):
        lines = cluster.driver(driver, ["--nodes", "2", "--checks", ",".join(checks)])
        verify(lines, driver, addresses, checks)


def commands(cluster: Cluster) -> list[str]:
    """Ids of the commands that have handed their pipes to the hub, and wait."""
    script = """for pid in $(pgrep -f 'rayfwd attach'); do
        [ "$(readlink /proc/$pid/fd/0 /proc/$pid/fd/1 | uniq)" = /dev/null ] && echo $pid
        done; true"""
    return cluster.lab.machine("head").run(["sh", "-c", script]).stdout.split()


@pytest.mark.ray
def test_a_killed_command_and_a_restart_of_the_head_are_ridden_through(cluster: Cluster) -> None:
    head, w1 = cluster.head, cluster.worker("w1")
    lanes = commands(cluster)
    assert len(lanes) == 2
    before = w1.events()[-1]
    cluster.lab.machine("head").run(["kill", "-9", lanes[0]])
    w1.wait_event("lane_lost", 20, after=before)
    before = w1.wait_event("lane_up", 60, after=before)
    after = commands(cluster)
    assert (len(after), lanes[1] in after) == (2, True)
    told = head.events()[-1]
    head.process.signal(signal.SIGUSR2)
    assert head.wait_event("handover_taken", 60, after=told)["reset"] == 0
    w1.wait_event("link_resumed", 60, after=before)
    head.wait_event("rayfwd_ready", 60, after=told)
    w1.wait_status(lambda status: len(status["link"]["lanes"]) == 2, 60)
    assert not set(commands(cluster)) & set(after), "those of the process before have ended"
    addresses = [node["address"] for node in head.status()["roster"]]
    lines = cluster.driver("w1", ["--nodes", "2", "--checks", "small_tasks"])
    verify(lines, "w1", addresses, ("small_tasks",))


@pytest.mark.ray
def test_the_key_runs_no_command(cluster: Cluster) -> None:
    """What ssh asks for is ignored: `rayfwd attach` runs instead and ends with its input."""
    ran = ssh(cluster, [], f"touch {HOME}/proof; id")
    assert "uid=" not in ran
    assert not cluster.lab.machine("head").host_path(f"{HOME}/proof").exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    "options",
    [["-W", "127.0.0.1:22"], ["-N", "-R", "17171:127.0.0.1:22"]],
    ids=["local", "remote"],
)
def test_the_key_forwards_nothing(cluster: Cluster, options: list[str]) -> None:
    said = ssh(cluster, ["-o", "ExitOnForwardFailure=yes", *options])
    assert "administratively prohibited" in said or "remote port forwarding failed" in said
    assert "SSH-2.0" not in said


@pytest.mark.ray
def test_the_key_reads_no_files(cluster: Cluster) -> None:
    """SFTP is a command too."""
    w1 = cluster.lab.machine("w1")
    argv = ["sftp", *OPTIONS, "-b", "-", f"ray@{cluster.lab.machine('head').address}"]
    ran = w1.run(argv, check=False, input=f"get {HOME}/rayfwd.toml {HOME}/stolen\n")
    assert ran.returncode != 0
    assert not w1.host_path(f"{HOME}/stolen").exists()


OPTIONS = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]


def ssh(cluster: Cluster, options: list[str], *command: str) -> str:
    """What an attempt with the worker's key says, in all."""
    target = f"ray@{cluster.lab.machine('head').address}"
    argv = ["timeout", "20", "ssh", *OPTIONS, *options, target, *command]
    ran = cluster.lab.machine("w1").run(argv, check=False)
    return ran.stdout + ran.stderr
