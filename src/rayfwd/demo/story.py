"""What the demo does, step by step, and what must hold at each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayfwd.demo.daemons import (
    OBJECT_STORE,
    WORKER_PORTS,
    Daemon,
    environment,
    needed_paths,
)
from rayfwd.demo.machine import DemoMachine
from rayfwd.demo.sshserver import ALIAS, SSHServer
from rayfwd.demo.teller import Narrator, StepFailedError
from rayfwd.problems import ProblemError
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.ray.install import RayInstall
from rayfwd.ray.nodes import NodeSeen
from rayfwd.system.logs import escaped

STEP_TIMEOUT = 120.0
"""Seconds for a step that waits for Ray."""
CUT_SECONDS = 10.0
"""Seconds for which no new SSH connection is let in after the cut."""
ENDING_SECONDS = 10.0
"""Seconds after the end of `rayfwd run` until nothing of it may be there."""
WARM_TASKS = 5
"""Results of every kind of work that must have come before the cut, and again after it."""

_JOB = Path(__file__).with_name("job.py")


@dataclass(slots=True)
class Numbers:
    """The numbers for the last words."""

    ray: str = ""
    cpus: float = 0
    connections: int = 0
    down: float = 0.0
    held: int = 0
    finished: dict[str, Any] = field(default_factory=dict)
    objects: list[dict[str, Any]] = field(default_factory=list)


class Story:
    """One run of the demo. `close` ends and removes everything, whatever state it is in."""

    def __init__(self, folder: Path, ray: RayInstall, teller: Narrator) -> None:
        keep = needed_paths(folder, ray)
        shm = f"{OBJECT_STORE // 1_000_000 + 100}m"
        self._folder = folder
        self._ray = ray
        self._tell = teller
        machines = [DemoMachine(name, folder / name, keep, shm) for name in ("head", "worker")]
        settings = {
            "command": ray.command,
            "num_cpus": 1,
            "object_store_memory": OBJECT_STORE,
            "worker_ports": WORKER_PORTS,
        }
        self._head = Daemon(
            machines[0], {"role": "head", "ray": {**settings, "status_interval": 5.0}}
        )
        self._ssh = SSHServer(folder / "ssh", self._head.hub_socket)
        head = {
            "ssh": ALIAS,
            "ssh_config": str(self._ssh.config),
            "identity": str(self._ssh.identity),
            "known_hosts": str(self._ssh.known_hosts),
            "socket": str(self._head.hub_socket),
        }
        self._worker = Daemon(machines[1], {"role": "worker", "head": head, "ray": settings})
        self._job = Job(self._head.machine, folder, ray)
        self._outcome = Numbers(ray=ray.versions.ray)

    async def tell(self) -> None:
        """All of it. Raises StepFailedError or ProblemError."""
        await self._make_machines()
        await self._start_daemons()
        await self._show_nodes()
        await self._start_job()
        await self._cut()
        await self._finish_job()
        await self._stop()

    async def close(self) -> None:
        """End every process and remove every mount; the files are the caller's."""
        await asyncio.gather(*(daemon.machine.close() for daemon in self._daemons))
        await self._ssh.close()

    def logs(self) -> Iterable[tuple[str, Path]]:
        """What was logged, by whom."""
        yield from ((f"rayfwd on {d.machine.name}", d.log) for d in self._daemons)
        yield "the job", self._job.log

    def last_words(self) -> list[str]:
        """What happened, in plain words."""
        out, done = self._outcome, self._outcome.finished["done"]
        tasks, training = done["head"] + done["worker"], self._outcome.finished["training"]
        first = [
            f"{o['bytes'] / 1e6:.0f} MB from {o['way']} in {o['seconds']:.1f} s"
            for o in out.objects
        ]
        return [
            f"Ray {out.ray} ran on two machines with {out.cpus:g} CPUs in all. The worker has no "
            "network: it has only SSH to the head.",
            f"Every large object arrived intact: {', '.join(first)}; "
            f"{out.finished['bytes'] / 1e6:.0f} MB in all, compared by SHA-256.",
            f"The link was cut once: {out.connections} SSH connections closed, {out.down:.1f} s "
            f"without any, {out.held} connections of Ray's held meanwhile.",
            f"The job lost nothing: {tasks} tasks ({done['worker']} on the worker), "
            f"{done['exchange']} exchanges of objects and {done['actor']} calls of one actor; "
            "none failed, none was retried.",
            f"The training did not notice: {training['steps']} steps on both machines, loss down "
            f"from {training['first']:.2f} to {training['last']:.4f}. The weights are bit for bit "
            "those of the same training in a single process.",
        ]

    @property
    def _daemons(self) -> tuple[Daemon, Daemon]:
        return self._head, self._worker

    # -- the steps -----------------------------------------------------------------------

    async def _make_machines(self) -> None:
        self._tell.title("Creating two machines inside this one")
        for daemon in self._daemons:
            machine = daemon.machine
            machine.folder.mkdir()
            await machine.start()
            self._tell.say(
                f"{machine.name}: its own processes, mounts, host name and network "
                f"(interfaces: {', '.join(machine.interfaces)})"
            )
        await self._ssh.start()
        self._tell.say("they share nothing but the head's SSH server, on a Unix socket")

    async def _start_daemons(self) -> None:
        self._tell.title("Starting `rayfwd run` on both; Ray starts once the link is up")
        self._head.start(environment(self._head.machine, os.environ))
        await self._wait_listening()
        self._worker.start(environment(self._worker.machine, os.environ))
        for daemon in self._daemons:
            await self._wait_ready(daemon)

    async def _wait_listening(self) -> None:
        """For the hub, so that the worker's first try finds it."""

        async def listening() -> bool:
            self._check_alive()
            return self._head.hub_socket.exists()

        await self._tell.until(listening, lambda: "head: the hub is not there yet", STEP_TIMEOUT)

    async def _wait_ready(self, daemon: Daemon) -> None:
        name, status = daemon.machine.name, None

        async def ready() -> bool:
            nonlocal status
            self._check_alive()
            try:
                status = await daemon.status()
            except ProblemError:
                return False  # it does not answer yet
            wrong = (c for c in status.conditions if c.id in status.ray.conditions)
            error = next((c.problem for c in wrong if c.severity == "error"), None)
            if daemon is self._head and error:  # a worker's may pass: the head may be slow
                raise StepFailedError(f"Ray on {name}: {error}")
            return status.state == "ready"

        await self._tell.until(
            ready, lambda: f"{name}: {status.summary if status else 'starting'}", STEP_TIMEOUT
        )
        status = await daemon.status()
        assert status.node is not None, "a node that is ready has its plan"
        self._tell.say(f"{name}: ready, Ray {status.ray.version} is up at {status.node.address}")
        if status.link is not None:
            lanes = len(status.link.lanes)
            self._tell.say(f"the link: {lanes} SSH connections, dialled by the worker")

    async def _show_nodes(self) -> None:
        self._tell.title("The cluster, as Ray reports it")
        cluster = ClusterReport(None, {}, ())

        async def complete() -> bool:
            nonlocal cluster
            self._check_alive()
            with contextlib.suppress(ProblemError):  # it does not answer in time
                cluster = (await self._head.status()).cluster or cluster
            return cluster.totals.get("CPU", (0.0, 0.0))[1] == 2 and len(alive()) == 2

        def alive() -> list[NodeSeen]:
            return [node for node in cluster.nodes if node.state == "ALIVE"]

        await self._tell.until(
            complete, lambda: f"{len(alive())} nodes so far in Ray's own report", STEP_TIMEOUT
        )
        for node in sorted(alive(), key=lambda node: not node.is_head):
            resources = node.resources_total
            self._tell.say(
                f"{'head' if node.is_head else 'worker':<7} {node.address:<12} "
                f"{node.state}  {resources.get('CPU', 0):g} CPU  "
                f"object store {resources.get('object_store_memory', 0) / 1e6:.0f} MB"
            )
        used, total = cluster.totals["CPU"]
        self._outcome.cpus = total
        self._tell.say(f"`ray status`: {used:g} of {total:g} CPUs in use")

    async def _start_job(self) -> None:
        self._tell.title("Starting a job on the head that uses both machines")
        node = (await self._worker.status()).node
        assert node is not None, "a node that is ready has its plan"
        self._job.start(node.address)
        await self._wait_job(lambda: len(self._job.objects) == 2, "starting the first tasks")
        self._outcome.objects = self._job.objects
        for seen in self._job.objects:
            text = f"{seen['bytes'] / 1e6:.0f} MB from {seen['way']} in {seen['seconds']:.1f} s"
            if not seen["same"]:
                raise StepFailedError(f"{text}, but other bytes arrived")
            self._tell.say(f"{text}, SHA-256 compared")
        self._tell.say(
            "now a training run on both machines; beside it tasks, an actor, and objects in both "
            "directions"
        )
        await self._wait_job(lambda: self._job.all_above({}, WARM_TASKS), "steady work")
        self._tell.say(f"so far: {self._job}")

    async def _cut(self) -> None:
        self._tell.title(f"Cutting the link for {CUT_SECONDS:.0f} s")
        before = await self._worker.link()
        self._ssh.refusing = True
        cut_at = time.monotonic()
        self._outcome.connections = self._ssh.cut()
        self._tell.say(
            f"{self._outcome.connections} SSH connections closed, new ones refused; "
            f"{self._job.in_flight} tasks and calls are in flight"
        )
        await self._pass(cut_at + 2.0)
        self._outcome.held = (await self._worker.status()).streams.parked
        link = await self._worker.link()
        if link.state != "parked":
            raise StepFailedError(f"the link is {link.state}, it should be parked")
        self._tell.say(f"the worker's link is parked: {self._outcome.held} connections are held")
        # What had arrived before the cut may be told by the job a moment later.
        await self._pass(cut_at + 4.0)
        at_cut = dict(self._job.done)
        await self._pass(cut_at + CUT_SECONDS)
        now = dict(self._job.done)
        came = sum(now[kind] - at_cut[kind] for kind in ("worker", "actor", "exchange", "training"))
        if came or now["head"] == at_cut["head"]:
            raise StepFailedError(f"the link was not cut: {at_cut} became {now} in the meantime")
        self._tell.say(
            f"meanwhile: {now['head'] - at_cut['head']} tasks done on the head, 0 on the worker; "
            f"the training waits at step {now['training']}"
        )
        self._ssh.refusing = False
        self._tell.title("Letting the link come back")
        await self._wait_link_up(before.cuts)
        await self._wait_job(lambda: self._job.all_above(now, WARM_TASKS), "work resumes")
        self._tell.say(f"the job goes on: {self._job}")

    async def _wait_link_up(self, cuts_before: int) -> None:
        link = await self._worker.link()
        parked_since = link.since

        async def up() -> bool:
            nonlocal link
            self._check_alive()
            with contextlib.suppress(ProblemError):  # it does not answer in time
                link = await self._worker.link()
            return link.state == "up"

        await self._tell.until(up, lambda: f"the link is {link.state}", STEP_TIMEOUT)
        self._outcome.down = link.since - parked_since
        if link.cuts != cuts_before + 1 or link.ridden_through != link.cuts:
            raise StepFailedError(
                f"the link counted {link.cuts} cuts and rode through {link.ridden_through}"
            )
        self._tell.say(f"the link is up again after {self._outcome.down:.1f} s")

    async def _finish_job(self) -> None:
        self._tell.title("Letting the job finish what is in flight")
        self._job.stop()
        await self._wait_job(lambda: bool(self._job.finished), "finishing")
        finished = self._outcome.finished = self._job.finished
        if finished["failed"] or finished["actor_processes"] != 1:
            raise StepFailedError(f"the job lost something: {finished}")
        if not finished["training"]["same"]:
            raise StepFailedError(f"the training has another result: {finished['training']}")
        for daemon in self._daemons:
            restarts = (await daemon.status()).ray.restarts
            if restarts:
                raise StepFailedError(f"Ray on {daemon.machine.name} was restarted ({restarts})")
        self._tell.say("every result arrived exactly once and was correct")

    async def _stop(self) -> None:
        self._tell.title("Stopping both machines, Ray first")
        for daemon in (self._worker, self._head):
            daemon.stop()

            async def ended(daemon: Daemon = daemon) -> bool:
                return daemon.exit_code is not None

            seconds = await self._tell.until(
                ended, lambda: "Ray drains and its processes end", STEP_TIMEOUT
            )
            if daemon.exit_code != 0:
                raise StepFailedError(f"exit code {daemon.exit_code} on {daemon.machine.name}")
            await self._wait_empty(daemon.machine)
            self._tell.say(f"{daemon.machine.name}: ended in {seconds:.1f} s, no process is left")

    async def _wait_empty(self, machine: DemoMachine) -> None:
        """A process may need a moment to be gone once it has been told to."""
        left: list[str] = []

        async def empty() -> bool:
            nonlocal left
            left = await machine.processes()
            return not left

        await self._tell.until(
            empty, lambda: f"still running on {machine.name}: {', '.join(left)}", ENDING_SECONDS
        )

    # -- waiting -------------------------------------------------------------------------

    def _check_alive(self) -> None:
        for daemon in self._daemons:
            if daemon.exit_code is not None:
                raise StepFailedError(
                    f"rayfwd on {daemon.machine.name} ended with exit code {daemon.exit_code}"
                )

    async def _wait_job(self, true: Callable[[], bool], what: str) -> None:
        async def look() -> bool:
            self._check_alive()
            self._job.read()
            if true():
                return True
            self._job.check()
            return False

        await self._tell.until(look, lambda: f"{what}: {self._job}", STEP_TIMEOUT)

    async def _pass(self, until: float) -> None:
        """Let time pass, and read what the job says."""

        async def over() -> bool:
            self._check_alive()
            self._job.read()
            self._job.check()
            return time.monotonic() >= until

        await self._tell.until(over, lambda: str(self._job), STEP_TIMEOUT)


class Job:
    """The driver on the head (`job.py`), and what it has said so far."""

    def __init__(self, machine: DemoMachine, folder: Path, ray: RayInstall) -> None:
        self.log = folder / "job.log"
        self.objects: list[dict[str, Any]] = []
        self.done: dict[str, int] = {}
        self.in_flight = 0
        self.finished: dict[str, Any] = {}
        self._machine = machine
        self._ray = ray
        self._out = folder / "job.out"
        self._stop_file = folder / "job.stop"
        self._ended: asyncio.Future[int] | None = None
        self._read = 0

    def start(self, worker_address: str) -> None:
        """Start the driver on the head."""
        argv = [self._ray.python, str(_JOB), worker_address, str(self._stop_file)]
        env = environment(self._machine, os.environ)
        self._ended = self._machine.run("job", argv, env, out=self._out, log=self.log)

    def stop(self) -> None:
        """Begin nothing more, finish what is in flight."""
        self._stop_file.touch()

    def read(self) -> None:
        """Take in what the driver has printed since."""
        with contextlib.suppress(FileNotFoundError), self._out.open("rb") as file:
            file.seek(self._read)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.splitlines():
                self._heard(json.loads(line))

    def check(self) -> None:
        """Raises StepFailedError when the driver has ended before it should, or has lost a task."""
        if self.finished.get("failed"):
            raise StepFailedError(f"the job lost a task: {escaped(str(self.finished['failed']))}")
        if self._ended is not None and self._ended.done() and not self.finished:
            raise StepFailedError(f"the job ended with exit code {self._ended.result()}")

    def all_above(self, before: dict[str, int], count: int) -> bool:
        """Whether of every kind at least `count` more were done than `before`."""
        kinds = self.done
        return bool(kinds) and all(kinds[k] >= before.get(k, 0) + count for k in kinds)

    def _heard(self, said: dict[str, Any]) -> None:
        match said["event"]:
            case "object":
                self.objects.append(said)
            case "progress":
                self.done, self.in_flight = said["done"], said["in_flight"]
            case "finished":
                self.finished, self.done, self.in_flight = said, said["done"], 0

    def __str__(self) -> str:
        if not self.done:
            return "nothing is done yet"
        return (
            f"{self.done['head']} tasks on the head, {self.done['worker']} on the worker, "
            f"{self.done['actor']} calls, {self.done['exchange']} exchanges done; "
            f"training: step {self.done['training']}"
        )
