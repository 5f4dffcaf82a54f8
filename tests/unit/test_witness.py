"""A path that is alive and takes no new connection is told from one that is cut."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing

import pytest

from rayfwd.ssh import dial, witness
from rayfwd.ssh.witness import BARRED_AFTER, Witness
from tests.unit.loops import run


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


def test_a_connection_that_is_answered_outlives_its_owner_until_it_is_dropped() -> None:
    near, far = pair()
    seen = Witness()
    with closing(far):
        seen.hold(near)
        near.close()
        assert not seen.barred(100.0), "it has been alive for no time yet"
        assert not seen.barred(100.0 + BARRED_AFTER / 2)
        assert seen.barred(100.0 + BARRED_AFTER)
        assert not seen.barred(101.0 + BARRED_AFTER), "the next attempt is one of its own"
        far.settimeout(5)
        seen.drop()
        assert far.recv(1) == b""
    assert not seen.barred(200.0)


def test_what_has_been_silent_for_a_while_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = pair()
    seen = Witness()
    ages = [0.1, 5.0, 0.1, 0.1]
    monkeypatch.setattr(witness, "_last_heard", lambda _: ages.pop(0))
    with closing(near), closing(far):
        seen.hold(near)
        assert not seen.barred(0.0)
        assert not seen.barred(BARRED_AFTER), "it was cut again"
        assert not seen.barred(BARRED_AFTER + 1)
        assert seen.barred(2 * BARRED_AFTER + 1)
        seen.drop()


def test_dialling_ends_where_only_old_connections_are_answered() -> None:
    """A listener whose queue is full: the kernel drops what comes, as a firewall does."""

    async def main() -> None:
        near, far = pair()
        seen = Witness()
        seen.hold(near)
        urgent = asyncio.Event()
        urgent.set()
        loop = asyncio.get_running_loop()
        with closing(near), closing(far), socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            in_queue = [socket.create_connection(full.getsockname())]
            found = await loop.getaddrinfo(*full.getsockname(), type=socket.SOCK_STREAM)
            began = loop.time()
            with pytest.raises(dial.BarredError):
                async with asyncio.timeout(20):
                    await dial.connect(found, urgent, None, seen)
            assert loop.time() - began >= BARRED_AFTER
            for one in in_queue:
                one.close()
        seen.drop()

    run(main)
