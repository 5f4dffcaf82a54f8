"""Many workers in one process: sessions of two lanes each at a real hub, the SSH left out.

`python -m bench.many SOCKET PORT LINKS STREAMS`: LINKS workers with STREAMS streams in all, opened
to an echo server of this process at PORT, which the head is to expose. Prints `ready` when all have
echoed; then each line read from stdin, a number of seconds, lets every stream send 200 bytes again
whenever they came back, for that long, and prints how many did. Ends with stdin.

With STREAMS 0 all workers join at once, and what is printed is `ready`, the seconds until the last
one knew all the others, and the bytes of messages that the first one was told by then. For each
line read from stdin one more joins and leaves again, and the bytes and messages are printed that
the first one was told of each.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

from rayfwd.session import messages
from rayfwd.session.frames import MAX_PAYLOAD, Chunk, Kind, first_frame
from rayfwd.session.handshake import CHANGES, OVERLAY, Hello, Welcome
from rayfwd.session.lane import LaneClass
from rayfwd.session.messages import Message
from rayfwd.session.session import Limits, Session
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Target
from rayfwd.transport.mux import Mux, MuxStream
from rayfwd.transport.writev import write

MESSAGE = bytes(200)
AT_ONCE = 32
"""Workers that dial in the same moment, so that no connection of theirs is one too many."""


class Lane(asyncio.Protocol):
    """A lane over the hub's socket, as a worker has it."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self.paused = False
        self.leaves = False
        """It is closed from here."""
        self._buffer = bytearray()
        self._mux: Mux | None = None
        self._number = 0
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._mux is not None:
            self._mux.lane_data(self._number, data)
            return
        self._buffer += data
        frame = first_frame(self._buffer, MAX_PAYLOAD)
        if frame is not None:
            assert frame.kind is Kind.WELCOME, bytes(frame.payload)
            self.answer.set_result(Welcome.decode(frame))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.leaves:
            sys.exit(f"the hub closed a lane: {exc}")

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._mux is not None:
            self._mux.flush()

    def join(self, mux: Mux, lane_class: LaneClass) -> None:
        self._mux = mux
        self._number = mux.add_lane(self, lane_class)
        if self._buffer:
            mux.lane_data(self._number, bytes(self._buffer))

    def write(self, chunks: Sequence[Chunk]) -> None:
        write(self._transport, chunks)

    def close(self) -> None:
        self._transport.close()

    def abort(self, why: str) -> None:
        sys.exit(f"a lane was given up: {why}")


class Caller:
    """A stream to the echo server."""

    until = 0.0
    echoes = 0

    def __init__(self) -> None:
        self.stream: MuxStream | None = None
        self.first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._came = 0

    def stream_data(self, chunks: Sequence[Chunk]) -> None:
        assert self.stream is not None
        size = sum(map(len, chunks))
        self._came += size
        self.stream.consumed(size)
        if self._came >= len(MESSAGE):
            self._came = 0
            Caller.echoes += 1
            if not self.first.done():
                self.first.set_result(None)
            if time.monotonic() < Caller.until:
                self.stream.send(MESSAGE)

    def stream_lost(self, reason: ResetReason, text: str) -> None:
        sys.exit(f"a stream was reset: {reason} {text}")

    def stream_ended(self) -> None: ...

    def stream_writable(self) -> None: ...

    def stream_finished(self) -> None: ...


class Echo(asyncio.Protocol):
    """A connection of the echo server."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


def cache_of(decode: Callable[[bytes], Message | None]) -> Callable[[bytes], Message | None]:
    return lru_cache(maxsize=16)(decode)


class Told:
    """What a worker is told of the others; `all_there` is set when it knows so many nodes.

    `counts`: it counts the bytes, too, for which all is encoded once more.
    """

    def __init__(self, nodes: int = 0, counts: bool = False) -> None:
        self._counts = counts
        self.all_there = asyncio.Event()
        self.more = asyncio.Event()
        self._nodes = nodes
        self.names: set[str] = set()
        self.bytes = 0
        self.messages = 0

    def __call__(self, message: Message) -> None:
        if self._counts and not isinstance(message, messages.Cluster):
            self.bytes += len(messages.encode(message))
            self.messages += 1
        self.more.set()
        if isinstance(message, messages.NodesChanged):
            self.names -= set(message.gone)
        if isinstance(message, messages.Nodes | messages.NodesChanged):
            self.names |= {node["name"] for node in message.nodes}
            if len(self.names) >= self._nodes:
                self.all_there.set()


async def link(
    path: str, number: int, told: Told, overlay: bool = False, ephemeral: bool = False
) -> tuple[Mux, str]:
    """A worker's session with its two lanes, and the head's address."""
    loop = asyncio.get_running_loop()
    hello = Hello(
        node=f"m{number}",
        key=f"the key of m{number}".ljust(32, "."),
        session=f"{time.time_ns():x}",
        resumes=False,
        lane=LaneClass.INTERACTIVE,
        version="0",
        worker_ports=8,
        features=frozenset({CHANGES, OVERLAY} if overlay else {CHANGES}),
        ephemeral=ephemeral,
    )
    _, lane = await loop.create_unix_connection(Lane, path)
    lane.write([hello.encode()])
    welcome = await lane.answer
    core = Session("worker", welcome.ride_through, Limits(), loop.time())
    mux = Mux(core, lambda *_: None, told, lambda _: None)
    lane.join(mux, LaneClass.INTERACTIVE)
    _, lane = await loop.create_unix_connection(Lane, path)
    lane.write([replace(hello, resumes=True, lane=LaneClass.BULK).encode()])
    await lane.answer
    lane.join(mux, LaneClass.BULK)
    return mux, str(welcome.nodes[0]["address"])


async def join_at_once(path: str, links: int) -> list[Mux]:
    """All workers, and how long that took until each of them knew all."""
    began, turns = time.monotonic(), asyncio.Semaphore(AT_ONCE)
    told = [Told(links + 1, counts=not number) for number in range(links)]  # the head is a node

    async def join(number: int) -> Mux:
        async with turns:
            return (await link(path, number, told[number], overlay=True))[0]

    muxes = await asyncio.gather(*map(join, range(links)))
    for each in told:
        await each.all_there.wait()
    print("ready", time.monotonic() - began, told[0].bytes, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        await join_and_leave(path, links, told[0])
    return muxes


async def join_and_leave(path: str, number: int, first: Told) -> None:
    """One more, which leaves for good when the first worker has heard of it."""
    name, counts = f"m{number}", []
    for there in (True, False):
        before = first.bytes, first.messages
        if there:
            mux, _ = await link(path, number, Told(), overlay=True, ephemeral=True)
        else:
            for lane in mux.lanes.values():
                cast(Lane, lane.transport).leaves = True
            mux.close("it leaves")
        while (name in first.names) is not there:
            first.more.clear()
            await first.more.wait()
        counts += [first.bytes - before[0], first.messages - before[1]]
    print(*counts, flush=True)


async def main() -> None:
    # As many sessions as there are workers read the same report here, which one machine reads once.
    messages.decode = cache_of(messages.decode)  # type: ignore[assignment]
    path, port, links, streams = sys.argv[1], *map(int, sys.argv[2:])
    loop = asyncio.get_running_loop()
    if not streams:
        joined = await join_at_once(path, links)
        os._exit(len(joined) != links)
    server = await loop.create_server(Echo, "127.0.0.1", port, backlog=1024)
    callers: list[Caller] = []
    kept: list[Mux] = []
    for number in range(links):
        mux, head = await link(path, number, Told())
        kept.append(mux)
        target = Target(head, port).encode()
        fresh = [Caller() for _ in range(streams // links)]
        for caller in fresh:
            caller.stream = mux.open(target, caller)
            caller.stream.send(MESSAGE)
        await asyncio.gather(*(caller.first for caller in fresh))
        callers += fresh
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        Caller.echoes, Caller.until = 0, time.monotonic() + float(line)
        for caller in callers:
            assert caller.stream is not None
            caller.stream.send(MESSAGE)
        await asyncio.sleep(float(line))
        print(Caller.echoes, flush=True)
    server.close()
    os._exit(0)  # 4,000 streams need no farewell


if __name__ == "__main__":
    asyncio.run(main())
