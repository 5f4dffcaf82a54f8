"""A Ray cluster in the lab: `rayfwd run` on the head and on workers, with files as in the README.

What differs from the README's few lines is what three nodes on one small computer need.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import tomli_w

from tests.lab.daemon import Daemon
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, CommandFailed

STATE_DIR = f"{HOME}/state"
RUNTIME_DIR = f"{HOME}/run"
HUB_SOCKET = f"{RUNTIME_DIR}/hub.sock"

WORKLOAD = Path(__file__).with_name("workload.py")
LARGE = 20_000_000
"""Bytes of a large object, where a test does not say: some of the chunks in which Ray fetches it,
and more than a stream's window ever is. To make, send and compare it is most of what `essential`
computes."""

Data = dict[str, Any]


class Cluster:
    """The daemons of a head and its workers. What was overridden is in `configs`, a dict a node.

    An override is `every=` or a node's name (`head=`, `w1=`), and changes the file of all nodes or
    of that one. Its keys are dotted or nested, as the file has them; None takes a key away:
    `Cluster(lab, every={"ride_through": 30}, w1={"ray.advertise": "198.51.100.2"},
    w2={"head": {"via": "exec"}})`. Any other keyword is a key of every node's file
    (`ride_through=30`, `ray={"num_cpus": 2}`).
    """

    def __init__(
        self,
        lab: Lab,
        ray_version: str = "2.60.0",
        workers: Sequence[str] = ("w1", "w2"),
        **overrides: Any,
    ) -> None:
        self.lab = lab
        self.ray_version = ray_version
        self.names = ("head", *workers)
        self.configs = {name: self._default(name) for name in self.names}
        self._daemons: dict[str, Daemon] = {}
        for key, value in overrides.items():
            if key in self.names:
                change(self.configs[key], value)
            else:
                for config in self.configs.values():
                    change(config, value if key == "every" else {key: value})

    def _default(self, name: str) -> Data:
        ray = {
            "command": str(self.lab.machine(name).ray(self.ray_version)),
            "num_cpus": 1,
            "worker_ports": 40,
            "object_store_memory": 300_000_000,
        }
        role: Data = {"role": "head" if name == "head" else "worker", "name": name}
        places = {"state_dir": STATE_DIR, "runtime_dir": RUNTIME_DIR, "log": {"format": "json"}}
        if name == "head":
            return {**role, **places, "ray": ray}
        head = {"ssh": f"ray@{self.lab.machine('head').address}", "socket": HUB_SOCKET}
        return {**role, **places, "head": head, "ray": ray}

    def config(self, name: str) -> str:
        """That node's file."""
        return tomli_w.dumps(self.configs[name])

    def start(self, names: Iterable[str] | None = None) -> None:
        """sshd on the head, then `rayfwd run` on these nodes (default: all) at once."""
        head = self.lab.machine("head")
        if not head.sshd_runs:
            head.start_sshd()
        for name in names if names is not None else self.names:
            self.start_node(name)

    def start_node(self, name: str, under: Sequence[str] = (), net_admin: bool = False) -> Daemon:
        """`rayfwd run` on one node, again if it has ended; `under` a command that becomes it,
        `net_admin`: with the right to change the network."""
        old = self._daemons.get(name)
        assert old is None or old.process.poll() is not None, f"{name}: rayfwd still runs"
        machine = self.lab.machine(name)
        daemon = machine.rayfwd_daemon(self.config(name), under=under, net_admin=net_admin)
        self._daemons[name] = daemon
        return daemon

    def wait_ready(self, timeout: float = 180) -> None:
        """Until every daemon that was started is ready, and the head has every worker's link."""
        for daemon in self._daemons.values():
            daemon.wait_ready(timeout)
        workers = {name for name in self._daemons if name != "head"}
        self.head.wait_status(lambda status: workers <= _linked(status), timeout)

    @property
    def head(self) -> Daemon:
        return self._daemons["head"]

    def worker(self, name: str) -> Daemon:
        """The daemon that was last started there."""
        return self._daemons[name]

    @property
    def daemons(self) -> tuple[Daemon, ...]:
        return tuple(self._daemons.values())

    def stop(self, timeout: float = 90) -> dict[str, int]:
        """SIGTERM to all daemons at once; their exit codes."""
        codes: dict[str, int] = {}
        errors: list[BaseException] = []

        def end(name: str, daemon: Daemon) -> None:
            try:
                codes[name] = daemon.stop(timeout)
            except AssertionError as exc:
                errors.append(exc)

        at_once([lambda n=n, d=d: end(n, d) for n, d in self._daemons.items()])  # type: ignore[misc]
        if errors:
            raise errors[0]
        return codes

    def driver(
        self,
        machine: Machine | str,
        script_args: Sequence[str] = (),
        timeout: float = 280,
        env: Mapping[str, str] | None = None,
    ) -> list[Data]:
        """Run workload.py by Ray's Python on a machine; the JSON lines it printed.

        A failed check is in its line; a driver that could not begin or did not end is raised.
        """
        where = self.lab.machine(machine) if isinstance(machine, str) else machine
        script = f"{HOME}/workload.py"
        where.write(script, WORKLOAD.read_text())
        argv = [str(where.ray_python(self.ray_version)), script, f"--large={LARGE}"]
        argv += map(str, script_args)
        try:
            ran = where.run(argv, timeout=timeout, check=False, env=env)
        except TimeoutError as exc:
            raise AssertionError(f"{where.name}: {exc}{self.lab.tails()}") from None
        lines = [json.loads(x) for x in ran.stdout.splitlines() if x.startswith("{")]
        if ran.returncode not in {0, 1} or not lines:
            raise CommandFailed(ran.returncode, argv, ran.stdout, ran.stderr)
        return lines


def at_once(calls: Sequence[Callable[[], None]]) -> None:
    """Make these calls in a thread each, and wait for all."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _linked(status: Data) -> set[str]:
    return {w["name"] for w in status.get("workers") or [] if w.get("state") == "up"}


def change(config: Data, overrides: Mapping[str, Any]) -> None:
    """Put values into a configuration: keys dotted or nested, None takes one away."""
    for key, value in overrides.items():
        *above, last = key.split(".")
        section = config
        for part in above:
            section = section.setdefault(part, {})
        if value is None:
            section.pop(last, None)
        elif isinstance(value, Mapping) and isinstance(section.get(last), dict):
            change(section[last], value)
        else:
            section[last] = deepcopy(value)
