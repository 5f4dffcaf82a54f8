"""A restart of either side costs no connection: real hub, sessions, doors and sockets.

The process that comes after is the same one here; what it gets comes out of a parcel all the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rayfwd import parcel
from rayfwd.daemon import handover
from rayfwd.doors import Dialer, Doors, Pump, Target
from rayfwd.hub import Hub
from rayfwd.mux import Mux
from rayfwd.session.session import Limits, Session
from rayfwd.session.snapshot import Tree
from tests.unit.cluster import (
    BULK,
    INTERACTIVE,
    Cluster,
    Worker,
    cluster,
    echo,
    free_place,
    goodbye,
    serving,
)
from tests.unit.loops import run

PATHS = ["w1>head", "head>w1", "w1>w2"]


class HeadHolder:
    """The test's head as a daemon hands it over."""

    def __init__(self, doors: Doors, dialer: Dialer, hub: Hub) -> None:
        self.doors, self.dialer, self.hub = doors, dialer, hub

    def muxes(self) -> dict[str, Mux]:
        return {name: node.mux for name, node in self.hub.nodes.items() if node.mux is not None}

    def waiting(self) -> list[tuple[Target, Pump]]:
        return self.hub.waiting

    def stop_accepting(self) -> socket.socket | None:
        return self.hub.stop_accepting()

    def hand_over(self) -> Tree:
        return {"splices": self.hub.splices(), "nodes": self.hub.hand_over()}

    def take_over(self, tree: Tree) -> None:
        for each in tree["nodes"]:
            self.hub.take_over(each)

    def take_over_splices(self, tree: Tree) -> None:
        for each in tree["splices"]:
            self.hub.splice(each)


class WorkerHolder:
    """A worker of the test's."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.doors, self.dialer = worker, worker.doors, worker.dialer

    def muxes(self) -> dict[str, Mux]:
        return {} if self.worker.mux is None else {"head": self.worker.mux}

    def waiting(self) -> list[tuple[Target, Pump]]:
        return []

    def stop_accepting(self) -> socket.socket | None:
        return None

    def hand_over(self) -> Tree:
        assert self.worker.mux is not None
        return {"core": self.worker.mux.stop()}

    def take_over(self, tree: Tree) -> None:
        worker = self.worker
        core = Session.restored(tree["core"], asyncio.get_running_loop().time())
        worker.mux = Mux(core, worker._accept, worker.messages.append, worker.changes.append)
        worker.mux.flush()

    def take_over_splices(self, tree: Tree) -> None: ...


async def carry(holder: handover.Holder) -> handover.Arrival:
    """What the process that comes after finds."""
    left = await handover.leave(holder, "worker", "w1")
    with left.parcel, left.other_end:
        unpacked = parcel.unpack(left.parcel)
    assert unpacked is not None
    return handover.opened(*unpacked, "worker", "w1")


async def restart_head(c: Cluster) -> None:
    old = HeadHolder(c.doors, c.dialer, c.hub)
    wanted = dict(c.doors._wanted)
    arrival = await carry(old)
    await old.dialer.close()
    again = Cluster(c.hub.path.parent, c.limits)
    c.hub, c.doors, c.dialer = again.hub, again.doors, again.dialer
    c.doors.inherit(arrival.doors())
    listening = arrival.listening()
    await arrival.take_over(HeadHolder(c.doors, c.dialer, c.hub))
    c.doors.set_wanted(wanted)
    c._tasks.append(asyncio.create_task(c.doors.run()))
    await c.hub.start(listening)
    for worker in c.workers.values():
        worker.lanes.clear()
        await worker.connect(INTERACTIVE)
        await worker.connect(BULK)


async def restart_worker(c: Cluster, name: str) -> None:
    old = c.workers[name]
    wanted = dict(old.doors._wanted)
    arrival = await carry(WorkerHolder(old))
    await old.dialer.close()
    worker = c.workers[name] = Worker(name, c.hub.path, c.limits)
    worker.hello = old.hello
    worker.doors.inherit(arrival.doors())
    await arrival.take_over(WorkerHolder(worker))
    worker.doors.set_wanted(wanted)
    c._tasks.append(asyncio.create_task(worker.doors.run()))
    await worker.connect(INTERACTIVE)
    await worker.connect(BULK)


async def restart(c: Cluster, who: str) -> None:
    await (restart_head(c) if who == "head" else restart_worker(c, who))


@asynccontextmanager
async def echoing(c: Cluster, path: str) -> AsyncIterator[Target]:
    """Where a client dials to reach an echo server by `path`."""
    near, _, far = path.partition(">")
    place = Target(c.address_of(far), free_place().port)
    listen = await c.door(near, place)
    async with serving(echo, place):
        yield listen


async def converse(listen: Target, seed: int, size: int, done: list[int]) -> None:
    """Send `size` bytes and their end, read as many back, at a pace that changes."""
    chance = random.Random(seed)
    sent, got = hashlib.sha256(), hashlib.sha256()
    reader, writer = await asyncio.open_connection(*listen, limit=1 << 14)

    async def write() -> None:
        left = size
        while left:
            data = chance.randbytes(min(left, chance.choice((1, 100, 5000, 100_000))))
            left -= len(data)
            sent.update(data)
            writer.write(data)
            await writer.drain()
            if chance.random() < 0.2:
                await asyncio.sleep(0.005)
        writer.write_eof()

    async def read() -> int:
        count = 0
        while data := await reader.read(chance.choice((100, 1 << 14))):
            got.update(data)
            count += len(data)
            if chance.random() < 0.02:
                await asyncio.sleep(0.02)
        return count

    _, count = await asyncio.gather(write(), read())
    assert count == size
    assert got.digest() == sent.digest()
    done.append(seed)
    await goodbye(writer)


TIGHT = Limits(window=1 << 15, window_ceiling=1 << 18, stream_buffer=1 << 15)


@pytest.mark.parametrize("who", ["head", "w1"])
@pytest.mark.parametrize("limits", [Limits(), TIGHT], ids=["roomy", "tight"])
def test_streams_go_on_through_restarts(tmp_path: Path, who: str, limits: Limits) -> None:
    """On every path, at whatever moment: every byte comes out, once, and in order."""

    async def main() -> None:
        done: list[int] = []
        async with cluster(tmp_path, "w1", "w2", limits=limits) as c:
            async with (
                echoing(c, PATHS[0]) as first,
                echoing(c, PATHS[1]) as second,
                echoing(c, PATHS[2]) as third,
                asyncio.TaskGroup() as group,
            ):
                talks = [
                    group.create_task(converse(listen, seed, 3_000_000, done))
                    for seed, listen in enumerate((first, second, third) * 3)
                ]
                restarts = 0
                while not all(talk.done() for talk in talks):
                    await asyncio.sleep(0.03 * (1 + restarts % 4))
                    await restart(c, who)
                    restarts += 1
                assert restarts > 3
            assert len(done) == 9

    run(main, 60)
