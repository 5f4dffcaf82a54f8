"""Records statuses of real daemons for tests/fixtures/status: `python -m tests.lab.record`.

As root, with Ray's environments made (see tests/setup_envs.py). A recording is
`{"now": wall-clock seconds, "status": what rayfwd status --json printed}`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import time
from pathlib import Path

from tests.lab import package
from tests.lab.cluster import Cluster
from tests.lab.daemon import Daemon
from tests.lab.machines import Lab
from tests.need import CHECKOUT

FOLDER = CHECKOUT / "tests" / "fixtures" / "status"
RAY = "/home/ray/venv/bin/ray"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="rayfwd-record-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        if package.current() is None:
            package.install(folder)
        with Lab(folder / "lab") as lab:
            cluster = Cluster(lab, ride_through=60, w2={"ray.resources": {"disk": 2}})
            cluster.start(["head"])
            cluster.head.wait_event("hub_listening")
            cluster.start(["w1", "w2"])
            cluster.wait_ready()
            try:
                record(lab, cluster)
            finally:
                cluster.stop()


def record(lab: Lab, cluster: Cluster) -> None:
    head, w1, w2 = cluster.head, cluster.worker("w1"), cluster.worker("w2")
    for daemon in (head, w2):
        daemon.wait_status(
            lambda s: (
                s["cluster"] is not None
                and sum(n["state"] == "ALIVE" for n in s["cluster"]["nodes"]) == 3
                and s["cluster"]["totals"].get("CPU", [0, 0])[1] == 3
            ),
            90,
        )
    keep("head-ready", head)
    keep("worker-ready", w2)

    lab.cut(lab.machine("w1"))
    w1.wait_event("link_parked")
    head.wait_event("link_parked")
    time.sleep(3)
    keep("worker-parked", w1)
    keep("head-parked", head)
    lab.heal(lab.machine("w1"))
    w1.wait_event("link_resumed")
    head.wait_event("link_resumed")
    w1.wait_status(lambda s: len(s["link"]["lanes"]) == 2)
    keep("worker-resumed", w1)

    raylet = [pid for pid in lab.machine("w2").pids() if "raylet" in comm(pid)]
    for pid in raylet:
        signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL)
    head.wait_status(
        lambda s: any(n["state"] == "DEAD" for n in s["cluster"]["nodes"]),
        90,
    )
    keep("head-rejoined", head)

    lab.machine("head").stop_sshd()
    lab.reset_connections(lab.machine("head"))  # else what stands goes on
    w1.wait_event("session_ended", 120)
    w1.wait_status(lambda s: s["state"] == "waiting")
    keep("worker-down", w1)
    keep("head-down", head)
    lab.machine("head").start_sshd()
    w1.wait_status(lambda s: s["state"] == "ready", 120)


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def keep(name: str, daemon: Daemon) -> None:
    status = daemon.status()
    text = json.dumps({"now": round(time.time(), 1), "status": status}, indent=1)
    text = re.sub(r"/[^\s\"]*/bin/ray(?= )", RAY, text)
    (FOLDER / f"{name}.json").write_text(text + "\n")
    print(name, flush=True)


if __name__ == "__main__":
    main()
