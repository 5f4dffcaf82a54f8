"""Listeners and relays on real sockets: the same bytes and the same endings as a direct connection.

Every conversation runs over each path, `direct` among them: what a test asserts holds without
rayfwd between too.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from rayfwd import codes
from rayfwd.session.session import Limits
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening, Target
from rayfwd.system import descriptors
from rayfwd.transport.connector import DIAL_TIMEOUT, LocalConnector
from rayfwd.transport.listeners import OPENED_AT_ONCE, RETRY_LAST, Listeners, listeners_for
from rayfwd.transport.relay import SocketRelay
from tests.unit.cluster import (
    Cluster,
    Handler,
    cluster,
    connect_and_read,
    echo,
    free_place,
    goodbye,
    reset,
    serving,
)
from tests.unit.loops import log_events, of, until
from tests.unit.loops import run as run_in_real_time
from tests.unit.loops import run_on_fake_clock as run

PATHS = ["direct", "w1>head", "head>w1", "w1>w2"]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
every_path = pytest.mark.parametrize("path", PATHS)


@asynccontextmanager
async def a_path(
    directory: Path, path: str, handler: Handler | None, limits: Limits | None = None
) -> AsyncIterator[Target]:
    """Where a client dials to reach `handler` by `path`; no handler: nothing listens there."""
    near, _, far = path.partition(">")
    async with cluster(directory, "w1", "w2", limits=limits) as c:
        port = free_place().port
        place = free_place() if path == "direct" else Target(c.address_of(far), port)
        listen = place if path == "direct" else await c.listener(near, place)
        if handler is None:
            yield listen
        else:
            async with serving(handler, place):
                yield listen
        await at_rest(c)


async def at_rest(c: Cluster) -> None:
    """No stream is left on any side, nor a byte of one."""

    def sessions() -> list[int]:
        muxes = [n.mux for n in c.hub.nodes.values()] + [w.mux for w in c.workers.values()]
        return [len(m.session.streams) - 1 for m in muxes if m is not None]

    await until(lambda: not any(sessions()), 10.0, lambda: f"streams left: {sessions()}")
    for node in c.hub.nodes.values():
        assert node.mux is not None
        assert node.mux.owners == {}


async def write_for_ever(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x" * 1000)
        await writer.drain()
        await asyncio.sleep(0.01)


def stop_reading(writer: asyncio.StreamWriter) -> asyncio.Transport:
    """The program takes nothing from its socket until the transport's `resume_reading`."""
    transport = cast(asyncio.Transport, writer.transport)
    transport.pause_reading()
    return transport


@every_path
def test_a_server_may_speak_first(tmp_path: Path, path: str) -> None:
    async def greeter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 welcome\r\n")
        assert await reader.readline() == b"thanks\n"
        writer.write_eof()

    async def main() -> None:
        async with a_path(tmp_path, path, greeter) as listen:
            reader, writer = await asyncio.open_connection(*listen)
            assert await reader.readline() == b"220 welcome\r\n"
            writer.write(b"thanks\n")
            assert await reader.read() == b""
            await goodbye(writer)

    run(main)


@every_path
@pytest.mark.parametrize("first", ["client", "server"])
def test_each_side_may_half_close_first(tmp_path: Path, path: str, first: str) -> None:
    got: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if first == "server":
            writer.write(b"all I have to say")
            writer.write_eof()
            got.append(await reader.read())
        else:
            got.append(await reader.read())
            writer.write(b"all I have to say")
            writer.write_eof()

    async def main() -> None:
        async with a_path(tmp_path, path, handler) as listen:
            reader, writer = await asyncio.open_connection(*listen)
            if first == "server":
                assert await reader.read() == b"all I have to say"
                writer.write(b"and so do I")
                writer.write_eof()
            else:
                writer.write(b"and so do I")
                writer.write_eof()
                assert await reader.read() == b"all I have to say"
            await until(lambda: got)
            assert got == [b"and so do I"]
            await goodbye(writer)

    run(main)


@every_path
def test_a_connection_that_nobody_takes_is_refused(tmp_path: Path, path: str) -> None:
    """Directly it is refused at once, by a listener it is accepted and then reset."""

    async def main() -> None:
        async with a_path(tmp_path, path, None) as listen:
            with pytest.raises((ConnectionRefusedError, ConnectionResetError)):
                await connect_and_read(listen)

    run(main)


@every_path
def test_a_reset_by_the_server_reaches_the_client(tmp_path: Path, path: str) -> None:
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(5)
        reset(writer)

    async def main() -> None:
        async with a_path(tmp_path, path, rude) as listen:
            reader, writer = await asyncio.open_connection(*listen)
            writer.write(b"hello")
            with pytest.raises(ConnectionResetError):
                await reader.read()
            await goodbye(writer)

    run(main)


@every_path
def test_a_reset_by_the_client_reaches_the_server(tmp_path: Path, path: str) -> None:
    ended: list[str] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"ready")
            while await reader.read(100):
                pass
            ended.append("in order")
        except ConnectionResetError:
            ended.append("reset")

    async def main() -> None:
        async with a_path(tmp_path, path, handler) as listen:
            reader, writer = await asyncio.open_connection(*listen)
            assert await reader.readexactly(5) == b"ready"
            reset(writer)
            await until(lambda: ended)
            assert ended == ["reset"]

    run(main)


@every_path
def test_a_server_that_closes_with_bytes_unread_resets(tmp_path: Path, path: str) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stop_reading(writer)
        writer.write(b"no more")
        await asyncio.sleep(2)

    async def main() -> None:
        async with a_path(tmp_path, path, deaf) as listen:
            _, writer = await asyncio.open_connection(*listen)
            writer.write(b"x" * 1000)
            await asyncio.sleep(3)
            with pytest.raises(ConnectionError):
                await write_for_ever(writer)
            await goodbye(writer)

    run(main)


def test_what_is_short_is_not_held_back(tmp_path: Path) -> None:
    """The kernel waits for no confirmation (Nagle's algorithm): neither behind a listener nor where
    a connection is dialled. What runs over a listener writes many short messages, as Ray does."""

    async def main() -> None:
        async with cluster(tmp_path, "w1") as c:
            place = Target(c.address, free_place().port)
            listen = await c.listener("w1", place)
            async with serving(echo, place):
                reader, writer = await asyncio.open_connection(*listen)
                writer.write(b"x")
                assert await reader.read(1) == b"x"
                (behind,), (dialled,) = c.workers["w1"].listeners.relays, c.connector.relays
                for relay in (behind, dialled):
                    assert relay._transport is not None
                    sock = relay._transport.get_extra_info("socket")
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                await goodbye(writer)
                await at_rest(c)

    run(main)


@every_path
def test_many_bytes_pass_unchanged_both_ways_at_once(tmp_path: Path, path: str) -> None:
    data = os.urandom(1 << 20) * 8

    async def send(writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(data), 100_003):
            writer.write(data[start : start + 100_003])
            await writer.drain()
        writer.write_eof()

    digests: list[str] = []

    async def digest(reader: asyncio.StreamReader) -> None:
        sha = hashlib.sha256()
        while chunk := await reader.read(1 << 18):
            sha.update(chunk)
        digests.append(sha.hexdigest())

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.gather(send(writer), digest(reader))

    async def main() -> None:
        async with a_path(tmp_path, path, both) as listen:
            reader, writer = await asyncio.open_connection(*listen)
            await both(reader, writer)
            await until(lambda: len(digests) == 2)
            assert set(digests) == {hashlib.sha256(data).hexdigest()}
            await goodbye(writer)

    run(main)


@every_path
def test_a_slow_reader_beside_a_fast_one(tmp_path: Path, path: str) -> None:
    size = 4 << 20

    async def source(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(size >> 16):
            writer.write(b"x" * (1 << 16))
            await writer.drain()
        writer.write_eof()
        await reader.read()

    async def main() -> None:
        async with a_path(tmp_path, path, source) as listen:
            slow_reader, slow_writer = await asyncio.open_connection(*listen)
            slow = stop_reading(slow_writer)
            for _ in range(3):
                reader, writer = await asyncio.open_connection(*listen)
                writer.write_eof()
                assert len(await reader.read()) == size
                await goodbye(writer)
            slow.resume_reading()
            slow_writer.write_eof()
            assert len(await slow_reader.read()) == size
            await goodbye(slow_writer)

    run(main)


@pytest.mark.parametrize("path", PATHS[1:])
def test_what_a_slow_reader_leaves_is_bounded_on_the_way(tmp_path: Path, path: str) -> None:
    """The writer is stopped by its own socket, not by the memory of what is between."""
    sent = 0

    async def source(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        try:
            while True:
                writer.write(b"x" * (1 << 16))
                await writer.drain()
                sent += 1 << 16
        except ConnectionError:
            pass

    async def main() -> None:
        async with a_path(tmp_path, path, source) as listen:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, listen)
            last = -1
            while sent != last:
                last = sent
                await asyncio.sleep(0.5)
            assert 0 < sent < 24 << 20
            sock.close()

    run(main)


@every_path
def test_a_thousand_short_connections_in_a_row(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with a_path(tmp_path, path, echo) as listen:
            for i in range(1000):
                reader, writer = await asyncio.open_connection(*listen)
                writer.write(b"%d" % i)
                writer.write_eof()
                assert await reader.read() == b"%d" % i
                await goodbye(writer)

    run(main)


@every_path
def test_five_hundred_open_at_once(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with a_path(tmp_path, path, echo) as listen:
            streams: list[Streams] = []
            for _ in range(500):
                streams.append(await asyncio.open_connection(*listen))
            for i, (_, writer) in enumerate(streams):
                writer.write(b"%d\n" % i)
            for i, (reader, writer) in enumerate(streams):
                assert await reader.readline() == b"%d\n" % i
                writer.write_eof()
            for reader, writer in streams:
                assert await reader.read() == b""
                await goodbye(writer)

    run(main)


@pytest.mark.parametrize("path", PATHS[1:])
def test_open_connections_survive_a_cut(tmp_path: Path, path: str) -> None:
    data = os.urandom(3 << 20)

    async def main() -> None:
        near, _, far = path.partition(">")
        async with cluster(tmp_path, "w1", "w2") as c:
            place = Target(c.address_of(far), free_place().port)
            listen = await c.listener(near, place)
            async with serving(echo, place):
                reader, writer = await asyncio.open_connection(*listen)

                async def send() -> None:
                    for i in range(3):
                        writer.write(data[i << 20 : (i + 1) << 20])
                        await writer.drain()
                        for name in {near, far} - {"head"}:
                            c.workers[name].cut()
                        await asyncio.sleep(0.05)
                        for name in {near, far} - {"head"}:
                            await c.workers[name].connect()
                    writer.write_eof()

                sending = asyncio.create_task(send())
                got = await reader.read()
                await sending
                assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
                await goodbye(writer)
            await at_rest(c)

    run(main)


@pytest.mark.parametrize("path", PATHS[1:])
def test_connections_made_while_parked_are_held_and_served(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        near, _, far = path.partition(">")
        async with cluster(tmp_path, "w1", "w2") as c:
            place = Target(c.address_of(far), free_place().port)
            listen = await c.listener(near, place)
            worker = c.workers[near if near != "head" else far]
            async with serving(echo, place):
                worker.cut()
                await until(lambda: c.hub.nodes[worker.name].state == "parked")
                reader, writer = await asyncio.open_connection(*listen)
                writer.write(b"patience")
                writer.write_eof()
                await asyncio.sleep(30)
                await worker.connect()
                assert await reader.read() == b"patience"
                await goodbye(writer)
            await at_rest(c)

    run(main)


def test_a_relay_without_a_stream_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor under Python 3.11.2, which Debian 12 has: there a transport begins to read after
    `connection_made`, though that has paused it. What a relay cannot pass on would be an exception
    that the loop is told of, and `run` fails by that."""

    def add_reader(self: Any, descriptor: int, callback: Callable[[], None]) -> None:
        if not self._closing:
            self._loop._add_reader(descriptor, callback)

    monkeypatch.setattr("asyncio.selector_events._SelectorTransport._add_reader", add_reader)

    async def main() -> None:
        waiting: list[SocketRelay] = []
        listeners = Listeners(lambda _target, relay: waiting.append(relay))
        place = free_place()
        listeners.set_wanted({place: place})
        running = asyncio.create_task(listeners.run())
        await until(lambda: listeners.open == 1)
        reader, writer = await asyncio.open_connection(*place)
        writer.write(b"early")
        await until(lambda: waiting)
        await asyncio.sleep(1)
        waiting[0].refuse()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    run(main)


def test_a_session_that_ends_resets_its_connections(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1", ride_through=60.0) as c:
            place = Target(c.address, free_place().port)
            listen = await c.listener("w1", place)
            async with serving(echo, place):
                reader, writer = await asyncio.open_connection(*listen)
                writer.write(b"x")
                assert await reader.read(1) == b"x"
                c.workers["w1"].cut()
                with pytest.raises(ConnectionResetError):
                    await reader.read()
                await goodbye(writer)

    run(main)


# -- listeners themselves --------------------------------------------------------------------------


def refuse(_target: Target, relay: SocketRelay) -> None:
    relay.refuse()


@asynccontextmanager
async def listeners_at_work(
    on_change: Callable[[], None] | None = None,
) -> AsyncIterator[Listeners]:
    listeners = Listeners(refuse, on_change)
    task = asyncio.create_task(listeners.run())
    try:
        yield listeners
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_who_shows_them_hears_of_every_change() -> None:
    async def main() -> None:
        taken, free = free_place(), free_place()
        told: list[tuple[int, int]] = []
        with socket.socket() as other:
            other.bind(taken)
            other.listen()
            async with listeners_at_work(
                lambda: told.append((listeners.open, len(listeners.blocked)))
            ) as listeners:
                listeners.set_wanted({taken: taken, free: free})
                await until(lambda: told == [(1, 1)])
                await asyncio.sleep(5 * RETRY_LAST)  # tried again some times, to no avail
                assert told == [(1, 1)]
                other.close()
                await until(lambda: told == [(1, 1), (2, 0)])
                listeners.set_wanted({})
                await until(lambda: told[-1] == (0, 0))

    run(main)


def test_a_listener_whose_port_is_taken_is_said_once_and_opens_when_it_is_free() -> None:
    async def main() -> None:
        taken, free = free_place(), free_place()
        with log_events() as log, socket.socket() as other:
            other.bind(taken)
            other.listen()
            async with listeners_at_work() as listeners:
                listeners.set_wanted({taken: taken, free: free})
                await until(lambda: listeners.open == 1 and listeners.blocked)
                (problem,) = listeners.blocked
                assert problem.code == codes.LISTENER_BLOCKED
                assert str(taken.port) in problem.cause
                assert str(taken.port) in problem.remedy
                await asyncio.sleep(5 * RETRY_LAST)
                assert len(of(log, "listener_blocked")) == 1, (
                    "it is the same problem, not a new one"
                )
                other.close()
                await until(lambda: listeners.open == 2)
                assert listeners.blocked == ()
        assert len(of(log, "listener_unblocked")) == 1

    run(main)


def test_what_a_program_elsewhere_has_opened_is_there_with_the_news_of_it() -> None:
    """Who hears of the port may dial it at once: the next turn of the loop may be too late."""

    async def main() -> None:
        told: list[int] = []
        plan, one, two = free_place(), free_place(), free_place()
        with log_events() as log, socket.socket() as other:
            other.bind(two)
            other.listen()
            async with listeners_at_work(lambda: told.append(listeners.open)) as listeners:
                listeners.set_wanted({plan: plan}, {one: one})
                await until(lambda: listeners.open == 2)
                listeners.set_wanted({plan: plan})
                await until(lambda: told[-1] == 1)
                listeners.set_wanted({plan: plan}, {one: one, two: two})
                assert listeners.open == 2
                await until(lambda: told[-1] == 2 and listeners.blocked)
                (problem,) = listeners.blocked
                assert problem.code == codes.OPEN_PORT_TAKEN
        assert [line["new"] for line in of(log, "listeners_open")] == [2, 1]

    run(main)


def test_others_may_be_wanted_while_many_are_opened() -> None:
    """A node may announce two thousand ports, and be gone a moment later."""
    places = [free_place() for _ in range(3 * OPENED_AT_ONCE)]

    async def main() -> None:
        async with listeners_at_work() as listeners:
            listeners.set_wanted({place: place for place in places})
            while listeners.open < OPENED_AT_ONCE:
                await asyncio.sleep(0)
            assert listeners.open < len(places)
            listeners.set_wanted({places[0]: places[0]})
            await until(lambda: listeners.open == 1, what="it has ended")
            assert listeners.is_open(places[0])

    run_in_real_time(main)


def test_listeners_that_are_no_longer_wanted_are_closed() -> None:
    async def main() -> None:
        one, two = free_place(), free_place()
        async with listeners_at_work() as listeners:
            listeners.set_wanted({one: one, two: two})
            await until(lambda: listeners.open == 2)
            listeners.set_wanted({two: two})
            await until(lambda: listeners.open == 1)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*one)
            _, writer = await asyncio.open_connection(*two)
            await goodbye(writer)

    run(main)


def test_an_address_that_is_not_local_is_a_blocked_listener() -> None:
    async def main() -> None:
        with log_events() as log:
            async with listeners_at_work() as listeners:
                there = Target("192.0.2.1", 20000)
                listeners.set_wanted({there: there})
                await until(lambda: listeners.blocked)
                assert listeners.blocked[0].code == codes.LISTENER_BLOCKED
        assert len(of(log, "listener_blocked")) == 1

    run(main)


def test_a_node_has_a_listener_for_every_port() -> None:
    listeners = listeners_for("127.77.0.2", [20000, 20001])
    assert listeners == {t: t for t in (Target("127.77.0.2", 20000), Target("127.77.0.2", 20001))}


@pytest.mark.parametrize("data", [b"", b"12345", b"1234567"])
def test_a_target_is_six_bytes(data: bytes) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Target.decode(data)
    place = Target("127.77.0.2", 65535)
    assert Target.decode(place.encode()) == place
    assert len(place.encode()) == 6


@pytest.mark.interpreted
def test_attempts_to_dial_end_with_their_dialer() -> None:
    """An address that never answers: a listener whose queue is full."""

    async def main() -> None:
        place = free_place()
        connector = LocalConnector()
        with socket.socket() as full:
            full.bind(place)
            full.listen(0)
            fillers = []
            for _ in range(3):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(place)
                fillers.append(filler)
            relay = connector.accept(FakeStream(), Opening(place))  # type: ignore[arg-type]
            await asyncio.sleep(DIAL_TIMEOUT / 2)
            assert connector.opening_of(relay) == Opening(place), "it is dialled no more"
            now = asyncio.get_running_loop().time
            before = now()
            await connector.close()
            assert now() == before, "it is waited for"
            for filler in fillers:
                filler.close()

    run(main)


class FakeStream:
    """A stream that takes everything and does nothing."""

    must_wait = False

    def __init__(self, mux: Any = None) -> None:
        self.mux = mux
        self.was_reset: ResetReason | None = None

    def reset(self, reason: ResetReason, _: str = "") -> None:
        self.was_reset = reason

    def consumed(self, _: int) -> None: ...


class Heard(FakeStream):
    """Notes what it is given."""

    def __init__(self, heard: list[object]) -> None:
        super().__init__()
        self._heard = heard

    def send(self, data: bytes) -> bool:
        self._heard.append(data)
        return True


def test_it_is_known_that_a_program_speaks_before_it_is_heard() -> None:
    async def main() -> None:
        heard: list[object] = []
        place = free_place()

        def route(_: Target, relay: SocketRelay) -> None:
            relay.when_read(heard.append)
            relay.attach(Heard(heard))  # type: ignore[arg-type]

        listeners = Listeners(route)
        listeners.set_wanted({place: place})
        running = asyncio.create_task(listeners.run())
        await until(lambda: listeners.open == 1)
        _, writer = await asyncio.open_connection(*place)
        writer.write(b"29500")
        await until(lambda: len(heard) == 2)
        for relay in list(listeners.relays):
            relay.refuse()
        writer.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert heard == [5, b"29500"]

    run(main)


class Peer(NamedTuple):
    """Stands for a session."""

    peer: str


@pytest.mark.interpreted
def test_whoever_has_most_connections_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where descriptors are scarce, for who has less than half of that."""
    greedy, modest = Peer("greedy"), Peer("modest")

    async def body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionResetError):
            await reader.read()
        writer.close()

    async def main() -> None:
        place = free_place()
        connector = LocalConnector()

        async def dial(mux: Peer) -> FakeStream:
            stream = FakeStream(mux)
            relay = connector.accept(stream, Opening(place))  # type: ignore[arg-type]
            await until(lambda: stream.was_reset is not None or relay in connector.relays)
            return stream

        async with serving(body, place):
            theirs = [await dial(greedy) for _ in range(6)]
            monkeypatch.setattr(descriptors, "reserve", lambda: 0)
            assert (await dial(greedy)).was_reset is ResetReason.TOO_MANY
            assert [stream.was_reset for stream in theirs] == [None] * 6
            monkeypatch.setattr(descriptors, "reserve", room_for_one(connector))
            mine = [await dial(modest) for _ in range(2)]
            assert [stream.was_reset for stream in mine] == [None] * 2
            assert [stream.was_reset for stream in theirs] == [
                *([None] * 4),
                *([ResetReason.TOO_MANY] * 2),
            ]
            assert (await dial(modest)).was_reset is ResetReason.TOO_MANY, "it has half of it"
            for relay in list(connector.relays):
                relay.refuse()
            await until(lambda: not connector.relays)
            await connector.close()

    run_in_real_time(main, 60)


def room_for_one(connector: LocalConnector) -> Callable[[], int]:
    """No number is below the reserve while six connections stand."""
    return lambda: 0 if len(connector.relays) >= 6 else 1 << 20


def test_listeners_leave_descriptors_to_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are wanted first are opened, and one line tells of the rest."""

    async def main() -> None:
        monkeypatch.setattr(descriptors, "for_listeners", lambda: 3)
        places = [free_place() for _ in range(6)]
        listeners = Listeners(lambda target, relay: relay.refuse())
        listeners.set_wanted({place: place for place in places[:2]})
        with log_events() as log:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(listeners.run())
                await until(lambda: listeners.open == 2)
                listeners.set_wanted({place: place for place in places})
                await until(lambda: listeners.open == 3 and len(listeners.blocked_at) == 3)
                assert all(map(listeners.is_open, places[:3]))
                assert {p.code for p in listeners.blocked} == {codes.DESCRIPTORS_EXHAUSTED}
                listeners.set_wanted({place: place for place in places[3:]})
                await until(lambda: listeners.open == 3 and not listeners.blocked_at)
                task.cancel()
        assert len(of(log, "descriptors_exhausted")) == 1

    run(main)


def test_few_descriptors_hold_up_new_connections_and_break_nothing(tmp_path: Path) -> None:
    """Head and worker in a process that may open 100 files; the programs are outside."""
    port = free_place().port
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.few_descriptors", str(tmp_path), "100", str(port)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    head, address, listening = child.stdout.readline().split()
    place = Target(address, int(listening))

    async def connect() -> Streams | None:
        """None: the reset came before the connection was seen to stand."""
        try:
            return await asyncio.open_connection(*place)
        except ConnectionResetError:
            return None

    async def exchange(streams: Streams | None) -> str:
        if streams is None:
            return "reset"
        reader, writer = streams
        try:
            writer.write(b"x")
            async with asyncio.timeout(2):
                return "served" if await reader.read(1) == b"x" else "closed"
        except ConnectionError:
            return "reset"
        except TimeoutError:
            return "held"

    async def main() -> None:
        async with serving(echo, Target(head, port)):
            await conversation()

    async def conversation() -> None:
        streams = [await connect() for _ in range(60)]
        seen = await asyncio.gather(*map(exchange, streams))
        assert "served" in seen
        assert len(set(seen)) > 1, "the limit was not reached"
        served = [s for s, how in zip(streams, seen, strict=True) if how == "served"]
        assert await exchange(served[0]) == "served", "what stands is left alone"
        for made in streams:
            if made is not None:
                reset(made[1])

        async def once() -> str:
            one = await connect()
            how = await exchange(one)
            if one is not None:
                reset(one[1])
            return how

        for _ in range(20):
            if await once() == "served":
                break
            await asyncio.sleep(0.2)
        assert [await once() for _ in range(10)] == ["served"] * 10

    try:
        run_in_real_time(main, 60)
    finally:
        said, _ = child.communicate("stop\n", timeout=20)
    assert child.returncode == 0
    assert said.split() == ["in", "order"]
