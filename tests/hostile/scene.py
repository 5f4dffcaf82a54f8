"""A head, an honest worker, and what an attack may cost them.

Bounds are in bytes, descriptors and lines; of time they are ratios to the honest worker's own usual
answers, with a floor for machines that are busy with other things.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayfwd.system.control import ask
from tests.hostile.speaker import Speaker
from tests.lab.cluster import HUB_SOCKET, RUNTIME_DIR, Cluster
from tests.lab.daemon import Daemon
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, Process, until

ECHO = 9911
"""The port of the head that is exposed."""
HERE = 7911
"""That port of the honest worker's, through the link."""

MEGABYTE = 1 << 20
MEMORY = 96 * MEGABYTE
"""What one hostile peer may cost a daemon: its session's buffers (64 MiB), and what they are kept
in."""
LOG = 300_000
"""Bytes of log that one attack may cause."""
FACTOR = 2.0
FLOOR = 1.0
"""Seconds: an honest answer may take so many times the usual, or this long."""
WORST = 8.0
"""Seconds for the slowest of them: a lane that does not answer is given up before."""
ENOUGH = 10
"""Answers that a comparison needs."""

FAULTS = ("rayfwd_fault", "watcher_fault", "loop_fault", "metrics_fault", "not_json", "loop_stuck")
"""Events that say that something of ours went wrong."""


@dataclass
class Answers:
    """The honest program's, within a time."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Honest:
    """A program on the worker that asks one on the head, and how long that takes."""

    def __init__(self, machine: Machine, python: str) -> None:
        argv = [python, f"{HOME}/honest.py", "call", "127.0.0.1", str(HERE)]
        self.process = machine.popen(argv, log=machine.lab.folder / "honest.log")

    def answers(self, since: float, to: float) -> Answers:
        """To what was asked within that time, and has been answered."""
        found = Answers()
        text = self.process.log.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            when, _, seconds = json.loads(line)
            if since <= when < to:
                if seconds is None:
                    found.failed += 1
                else:
                    found.seconds.append(seconds)
        return found

    def for_a_while(self) -> Answers:
        """Enough of them, asked from now on."""
        since = time.monotonic()

        def enough() -> list[Answers]:
            found = self.answers(since, time.monotonic())
            return [found] if len(found.seconds) + found.failed >= 4 * ENOUGH else []

        return until(enough, 60, lambda: f"answers: {self.process.log.read_text()[-300:]}")[0]


class Scene:
    """The cluster, and a contextmanager for each attack."""

    def __init__(self, lab: Lab, under: Sequence[str] = ()) -> None:
        self.lab = lab
        self.head, self.w1, self.w2 = lab.machines
        assert lab.rayfwd is not None
        self.python = str(lab.rayfwd.with_name("python"))
        """One that every user of the machines may run."""
        forward = [{"listen": f"127.0.0.1:{HERE}", "to": f"head:{ECHO}"}]
        self.cluster = Cluster(
            lab,
            workers=("w1", "w2"),
            every={"ray.start": False, "canary": {"enabled": False}},
            head={"expose": [ECHO]},
            w1={"forward": forward},
        )
        self._under = under
        self.calm = Answers()

    def start(self) -> None:
        text = Path(__file__).with_name("honest.py").read_text()
        for machine in (self.head, self.w1):
            machine.write(f"{HOME}/honest.py", text)
        self.head.popen([self.python, f"{HOME}/honest.py", "serve", str(ECHO)])
        self.head.start_sshd()
        self.cluster.start_node("head", self._under)
        self.cluster.start_node("w1")
        self.daemon.wait_event("hub_listening")
        self.worker.wait_event("lane_up", 60)
        self.honest = Honest(self.w1, self.python)
        self.calm = self.honest.for_a_while()
        assert not self.calm.failed

    def stop(self) -> None:
        self.cluster.stop()

    @property
    def daemon(self) -> Daemon:
        """The head's."""
        return self.cluster.head

    @property
    def worker(self) -> Daemon:
        """The honest one's."""
        return self.cluster.worker("w1")

    @property
    def hub(self) -> Path:
        return self.head.host_path(HUB_SOCKET)

    def speaker(self) -> Speaker:
        return Speaker(self.hub)

    @property
    def address(self) -> str:
        """The head's in the plan."""
        return self.address_of("head")

    def address_of(self, name: str) -> str:
        """A node's."""
        rows = self.daemon.status()["roster"]
        return str(next(row["address"] for row in rows if row["name"] == name))

    def run_as(self, machine: Machine, uid: int, script: str, *words: object) -> str:
        """What a script of that user's prints there."""
        return machine.run(self.words_as(uid, script, *words), user="root").stdout

    def start_as(self, machine: Machine, uid: int, script: str, *words: object) -> Process:
        """The same, left to run."""
        return machine.popen(self.words_as(uid, script, *words), user="root")

    def words_as(self, uid: int, script: str, *words: object) -> list[str]:
        drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
        return [*drop, self.python, "-c", script, *map(str, words)]

    @contextmanager
    def attack(
        self,
        on: Daemon | None = None,
        memory: int = MEMORY,
        descriptors: int = 80,
        log: int = LOG,
        honest: bool = True,
    ) -> Iterator[None]:
        """What is done within costs a daemon (the head's) no more than that, nobody else anything
        (unless `honest` is false), and when it is over the daemon has its descriptors back."""
        daemon = on or self.daemon
        before = Cost.of(daemon)
        faults = _faults(daemon)
        with Sampler(daemon) as peak:
            began = time.monotonic()
            try:
                yield
            finally:
                ended = time.monotonic()
                self.forget()
        assert daemon.process.poll() is None, f"it has ended{daemon.tail()}"
        assert _faults(daemon) == faults, f"a fault of ours{daemon.tail()}"
        assert peak.memory - before.memory <= memory, f"{(peak.memory - before.memory) / 1e6} MB"
        more = peak.descriptors - before.descriptors
        assert more <= descriptors, f"{more} descriptors"
        logged = Cost.of(daemon).log - before.log
        assert logged <= log, f"{logged} bytes of log{daemon.tail()}"
        assert b"\x1b" not in daemon.log.read_bytes(), "nobody's terminal is written to"
        during = self.honest.answers(began, ended) if honest else Answers()
        self._check_honest(during)
        until(
            lambda: Cost.of(daemon).descriptors <= before.descriptors + 4,
            30,
            lambda: f"{Cost.of(daemon).descriptors} descriptors, {before.descriptors} before",
        )

    def forget(self) -> None:
        """Every node but the honest ones."""
        control = self.head.host_path(f"{RUNTIME_DIR}/control.sock")
        for row in self.daemon.status()["roster"]:
            if row["name"] not in {"head", "w1"}:
                ask(control, "forget", {"name": row["name"]})

    def _check_honest(self, during: Answers) -> None:
        after = self.honest.for_a_while()
        assert during.failed == after.failed == 0, f"{during.failed} answers failed"
        if len(during.seconds) >= ENOUGH:
            usual = max(FLOOR, FACTOR * self.calm.median)
            assert during.median <= usual, f"{during.median} s, {self.calm.median} s before"
        worst = max(during.seconds + after.seconds)
        assert worst <= WORST, f"{worst} s"


@dataclass(frozen=True)
class Cost:
    """What a daemon takes of its machine."""

    memory: int
    descriptors: int
    log: int

    @classmethod
    def of(cls, daemon: Daemon) -> Cost:
        pid = daemon.process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        (resident,) = re.findall(r"VmRSS:\s+(\d+) kB", status)
        return cls(
            1024 * int(resident), len(os.listdir(f"/proc/{pid}/fd")), daemon.log.stat().st_size
        )


class Sampler:
    """The most that a daemon takes, looked at again and again."""

    INTERVAL = 0.05

    def __init__(self, daemon: Daemon) -> None:
        self.memory = self.descriptors = 0
        self._daemon = daemon
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            try:
                cost = Cost.of(self._daemon)
            except (OSError, ValueError):  # it has ended, which the test tells
                return
            self.memory = max(self.memory, cost.memory)
            self.descriptors = max(self.descriptors, cost.descriptors)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def _faults(daemon: Daemon) -> list[Any]:
    return [event for event in daemon.events() if event["event"] in FAULTS]


def repeat(seconds: float, function: Callable[[], object]) -> int:
    """Call it again and again for that time; how often."""
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        function()
        count += 1
    return count
