"""A connection over two pipes, as asyncio's protocols have one over a socket."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from rayfwd.system.passing import is_stream
from rayfwd.transport.pipes import WIDE, PipeTransport
from rayfwd.transport.writev import write
from tests.unit.loops import run, turns, until


class Protocol(asyncio.Protocol):
    def __init__(self, keeps_open: bool = False) -> None:
        self.got = bytearray()
        self.paused: list[bool] = []
        self.ended = False
        self.lost: list[Exception | None] = []
        self._keeps_open = keeps_open

    def data_received(self, data: bytes) -> None:
        self.got += data

    def eof_received(self) -> bool:
        self.ended = True
        return self._keeps_open

    def pause_writing(self) -> None:
        self.paused.append(True)

    def resume_writing(self) -> None:
        self.paused.append(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


class Far:
    """The other ends: `write` what the transport reads, `read` what it writes."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write
        os.set_blocking(read, False)
        os.set_blocking(write, False)

    def take(self, size: int = 1 << 20) -> bytes:
        with suppress(BlockingIOError):
            return os.read(self.read, size)
        return b""

    def close(self) -> None:
        for name in ("read", "write"):
            if (descriptor := getattr(self, name)) >= 0:
                os.close(descriptor)
                setattr(self, name, -1)


@contextmanager
def piped(protocol: Protocol) -> Iterator[tuple[PipeTransport, Far]]:
    """Both ends; nothing of the transport is left."""
    near_read, far_write = os.pipe()
    far_read, near_write = os.pipe()
    far = Far(far_read, far_write)
    try:
        yield PipeTransport(protocol, near_read, near_write), far
    finally:
        far.close()


async def over(protocol: Protocol) -> None:
    await until(lambda: protocol.lost)
    await asyncio.sleep(0)


def test_what_the_other_side_writes_is_received_and_its_end_closes() -> None:
    async def main() -> None:
        protocol = Protocol()
        with piped(protocol) as (transport, far):
            os.write(far.write, b"hello")
            await until(lambda: protocol.got == b"hello")
            transport.pause_reading()
            os.write(far.write, b" again")
            await turns()
            assert protocol.got == b"hello"
            assert not transport.is_reading()
            transport.resume_reading()
            await until(lambda: protocol.got == b"hello again")
            far.close()
            await over(protocol)
            assert (protocol.ended, protocol.lost) == (True, [None])
            assert transport.is_closing()

    run(main)


def test_an_end_that_the_protocol_rides_out() -> None:
    async def main() -> None:
        protocol = Protocol(keeps_open=True)
        with piped(protocol) as (transport, far):
            os.close(far.write)
            far.write = -1
            await until(lambda: protocol.ended)
            transport.write(b"still here")
            assert far.take() == b"still here"
            assert not protocol.lost
            transport.close()
            await over(protocol)

    run(main)


@pytest.mark.parametrize("seed", range(3))
def test_all_that_is_written_arrives_in_order_whatever_the_pipe_takes(seed: int) -> None:
    chance = random.Random(seed)
    pieces = [chance.randbytes(chance.choice((1, 100, 70_000))) for _ in range(150)]

    async def main() -> None:
        protocol = Protocol()
        got = bytearray()
        with piped(protocol) as (transport, far):
            transport.set_write_buffer_limits(200_000)
            left = list(pieces)
            while left:
                some, left = left[:20], left[20:]
                write(transport, [memoryview(some[0]), *some[1:]])
                got += far.take(chance.randrange(1, 200_000))
            assert transport.get_write_buffer_size() > 200_000
            transport.close()
            transport.write(b"after the end")
            while not protocol.lost:
                got += far.take()
                await asyncio.sleep(0)
            got += far.take()
            assert got == b"".join(pieces)
            assert protocol.paused[0]
            assert protocol.lost == [None], "what waited was sent before"

    run(main)


def test_who_writes_is_told_to_wait_and_to_go_on() -> None:
    async def main() -> None:
        protocol = Protocol()
        with piped(protocol) as (transport, far):
            transport.set_write_buffer_limits(100_000)
            transport.write(bytes(65_536))
            transport.write(bytearray(100_000))
            assert protocol.paused == []
            transport.write(b"x")
            assert protocol.paused == [True]
            while protocol.paused != [True, False]:
                assert far.take()
                await asyncio.sleep(0.001)
            assert transport.get_write_buffer_size() <= 25_000
            transport.abort()
            assert transport.get_write_buffer_size() == 0
            await over(protocol)

    run(main)


def test_what_came_before_a_write_failed_is_received_first() -> None:
    async def main() -> None:
        protocol = Protocol()
        with piped(protocol) as (transport, far):
            transport.pause_reading()
            os.write(far.write, b"why")
            far.close()
            transport.write(b"x")
            transport.write(b"y")
            await over(protocol)
            assert protocol.got == b"why"
            assert [type(exc) for exc in protocol.lost] == [BrokenPipeError]

    run(main)


def test_a_write_that_waits_and_fails() -> None:
    async def main() -> None:
        protocol = Protocol()
        with piped(protocol) as (transport, far):
            transport.write(bytes(200_000))
            far.close()
            await over(protocol)
            assert len(protocol.lost) == 1

    run(main)


def test_pipes_are_made_wide_and_a_no_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        protocol = Protocol()
        with piped(protocol) as (transport, far):
            transport.widen()
            sizes = [fcntl.fcntl(end, fcntl.F_GETPIPE_SZ) for end in (far.read, far.write)]
            assert sizes == [WIDE, WIDE]

            def no(*_: object) -> int:
                raise PermissionError(1, "Operation not permitted")

            monkeypatch.setattr(fcntl, "fcntl", no)
            transport.widen()
            transport.write(b"as before")
            assert far.take() == b"as before"
            transport.abort()
            await over(protocol)

    run(main)


def test_two_ends_of_one_socket() -> None:
    """An sshd without pipes gives a command a socket."""

    async def main() -> None:
        near, far = socket.socketpair()
        far.setblocking(False)
        protocol = Protocol()
        with far:
            transport = PipeTransport(protocol, os.dup(near.fileno()), near.detach())
            transport.widen()
            transport.write(b"question")
            assert far.recv(100) == b"question"
            far.send(b"answer")
            await until(lambda: protocol.got == b"answer")
            transport.close()
            await over(protocol)
            assert far.recv(100) == b""

    run(main)


def test_what_a_loop_can_wait_for() -> None:
    read, send = os.pipe()
    with open("/dev/null", "rb") as null, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mail:
        assert (is_stream(read), is_stream(send)) == (True, True)
        assert (is_stream(null.fileno()), is_stream(mail.fileno())) == (False, False)
    os.close(read)
    os.close(send)
    assert not is_stream(read)
