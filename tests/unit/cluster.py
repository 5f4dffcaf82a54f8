"""A head and workers in one process: real hub, sessions, listeners and sockets, without SSH.

Each node's services listen on its own address; its listeners on the others listen elsewhere, since
all the machines are this one.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rayfwd.cluster.plan import head_plan
from rayfwd.hub import Hub, HubOffer
from rayfwd.hub.connection import HELLO_TIMEOUT
from rayfwd.hub.roster import Roster
from rayfwd.session.events import Parked, Resumed, SessionEnded
from rayfwd.session.frames import MAX_PAYLOAD, Chunk, Frame, Kind, first_frame
from rayfwd.session.handshake import Hello, Refusal, Welcome
from rayfwd.session.lane import LaneClass
from rayfwd.session.messages import Message
from rayfwd.session.session import Limits, Session
from rayfwd.session.target import Opening, Target
from rayfwd.transport.admission import Admission
from rayfwd.transport.connector import LocalConnector
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.mux import Mux, MuxStream, StreamOwner
from rayfwd.transport.relay import SocketRelay
from rayfwd.transport.writev import write
from tests.unit.loops import until

INTERACTIVE, BULK = LaneClass.INTERACTIVE, LaneClass.BULK
NETWORK = f"127.{80 + os.getpid() % 97}.{os.getpid() // 97 % 251}.0/24"
"""Of this test process alone, so that runs beside each other do not meet."""
_ports = itertools.count(12000)
_sessions = itertools.count(1)


def free_place() -> Target:
    """An address and a port that nothing uses."""
    return Target(NETWORK.replace(".0/24", ".250"), next(_ports))


def hello_of(name: str, **fields: Any) -> Hello:
    hello = Hello(
        node=name,
        key=f"the key of {name}".ljust(32, "."),
        session=f"{next(_sessions):x}",
        resumes=False,
        lane=INTERACTIVE,
        version="0",
        worker_ports=40,
    )
    return replace(hello, **fields)


class SocketLane(asyncio.Protocol):
    """A lane over a socket, as the worker's end of it has it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[Frame | None] = asyncio.get_running_loop().create_future()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.paused = False
        self.why_aborted = ""
        self._buffer = bytearray()
        self._mux: Mux | None = None
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(1 << 18)

    def data_received(self, data: bytes) -> None:
        if self._mux is not None:
            self._mux.lane_data(self._number, data)
            return
        self._buffer += data
        frame = first_frame(self._buffer, MAX_PAYLOAD)
        if frame is not None and not self.answer.done():
            self.answer.set_result(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_result(None)
        if not self.closed.done():
            self.closed.set_result(None)
        if self._mux is not None:
            self._mux.lane_lost(self._number)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._mux is not None:
            self._mux.flush()

    def join(self, mux: Mux, kind: LaneClass) -> int:
        self._mux = mux
        self._number = mux.add_lane(self, kind)
        if self._buffer:
            mux.lane_data(self._number, bytes(self._buffer))
            self._buffer.clear()
        return self._number

    def write(self, chunks: Sequence[Chunk]) -> None:
        assert self.transport is not None
        write(self.transport, chunks)

    def close(self) -> None:
        assert self.transport is not None
        self.transport.close()

    def abort(self, why: str) -> None:
        assert self.transport is not None
        self.why_aborted = why
        self.transport.abort()


async def knock(path: Path, first: bytes = b"") -> SocketLane:
    """A connection to a hub that has said `first`."""
    loop = asyncio.get_running_loop()
    _, lane = await loop.create_unix_connection(SocketLane, str(path))
    if first and lane.transport is not None:
        lane.transport.write(first)
    return lane


async def answer_to(path: Path, first: bytes) -> Welcome | Refusal | None:
    """What a hub answers to `first`; None: it just closes. The connection is closed then."""
    lane = await knock(path, first)
    async with asyncio.timeout(2 * HELLO_TIMEOUT):
        frame = await lane.answer
        lane.close()
        await lane.closed
    if frame is None:
        return None
    return Refusal.decode(frame) if frame.kind is Kind.REFUSE else Welcome.decode(frame)


class Worker:
    """A worker: its session, its listeners, its services' dialler."""

    def __init__(
        self, name: str, hub: Path, limits: Limits, admission: Admission | None = None
    ) -> None:
        self.name = name
        self.hello = hello_of(name)
        self.mux: Mux | None = None
        self.lanes: list[SocketLane] = []
        self.welcome: Welcome | None = None
        self.changes: list[Parked | Resumed | SessionEnded] = []
        self.messages: list[Message] = []
        self.connector = LocalConnector()
        self.listeners = Listeners(self._route, admission=admission)
        self._hub = hub
        self._limits = limits

    @property
    def address(self) -> str:
        assert self.welcome is not None
        return str(self.welcome.node["address"])

    async def connect(self, kind: LaneClass = INTERACTIVE) -> SocketLane:
        """A lane comes up; the first one makes the session."""
        resumes = self.mux is not None
        lane = await knock(self._hub, replace(self.hello, lane=kind, resumes=resumes).encode())
        frame = await lane.answer
        assert frame is not None, "the hub closed the lane"
        assert frame.kind is Kind.WELCOME, frame.payload
        self.welcome = Welcome.decode(frame)
        if self.mux is None:
            now = asyncio.get_running_loop().time()
            core = Session("worker", self.welcome.ride_through, self._limits, now)
            self.mux = Mux(core, self._accept, self.messages.append, self.changes.append)
        lane.join(self.mux, kind)
        self.lanes.append(lane)
        return lane

    def cut(self) -> None:
        """Every lane dies at once."""
        lanes, self.lanes = self.lanes, []
        for lane in lanes:
            lane.abort("cut")

    async def close(self) -> None:
        if self.mux is not None:
            self.mux.close("the worker stops")
        await self.connector.close()
        for lane in self.lanes:
            await lane.closed

    def _accept(self, stream: MuxStream, data: bytes) -> StreamOwner | None:
        return self.connector.accept(stream, Opening.decode(data))

    def _route(self, target: Target, relay: SocketRelay) -> None:
        relay.open_stream(self.mux, target)


class Cluster:
    """A head with its hub, and workers with two lanes each."""

    def __init__(self, directory: Path, limits: Limits | None = None, ride_through: float = 60.0):
        self.limits = limits or Limits()
        services = {"gcs": 6379, "dashboard": 8265, "client": 10001}
        own = head_plan("head", NETWORK, 20000, 40, services)
        self.address = own.address
        self.connector = LocalConnector()
        self.roster = Roster(directory / "roster.json", own, NETWORK, 20000)
        self.messages: list[tuple[str, Message]] = []
        self.offered = HubOffer(ray="2.60.0", python="3.11")
        path = directory / "hub.sock"
        self.hub = Hub(self, path, self.roster, (), NETWORK, ride_through, self.limits)
        self.listeners = Listeners(self.hub.router.open)
        self.workers: dict[str, Worker] = {}
        self.admission: Admission | None = None
        """Of the next worker's listeners; None: the usual one."""
        self._tasks: list[asyncio.Task[None]] = []

    def offer(self) -> HubOffer:
        return self.offered

    def accept(self, stream: MuxStream, opening: Opening) -> StreamOwner | None:
        return self.connector.accept(stream, opening)

    def message(self, node: str, message: Message) -> None:
        self.messages.append((node, message))

    def hub_changed(self) -> None: ...

    async def worker(self, name: str, called: str = "", **hello: Any) -> Worker:
        """`called`: what it is called here; `hello`: what is else in its HELLO."""
        worker = self.workers[called or name] = Worker(
            name, self.hub.socket.path, self.limits, self.admission
        )
        worker.hello = replace(worker.hello, **hello)
        await worker.connect(INTERACTIVE)
        await worker.connect(BULK)
        self._tasks.append(asyncio.create_task(worker.listeners.run()))
        return worker

    def address_of(self, name: str) -> str:
        return self.address if name == "head" else self.workers[name].address

    async def listener(self, near: str, target: Target) -> Target:
        """A listener on node `near` to a port of another; where it listens."""
        listeners = self.listeners if near == "head" else self.workers[near].listeners
        listen = free_place()
        listeners.set_wanted({**listeners._wanted, listen: target})
        await until(lambda: listeners.is_open(listen), what=f"no listener at {listen}")
        return listen

    async def start(self) -> None:
        await self.hub.start()
        self._tasks.append(asyncio.create_task(self.listeners.run()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers.values():
            await worker.close()
        await self.hub.close("the head stops")
        await self.connector.close()


@asynccontextmanager
async def cluster(
    directory: Path,
    *workers: str,
    limits: Limits | None = None,
    ride_through: float = 60.0,
    admission: Admission | None = None,
) -> AsyncIterator[Cluster]:
    """`admission` is of a single worker."""
    made = Cluster(directory, limits, ride_through)
    made.admission = admission
    await made.start()
    try:
        for name in workers:
            await made.worker(name)
        yield made
    finally:
        await made.close()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler, place: Target) -> AsyncIterator[Target]:
    """A program that listens at `place`. Its handlers have ended when this is left."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, *place, backlog=1024)
    try:
        yield place
    finally:
        server.close()
        if tasks:
            await asyncio.wait(tasks, timeout=10)
        assert not tasks, "a program's connection never ended"


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection by a reset, as a program does that dies with bytes unread."""
    if writer.transport.is_closing():
        return
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what comes, and the end."""
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except ConnectionError:
        pass


async def goodbye(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionError:
        pass


async def connect_and_read(place: Target) -> bytes:
    reader, writer = await asyncio.open_connection(*place)
    try:
        return await reader.read()
    finally:
        await goodbye(writer)
