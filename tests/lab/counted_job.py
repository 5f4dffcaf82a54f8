"""A Ray job that goes on until SIGTERM and counts every call: what a fault costs shows here.

Run by Ray's own Python on a machine of the lab; the standard library and Ray only. On every node
run tasks of 1 s that return 1 MB, and an actor that is called some 15 times a second; objects of
50 MB go from the driver to every node and back, and from every node to every other. All contents
are verified, nothing is retried (`max_retries=0`, `max_restarts=0`), and a task that runs twice is
seen.

Prints JSON lines. A call that took longer than `TOLD` seconds or failed is
`{"call": kind, "way": …, "began": …, "ended": …, "error": …}`, times on the monotonic clock, which
all machines of the lab share; every second `{"counts": …, "nodes": …, "dead": …, "now": …}`, the
last one with `"over": true`. `way` is a node's address, or `from>to`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SIZE = 1_000_000
LARGE = 50_000_000
TOLD = 0.5
PATIENCE = 400.0
"""Seconds after which a call has failed, whatever Ray still hopes."""

stop = threading.Event()
said = threading.Lock()


def say(line: dict[str, Any]) -> None:
    with said:
        print(json.dumps(line), flush=True)


def content(label: str, size: int) -> bytes:
    return hashlib.shake_256(label.encode()).digest(size)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Remote functions. What they need of this file travels with them: a worker cannot import it.


def _work(label: str, size: int, seconds: float) -> tuple[str, bytes, bool]:
    """The node, the bytes, and whether this task ran here before."""
    import os
    import tempfile

    mark = os.path.join(tempfile.gettempdir(), "ran-" + label)
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        again = False
    except FileExistsError:
        again = True
    time.sleep(seconds)
    here = ray.get_runtime_context().get_node_id()
    return here, hashlib.shake_256(label.encode()).digest(size), again


def _digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _make(label: str, size: int) -> bytes:
    return hashlib.shake_256(label.encode()).digest(size)


class _Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


work = ray.remote(max_retries=0, num_cpus=1)(_work)
digest_of = ray.remote(max_retries=0, num_cpus=0)(_digest_of)
make = ray.remote(max_retries=0, num_cpus=0)(_make)
Counter = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=0)(_Counter)


class CorruptError(Exception):
    """Not what was to come."""


class RanTwiceError(Exception):
    """A task ran twice."""


class Job:
    """The counts, and the loops that make calls; each in a thread of its own."""

    def __init__(self, nodes: int, rest: float) -> None:
        self.rest = rest
        self.run = f"{time.time_ns():x}"
        self.counts = {
            kind: {"done": 0, "failed": 0, "again": 0, "corrupt": 0, "longest": 0.0}
            for kind in ("task", "actor", "object")
        }
        self.on: dict[str, int] = {}
        """How many tasks and actor calls went well, by address."""
        self.alive: dict[str, str] = {}
        self.seen: set[str] = set()
        self.dead: set[str] = set()
        end = time.monotonic() + 60
        while len(self.alive) < nodes:
            self.look()
            if time.monotonic() > end:
                raise TimeoutError(f"{len(self.alive)} nodes, not {nodes}")
            time.sleep(0.2)
        self.addresses = sorted(self.alive)
        self.own = ray.util.get_node_ip_address()

    def look(self) -> None:
        """Which nodes there are, and which have died since the beginning."""
        entries = ray.nodes()
        alive = {e["NodeManagerAddress"]: e["NodeID"] for e in entries if e["Alive"]}
        self.seen |= set(alive.values())
        self.dead |= {e["NodeID"] for e in entries if not e["Alive"]} & self.seen
        self.alive = alive

    def there(self, address: str) -> dict[str, Any]:
        node = self.alive.get(address)
        while node is None and not stop.wait(0.2):
            node = self.alive.get(address)
        if node is None:
            raise LookupError(f"no node {address}")
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}

    def call(self, kind: str, way: str, began: float, end: Callable[[], None]) -> bool:
        """Await the end of a call, and count it."""
        count, error = self.counts[kind], None
        try:
            end()
            what = "done"
        except CorruptError as exc:
            what, error = "corrupt", str(exc)
        except RanTwiceError as exc:
            what, error = "again", str(exc)
        except Exception as exc:
            what, error = "failed", f"{type(exc).__name__}: {exc}".replace("\n", " | ")[:600]
        ended = time.monotonic()
        with said:
            count[what] += 1
            self.on[way] = self.on.get(way, 0) + (what == "done")
            count["longest"] = max(count["longest"], round(ended - began, 2))
        if error is not None or ended - began > TOLD + (1.0 if kind == "task" else 0.0):
            line = {"call": kind, "way": way, "began": began, "ended": ended, "error": error}
            say(line)
        return error is None

    def tasks(self, address: str) -> None:
        """One runs and one waits for it."""
        flying: deque[tuple[float, str, Any]] = deque()
        number = 0
        while flying or not stop.is_set():
            if len(flying) < 2 and not stop.is_set():
                number += 1
                label = f"{self.run}-{address}-{number}"
                here = self.there(address)
                flying.append(
                    (time.monotonic(), label, work.options(**here).remote(label, SIZE, 1.0))
                )
                continue
            began, label, reference = flying.popleft()

            def end(label: str = label, reference: Any = reference) -> None:
                _, data, again = ray.get(reference, timeout=PATIENCE)
                if again:
                    raise RanTwiceError(label)
                if data != content(label, SIZE):
                    raise CorruptError(label)

            if not self.call("task", address, began, end):
                stop.wait(1.0)

    def actors(self, address: str) -> None:
        counter, count = None, 0
        while not stop.is_set():
            if counter is None:
                counter, count = Counter.options(**self.there(address)).remote(), 0
            count += 1
            began = time.monotonic()

            def end(counter: Any = counter, count: int = count) -> None:
                found = ray.get(counter.add.remote(), timeout=PATIENCE)
                if found != count:
                    raise CorruptError(f"{found} instead of {count}")

            if self.call("actor", address, began, end):
                stop.wait(0.05)
            else:
                counter = None
                stop.wait(1.0)

    def objects(self) -> None:
        """One after another, every way there is."""
        ends = ["", *self.addresses]  # the first one is the driver
        ways = [(a, b) for a in ends for b in ends if (a or self.own) != (b or self.own)]
        number = 0
        while not stop.wait(self.rest if number else 0.0):
            a, b = ways[number % len(ways)]
            number += 1
            label = f"{self.run}-{a}>{b}-{number}"
            wanted = digest(content(label, LARGE))
            began = time.monotonic()

            def end(a: str = a, b: str = b, label: str = label, wanted: str = wanted) -> None:
                if a:
                    data = make.options(**self.there(a)).remote(label, LARGE)
                else:
                    data = ray.put(content(label, LARGE))
                if b:
                    found = digest_of.options(**self.there(b)).remote(data)
                    got = ray.get(found, timeout=PATIENCE)
                else:
                    got = digest(ray.get(data, timeout=PATIENCE))
                if got != wanted:
                    raise CorruptError(label)

            self.call("object", f"{a or 'driver'}>{b or 'driver'}", began, end)

    def watch(self) -> None:
        while not stop.wait(1.0):
            try:
                self.look()
            except Exception as exc:  # the GCS cannot be asked for now
                say({"look_failed": f"{type(exc).__name__}: {exc}"[:300], "now": time.monotonic()})

    def tell(self, over: bool = False) -> None:
        with said:
            counts = {kind: dict(count) for kind, count in self.counts.items()}
            nodes = {address: self.on.get(address, 0) for address in self.addresses}
        line = {"counts": counts, "nodes": nodes, "dead": sorted(self.dead)}
        line["now"] = time.monotonic()
        say({**line, "over": True} if over else line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=3, help="how many nodes there must be")
    parser.add_argument("--rest", type=float, default=1.5, help="seconds between two large objects")
    args = parser.parse_args()
    ray.init(address="auto", logging_level="WARNING", log_to_driver=False)
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # Ray has put its own there
    job = Job(args.nodes, args.rest)
    loops: list[tuple[Callable[..., None], tuple[str, ...]]] = [(job.objects, ()), (job.watch, ())]
    loops += [(loop, (address,)) for loop in (job.tasks, job.actors) for address in job.addresses]
    threads = [threading.Thread(target=loop, args=of, daemon=True) for loop, of in loops]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        job.tell()
        time.sleep(1.0)
    job.look()
    job.tell(over=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
