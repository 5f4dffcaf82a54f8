"""A restart of either side costs no connection: whole daemons, their sessions and sockets.

The process that comes after is the same one here; what it gets comes out of a bundle all the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rayfwd.daemon import handover
from rayfwd.daemon import head as head_module
from rayfwd.daemon import worker as worker_module
from rayfwd.daemon.handover import Arrival
from rayfwd.session.session import Limits
from rayfwd.session.snapshot import MAGIC, SnapshotError, Tree, dump, load
from rayfwd.session.target import Opening, Target
from rayfwd.system import fdpass
from rayfwd.system.notify import Notifier
from rayfwd.transport import link as link_module
from rayfwd.watch import reach
from tests.unit.cluster import echo, goodbye, serving
from tests.unit.daemons import exposed, site
from tests.unit.loops import log_events, of, run, until


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redial fast; there is no Ray, so none is dialled."""
    for name, seconds in {"REDIAL_FIRST": 0.01, "REDIAL_PARKED": 0.02, "REDIAL_LAST": 0.2}.items():
        monkeypatch.setattr(link_module, name, seconds)
    monkeypatch.setattr(reach, "servers", lambda _plan: [])


class Came:
    """Bytes that came back, of all conversations."""

    count = 0


async def converse(listen: Target, seed: int, size: int, done: list[int], came: Came) -> None:
    """Send `size` bytes and their end, read as many back, at a pace that changes."""
    chance = random.Random(seed)
    sent, got = hashlib.sha256(), hashlib.sha256()
    reader, writer = await asyncio.open_connection(*listen, limit=1 << 14)

    async def write() -> None:
        left = size
        while left:
            data = chance.randbytes(min(left, chance.choice((1, 100, 5000, 100_000))))
            left -= len(data)
            sent.update(data)
            writer.write(data)
            await writer.drain()
            if chance.random() < 0.2:
                await asyncio.sleep(0.005)
        writer.write_eof()

    async def read() -> int:
        count = 0
        while data := await reader.read(chance.choice((100, 1 << 14))):
            got.update(data)
            count += len(data)
            came.count += len(data)
            if chance.random() < 0.02:
                await asyncio.sleep(0.02)
        return count

    _, count = await asyncio.gather(write(), read())
    assert count == size
    assert got.digest() == sent.digest()
    done.append(seed)
    await goodbye(writer)


TIGHT = Limits(window=1 << 15, window_ceiling=1 << 18, stream_buffer=1 << 15)


@pytest.mark.parametrize("who", ["head", "w1"])
@pytest.mark.parametrize("limits", [Limits(), TIGHT], ids=["roomy", "tight"])
def test_streams_go_on_through_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str, limits: Limits
) -> None:
    """On every path, at whatever moment: every byte comes out, once, and in order."""
    monkeypatch.setattr(head_module, "Limits", lambda: limits)
    monkeypatch.setattr(worker_module, "Limits", lambda: limits)

    async def main() -> None:
        done: list[int] = []
        async with site(tmp_path, "w1", "w2") as s:
            paths = [s.path("w1", "head"), s.path("head", "w1"), s.path("w1", "w2")]
            await s.start()
            async with (
                serving(echo, exposed(s.head)),
                serving(echo, exposed(s.workers["w1"])),
                serving(echo, exposed(s.workers["w2"])),
                asyncio.TaskGroup() as group,
            ):
                came = Came()
                talks = [
                    group.create_task(converse(listen, seed, 3_000_000, done, came))
                    for seed, listen in enumerate(paths * 3)
                ]
                restarts = 0

                def over() -> bool:
                    return all(talk.done() for talk in talks)

                async def goes_on(more: int) -> None:
                    goal = came.count + more
                    await until(lambda: over() or came.count >= goal, 30)

                while not over():
                    await goes_on(700_000 * (1 + restarts % 4))
                    await s.node(who).restart()
                    await s.ready()  # or a slow machine would do nothing but restart
                    restarts += 1
                assert restarts > 3
            assert len(done) == 9

    run(main, 60)


def of_0_1_0(data: bytes) -> bytes:
    """The same bundle as 0.1.0 wrote it."""
    tree = load(data)
    tree["doors"] = tree.pop("listeners")
    tree["pumps"] = [
        [name, number, at, dialled and list(Opening.decode(dialled).target), rest]
        for name, number, at, dialled, rest in tree.pop("relays")
    ]
    old = bytearray(b"".join(dump(tree)))
    struct.pack_into(">I", old, len(MAGIC), 1)
    return bytes(old)


@pytest.mark.parametrize("who", ["head", "w1"])
def test_streams_go_on_through_an_upgrade_from_0_1_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """It had other words for listeners and relays."""
    opened = handover.opened

    def older(data: bytes, descriptors: list[int], role: str, name: str) -> Arrival:
        return opened(of_0_1_0(data), descriptors, role, name)

    monkeypatch.setattr(handover, "opened", older)

    async def main() -> None:
        done: list[int] = []
        async with site(tmp_path, "w1") as s:
            paths = [s.path("w1", "head"), s.path("head", "w1")]
            await s.start()
            async with (
                serving(echo, exposed(s.head)),
                serving(echo, exposed(s.workers["w1"])),
                asyncio.TaskGroup() as group,
            ):
                came = Came()
                for seed, listen in enumerate(paths):
                    group.create_task(converse(listen, seed, 1_000_000, done, came))
                await until(lambda: came.count > 200_000)
                with log_events() as log:
                    await s.node(who).restart()
                    await s.ready()
                (taken,) = of(log, "handover_taken")
                assert taken["reset"] == 0
                assert taken["streams"] >= 2
            assert len(done) == 2

    run(main, 60)


def test_a_refused_snapshot_resets_every_connection(tmp_path: Path) -> None:
    """What cannot be joined again is reset on both sides, once, and said."""

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            listen = s.path("w1", "head")
            await s.start()
            w1 = s.workers["w1"]
            async with serving(echo, exposed(s.head)):
                reader, writer = await asyncio.open_connection(*listen)
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                with log_events() as log:
                    await w1.restart(
                        lambda tree: tree.update(relays=[["another", 1, None, None, b""]])
                    )
                    with pytest.raises(ConnectionResetError):
                        await reader.read()
                (taken,) = of(log, "handover_taken")
                assert (taken["streams"], taken["reset"]) == (0, 1)
                writer.close()
                session = s.head.head.muxes()["w1"].session
                await until(lambda: list(session.streams) == [0])

    run(main)


class TestParcel:
    def test_everything_comes_in_order_however_much_it_is(self, tmp_path: Path) -> None:
        pairs = [socket.socketpair() for _ in range(300)]
        packed = fdpass.pack([b"some ", memoryview(b"bytes")], [a.fileno() for a, _ in pairs])
        for a, _ in pairs:
            a.close()
        with packed.bundle, packed.other_end:
            unpacked = fdpass.unpack(packed.bundle)
            assert fdpass.unpack(packed.bundle) is None, "it is emptied once"
        assert unpacked is not None
        data, descriptors = unpacked
        assert data == b"some bytes"
        assert len(descriptors) == 300
        for number, (descriptor, (_, b)) in enumerate(zip(descriptors, pairs, strict=True)):
            assert not os.get_inheritable(descriptor)
            with socket.socket(fileno=descriptor) as again, b:
                again.send(b"%d" % number)
                assert b.recv(10) == b"%d" % number

    def test_what_nobody_keeps_is_closed(self) -> None:
        ours, theirs = socket.socketpair()
        packed = fdpass.pack([b""], [ours.fileno()])
        ours.close()
        theirs.setblocking(False)
        with theirs, packed.other_end:
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
            packed.bundle.close()
            assert theirs.recv(1) == b""

    def test_half_of_one_is_refused(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, open(os.devnull, "rb") as file:
            socket.send_fds(ours, [b"some"], [file.fileno()])
            ours.close()
            with pytest.raises(fdpass.BundleError, match="not whole"):
                fdpass.unpack(theirs)


class TestArrival:
    @pytest.mark.parametrize(
        ("tree", "why"),
        [
            (
                {"role": "head", "name": "w1"},
                "it belongs to the head w1, and this is the worker w1",
            ),
            ({}, "it belongs to the None None, and this is the worker w1"),
            ({"role": "worker", "name": "w1", "doors": []}, "it is no bundle of 0.1.0"),
        ],
    )
    def test_that_of_another_node_is_refused(self, tree: Tree, why: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            with pytest.raises(SnapshotError, match=why):
                handover.opened(b"".join(dump(tree)), [ours.detach()], "worker", "w1")
            assert theirs.recv(1) == b""


EXEC = """
import os, sys
from rayfwd.system import fdpass
if "LISTEN_FDS" not in os.environ:
    packed = fdpass.pack([b"from before"], [])
    os.execve(sys.executable, sys.orig_argv, fdpass.start_with(packed.bundle, os.environ))
(found,) = fdpass.received(os.environ)[fdpass.NAME]
print(fdpass.unpack(found), [name for name in os.environ if name.startswith("LISTEN")])
"""


def test_a_parcel_goes_through_exec() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXEC], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr) == ("(b'from before', []) []\n", "")


class Manager:
    """What systemd does with its notification socket, as far as descriptors go."""

    def __init__(self, path: Path, keeps: bool) -> None:
        self.kept: dict[bytes, int] = {}
        self._keeps = keeps
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 10)
            words = dict(line.split(b"=", 1) for line in data.split(b"\n"))
            for descriptor in descriptors:
                if b"FDSTORE" in words and self._keeps:
                    self.kept[words[b"FDNAME"]] = descriptor
                else:
                    os.close(descriptor)
            if b"FDSTOREREMOVE" in words:
                os.close(self.kept.pop(words[b"FDNAME"]))
            if b"STOP" in words:
                return

    def stop(self) -> None:
        self._socket.connect(self._socket.getsockname())
        self._socket.send(b"STOP=1")
        self._thread.join(10)
        self._socket.close()


@pytest.mark.parametrize("keeps", [True, False])
def test_it_is_known_whether_the_service_manager_keeps_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    """Real systemd: tests/systemd. Here is what one does that has no room, or none at all."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    manager, notifier = Manager(tmp_path / "notify", keeps), Notifier()
    try:
        assert handover.can_keep(notifier) is keeps
        packed = fdpass.pack([b"data"], [])
        if keeps:
            handover.keep(packed, notifier)
            (kept,) = manager.kept.values()
            with socket.socket(fileno=kept) as again:
                assert fdpass.unpack(again) == (b"data", [])
        else:
            with pytest.raises(OSError, match="did not accept it"):
                handover.keep(packed, notifier)
    finally:
        notifier.close()
        manager.stop()


def test_where_nobody_listens_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not handover.can_keep(Notifier())
