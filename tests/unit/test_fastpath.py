"""The fast path under a lane: the same bytes as without it, whatever else the connection does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import asyncssh
import pytest
from asyncssh.crypto import cipher

from rayfwd.ssh.asyncssh_internals import TRIAL
from rayfwd.ssh.fastpath import FastPath
from tests.unit.loops import run

GCM = "aes128-gcm@openssh.com"
DEADLINE = 60.0


class Echo(asyncssh.SSHServerSession[bytes]):
    """Sends back what comes; ends, orderly, when the client has ended."""

    def connection_made(self, chan: Any) -> None:
        self._channel = chan

    def exec_requested(self, command: str) -> bool:
        return True

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self._channel.write(data)

    def eof_received(self) -> bool:
        self._channel.write_eof()
        self._channel.exit(0)
        return False


class Server(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return False

    def session_requested(self) -> Echo:
        return Echo()


class Client(asyncssh.SSHClientSession[bytes]):
    """Notes what comes, and by which way."""

    def __init__(self) -> None:
        self.came = bytearray()
        self.slow = 0
        """Bytes that AsyncSSH delivered."""
        self.ended = asyncio.Event()
        self.more = asyncio.Event()
        self.full = False

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self.slow += len(data)
        self.take([memoryview(data)])

    def take(self, came: list[memoryview]) -> None:
        for data in came:
            self.came += data
        self.more.set()

    def eof_received(self) -> bool:
        self.ended.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    async def has(self, size: int) -> None:
        while len(self.came) < size:
            self.more.clear()
            await self.more.wait()


Made = tuple[asyncssh.SSHClientConnection, asyncssh.SSHClientChannel[bytes], Client]


@asynccontextmanager
async def connected(
    algorithm: str = GCM, server: dict[str, Any] | None = None, **client: Any
) -> AsyncIterator[Made]:
    key = asyncssh.generate_private_key("ssh-ed25519")
    listener = await asyncssh.create_server(
        Server,
        "127.0.0.1",
        0,
        server_host_keys=[key],
        encoding=None,
        encryption_algs=[algorithm],
        **(server or {}),
    )
    trusted = asyncssh.import_known_hosts(f"* {key.export_public_key().decode()}")
    async with asyncio.timeout(DEADLINE):
        connection = await asyncssh.connect(
            "127.0.0.1",
            listener.get_port(),
            known_hosts=trusted,
            config=[],
            client_keys=None,
            compression_algs=None,
            encryption_algs=[algorithm],
            **client,
        )
        try:
            channel, session = await connection.create_session(Client, "echo", encoding=None)
            while channel._recv_paused:  # a lane's channel has carried the handshake by then
                await asyncio.sleep(0)
            yield connection, channel, cast(Client, session)
        finally:
            connection.abort()
            listener.close()
            await listener.wait_closed()


def installed(made: Made, resume: Callable[[], None] = lambda: None) -> FastPath:
    connection, channel, session = made
    path = FastPath.install(connection, channel, session.take, resume)
    assert path is not None, "this AsyncSSH is not as the fast path knows it"
    return path


async def write(path: FastPath, chunks: list[bytes | memoryview]) -> None:
    """As a lane does it: nothing while the path is paused."""
    while path.paused:
        await asyncio.sleep(0.001)
    path.write(chunks)
    await asyncio.sleep(0)


def random_chunks(rng: random.Random) -> list[bytes | memoryview]:
    sizes = [rng.choice([1, 20, 300, 5_000, 32_768, 65_536]) for _ in range(rng.randint(1, 6))]
    return [
        rng.randbytes(size) if rng.random() < 0.5 else memoryview(rng.randbytes(size))
        for size in sizes
    ]


@pytest.mark.parametrize("seed", range(3))
def test_what_goes_in_comes_out(seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        async with connected() as made:
            path, sent = installed(made), bytearray()
            for _ in range(60):
                chunks = random_chunks(rng)
                sent += b"".join(chunks)
                await write(path, chunks)
            await made[2].has(len(sent))
            assert made[2].came == sent
            assert made[2].slow == 0, "all of it came by the fast path"
            made[1].write_eof()
            await made[2].ended.wait()

    run(main)


def test_keys_are_exchanged_again_by_either_side_in_the_middle() -> None:
    async def main() -> None:
        async with connected(server={"rekey_bytes": 700_000}, rekey_bytes=500_000) as made:
            path, rng, sent = installed(made), random.Random(1), bytearray()
            keys = set()
            for _ in range(150):
                chunks = random_chunks(rng)
                sent += b"".join(chunks)
                await write(path, chunks)
                keys.add(path._insides._outgoing.cipher._key)
            await made[2].has(len(sent))
            assert made[2].came == sent
            assert len(keys) > 3, "keys were exchanged"
            assert made[2].slow < len(sent) / 2, "the fast path is found again"

    run(main)


def test_a_window_that_is_full_is_waited_for() -> None:
    """What it has no room for is held, and goes the fast way too."""

    async def main() -> None:
        resumed = asyncio.Event()
        async with connected(server={"window": 100_000}) as made:
            path, data = installed(made, resumed.set), random.Random(2).randbytes(1_500_000)
            path.write([data[:40_000], data[40_000:]])
            assert path.paused
            path.write([b"behind it"])
            await made[2].has(len(data) + 9)
            assert made[2].came == data + b"behind it"
            assert resumed.is_set(), "nobody was told that there is room again"
            assert made[2].slow == 0

    run(main)


def test_what_is_held_is_not_asyncsshs_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with connected(server={"window": 100_000}) as made:
            path = installed(made)

            def slow(data: bytes) -> None:
                raise AssertionError(f"{len(data)} bytes went AsyncSSH's way")

            monkeypatch.setattr(made[1], "write", slow)
            for _ in range(20):
                await write(path, [bytes(60_000)])
            await made[2].has(20 * 60_000)

    run(main)


def test_what_is_held_when_the_channel_closes_is_sent_first() -> None:
    async def main() -> None:
        async with connected(server={"window": 100_000}) as made:
            path, data = installed(made), random.Random(4).randbytes(700_000)
            path.write([data])
            path.close()
            made[1].write_eof()
            await made[2].has(len(data))
            assert made[2].came == data

    run(main)


def test_pieces_of_packets_are_put_together() -> None:
    """The transport's reads end anywhere; here after one byte, and after a few."""

    async def main() -> None:
        async with connected() as made:
            path, rng = installed(made), random.Random(3)
            whole = path.data_received

            def in_pieces(data: bytes) -> None:
                view = memoryview(data)
                while view:
                    size = rng.choice([1, 2, 3, 5, 17, 4_000])
                    whole(bytes(view[:size]))
                    view = view[size:]

            path.data_received = in_pieces  # type: ignore[method-assign]
            data = rng.randbytes(300_000)
            path.write([data])
            await made[2].has(len(data))
            assert made[2].came == data
            assert made[2].slow == 0

    run(main)


def test_a_broken_packet_ends_the_connection() -> None:
    async def main() -> None:
        async with connected() as made:
            path = installed(made)
            whole = path.data_received

            def broken(data: bytes) -> None:
                whole(data[:-1] + bytes([data[-1] ^ 1]))

            path.data_received = broken  # type: ignore[method-assign]
            path.write([b"x" * 1000])
            await made[2].ended.wait()
            assert made[2].came == b""
            with pytest.raises(OSError, match="not open"):
                path.write([b"more"])

    run(main)


def test_no_counter_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AES-GCM that would give the key away; AsyncSSH and the fast path share the counter."""
    used: list[tuple[bytes, bytes]] = []

    async def main() -> None:
        async with connected(rekey_bytes=300_000) as made:
            path, rng, sent = installed(made), random.Random(4), 0
            note(path)
            for turn in range(60):
                chunks = random_chunks(rng)
                sent += sum(map(len, chunks))
                await write(path, chunks)
                if turn % 7 == 0:
                    made[0].send_debug("AsyncSSH's own packet")
            await made[2].has(sent)

    def note(path: FastPath) -> None:
        real = cipher.AESGCM  # type: ignore[attr-defined]

        class Recorder:
            def __init__(self, key: bytes) -> None:
                self.key, self.real = key, real(key)

            def encrypt(self, nonce: bytes, data: bytes, more: bytes) -> bytes:
                if data != TRIAL:  # that never leaves the process
                    used.append((self.key, nonce))
                return bytes(self.real.encrypt(nonce, data, more))

            def decrypt(self, nonce: bytes, data: bytes, more: bytes) -> bytes:
                return bytes(self.real.decrypt(nonce, data, more))

        monkeypatch.setattr(cipher, "AESGCM", Recorder)
        monkeypatch.setattr("rayfwd.ssh.asyncssh_internals.AESGCM", Recorder)
        path._insides._outgoing._encryption = None  # looked at anew

    run(main)
    assert len(used) > 100
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("name", ["chacha20-poly1305@openssh.com", "aes128-ctr"])
def test_another_cipher_goes_asyncsshs_way(name: str) -> None:
    async def main() -> None:
        async with connected(name) as made:
            assert FastPath.install(made[0], made[1], made[2].take, lambda: None) is None
            made[1].write(b"as ever")
            await made[2].has(7)

    run(main)


def test_a_transport_that_is_full_pauses_and_resumes() -> None:
    async def main() -> None:
        resumed = asyncio.Event()
        async with connected(server={"window": 1 << 24}) as made:
            path = installed(made, resumed.set)
            sent = 0
            while not path.paused:  # the loop does not run meanwhile, so that nobody reads
                path.write([bytes(200_000)])
                sent += 200_000
                assert sent < 1 << 24, "it never says that it is full"
            await resumed.wait()
            await made[2].has(sent)

    run(main)
