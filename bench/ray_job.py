"""What Ray does between the head and a worker, from a driver on the head; prints one JSON object.

Run by Ray's own Python on a machine of the lab: the standard library and Ray only.
`ray_job.py ADDRESS`: the worker's address in the plan.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LARGE = 300_000_000
MESSAGE = bytes(200)
SECONDS = 3.0


class _Peer:
    def echo(self, data: bytes) -> bytes:
        return data

    def make(self, size: int) -> list[Any]:
        """An object of this node, by reference: it is fetched when it is asked for."""
        return [ray.put(bytes(size))]

    def size(self, data: bytes) -> int:
        return len(data)


def calls(peer: Any, seconds: float) -> list[float]:
    """Seconds of each of a series of calls, one after another."""
    times = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        ray.get(peer.echo.remote(MESSAGE))
        times.append(time.perf_counter() - began)
    return sorted(times)


def rate(peer: Any, seconds: float) -> float:
    """Calls a second, many under way at once."""
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        ray.get([peer.echo.remote(MESSAGE) for _ in range(200)])
        count += 200
    return count / (time.perf_counter() - began)


def fetch(peer: Any, size: int) -> float:
    """MB/s of an object from the worker."""
    (there,) = ray.get(peer.make.remote(size))
    began = time.perf_counter()
    assert len(ray.get(there)) == size
    return size / 1e6 / (time.perf_counter() - began)


def give(peer: Any, size: int) -> float:
    """MB/s of an object to the worker."""
    here = ray.put(bytes(size))
    began = time.perf_counter()
    assert ray.get(peer.size.remote(here)) == size
    return size / 1e6 / (time.perf_counter() - began)


def calls_beside_bulk(peer: Any, other: Any, seconds: float) -> list[float]:
    """The same as `calls` while objects go both ways."""
    stop = threading.Event()

    def bulk() -> None:
        while not stop.is_set():
            fetch(other, LARGE // 10)
            give(other, LARGE // 10)

    thread = threading.Thread(target=bulk)
    thread.start()
    try:
        return calls(peer, seconds)
    finally:
        stop.set()
        thread.join()


def main() -> None:
    ray.init(address="auto", logging_level="WARNING", log_to_driver=False)
    (node,) = (n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == sys.argv[1])
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    remote: Any = ray.remote(num_cpus=0)(_Peer)
    peer, other = (remote.options(scheduling_strategy=there).remote() for _ in range(2))
    calls(peer, 1.0)
    ray.get(other.echo.remote(MESSAGE))
    fetch(peer, LARGE // 10)
    give(peer, LARGE // 10)
    alone = calls(peer, SECONDS)
    at_once = [rate(peer, SECONDS) for _ in range(3)]
    up = [fetch(peer, LARGE) for _ in range(3)]
    down = [give(peer, LARGE) for _ in range(3)]
    beside = calls_beside_bulk(peer, other, 2 * SECONDS)
    found = {
        "call, p50": alone[len(alone) // 2] * 1e6,
        "call, p99": alone[len(alone) * 99 // 100] * 1e6,
        "calls at once": sorted(at_once)[1],
        "object, worker to head": sorted(up)[1],
        "object, head to worker": sorted(down)[1],
        "call beside bulk, p50": beside[len(beside) // 2] * 1e6,
        "call beside bulk, p99": beside[len(beside) * 99 // 100] * 1e6,
    }
    print(json.dumps(found), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
