"""A cluster on booted machines, set up by the commands that the README gives, with real Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.lab.loadgen import Job
from tests.lab.process import Process, until
from tests.systemd.machines import RAY, Lab, Machine

PYTHON = Path("/home/ray/venv/bin/python")
"""Ray's."""

BOTH = ["127.77.0.1", "127.77.0.2"]
"""The head's address and the worker's."""

SMALL = """\
num_cpus = 1
object_store_memory = 100000000
"""
"""Lines for [ray]: two nodes share a machine with all other tests."""

TASKS = """
import json, ray, time
ray.is_initialized() or ray.init(address="auto", logging_level="error", log_to_driver=False)
deadline = time.monotonic() + 120
while len([n for n in ray.nodes() if n["Alive"]]) < 2 and time.monotonic() < deadline:
    time.sleep(0.2)

@ray.remote(num_cpus=1)
def work(data):
    return len(data), ray.util.get_node_ip_address(), bytes(2_000_000)

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
alive = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
on = [work.options(scheduling_strategy=On(node, soft=False)) for node in alive]
there = [task.remote(bytes(1_000_000)) for task in on]
print("done", json.dumps([[n, a, len(b)] for n, a, b in ray.get(there, timeout=60)]))
"""


class AsRay:
    """A machine as a job sees it: everything is done by the user that Ray runs as."""

    def __init__(self, machine: Machine) -> None:
        self.lab = machine.lab
        self._machine = machine

    def write(self, path: str, text: str) -> None:
        self._machine.write(path, text, "ray")

    def popen(self, argv: list[str]) -> Process:
        return self._machine.popen(argv, user="ray")


class Cluster:
    """Head and worker of a lab: the machines' own services, or those of user `ray`."""

    def __init__(
        self, lab: Lab, user: str = "root", further: str = "", level: str | None = "listeners"
    ) -> None:
        """`further`: lines for [ray] of both; `level`: None takes what the file says by default."""
        self.lab = lab
        self.user = user
        self.head = lab.machine("head")
        self.worker = lab.machine("worker")
        self._further = SMALL + further
        self._level = "" if level is None else f'[network]\nlevel = "{level}"\n\n'

    def init_head(self, *further: str) -> str:
        """The README's command on the head; what it printed."""
        words = ["rayfwd", "init", "head", "--ray", RAY, *further]
        return self.head.run(words, user=self.user).stdout

    def init_worker(self, *further: str) -> str:
        """The README's command on the worker; what it printed."""
        words = ["--head", "ray@head", "--ray", RAY, "--fingerprint", self.head.fingerprint]
        words = ["rayfwd", "init", "worker", *words, *further]
        return self.worker.run(words, user=self.user).stdout

    def authorize(self, init_said: str) -> None:
        """Put the line that `rayfwd init worker` printed where it says."""
        (line,) = [text for text in init_said.splitlines() if "restrict,command=" in text]
        self.head.run(["install", "-d", "-m", "0700", "/home/ray/.ssh"], user="ray")
        path = "/home/ray/.ssh/authorized_keys"
        self.head.run(["sh", "-c", f"cat >>{path}"], user="ray", input=f"{line.strip()}\n")

    @property
    def config(self) -> str:
        """The path of the file that `init` makes."""
        return "/etc/rayfwd.toml" if self.user == "root" else "/home/ray/.config/rayfwd.toml"

    def set_up(self) -> None:
        """Both by `rayfwd init`; Ray is kept small."""
        self.init_head()
        self.authorize(self.init_worker())
        for machine in self.lab.machines:
            text = machine.read(self.config)
            assert text.count("[ray]\n") == 1, text
            text = text.replace("[ray]\n", f"{self._level}[ray]\n{self._further}")
            machine.host_path(self.config).write_text(text)

    def start(self) -> None:
        """The README's last command, on both."""
        for machine in self.lab.machines:
            machine.systemctl("enable", "--now", "--no-block", "rayfwd", user=self.user)

    def wait_ready(self, timeout: float = 120) -> None:
        """Return when both services are active, which they are when their job is being done."""
        for machine in self.lab.machines:
            machine.wait_for(timeout=timeout, user=self.user, ActiveState="active")

    def driver(self, script: str, *words: str) -> str:
        """What a script says that Ray's Python runs on the head."""
        return self.head.run([str(PYTHON), "-c", script, *words], user="ray", timeout=200).stdout

    def addresses_that_work(self) -> list[str]:
        """Of the nodes that have run a task, with 1 MB there and 2 MB back; waits for two nodes."""
        return that_worked(self.driver(TASKS))

    def job(self) -> Job:
        """A job that counts every call, from a driver on the worker."""
        return Job(AsRay(self.worker), PYTHON, "--nodes", "2")  # type: ignore[arg-type]

    def goes_on(self, job: Job) -> None:
        """Wait until the job gets further on both nodes; it leaves no CPU to others' tasks."""
        before = {address: job.done_on(address) for address in BOTH}
        until(
            # What is told once a second may be some calls behind.
            lambda: all(job.done_on(address) > n + 30 for address, n in before.items()),
            60,
            lambda: f"the job gets no further than {before}: {job.counts()}",
        )

    def restart(self, machine: Machine) -> dict[str, Any]:
        """`systemctl restart rayfwd`; what the new process said of what it took over."""
        before = machine.show(user=self.user)["MainPID"]
        machine.systemctl("restart", "rayfwd", user=self.user)
        shown = machine.wait_for(user=self.user, ActiveState="active", SubState="running")
        assert shown["MainPID"] != before
        assert shown["StatusText"].startswith("ready")
        return machine.events("handover_taken", user=self.user)[-1]

    def raylets(self) -> list[int]:
        """Their process ids, the head's first."""
        return [raylet(machine) for machine in self.lab.machines]


def raylet(machine: Machine) -> int:
    """Its process id there. The oldest: a process that it forks is called so for a moment."""
    return int(machine.run(["pgrep", "--oldest", "--exact", "raylet"]).stdout)


def that_worked(said: str) -> list[str]:
    """The addresses of nodes that have run a task of `TASKS`, by what it has said."""
    # Ray prints what raylets and workers say between the lines.
    (done,) = [line for line in said.splitlines() if line.startswith("done ")]
    found = json.loads(done.removeprefix("done "))
    assert {(sent, back) for sent, _, back in found} == {(1_000_000, 2_000_000)}
    return sorted(address for _, address, _ in found)
