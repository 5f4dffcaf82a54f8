"""A cluster on booted machines, set up by the commands that the README gives, with real Ray."""

from __future__ import annotations

import json
from typing import Any

from tests.systemd.machines import RAY, Lab

SMALL = """\
num_cpus = 1
object_store_memory = 100000000
"""
"""Lines for [ray]: two nodes share a machine with all other tests."""

TASKS = """
import json, ray, sys, time
ray.init(address="auto", logging_level="error", log_to_driver=False)
deadline = time.monotonic() + 60
while len([n for n in ray.nodes() if n["Alive"]]) < 2 and time.monotonic() < deadline:
    time.sleep(0.2)

@ray.remote(num_cpus=1)
def work(data):
    return len(data), ray.util.get_node_ip_address(), bytes(2_000_000)

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
alive = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
on = [work.options(scheduling_strategy=On(node, soft=False)) for node in alive]
there = [task.remote(bytes(1_000_000)) for task in on]
print(json.dumps([[n, a, len(b)] for n, a, b in ray.get(there, timeout=60)]))
"""


class Cluster:
    """Head and worker of a lab."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.head = lab.machine("head")
        self.worker = lab.machine("worker")

    def init_head(self, *further: str) -> str:
        """The README's command on the head; what it printed."""
        return self.head.run(["rayfwd", "init", "head", "--ray", RAY, *further]).stdout

    def init_worker(self, *further: str) -> str:
        """The README's command on the worker; what it printed."""
        words = ["--head", "ray@head", "--ray", RAY, "--fingerprint", self.head.fingerprint]
        return self.worker.run(["rayfwd", "init", "worker", *words, *further]).stdout

    def authorize(self, init_said: str) -> None:
        """Put the line that `rayfwd init worker` printed where it says."""
        (line,) = [text for text in init_said.splitlines() if "restrict,command=" in text]
        self.head.run(["install", "-d", "-m", "0700", "/home/ray/.ssh"], user="ray")
        path = "/home/ray/.ssh/authorized_keys"
        self.head.run(["sh", "-c", f"cat >>{path}"], user="ray", input=f"{line.strip()}\n")

    def set_up(self) -> None:
        """Both by `rayfwd init`; Ray is kept small."""
        self.init_head()
        self.authorize(self.init_worker())
        for machine in self.lab.machines:
            path = "/etc/rayfwd.toml"
            line = f'command = "{RAY}"\n'
            text = machine.read(path)
            assert line in text, text
            machine.host_path(path).write_text(text.replace(line, line + SMALL))  # in [ray]

    def start(self) -> None:
        """The README's last command, on both."""
        for machine in self.lab.machines:
            machine.systemctl("enable", "--now", "--no-block", "rayfwd")

    def wait_ready(self, timeout: float = 90) -> None:
        """Return when both services are active, which they are when their job is being done."""
        for machine in self.lab.machines:
            machine.wait_for(timeout=timeout, ActiveState="active", SubState="running")

    def work(self) -> list[Any]:
        """A task on each node, with 1 MB there and 2 MB back: size, node's address, size."""
        said = self.head.run(["/home/ray/venv/bin/python", "-c", TASKS], user="ray", timeout=120)
        found: list[Any] = json.loads(said.stdout)
        return sorted(found, key=lambda one: str(one[1]))
