"""Many chunks are written at once, whatever the socket takes of them."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import pytest

from rayfwd.transport.writev import JOIN_BYTES, PIECES, write
from tests.unit.loops import run, until


class Writer(asyncio.Protocol):
    """Writes to a connection, and notes why it is gone."""

    def __init__(self) -> None:
        self.lost: list[Exception | None] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


@asynccontextmanager
async def writer() -> AsyncIterator[tuple[Writer, socket.socket]]:
    """One end of a connection that is written to, and the other."""
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    _, protocol = await asyncio.get_running_loop().create_connection(Writer, sock=near)
    try:
        yield protocol, far
    finally:
        protocol.transport.abort()
        far.close()


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes the kernel took, each time that it was given chunks."""
    taken: list[int] = []
    real = os.writev

    def noted(fd: int, chunks: Sequence[bytes]) -> int:
        taken.append(real(fd, chunks))
        return taken[-1]

    monkeypatch.setattr(os, "writev", noted)
    return taken


async def received(far: socket.socket, size: int) -> bytes:
    out = b""
    while len(out) < size:
        out += await asyncio.get_running_loop().sock_recv(far, 1 << 20)
    return out


@pytest.mark.parametrize(
    "sizes",
    [
        [10],
        [10, 20, 0, 30],
        [JOIN_BYTES, 0, JOIN_BYTES],
        [0, 1 << 20, 5, 1 << 20],
        [JOIN_BYTES // 100] * (2 * PIECES),
    ],
)
def test_all_of_it_arrives_in_order(sizes: list[int]) -> None:
    chunks = [random.randbytes(size) for size in sizes]

    async def main() -> None:
        async with writer() as (protocol, far):
            write(protocol.transport, chunks)
            write(protocol.transport, [b"what", bytes(JOIN_BYTES), b"follows"])
            whole = b"".join(chunks) + b"what" + bytes(JOIN_BYTES) + b"follows"
            assert await received(far, len(whole)) == whole

    run(main)


def test_long_pieces_are_not_joined_and_short_ones_are(vectors: list[int]) -> None:
    async def main() -> None:
        async with writer() as (protocol, far):
            write(protocol.transport, [b"a", b"b"])
            assert not vectors
            write(protocol.transport, [b"x" * JOIN_BYTES, memoryview(b"yz")[1:]])
            assert vectors == [JOIN_BYTES + 1]
            assert await received(far, JOIN_BYTES + 3) == b"ab" + b"x" * JOIN_BYTES + b"z"

    run(main)


def test_nothing_overtakes_what_waits(vectors: list[int]) -> None:
    async def main() -> None:
        async with writer() as (protocol, far):
            size = 8 << 20
            protocol.transport.write(b"1" * size)
            assert protocol.transport.get_write_buffer_size()
            write(protocol.transport, [b"2" * size, b"3"])
            assert not vectors
            assert await received(far, 2 * size + 1) == b"1" * size + b"2" * size + b"3"

    run(main)


def test_the_transport_finds_the_error_and_tells_its_protocol(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with writer() as (protocol, far):
            far.close()
            write(protocol.transport, [bytes(JOIN_BYTES)] * 20)
            assert not protocol.lost, "not from within the call"
            await until(lambda: protocol.lost)
            assert isinstance(protocol.lost[0], BrokenPipeError)

    run(main)
    assert not caplog.messages, "asyncio complains of who writes on and on"


def test_a_transport_that_closes_takes_no_more(vectors: list[int]) -> None:
    async def main() -> None:
        async with writer() as (protocol, _):
            protocol.transport.close()
            write(protocol.transport, [bytes(JOIN_BYTES), b"x"])
            assert not vectors

    run(main)
