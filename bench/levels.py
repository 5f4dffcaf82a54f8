"""The overlay beside the listeners: the same port of the head's, dialled by a program on a worker.

On the machines of tests/lab, which needs root; without Ray, so that nothing else is about.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from tests.lab.cluster import Cluster
from tests.lab.machines import Lab
from tests.lab.process import HOME, until

PEERS = Path(__file__).with_name("peers.py")
ADDRESS, PORT = "127.77.0.1", 20005
"""Of the head: a port of its plan, which Ray does not have here."""


@contextlib.contextmanager
def at_level(lab: Lab, level: str) -> Iterator[None]:
    """The daemons of a head and a worker at that level, and the server on the head."""
    cluster = Cluster(lab, workers=("w1",), ray={"start": False}, network={"level": level})
    lab.machine("head").start_sshd()
    for name in cluster.names:
        cluster.start_node(name, net_admin=level == "overlay")
    cluster.wait_ready()
    for daemon in cluster.daemons:
        found = daemon.status()["network"]["level"]
        assert found == level, f"{daemon.machine.name}: {found}"
    server = lab.machine("head").popen([*peers(lab, "head"), "serve", ADDRESS, str(PORT)])
    until(lambda: "listening" in server.log.read_text(), 20, server.log.read_text)
    yield
    cluster.stop()


def peers(lab: Lab, name: str) -> list[str]:
    """The command of `peers.py` on that machine."""
    machine = lab.machine(name)
    machine.write(f"{HOME}/peers.py", PEERS.read_text())
    assert lab.rayfwd is not None
    return [str(lab.rayfwd.with_name("python")), f"{HOME}/peers.py"]


def measure(lab: Lab, size: int, seconds: float) -> dict[str, float]:
    """What the client on the worker finds."""
    words = [*peers(lab, "w1"), "measure", ADDRESS, str(PORT), str(size), str(seconds)]
    found: dict[str, float] = json.loads(lab.machine("w1").run(words, timeout=300).stdout)
    return found
