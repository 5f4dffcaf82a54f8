"""Long transfers read little, and pause, while short messages are about."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from rayfwd.transport import readpacing as module
from rayfwd.transport.readpacing import (
    BURST_BYTES,
    LINGER_SECONDS,
    LONG_READ,
    READ_SMALL,
    Pace,
    Reading,
)
from tests.unit.loops import run_on_fake_clock as run
from tests.unit.loops import until


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Pace:
    """That of the process, as it begins."""
    fresh = Pace(clock)
    monkeypatch.setattr(module, "pace", fresh)
    return fresh


class Reader(asyncio.Protocol):
    """Counts what it reads."""

    def __init__(self) -> None:
        self.size = 0
        self.reads: list[int] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.reading = Reading(self.transport)

    def data_received(self, data: bytes) -> None:
        self.size += len(data)
        self.reads.append(len(data))


async def reader() -> tuple[Reader, socket.socket]:
    """One end of a connection that is read, and the other."""
    near, far = socket.socketpair()
    near.setblocking(False)
    _, protocol = await asyncio.get_running_loop().create_connection(Reader, sock=near)
    return protocol, far


@contextmanager
def closed(protocol: Reader, far: socket.socket) -> Iterator[None]:
    try:
        yield
    finally:
        protocol.transport.abort()
        far.close()


async def next_read(reading: Reader, far: socket.socket) -> int:
    """How much its next read takes, of twice as much as a small one."""
    count = len(reading.reads)
    far.sendall(bytes(2 * READ_SMALL))
    size = reading.size + 2 * READ_SMALL
    await until(lambda: reading.size == size)
    return reading.reads[count]


def test_reads_are_large_when_there_is_nobody_to_wait(pace: Pace) -> None:
    async def main() -> None:
        protocol, far = await reader()
        with closed(protocol, far):
            assert await next_read(protocol, far) == READ_SMALL
            for _ in range(20):
                protocol.reading.after_read(READ_SMALL)
                assert await next_read(protocol, far) > READ_SMALL
                assert protocol.transport.is_reading(), "it pauses, though nobody waits"

    run(main)


def test_a_long_transfer_pauses_while_short_messages_are_about(pace: Pace) -> None:
    async def main() -> None:
        protocol, far = await reader()
        with closed(protocol, far):
            pace.short_message()
            for _ in range(BURST_BYTES // READ_SMALL - 1):
                protocol.reading.after_read(READ_SMALL)
                assert await next_read(protocol, far) == READ_SMALL
                assert protocol.transport.is_reading()
            protocol.reading.after_read(READ_SMALL)
            assert not protocol.transport.is_reading(), "it does not pause"
            before = protocol.size
            far.send(b"behind the wait")
            await until(lambda: protocol.size == before + 15)
            assert protocol.transport.is_reading()

    run(main)


def test_short_messages_are_soon_over(pace: Pace, clock: Clock) -> None:
    seen = [pace.latency_sensitive]
    pace.short_message()
    for passed in (0.9, 0.2):
        clock.now += passed * LINGER_SECONDS
        seen.append(pace.latency_sensitive)
    assert seen == [False, True, False]


def test_what_is_short_never_pauses(pace: Pace) -> None:
    async def main() -> None:
        protocol, far = await reader()
        with closed(protocol, far):
            for _ in range(2 * BURST_BYTES // LONG_READ):
                pace.short_message()
                protocol.reading.after_read(LONG_READ - 1)
            assert protocol.transport.is_reading()

    run(main)


def test_the_end_of_a_pause_does_not_start_what_was_stopped(pace: Pace) -> None:
    """Nor does its owner's word end a pause."""

    async def main() -> None:
        protocol, far = await reader()
        with closed(protocol, far):
            pace.short_message()
            protocol.reading.after_read(BURST_BYTES)
            protocol.reading.resume()
            assert not protocol.transport.is_reading(), "it was pausing"
            protocol.reading.stop()
            await asyncio.sleep(0.02)
            assert not protocol.transport.is_reading(), "it was stopped"
            protocol.reading.resume()
            assert protocol.transport.is_reading()

    run(main)


def test_a_pause_outlives_its_connection(pace: Pace) -> None:
    async def main() -> None:
        protocol, far = await reader()
        with closed(protocol, far):
            pace.short_message()
            protocol.reading.after_read(BURST_BYTES)
        await asyncio.sleep(0.02)  # `run` fails if the loop is told of an exception

    run(main)
