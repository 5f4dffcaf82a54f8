"""A program on a machine that is no node: Ray Client, over a link that is cut while it is at work.

Run by Ray's Python with RAY_ADDRESS set. It prints `begun`, waits for a file, and then what came
of calls that were under way: as JSON, in one line.
"""

from __future__ import annotations

import json
import os
import sys
import time

import ray


class _Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


def _slow(path: str) -> int:
    """Goes on until the head's file is there."""
    while not os.path.exists(path):
        time.sleep(0.1)
    return 42


def _double(data: bytes) -> bytes:
    return data + data


Counter = ray.remote(max_restarts=0, max_task_retries=0)(_Counter)
slow = ray.remote(max_retries=0)(_slow)
double = ray.remote(max_retries=0)(_double)


def main(go_on: str, here: str) -> None:
    ray.init()
    counter = Counter.remote()
    counts = [ray.get(counter.add.remote())]
    waits = slow.remote(go_on)
    data = os.urandom(5_000_000)
    print("begun", flush=True)
    while not os.path.exists(here):  # the link is cut now, and these calls are made over it
        time.sleep(0.05)
    print("calling", flush=True)
    counts += [ray.get(counter.add.remote()) for _ in range(20)]
    whole = ray.get(double.remote(data)) == data + data
    print(json.dumps({"counts": counts, "whole": whole, "slow": ray.get(waits)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
