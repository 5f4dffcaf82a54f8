"""Listening sockets in the service manager's store: real sockets, and a manager of this test's."""

from __future__ import annotations

import array
import asyncio
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayfwd.session.target import Target
from rayfwd.system import fdstore
from rayfwd.system.fdstore import FdStore
from rayfwd.system.notify import Notifier
from rayfwd.transport.listeners import Listeners
from tests.unit.cluster import free_place
from tests.unit.loops import log_events, of, run, until


class Manager:
    """What systemd does with FDSTORE and FDSTOREREMOVE (sd_pid_notify_with_fds(3))."""

    def __init__(self, path: Path) -> None:
        self.store: dict[str, list[socket.socket]] = {}
        self.least = 99
        """How many were there at the least, after the first."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def work(self) -> None:
        """Take what came."""
        while True:
            try:
                data, control, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(64))
            except BlockingIOError:
                return
            words = dict(line.split("=", 1) for line in data.decode().splitlines())
            for _, _, passed in control:
                for descriptor in array.array("i", passed):
                    assert (words["FDSTORE"], words["FDPOLL"]) == ("1", "0")
                    stored = self.store.setdefault(words["FDNAME"], [])
                    stored.append(socket.socket(fileno=descriptor))
            if words.get("FDSTOREREMOVE") == "1":
                for each in self.store.pop(words["FDNAME"], []):
                    each.close()
            if self.store or self.least < 99:
                self.least = min(self.least, sum(map(len, self.store.values())))

    def given(self) -> list[socket.socket]:
        """What the next process is started with: its own, of what is kept."""
        self.work()
        return [each.dup() for stored in self.store.values() for each in stored]

    def forget(self) -> None:
        """All of it is closed, as it is when the service is stopped."""
        self.work()
        for stored in self.store.values():
            for each in stored:
                each.close()
        self.store.clear()

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self.forget()
            self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield made
    made.close()


def taken(place: Target) -> bool:
    """Whether somebody else is kept from listening there."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(place)
            other.listen()
        except OSError as exc:
            return exc.errno == errno.EADDRINUSE
    return False


class Process:
    """A daemon's listeners, without the daemon."""

    def __init__(self) -> None:
        self.notifier = Notifier()
        self.listeners = Listeners(lambda _target, relay: relay.refuse())
        self.listeners.keep = FdStore(self.notifier).keep
        self.running: asyncio.Task[None] | None = None

    async def start(self, given: list[socket.socket]) -> None:
        held = fdstore.held(given)
        self.listeners.inherit({Target(*place): sock for place, sock in held.items()})
        self.running = asyncio.create_task(self.listeners.run())
        await asyncio.sleep(0)  # it begins

    async def crash(self) -> None:
        """Whatever it had open is closed, and nothing is told."""
        assert self.running is not None
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        self.notifier.close()


def test_they_outlive_a_crash_and_go_to_the_next_process(manager: Manager) -> None:
    async def main() -> None:
        one, two = free_place(), free_place()
        first = Process()
        await first.start([])
        first.listeners.set_wanted({one: one})
        await until(lambda: first.listeners.open == 1)
        first.listeners.set_wanted({one: one, two: two})
        await until(lambda: first.listeners.open == 2)
        manager.work()
        assert manager.least == 1, "one set is there at every moment"
        await first.crash()
        assert taken(one)
        assert taken(two)
        with socket.create_connection(one):
            pass  # it waits in the kernel for the next process

        second = Process()
        given = manager.given()
        assert len(given) == 1
        await second.start(given)
        await second.crash()
        manager.work()
        assert taken(two), "also where that ends before it knows which listeners there are to be"

        third = Process()
        await third.start(manager.given())
        third.listeners.set_wanted({one: one})
        await until(lambda: third.listeners.open == 1)
        assert not third.listeners.blocked
        assert not taken(two), "what is no longer wanted is closed, for the manager as well"
        manager.work()
        (last,) = [each for stored in manager.store.values() for each in stored]
        assert [Target(*place) for place in keys(last)] == [one]
        third.listeners.set_wanted({})
        await until(lambda: third.listeners.open == 0)
        assert not taken(one)
        manager.work()
        assert not manager.store
        await third.crash()

    run(main)


def keys(bundle: socket.socket) -> list[tuple[str, int]]:
    found = fdstore.held([bundle.dup()])
    for sock in found.values():
        sock.close()
    return list(found)


def test_a_listener_that_is_wanted_no_more_ends_at_once_though_it_is_held(
    manager: Manager,
) -> None:
    """The manager reads its mail when it likes."""

    async def main() -> None:
        place = free_place()
        process = Process()
        await process.start([])
        process.listeners.set_wanted({place: place})
        await until(lambda: process.listeners.open == 1)
        manager.work()
        process.listeners.set_wanted({})
        await until(lambda: process.listeners.open == 0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(place)
        assert not taken(place)
        await process.crash()
        manager.forget()

    run(main)


def test_what_is_no_bundle_is_left_out() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.send(b"what is this")
    with log_events() as log, far:
        assert fdstore.held([near]) == {}
    assert len(of(log, "listeners_not_held")) == 1


def test_without_a_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    with log_events() as log, socket.socket() as sock:
        FdStore(Notifier()).keep([sock])
    assert log == []


def test_a_manager_that_is_gone_is_said(manager: Manager) -> None:
    notifier = Notifier()
    manager.close()
    with log_events() as log, socket.socket() as sock:
        FdStore(notifier).keep([sock])
    assert len(of(log, "listeners_not_held")) == 1
    notifier.close()
