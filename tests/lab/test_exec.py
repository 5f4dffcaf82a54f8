"""`via = "exec"`: a key that may run `rayfwd attach` and nothing else is enough."""

from __future__ import annotations

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
