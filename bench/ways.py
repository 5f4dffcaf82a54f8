"""What a way costs: how long from dialling to the first answer, and a small message there and back,
by each way, with real sshd.

All on loopback: what is measured is what the machines in between and their programs add. Each round
dials every way once, and rounds begin with another way each, so that what else the machine does
falls on all of them alike. As root or not: `python -m bench.ways`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from rayfwd.config import DialConfig, DirectConfig, HeadConfig, MeetConfig
from rayfwd.session.frames import Chunk, Kind, encode
from rayfwd.ssh.carriers import carrier_for
from rayfwd.ssh.meeting import Meeting
from rayfwd.system import unixsocket
from rayfwd.system.passing import Listening
from rayfwd.transport.awaited import Awaited
from rayfwd.transport.carrier import Carrier, Connection
from rayfwd.transport.dialler import Dialler
from rayfwd.transport.pipes import PipeTransport
from tests.unit.real_sshd import RealSshd

ROUNDS, MESSAGES, WARM = 9, 400, 100
MESSAGE = encode(Kind.PING, payload=b"x" * 44)
"""A whole frame, as what a lane begins with: `rayfwd attach` then passes its pipes on."""
TAKEN = b"\0"
"""The hub's word to `rayfwd attach` that it has its pipes."""
IN_VAIN = 60.0
RIDE_THROUGH = 60.0


class Echoed:
    """Owns a pipe, and awaits what comes back."""

    def __init__(self) -> None:
        self.came = asyncio.Event()
        self.over = ""

    def pipe_data(self, data: bytes | memoryview) -> None:
        del data
        self.came.set()

    def deliver(self, chunks: Sequence[Chunk]) -> None:
        del chunks
        self.came.set()

    def pipe_said(self, data: bytes) -> None:
        self.over += data.decode(errors="replace")

    def pipe_writable(self) -> None: ...

    def pipe_lost(self, why: str) -> None:
        self.over += why
        self.came.set()


async def look(way: Carrier) -> tuple[float, list[float]]:
    """Milliseconds from dialling until the first answer, and of the round trips after it."""
    owner = Echoed()
    began = time.perf_counter()
    connection: Connection = await way.dial(asyncio.Event())
    try:
        pipe = await connection.open(owner)
        took: list[float] = []
        first = 0.0
        for number in range(WARM + MESSAGES):
            owner.came.clear()
            sent = time.perf_counter()
            pipe.write([MESSAGE])
            await owner.came.wait()
            assert not owner.over, owner.over
            if number == 0:
                first = time.perf_counter() - began
                await connection.tune()
                pipe.carry(owner.deliver, owner.pipe_writable)
            if number >= WARM:
                took.append(1000 * (time.perf_counter() - sent))
        return 1000 * first, took
    finally:
        connection.abort()
        way.close()


class Hub(asyncio.Protocol):
    """Says again what it hears, over the pipes of `rayfwd attach` where they are passed."""

    def __init__(self, passed: dict[int, list[int]]) -> None:
        self._passed = passed
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        sock = self._transport.get_extra_info("socket")
        if sock is not None and (pipes := self._passed.pop(sock.fileno(), None)) is not None:
            self._transport.write(TAKEN)
            self._transport = PipeTransport(self, *pipes)
        self._transport.write(data)


class HeadDials:
    """A carrier to the worker's side of a way that the head dials: it waits, and the head comes."""

    def __init__(self, dial: DialConfig, waits_at: Path, hub: Path) -> None:
        self._waits = Awaited(waits_at, None)
        carrier = carrier_for(dial.way())
        self._dialler = Dialler(dial, carrier, hub, RIDE_THROUGH, lambda: None)
        self._task: asyncio.Task[None] | None = None

    async def dial(self, urgent: asyncio.Event) -> Connection:
        """From the moment when the head dials."""
        await self._waits.listen()
        self._task = asyncio.create_task(self._dialler.run())
        return await self._waits.dial(urgent)

    def close(self, parked: bool = False) -> None:
        del parked
        self._dialler.close()
        self._waits.end()
        if self._task is not None:
            self._task.cancel()


@asynccontextmanager
async def scene(directory: Path) -> AsyncIterator[dict[str, Callable[[], Carrier]]]:
    """A head, a host between, another worker; each way, made anew each time."""
    head = RealSshd(directory / "head")
    between = RealSshd(directory / "between", "127.0.0.2")
    worker = RealSshd(directory / "worker", "127.0.0.3")
    for sshd in (between, worker):
        sshd.authorize(head.public_key)
    hub = directory / "hub.sock"
    listening = Listening.instead_of(unixsocket.bind(hub))
    server = await asyncio.get_running_loop().create_unix_server(
        lambda: Hub(listening.passed), sock=listening
    )
    for sshd in (head, between, worker):
        # What the user's own files would have a shell do there is no matter here.
        await sshd.start(f"SetEnv HOME={directory}")
    known, plain, by_jump = (directory / name for name in ("known_hosts", "ssh_config", "by_jump"))
    lines = [sshd.known_hosts_line() for sshd in (head, between, worker)]
    known.write_text("".join([*lines, head.known_hosts_line("the-head")]))
    plain.write_text("")
    by_jump.write_text(f"Host {head.address}\n  ProxyJump {between.target}\n")
    common: dict[str, Any] = {
        "identity": head.identity,
        "known_hosts": known,
        "ssh_config": plain,
    }
    changed = asyncio.Event()
    meet = MeetConfig(ssh=between.target, sshd=f"{head.address}:{head.port}", **common)
    meeting = Meeting(meet, RIDE_THROUGH, changed.set)
    task = asyncio.create_task(meeting.run())
    straight = {**common, "ssh": head.target, "socket": hub}
    attach = f"{Path(sys.executable).with_name('rayfwd')} attach --peer --socket {hub}"

    def by_carrier(**keys: Any) -> Carrier:
        return cast(Carrier, carrier_for(HeadConfig(**{**straight, **keys})))

    def dialled(**keys: Any) -> Carrier:
        waits_at = directory / "link.sock"
        there = {**common, "ssh": worker.target, "socket": waits_at, "bulk_lanes": 0}
        return HeadDials(DialConfig(name="w1", **{**there, **keys}), waits_at, hub)

    def direct(**keys: Any) -> Carrier:
        there = {**common, "ssh": worker.target, "attach_command": attach}
        way = DirectConfig(node="w2", **{**there, **keys}).way()
        return cast(Carrier, carrier_for(way))

    made: dict[str, tuple[Callable[..., Carrier], dict[str, Any]]] = {
        "the worker dials": (by_carrier, {}),
        "through a jump host": (by_carrier, {"ssh_config": by_jump}),
        "the head dials": (dialled, {}),
        "both dial a third host": (
            by_carrier,
            {"ssh": f"{head.user}@the-head", "meet": between.target},
        ),
        "a worker dials another worker": (direct, {}),
    }
    try:
        await changed.wait()
        yield {
            f"{name}, {by}": partial(make, **keys, transport=transport)
            for name, (make, keys) in made.items()
            for by, transport in (("AsyncSSH", "asyncssh"), ("the system's `ssh`", "openssh"))
        }
    finally:
        meeting.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for sshd in (worker, between, head):
            await sshd.stop()
        server.close()


async def measure(rounds: int) -> None:
    """Print the table, and how busy the machine was."""
    firsts: defaultdict[str, list[float]] = defaultdict(list)
    trips: defaultdict[str, list[float]] = defaultdict(list)
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as directory:
        async with scene(Path(directory)) as ways:
            names = list(ways)
            for number in range(rounds):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    async with asyncio.timeout(IN_VAIN):
                        first, took = await look(ways[name]())
                    firsts[name].append(first)
                    trips[name].append(statistics.median(took))
                loads.append(os.getloadavg()[0])
    print("| way | from dialling to the first answer | round trip of 64 bytes |\n|---|---|---|")
    for name in names:
        first, trip = statistics.median(firsts[name]), statistics.median(trips[name])
        print(f"| {name} | {first:.0f} ms | {trip:.2f} ms |")
    print(f"Medians of {rounds} rounds; load {min(loads):.1f} to {max(loads):.1f}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asyncio.run(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
