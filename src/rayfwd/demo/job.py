"""The job of the demo, run with Ray's own Python as a driver on the head: a training on both
machines, and steady work beside it.

Usage: python job.py WORKER_ADDRESS STOP_FILE. Prints one JSON object a line: `nodes`, `object`,
`actor`, `working`, `progress` every half second, `finished`. It works until STOP_FILE exists, then
finishes what is in flight. Nothing is ever tried again by Ray: a task that is lost fails the job.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

BIG = 50_000_000
"""Bytes of the two objects at the start."""
MEDIUM = 4_000_000
"""Bytes of the objects of the steady work."""
SHORT = 0.25
LONG = 4.0
"""Seconds that a task takes."""
CALL = 0.1
"""Seconds that an actor's call or an exchange of objects takes, beside its work."""

ROWS = 500
"""Rows that each machine trains on."""
RATE = 0.2
"""How far a step of the training goes."""

NO_SECOND_TRY = {"max_retries": 0}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def measure(data: bytes) -> tuple[str, str]:
    """What arrived here, and where."""
    return socket.gethostname(), digest(data)


def produce(size: int) -> tuple[str, str, bytes]:
    data = os.urandom(size)
    return socket.gethostname(), digest(data), data


def exchange(data: bytes, size: int) -> tuple[str, str, str, bytes]:
    """The digest of what came, and something else to take home, with its digest."""
    time.sleep(CALL)
    return (*measure(data), *produce(size)[1:])


def work(number: int, seconds: float) -> tuple[str, int]:
    time.sleep(seconds)
    return socket.gethostname(), number * number


class Tally:
    """An actor: every call must reach it once."""

    def __init__(self) -> None:
        self._calls = 0

    def add(self) -> tuple[int, int]:
        self._calls += 1
        time.sleep(CALL)
        return self._calls, os.getpid()


class Rank:
    """One half of a data-parallel training: a line through the rows of this machine."""

    def __init__(self, number: int) -> None:
        """The rows follow from the number, so that the same training can be done elsewhere."""
        rows = random.Random(number)
        self._rows = [
            (x := rows.gauss(0, 1), 3.0 * x - 1.0 + rows.gauss(0, 0.1)) for _ in range(ROWS)
        ]

    def gradient(self, weights: tuple[float, float]) -> tuple[float, float, float]:
        """Of this machine's rows; the last is their loss."""
        slope, offset = weights
        errors = [(slope * x + offset - y, x) for x, y in self._rows]
        loss = sum(e * e for e, _ in errors) / ROWS
        return 2 * sum(e * x for e, x in errors) / ROWS, 2 * sum(e for e, _ in errors) / ROWS, loss

    def step(
        self, weights: tuple[float, float], other: tuple[float, float, float]
    ) -> tuple[float, float, float]:
        """The weights after a step by both gradients, and the loss before it."""
        own = self.gradient(weights)
        slope, offset, loss = ((a + b) / 2 for a, b in zip(own, other, strict=True))
        return weights[0] - RATE * slope, weights[1] - RATE * offset, loss


START = (0.0, 0.0)


def trained_alone(steps: int) -> tuple[float, float, float]:
    """The same training in this process."""
    near, far = Rank(1), Rank(2)
    weights, loss = START, 0.0
    for _ in range(steps):
        slope, offset, loss = far.step(weights, near.gradient(weights))
        weights = slope, offset
    return (*weights, loss)


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


class Work:
    """The steady work: of every kind one thing in flight, its result checked, then the next."""

    def __init__(self, places: dict[str, Any], tally: Any, ranks: tuple[Any, Any]) -> None:
        """`ranks` of the training: on the head, and on the worker."""
        self.done = {"head": 0, "worker": 0, "actor": 0, "exchange": 0, "training": 0}
        self.failed: list[str] = []
        self.calls = 0
        self.actor_pids: set[int] = set()
        self._number = 0
        self._tally = tally
        self._near, self._far = ranks
        self.weights, self.losses = START, list[float]()
        self._flying: dict[Any, tuple[Callable[[], Any], Callable[[Any], str | None], str]] = {}
        function = ray.remote(**NO_SECOND_TRY)(work)
        self._work = {
            name: function.options(scheduling_strategy=place) for name, place in places.items()
        }
        # Beside the CPU that the short tasks take.
        at_worker = {"scheduling_strategy": places["worker"], "num_cpus": 0}
        self._long = function.options(**at_worker)
        self._exchange = ray.remote(**NO_SECOND_TRY)(exchange).options(**at_worker)

    def begin(self) -> None:
        self._task("head", self._work["head"], SHORT)
        self._task("worker", self._work["worker"], SHORT)
        self._task("worker", self._long, LONG)
        self._call()
        self._swap()
        self._train()

    def step(self, more: bool) -> None:
        """Wait for one result or a moment, check it, and begin the next of its kind."""
        ready, _ = ray.wait(list(self._flying), timeout=0.2)
        for ref in ready:
            again, check, kind = self._flying.pop(ref)
            try:
                wrong = check(ray.get(ref))
            except Exception as exc:  # whatever it is, it is a task that Ray lost or that failed
                wrong = f"{type(exc).__name__}: {str(exc).splitlines()[0]}"
            if wrong is None:
                self.done[kind] += 1
            else:
                self.failed.append(f"{kind}: {wrong}")
            del ref
            if more:
                again()

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    def _fly(
        self, ref: Any, again: Callable[[], Any], check: Callable[[Any], str | None], kind: str
    ) -> None:
        self._flying[ref] = (again, check, kind)

    def _task(self, place: str, function: Any, seconds: float) -> None:
        self._number += 1
        expected = (place, self._number**2)

        def check(result: Any) -> str | None:
            return None if tuple(result) == expected else f"{result}, not {expected}"

        again = lambda: self._task(place, function, seconds)  # noqa: E731
        self._fly(function.remote(self._number, seconds), again, check, place)

    def _call(self) -> None:
        self.calls += 1
        expected = self.calls

        def check(result: Any) -> str | None:
            count, pid = result
            self.actor_pids.add(pid)
            return None if count == expected else f"call {expected} was its call {count}"

        self._fly(self._tally.add.remote(), self._call, check, "actor")

    def _train(self) -> None:
        """A step: each machine's gradient, brought together on the worker."""

        def check(result: Any) -> str | None:
            slope, offset, loss = result
            self.weights = slope, offset
            self.losses.append(loss)
            return None

        ref = self._far.step.remote(self.weights, self._near.gradient.remote(self.weights))
        self._fly(ref, self._train, check, "training")

    @property
    def training(self) -> dict[str, Any]:
        """How the training went, and whether it is the one of a single process."""
        steps = len(self.losses)
        alone = trained_alone(steps)
        same = (*self.weights, self.losses[-1]) == alone
        return {"steps": steps, "first": self.losses[0], "last": self.losses[-1], "same": same}

    def _swap(self) -> None:
        data = os.urandom(MEDIUM)
        sent = digest(data)

        def check(result: Any) -> str | None:
            place, arrived, expected, back = result
            same = (place, arrived, len(back)) == ("worker", sent, MEDIUM)
            return None if same and digest(back) == expected else "other bytes arrived"

        self._fly(self._exchange.remote(ray.put(data), MEDIUM), self._swap, check, "exchange")


def main() -> int:
    worker_address, stop_file = sys.argv[1], Path(sys.argv[2])
    ray.init(address="auto", log_to_driver=False, logging_level="warning")
    places = find_places(worker_address)
    send_objects({"scheduling_strategy": places["worker"], **NO_SECOND_TRY})
    once = {"max_restarts": 0, "max_task_retries": 0, "num_cpus": 0}
    tally = ray.remote(Tally).options(scheduling_strategy=places["worker"], **once).remote()
    rank = ray.remote(Rank)
    ranks = [
        rank.options(scheduling_strategy=places[place], **once).remote(number)
        for number, place in enumerate(("head", "worker"), 1)
    ]
    steady = Work(places, tally, (ranks[0], ranks[1]))
    work_until(stop_file, steady)
    say(
        "finished",
        done=steady.done,
        failed=steady.failed,
        training=None if steady.failed else steady.training,
        actor_processes=len(steady.actor_pids),
        bytes=2 * BIG + 2 * MEDIUM * steady.done["exchange"],
    )
    ray.shutdown()
    return 1 if steady.failed else 0


def find_places(worker_address: str) -> dict[str, Any]:
    """How a task is sent to the head and to the worker; both are said."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    say(
        "nodes",
        nodes=[
            {
                "host": node["NodeManagerHostname"],
                "address": node["NodeManagerAddress"],
                "cpus": node["Resources"].get("CPU", 0),
            }
            for node in alive
        ],
    )
    places = {}
    for node in alive:
        name = "worker" if node["NodeManagerAddress"] == worker_address else "head"
        places[name] = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return places


def send_objects(at_worker: dict[str, Any]) -> None:
    """A large object each way; how long it took is said."""
    # To a new process, so that what is timed is not its start.
    ray.get(ray.remote(measure).options(**at_worker).remote(b""))

    data = os.urandom(BIG)
    began = time.monotonic()
    host, arrived = ray.get(ray.remote(measure).options(**at_worker).remote(ray.put(data)))
    seconds = time.monotonic() - began
    same = (host, arrived) == ("worker", digest(data))
    say("object", way="head to worker", bytes=BIG, seconds=seconds, same=same)

    began = time.monotonic()
    host, expected, data = ray.get(ray.remote(produce).options(**at_worker).remote(BIG))
    seconds = time.monotonic() - began
    same = (host, expected, len(data)) == ("worker", digest(data), BIG)
    say("object", way="worker to head", bytes=BIG, seconds=seconds, same=same)


def work_until(stop_file: Path, steady: Work) -> None:
    """Calls one after another until that file is there, or one fails; then those under way."""
    steady.begin()
    last = 0.0
    while not stop_file.exists() and not steady.failed:
        steady.step(more=True)
        if time.monotonic() - last >= 0.5:
            last = time.monotonic()
            say("progress", done=steady.done, in_flight=steady.in_flight)
    while steady.in_flight and not steady.failed:
        steady.step(more=False)


if __name__ == "__main__":
    sys.exit(main())
