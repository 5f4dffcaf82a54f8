"""Canaries in a test: sent by hand, and met by faults that the machines' own firewalls make on
loopback, where Ray's connections meet the listeners.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.lab.cluster import Cluster
from tests.lab.daemon import CONFIG, Daemon
from tests.lab.machines import Machine
from tests.lab.process import CommandFailed

Row = dict[str, Any]

MARKS = (b"canary_task.py", b"RAYFWD_CANARY=")
"""What a process of a canary's has in its command line or its environment."""


def send(daemon: Daemon) -> tuple[int, Row]:
    """`rayfwd canary --json`: its exit code and its answer."""
    argv = [str(daemon.machine.lab.rayfwd), "canary", "--json", "--config", CONFIG]
    ran = daemon.machine.run(argv, check=False, timeout=150)
    if ran.returncode not in {0, 1} or not ran.stdout:
        raise CommandFailed(ran.returncode, argv, ran.stdout, ran.stderr)
    answer: Row = json.loads(ran.stdout)
    return ran.returncode, answer


@contextmanager
def dropped(machine: Machine, *rules: str) -> Iterator[None]:
    """No packet that a rule names leaves a program of the machine; nobody is told."""
    lines = "\n".join(f"{rule} drop" for rule in rules)
    text = f"""table inet shut {{
        chain output {{
            type filter hook output priority 0; policy accept
            {lines}
        }}
    }}"""
    machine.nft(text)
    try:
        yield
    finally:
        machine.nft("delete table inet shut")


def plan_of(cluster: Cluster, name: str) -> tuple[str, int, int]:
    """A node's address, and its first and last port."""
    row = next(node for node in cluster.head.status()["roster"] if node["name"] == name)
    first, last = row["ports"].split("-")
    return row["address"], int(first), int(last)


def of(status: Row, code: str, subject: str) -> Row | None:
    found = [p for p in status["conditions"] if (p["code"], p["subject"]) == (code, subject)]
    assert len(found) < 2
    return found[0] if found else None


def named(daemon: Daemon, code: str, subject: str, seconds: float) -> Row:
    """The problem, once the daemon's status has it."""
    status = daemon.wait_status(lambda s: of(s, code, subject), seconds)
    problem = of(status, code, subject)
    assert problem is not None
    return problem


def check_healed(cluster: Cluster) -> None:
    """Nothing of it is left, on the head and on the workers, and a canary comes back."""
    for daemon in cluster.daemons:
        daemon.wait_status(lambda s: s["conditions"] == [] and s["state"] == "ready", 90)


def nothing_of_it(cluster: Cluster) -> bool:
    """Whether the head has no process of a canary's."""
    texts = [_read(pid) for pid in cluster.head.machine.pids()]
    return not any(mark in text for mark in MARKS for text in texts)


def _read(pid: int) -> bytes:
    text = b""
    for name in ("cmdline", "environ"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                text += file.read()
        except OSError:
            pass
    return text
