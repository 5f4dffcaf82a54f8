"""`rayfwd connect` on a machine that is no node: without root and without a file.

The laptop's loopback has 127.0.0.1 alone, as on macOS: nothing else can be listened on.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from tests import shown
from tests.lab.cluster import HUB_SOCKET, Cluster
from tests.lab.machines import Machine
from tests.lab.process import HOME, Process, tail, until
from tests.lab.shared import Shared
from tests.status_doc import documented, mistakes

pytestmark = pytest.mark.ray

PROGRAM = Path(__file__).parents[1] / "client_job.py"
HEAD = "ray@198.51.100.1"
CUT = 8.0
"""Seconds; streams are held for 120."""

PAGE = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())
"""


class Connected:
    """`rayfwd connect` on a machine, and what it has told."""

    def __init__(self, machine: Machine, *words: str) -> None:
        self.machine = machine
        argv = [str(machine.lab.rayfwd), "connect", *words]
        self.process = machine.popen(argv)

    def said(self) -> str:
        return self.process.log.read_text()

    def wait_said(self, text: str, timeout: float = 30) -> str:
        until(lambda: text in self.said(), timeout, lambda: f"{text}{tail(self.process.log)}")
        return self.said()

    @property
    def env(self) -> dict[str, str]:
        """What it says is to be exported."""
        lines = re.findall(r"(?m)^  export (.*)", self.wait_said("Ctrl-C ends it."))
        words = [word for line in lines for word in shlex.split(line, comments=True)]
        return {key: value for key, _, value in (word.partition("=") for word in words)}

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.signal(number)
        return self.process.wait(20)


@pytest.fixture(scope="module")
def cluster(with_token: Shared) -> Cluster:
    return with_token.whole()


@pytest.fixture(scope="module")
def laptop(cluster: Cluster) -> Machine:
    machine = cluster.lab.machine("laptop")
    machine.network_command("ip", "addr", "del", "127.0.0.1/8", "dev", "lo")
    machine.network_command("ip", "addr", "add", "127.0.0.1/32", "dev", "lo")
    return machine


@pytest.fixture(scope="module")
def connected(cluster: Cluster, laptop: Machine) -> Iterator[Connected]:
    assert not laptop.host_path(f"{HOME}/.config").exists()
    connected = Connected(laptop, HEAD, "--socket", HUB_SOCKET)
    connected.wait_said("Ctrl-C ends it.")
    yield connected
    assert connected.end() == 0
    assert "Traceback" not in connected.said()
    cluster.head.wait_status(lambda status: status["clients"] == [], 20)


@pytest.mark.runs("rayfwd connect", "rayfwd connect *")
def test_it_tells_what_to_use(connected: Connected, laptop: Machine) -> None:
    said = connected.said()
    shown.compare("README.md", "connected to", said)
    assert f"connected to {HEAD} (Ray 2.60.0, Python 3.1" in said
    assert "  dashboard    http://127.0.0.1:8265\n" in said
    assert "  Ray Client   ray://127.0.0.1:10001\n" in said
    token_file = connected.env["RAY_AUTH_TOKEN_PATH"]
    token = laptop.host_path(token_file)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text().strip() not in said


def test_it_listens_on_one_address(connected: Connected, laptop: Machine) -> None:
    listening = laptop.network_command("ss", "-Hltn").splitlines()
    ports = (8265, 10001, 9480)
    assert {line.split()[3] for line in listening} == {f"127.0.0.1:{port}" for port in ports}


def test_the_heads_page(connected: Connected, laptop: Machine) -> None:
    """The one in the browser that shows the links; this client is on it."""
    assert "  page         http://127.0.0.1:9480/ " in connected.said()
    for path, expected in (("", "<title>rayfwd</title>"), ("data.json", '"peer":"laptop"')):
        argv = [str(laptop.ray_python()), "-c", PAGE, f"http://127.0.0.1:9480/{path}"]
        assert expected in laptop.run(argv).stdout


def test_the_dashboards_page(connected: Connected, laptop: Machine) -> None:
    argv = [str(laptop.ray_python()), "-c", PAGE, connected.env["RAY_API_SERVER_ADDRESS"]]
    assert "<title>Ray Dashboard</title>" in laptop.run(argv).stdout


def test_a_job_is_submitted(connected: Connected, laptop: Machine) -> None:
    argv = [str(laptop.ray()), "job", "submit", "--", "hostname"]
    said = laptop.run(argv, env=connected.env, timeout=120).stdout
    assert "succeeded" in said
    assert "\nhead\n" in said


def test_nothing_is_lost_while_the_link_is_cut(
    connected: Connected, cluster: Cluster, laptop: Machine
) -> None:
    """A task goes on meanwhile, and calls are made while no packet comes through."""
    laptop.write(f"{HOME}/client_job.py", PROGRAM.read_text())
    here, there = f"{HOME}/cut", f"{HOME}/go_on"
    argv = [str(laptop.ray_python()), f"{HOME}/client_job.py", there, here]
    job = laptop.popen(argv, env=connected.env)
    until(lambda: "begun" in job.log.read_text(), 60, lambda: tail(job.log))
    cluster.lab.cut(laptop)
    began = time.monotonic()
    try:
        laptop.write(here, "")
        until(lambda: "calling" in job.log.read_text(), 10, lambda: tail(job.log))
        cluster.lab.machine("head").write(there, "")
        connected.wait_said("the link is down; open connections are held for 120 s", 20)
        time.sleep(max(0.0, CUT - (time.monotonic() - began)))
        assert job.poll() is None
    finally:
        cluster.lab.heal(laptop)
    assert job.wait(60) == 0, tail(job.log)
    result = json.loads(job.log.read_text().splitlines()[-1])
    assert result == {"counts": list(range(1, 22)), "whole": True, "slow": 42}
    assert "the link is back" in connected.said()
    status = cluster.head.status()
    assert mistakes(status, documented())[0] == []
    (client,) = status["clients"]
    assert (client["name"], client["user"], client["state"]) == ("laptop", "ray", "up")
    assert client["cuts"] == client["ridden_through"] >= 1


def test_a_second_one_is_no_clash(connected: Connected, cluster: Cluster, laptop: Machine) -> None:
    """It has the same name, and other ports here; neither is in the plan."""
    second = Connected(laptop, HEAD, "--socket", HUB_SOCKET)
    said = second.wait_said("Ctrl-C ends it.")
    assert "port 8265 is in use on this machine, so port 8266 is used" in said
    assert second.env["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:8266"
    assert second.env["RAY_ADDRESS"] == "ray://127.0.0.1:10002"
    argv = [str(laptop.ray_python()), "-c", PAGE, "http://127.0.0.1:8266"]
    assert "<title>Ray Dashboard</title>" in laptop.run(argv).stdout
    status = cluster.head.status()
    assert [client["name"] for client in status["clients"]] == ["laptop", "laptop"]
    assert "laptop" not in [node["name"] for node in status["roster"]]
    assert "CLIENT" in cluster.lab.machine("head").run(
        [str(cluster.lab.rayfwd), "status", "--config", f"{HOME}/rayfwd.toml"]
    ).stdout  # fmt: skip
    assert second.end(signal.SIGTERM) == 0


def test_a_port_that_was_asked_for_and_is_taken(connected: Connected, laptop: Machine) -> None:
    process = Connected(laptop, HEAD, "--dashboard-port", "8265").process
    assert process.wait(20) == 1
    (line,) = process.log.read_text().splitlines()
    assert line.startswith("rayfwd: listen_taken: 127.0.0.1:8265 cannot be opened")


@pytest.fixture
def forced(cluster: Cluster, connected: Connected) -> Iterator[None]:
    """A key that may run `rayfwd attach --client` on the head, and nothing else."""
    head = cluster.lab.machine("head")
    command = f"{cluster.lab.rayfwd} attach --client --socket {HUB_SOCKET}"
    keys = head.host_path(f"{HOME}/.ssh/authorized_keys").read_text().splitlines()
    head.authorize(f'restrict,command="{command}" {cluster.lab.machine("laptop").public_key}')
    yield
    head.authorize(*keys)


def test_a_forced_command_is_found_without_an_option(forced: None, laptop: Machine) -> None:
    client = Connected(laptop, HEAD)
    try:
        url = client.env["RAY_API_SERVER_ADDRESS"]
        argv = [str(laptop.ray_python()), "-c", PAGE, url]
        assert "<title>Ray Dashboard</title>" in laptop.run(argv).stdout
    finally:
        assert client.end() == 0


def test_a_forced_command_for_clients_takes_no_node(
    forced: None, cluster: Cluster, laptop: Machine
) -> None:
    node = {**cluster.configs["w2"], "name": "laptop", "head": {"ssh": HEAD, "via": "exec"}}
    daemon = laptop.rayfwd_daemon(tomli_w.dumps(node))
    assert "is not a client" in daemon.wait_event("client_only", 30)["cause"]
    assert daemon.stop() == 0
    assert "laptop" not in [entry["name"] for entry in cluster.head.status()["roster"]]


def test_what_is_wrong_is_said_and_ends_it(laptop: Machine, connected: Connected) -> None:
    laptop.know()
    process: Process = Connected(laptop, HEAD).process
    assert process.wait(30) == 1
    (line,) = process.log.read_text().splitlines()
    assert line.startswith("rayfwd: host_key_unknown: the host key of 198.51.100.1 is not in ")
