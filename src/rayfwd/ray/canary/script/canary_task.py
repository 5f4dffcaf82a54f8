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


def main() -> None:
    spec = json.loads(sys.stdin.readline())
    timeout = spec["timeout"]
    # The last resort: no handler runs, so nothing of Ray's can hold it up.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 10)
    threading.Thread(target=end_with_input, daemon=True).start()
    began = time.monotonic()

    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(
        address=spec["gcs"],
        _node_ip_address=spec["own"],
        namespace="rayfwd-canary",
        log_to_driver=False,
        logging_level="ERROR",
    )
    emit("connected", seconds=round(time.monotonic() - began, 3))

    # Neither of the functions may lean on this module: it is not there on the other machines.
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

    remote = ray.remote(num_cpus=0, max_retries=0)
    functions = {"task": remote(beat), "to": remote(take), "from": remote(give)}
    data = os.urandom(SIZE)
    sum_of_data = zlib.crc32(data)
    there = ray.put(data)
    pending: dict[Any, tuple[str, str, float]] = {}
    costs: list[tuple[float, int]] = []

    def submit(node: str, stage: str) -> None:
        pinned = functions[stage].options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        )
        arguments: Any = {"task": (), "to": (there,), "from": (SIZE,)}[stage]
        pending[pinned.remote(*arguments)] = (node, stage, time.monotonic())

    def check(stage: str, ref: Any) -> str | None:
        """What is wrong with the result; None: nothing."""
        try:
            result = ray.get(ref, timeout=5)
        except Exception as exc:
            lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
            return f"{type(exc).__name__}: {' '.join(lines)[-600:]}"
        if stage == "to" and result != sum_of_data:
            return "the object arrived changed"
        if stage == "from":
            costs.append(result[2])
            if zlib.crc32(result[0]) != result[1]:
                return "the object arrived changed"
        return None

    def over(node: str, stage: str, since: float, error: str | None) -> None:
        seconds = round(time.monotonic() - since, 3)
        emit("stage", node=node, stage=stage, ok=error is None, seconds=seconds, error=error)
        if stage == "task" and error is None:
            submit(node, "to")
        elif stage == "to":
            submit(node, "from")

    for node in spec["nodes"]:
        submit(node, "task")
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=0.25)
        for ref in ready:
            node, stage, since = pending.pop(ref)
            over(node, stage, since, check(stage, ref))
        now = time.monotonic()
        for ref, (node, stage, since) in list(pending.items()):
            if now - since > SHARE[stage] * timeout:
                del pending[ref]
                over(node, stage, since, f"not done in {now - since:.0f} s")
    cpu, memory = used()
    emit(
        "cost",
        cpu=round(cpu, 2),
        memory=memory,
        workers_cpu=round(sum(c for c, _ in costs), 2),
        workers_memory=sum(m for _, m in costs),
    )
    ray.shutdown()


main()
