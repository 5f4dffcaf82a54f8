"""What a fault costs: the job and the echoes that run beside it, and how to read them.

Times are of the monotonic clock, which all machines of the lab and this process share.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, Process, until

JOB = Path(__file__).with_name("counted_job.py")
PULSE = Path(__file__).with_name("echo_probe.py")
ECHO = 15000
"""Of every machine: where its echo server listens on 127.0.0.1."""
LISTENERS = {"head": 16000, "w1": 16001, "w2": 16002}
"""On the other machines: the port of 127.0.0.1 that stands for that server."""

Line = dict[str, Any]


class Lines:
    """The JSON lines that a process writes, read once each."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._place = 0
        self._rest = b""
        self._found: list[Line] = []

    def all(self) -> list[Line]:
        with self.process.log.open("rb") as file:
            file.seek(self._place)
            text = file.read()
            self._place = file.tell()
        *lines, self._rest = (self._rest + text).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                self._found.append(json.loads(line))
        return self._found

    def last(self, key: str) -> Line | None:
        """The last line that has this key."""
        return next((line for line in reversed(self.all()) if key in line), None)

    def finish(self, timeout: float) -> None:
        """Tell it to end in order, and wait for it."""
        self.process.signal(signal.SIGTERM)
        self.process.wait(timeout)


class Job:
    """The counted job, from its driver on one machine."""

    def __init__(self, machine: Machine, python: Path, *args: str) -> None:
        script = f"{HOME}/{JOB.name}"
        machine.write(script, JOB.read_text())
        self.lines = Lines(machine.popen([str(python), script, *args]))
        until(self._works, 60, lambda: f"the job does not begin{machine.lab.tails()}")

    def _works(self) -> bool:
        assert self.lines.process.poll() is None, self.lines.process.log.read_text()[-4000:]
        counts = self.counts()
        return bool(counts) and all(count["done"] for count in counts.values())

    def counts(self) -> dict[str, dict[str, float]]:
        """Of each kind of call: done, failed, again, corrupt, and the longest."""
        counts: dict[str, dict[str, float]] = (self.lines.last("counts") or {}).get("counts", {})
        return counts

    @property
    def dead(self) -> list[str]:
        """Nodes that Ray has declared dead since the job began."""
        dead: list[str] = (self.lines.last("counts") or {}).get("dead", [])
        return dead

    def bad(self) -> list[Line]:
        """Every call that failed, was made twice, or brought something else."""
        return [line for line in self.lines.all() if line.get("error") is not None]

    def calls(self, kind: str) -> list[Line]:
        """The calls of a kind that took long or failed."""
        return [line for line in self.lines.all() if line.get("call") == kind]

    def done(self) -> float:
        return sum(count["done"] for count in self.counts().values())

    def done_on(self, address: str) -> int:
        """How many tasks and actor calls on that node went well."""
        return int((self.lines.last("counts") or {}).get("nodes", {}).get(address, 0))

    def finish(self, timeout: float = 60) -> None:
        """Let every call that was begun come to its end."""
        self.lines.finish(timeout)
        last = self.lines.last("counts")
        assert last is not None
        assert last.get("over"), self.lines.process.log.read_text()[-4000:]

    def finish_whole(self, least: int, timeout: float = 60) -> dict[str, dict[str, float]]:
        """Let it end once each kind of call was made more than `least` times: nothing was lost.
        Returns the counts."""

        def enough() -> bool:
            counts = self.counts()
            return bool(counts) and all(count["done"] > least for count in counts.values())

        until(enough, timeout, lambda: f"too few calls: {self.counts()}")
        self.finish(timeout)
        counts = self.counts()
        for count in counts.values():
            assert (count["failed"], count["again"], count["corrupt"]) == (0, 0, 0), counts
        self.check()
        return counts

    def check(self) -> None:
        """Nothing was lost so far."""
        assert self.bad() == []
        assert self.dead == []


class Echoes:
    """The echoes between machines, each way `from>to` by a connection that stands."""

    def __init__(self, lab: Lab, ways: Iterable[str]) -> None:
        self.lab = lab
        assert lab.rayfwd is not None
        python = str(lab.rayfwd.with_name("python"))
        script = f"{HOME}/{PULSE.name}"
        self.callers: dict[str, Lines] = {}
        servers = []
        for machine in lab.machines:
            machine.write(script, PULSE.read_text())
            servers.append(machine.popen([python, script, "serve", str(ECHO)]))
        for server in servers:
            until(lambda s=server: "listening" in s.log.read_text(), 20, lambda: "echo servers")  # type: ignore[misc]
        self.ways = list(ways)
        for source in dict.fromkeys(way.partition(">")[0] for way in self.ways):
            given = [
                f"{way}=127.0.0.1:{LISTENERS[way.partition('>')[2]]}"
                for way in self.ways
                if way.startswith(f"{source}>")
            ]
            caller = lab.machine(source).popen([python, script, "call", *given])
            self.callers[source] = Lines(caller)

    def slow(self) -> list[Line]:
        """Echoes that took long or failed, in the order in which they ended."""
        found = [line for lines in self.callers.values() for line in lines.all() if "what" in line]
        return sorted(found, key=lambda line: float(line["ended"]))

    def count(self, way: str) -> int:
        """How many have come back."""
        last = self.callers[way.partition(">")[0]].last("counts")
        return int((last or {"counts": {}})["counts"].get(f"{way} echo", 0))

    def beats(self, timeout: float = 30, ways: Iterable[str] | None = None) -> None:
        """Wait until echoes come back on every way (or on these) from now on."""
        before = {way: self.count(way) for way in ways or self.ways}
        # The count is told once a second: it may be higher than when it was read by echoes of old.
        until(
            lambda: all(self.count(way) > count + 30 for way, count in before.items()),
            timeout,
            lambda: f"no echo: {[w for w, count in before.items() if self.count(w) <= count + 30]}",
        )

    def longest(self, since: float, what: str = "echo", way: str = "") -> float:
        """Seconds of the slowest echo of those that ended after `since`; 0: all were quick."""
        return max(
            (
                line["ended"] - line["began"]
                for line in self.slow()
                if line["ended"] >= since and line["what"] == what and way in {"", line["target"]}
            ),
            default=0.0,
        )

    def after(self, moment: float, since: float, way: str = "") -> float:
        """Seconds from `moment` to the end of the last one that had begun before it.

        Those that had begun before `since` are others. Of new connections too, which were held.
        """
        ends = [
            line["ended"] - moment
            for line in self.slow()
            if since - 1 <= line["began"] < moment <= line["ended"] and way in {"", line["target"]}
        ]
        return max(ends, default=0.0)

    def failed(self) -> list[Line]:
        return [line for line in self.slow() if line["error"] is not None]

    def finish(self) -> None:
        for lines in self.callers.values():
            lines.finish(20)


def listeners(name: str) -> list[dict[str, str]]:
    """On a machine, a further listener to every other's echo server."""
    return [
        {"listen": f"127.0.0.1:{port}", "to": f"{other}:{ECHO}"}
        for other, port in LISTENERS.items()
        if other != name
    ]
