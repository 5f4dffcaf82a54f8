"""`rayfwd` for a machine that is head and worker of one cluster at once, as no machine is but here.

A daemon takes another one on its machine with the same network for a cluster that is in its way.
And each would open a listener for the other's ports, which are its own.

RAYFWD_BENCH_TURNS names a file: whatever keeps the loop for long is written there (`watch_turns`),
and a head has a Ray that it can report of, with every node of its plan (`show_ray`).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

from rayfwd.cli import main
from rayfwd.daemon.claim import MachineClaim
from rayfwd.network.open_ports import OpenPortsWatch
from rayfwd.ray import dashboard, status_text
from rayfwd.watch import cluster_watch
from rayfwd.watch.cluster_watch import ClusterWatch

TURNS = "RAYFWD_BENCH_TURNS"
COLLECTED = "collected"
"""What stands in that file for Python's collector."""
LONG = 0.002
"""Seconds of processor time from which a callback is written down."""
REPORT_INTERVAL = 30.0
"""Seconds between two looks at the cluster, as `ray.status_interval` has it."""


def take(_self: MachineClaim, _network: str) -> bool:
    """Nobody is in the way."""
    return True


def look(_self: OpenPortsWatch) -> None:
    """Nothing is told."""


class Collector:
    """Python's, as far as it keeps the loop."""

    def __init__(self, out: TextIO) -> None:
        self.spent = 0.0
        """Seconds of processor time, of the loop's thread."""
        self._out = out
        self._began = 0.0

    def __call__(self, phase: str, _: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if phase == "start":
            self._began = time.thread_time()
            return
        spent = time.thread_time() - self._began
        self.spent += spent
        if spent >= LONG:
            self._out.write(f"{time.time():.3f} {1000 * spent:.2f} {COLLECTED}\n")


def watch_turns(path: Path) -> None:
    """Write down each callback that computes for long: when it ended, its milliseconds, its name.

    Its processor time counts, and not what it had to wait for while others had the processor. What
    Python's collector took in it is written down for itself.
    """
    run = asyncio.Handle._run
    out = path.open("a", buffering=1)
    collector = Collector(out)
    gc.callbacks.append(collector)

    def timed(self: Any) -> None:
        began, before, callback = time.thread_time(), collector.spent, self._callback
        run(self)
        spent = time.thread_time() - began - (collector.spent - before)
        if spent >= LONG:
            out.write(f"{time.time():.3f} {1000 * spent:.2f} {name_of(callback)}\n")

    asyncio.Handle._run = timed  # type: ignore[method-assign]


def name_of(callback: Any) -> str:
    """Of a task's turn its name and where it is; of another callback what it is."""
    task = getattr(callback, "__self__", None)
    if not isinstance(task, asyncio.Task):
        return repr(callback)
    return f"{task.get_name()}: {task.get_coro()!r}"


def show_ray() -> None:
    """The head looks at a Ray in which every node of the plan is alive, and has a GPU or eight."""
    cluster_watch.find = find  # type: ignore[attr-defined, assignment]
    status_text.ask = ask  # type: ignore[assignment]
    ClusterWatch.run = look_again  # type: ignore[method-assign]


async def find(*_: object) -> Any:
    return SimpleNamespace(command="ray")


async def ask(*_: object) -> status_text.RayStatus:
    totals = {"CPU": (0.0, 64000.0), "GPU": (0.0, 8000.0), "memory": (0.0, 1e15)}
    return status_text.RayStatus(time.time(), totals, (), 0, 0)


def table(watch: ClusterWatch) -> bytes:
    """What the dashboard answers."""
    rows = [
        {
            "node_id": plan.name.rjust(56, "0"),
            "node_ip": plan.address,
            "is_head_node": plan.role == "head",
            "state": "ALIVE",
            "node_name": plan.address,
            "resources_total": {
                "CPU": 64.0,
                "GPU": 8.0,
                "memory": 5.4e11,
                "object_store_memory": 2e11,
                "accelerator_type:H100": 1.0,
                f"node:{plan.address}": 1.0,
            },
            "labels": {"ray.io/node_id": plan.name.rjust(56, "0")},
            "start_time_ms": 1_790_000_000_000,
            "end_time_ms": 0,
            "state_message": None,
        }
        for plan in watch._owner.view.nodes
    ]
    return json.dumps({"result": True, "data": {"result": {"result": rows}}}).encode()


def given(answer: bytes, *_: object) -> bytes:
    return answer


async def look_again(self: ClusterWatch) -> None:
    while True:
        await asyncio.sleep(REPORT_INTERVAL)
        answer = await asyncio.to_thread(table, self)
        dashboard.get = partial(given, answer)
        await self._scan()


if __name__ == "__main__":
    MachineClaim.take = take  # type: ignore[method-assign, assignment]
    OpenPortsWatch.look = look  # type: ignore[method-assign, assignment]
    if TURNS in os.environ:
        watch_turns(Path(os.environ[TURNS]))
        show_ray()
    sys.exit(main(sys.argv[1:]))
