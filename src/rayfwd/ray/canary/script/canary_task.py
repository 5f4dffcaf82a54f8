"""The canary itself: a driver that pins a tiny task to each node and sends 1 MB there and back.

Run by the Python that has Ray (2.9 to 2.60), with nothing but Ray and the standard library.
Standard input: a JSON line `{gcs, own, timeout, nodes: [node_id, ...]}`; it stays open, and its end
ends this process. Standard output: JSON lines that begin with `{"canary": `, flushed one by one, so
that what was found is known even if the rest hangs:

    {"canary": "connected", "seconds": ...}
    {"canary": "stage", "node": id, "stage": "task" | "to" | "from", "ok": ..., "seconds": ...,
     "error": ...}
    {"canary": "cost", "cpu": ..., "memory": ..., "workers_cpu": ..., "workers_memory": ...}

`task` runs on the node at all; `to` has it take an object of this driver's node; `from` has it make
one and this node fetch it. Exit code 0 if it got to the end, whatever it found.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
import zlib
from typing import Any

SIZE = 1000000
SHARE = {"task": 0.5, "to": 0.25, "from": 0.25}
"""Parts of the time-out that a stage may take."""


def emit(what: str, **fields: Any) -> None:
    line = json.dumps({"canary": what, **fields})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def end_with_input() -> None:
    """The daemon has gone: nobody will read what we find, and nobody would end us."""
    sys.stdin.read()
    os._exit(9)


def used() -> tuple[float, int]:
    """CPU seconds and bytes of memory (at most so far) of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


# None of the three that nodes run may lean on this module: it is not there on the other machines.


def beat() -> None:
    return None


def take(data: bytes) -> int:
    import zlib

    return zlib.crc32(data)


def give(size: int) -> Any:
    import os
    import resource
    import zlib

    data = os.urandom(size)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cost = (usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
    return data, zlib.crc32(data), cost


class Canary:
    """What is under way at each node, and what it has cost there."""

    def __init__(self, ray: Any, timeout: float) -> None:
        self._ray = ray
        self._timeout = timeout
        remote = ray.remote(num_cpus=0, max_retries=0)
        self._functions = {"task": remote(beat), "to": remote(take), "from": remote(give)}
        data = os.urandom(SIZE)
        self._sum = zlib.crc32(data)
        self._there = ray.put(data)
        self._pending: dict[Any, tuple[str, str, float]] = {}
        self.costs: list[tuple[float, int]] = []

    def run(self, nodes: list[str]) -> None:
        """Every stage at every node, until all is over."""
        for node in nodes:
            self._submit(node, "task")
        while self._pending:
            ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=0.25)
            for ref in ready:
                node, stage, since = self._pending.pop(ref)
                self._over(node, stage, since, self._check(stage, ref))
            now = time.monotonic()
            for ref, (node, stage, since) in list(self._pending.items()):
                if now - since > SHARE[stage] * self._timeout:
                    del self._pending[ref]
                    self._over(node, stage, since, f"not done in {now - since:.0f} s")

    def _submit(self, node: str, stage: str) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        pinned = self._functions[stage].options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        )
        arguments: Any = {"task": (), "to": (self._there,), "from": (SIZE,)}[stage]
        self._pending[pinned.remote(*arguments)] = (node, stage, time.monotonic())

    def _check(self, stage: str, ref: Any) -> str | None:
        """What is wrong with the result; None: nothing."""
        try:
            result = self._ray.get(ref, timeout=5)
        except Exception as exc:
            lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
            return f"{type(exc).__name__}: {' '.join(lines)[-600:]}"
        if stage == "to" and result != self._sum:
            return "the object arrived changed"
        if stage == "from":
            self.costs.append(result[2])
            if zlib.crc32(result[0]) != result[1]:
                return "the object arrived changed"
        return None

    def _over(self, node: str, stage: str, since: float, error: str | None) -> None:
        seconds = round(time.monotonic() - since, 3)
        emit("stage", node=node, stage=stage, ok=error is None, seconds=seconds, error=error)
        if stage == "task" and error is None:
            self._submit(node, "to")
        elif stage == "to":
            self._submit(node, "from")


def main() -> None:
    spec = json.loads(sys.stdin.readline())
    timeout = spec["timeout"]
    # The last resort: no handler runs, so nothing of Ray's can hold it up.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 10)
    threading.Thread(target=end_with_input, daemon=True).start()
    began = time.monotonic()

    import ray

    ray.init(
        address=spec["gcs"],
        _node_ip_address=spec["own"],
        namespace="rayfwd-canary",
        log_to_driver=False,
        logging_level="ERROR",
    )
    emit("connected", seconds=round(time.monotonic() - began, 3))
    canary = Canary(ray, timeout)
    canary.run(spec["nodes"])
    cpu, memory = used()
    emit(
        "cost",
        cpu=round(cpu, 2),
        memory=memory,
        workers_cpu=round(sum(c for c, _ in canary.costs), 2),
        workers_memory=sum(m for _, m in canary.costs),
    )
    ray.shutdown()


main()
