"""Whose connections the listeners take: real sockets of real users, where the tests run as root."""

from __future__ import annotations

import asyncio
import os
import pwd
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.session.session import Limits
from rayfwd.session.target import Target
from rayfwd.system import descriptors, sockdiag
from rayfwd.system.users import allowed_uids
from rayfwd.transport import acceptor as acceptor_module
from rayfwd.transport import admission as admission_module
from rayfwd.transport import listeners as listeners_module
from rayfwd.transport.admission import GONE, OTHERS, Admission
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.relay import SocketRelay
from tests.unit.cluster import cluster, echo, free_place, goodbye, serving
from tests.unit.loops import Log, log_events, of, run, until
from tests.unit.other_user import NOBODY, OTHER, child, needs_root
from tests.unit.test_client import site

DIAL = """
sock = socket.socket()
sock.settimeout(10)
how, host, port, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for _ in range(count):
    sock = socket.socket()
    sock.settimeout(10)
    try:
        sock.connect((host, port))
        sock.sendall(b"hello")
        if how == "stay":
            print(sock.recv(10).decode() or "closed", flush=True)
        sock.close()
    except ConnectionResetError:
        print("reset", flush=True)
sys.stdin.read()
"""


async def says(listen: Target, uid: int | None, how: str = "stay", count: int = 1) -> list[str]:
    """How it goes for a user who dials there some times and sends `hello`."""

    def ask() -> list[str]:
        with child(DIAL, how, *listen, count, uid=uid) as dialler:
            return [dialler.says() for _ in range(count if how == "stay" else 0)]

    return await asyncio.to_thread(ask)


@asynccontextmanager
async def echoing(directory: Path, admission: Admission | None = None) -> AsyncIterator[Target]:
    """A listener of a worker, to a program on the head that says what it hears."""
    async with cluster(directory, "w1", admission=admission) as c:
        place = Target(c.address, free_place().port)
        async with serving(echo, place):
            yield await c.listener("w1", place)


def refused(log: Log) -> list[tuple[str, int]]:
    return [(entry["user"], entry["count"]) for entry in of(log, "connection_refused")]


class TestWhoIsLetIn:
    def test_our_own_user(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with echoing(tmp_path) as listen:
                assert await says(listen, None) == ["hello"]

        run(main)

    @needs_root
    def test_no_other_user_and_each_is_named_once(self, tmp_path: Path) -> None:
        async def main() -> None:
            with log_events() as log:
                admission = Admission()
                async with echoing(tmp_path, admission) as listen:
                    assert await says(listen, OTHER, count=3) == ["reset"] * 3
                    assert await says(listen, NOBODY, count=2) == ["reset"] * 2
                    assert await says(listen, None) == ["hello"]
                assert admission.refused == {str(OTHER): 3, "nobody": 2}
            assert refused(log) == [(str(OTHER), 1), ("nobody", 1)]
            (first, _) = of(log, "connection_refused")
            assert first["listen"] == f"{listen.address}:{listen.port}"
            assert "listeners.users" in first["remedy"]

        run(main)

    @needs_root
    def test_root_and_who_is_named_where_the_daemon_is_an_ordinary_user(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        daemon, nobody = pwd.getpwnam("daemon").pw_uid, NOBODY
        monkeypatch.setattr(os, "geteuid", lambda: daemon)
        admission = Admission(allowed_uids(["nobody"], "listeners.users"))
        monkeypatch.undo()

        async def main() -> None:
            async with echoing(tmp_path, admission) as listen:
                for uid in (0, nobody, daemon):
                    assert await says(listen, uid) == ["hello"]
                assert await says(listen, OTHER) == ["reset"]
                admission.take_uids([OTHER])  # the file was read again
                assert await says(listen, OTHER) == ["hello"]
                assert await says(listen, nobody) == ["reset"]

        run(main)

    @needs_root
    def test_nobody_who_is_gone_before_he_is_looked_at(self, tmp_path: Path) -> None:
        """The kernel knows of no owner of what its program has closed; older ones say root."""

        async def main() -> None:
            heard = []

            async def listening(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                heard.append(await reader.read(100))

            admission = Admission()
            async with cluster(tmp_path, "w1", admission=admission) as c:
                place = Target(c.address, free_place().port)
                async with serving(listening, place):
                    listen = await c.listener("w1", place)
                    # Nothing is accepted meanwhile: the loop does not turn.
                    with child(DIAL, "leave", *listen, 20, uid=NOBODY):
                        pass
                    await until(lambda: admission.refused[GONE] == 20)
            assert heard == []

        run(main)

    def test_who_was_redirected_and_has_another_port_of_origin_here(self) -> None:
        """The rule has looked at the user. What was not redirected is refused without an owner."""
        admission = Admission()
        admission.open()
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname()):
                connection, _ = server.accept()
            with connection:
                elsewhere = "127.77.0.3", 20000
                assert admission.admit(connection, elsewhere) is not None
                assert admission.admit(connection, server.getsockname()) is None
                assert admission.admit(connection) is None
        admission.close()
        assert admission.refused == {GONE: 2}

    @needs_root
    def test_of_one_user_no_more_than_his_share(self, tmp_path: Path) -> None:
        async def main() -> None:
            admission = Admission([OTHER], most_of_one=2)
            async with echoing(tmp_path, admission) as listen:
                with child(HOLD, *listen, 4, uid=OTHER) as holder:
                    said = [await asyncio.to_thread(holder.says) for _ in range(4)]
                    assert said == ["hello", "hello", "reset", "reset"]
                    assert await says(listen, None) == ["hello"]
                await until(lambda: not admission._open[OTHER])
                assert await says(listen, OTHER) == ["hello"]
                assert admission.refused == {str(OTHER): 2}

        run(main)


HOLD = """
held = []
for _ in range(int(sys.argv[3])):
    sock = socket.socket()
    held.append(sock)
    try:
        sock.connect((sys.argv[1], int(sys.argv[2])))
        sock.sendall(b"hello")
        print(sock.recv(10).decode() or "closed", flush=True)
    except ConnectionResetError:
        print("reset", flush=True)
sys.stdin.read()
"""


class TestWhatIsSaid:
    def test_who_is_still_refused_is_named_again_later(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 1000.0
        admission = Admission(clock=lambda: now)
        with log_events() as log, socket.socket() as near:
            for _ in range(3):
                admission._refuse("eve", near, "remedy")
            now += admission_module.LOG_INTERVAL - 1
            admission._refuse("eve", near, "remedy")
            now += 1
            admission._refuse("eve", near, "remedy")
        assert refused(log) == [("eve", 1), ("eve", 5)]

    def test_users_are_counted_in_a_table_of_bounded_size(self) -> None:
        admission = Admission()
        with log_events() as log, socket.socket() as near:
            for number in range(500):
                admission._refuse(str(number), near, "remedy")
        assert len(admission.refused) == admission_module.MOST_USERS + 1
        assert admission.refused[OTHERS] == 500 - admission_module.MOST_USERS
        assert len(refused(log)) == admission_module.MOST_USERS + 1

    @needs_root
    def test_where_the_kernel_cannot_be_asked_all_are_let_in_and_that_is_said_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forbidden() -> sockdiag.SockDiag:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(sockdiag, "opened", forbidden)

        async def main() -> None:
            with log_events() as log:
                async with echoing(tmp_path) as listen:
                    assert await says(listen, NOBODY, count=3) == ["hello"] * 3
            said = of(log, "peer_check_absent")
            assert len(said) == 2, "once for each of the test's two nodes"
            assert "AF_NETLINK" in said[0]["remedy"]

        run(main)


class TestFewStreams:
    """The side that opens streams keeps to what the other side takes."""

    @pytest.mark.parametrize("near", ["head", "w1"])
    def test_a_session_that_is_full_refuses_at_the_listener(
        self, tmp_path: Path, near: str
    ) -> None:
        async def main() -> None:
            limits = Limits(streams=6)
            with log_events() as log:
                async with cluster(tmp_path, "w1", limits=limits) as c:
                    far = "w1" if near == "head" else "head"
                    place = Target(c.address_of(far), free_place().port)
                    listen = await c.listener(near, place)
                    async with serving(echo, place):
                        held = [await held_open(listen) for _ in range(30)]
                        served = [one for one in held if one is not None]
                        assert len(served) == 5, "one of the six is the control stream"
                        for writer in served:
                            await goodbye(writer)
                        await until(lambda: c.hub.nodes["w1"].mux.session.full is False)  # type: ignore[union-attr]
                        again = await held_open(listen)
                        assert again is not None
                        await goodbye(again)
                    assert c.workers["w1"].changes == [], "the session goes on"
            assert len(of(log, "session_full")) == 1
            assert of(log, "session_broken") == []

        run(main)

    def test_one_between_workers_is_refused_by_the_hub(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1", "w2", "w3", limits=Limits(streams=6)) as c:
                place = Target(c.address_of("w3"), free_place().port)
                one, two = await c.listener("w1", place), await c.listener("w2", place)
                async with serving(echo, place):
                    held = [await held_open(at) for _ in range(5) for at in (one, two)]
                    served = [writer for writer in held if writer is not None]
                    assert len(served) == 5
                    for writer in served:
                        await goodbye(writer)
                assert [worker.changes for worker in c.workers.values()] == [[], [], []]

        run(main)


async def held_open(listen: Target) -> asyncio.StreamWriter | None:
    """A connection that is served; None: it was reset."""
    try:
        reader, writer = await asyncio.open_connection(*listen)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
    except ConnectionError:
        return None
    return writer


class TestFewDescriptors:
    def test_a_listener_that_cannot_be_opened_for_want_of_one_ends_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor where there is not even the reserve."""
        monkeypatch.setattr(listeners_module, "RETRY_LAST", 0.05)

        async def main() -> None:
            listeners = Listeners(lambda _target, relay: relay.refuse())
            running = asyncio.create_task(listeners.run())
            places = [free_place() for _ in range(100)]
            await asyncio.sleep(0)  # it can ask the kernel
            before = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free() + 5, before[1]))
            monkeypatch.setattr(descriptors, "reserve", lambda: 1 << 20)
            try:
                listeners.set_wanted({place: place for place in places})
                await until(lambda: listeners.blocked)
                assert listeners.open == 5
                assert {p.code for p in listeners.blocked} == {codes.DESCRIPTORS_EXHAUSTED}
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            await until(lambda: listeners.open == 100)
            assert not running.done()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        run(main)

    def test_listeners_leave_the_reserve_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            listeners = Listeners(lambda _target, relay: relay.refuse())
            running = asyncio.create_task(listeners.run())
            await asyncio.sleep(0)
            free = lowest_free()
            monkeypatch.setattr(descriptors, "reserve", lambda: free + 10)
            places = [free_place() for _ in range(20)]
            listeners.set_wanted({place: place for place in places})
            await until(lambda: listeners.blocked)
            assert listeners.open == 10
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        run(main)

    def test_new_connections_wait_while_only_the_reserve_is_left(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the kernel: nobody is refused."""
        monkeypatch.setattr(acceptor_module, "CHECK_INTERVAL", 0.05)

        async def main() -> None:
            came: list[SocketRelay] = []
            listeners = Listeners(lambda _target, relay: came.append(relay))
            running = asyncio.create_task(listeners.run())
            listen = free_place()
            listeners.set_wanted({listen: listen})
            await until(lambda: listeners.open)
            with log_events() as log, child(CONNECT, *listen, 40) as holder:
                limit, looks = (lowest_free() + 15) * 10 // 9, 0

                def look() -> int:
                    nonlocal looks
                    looks += 1
                    return limit

                monkeypatch.setattr(descriptors, "limit", look)
                assert await asyncio.to_thread(holder.says) == "40 connected"
                await until(lambda: listeners.problems)
                (problem,) = listeners.problems
                assert problem.code == codes.DESCRIPTORS_EXHAUSTED
                before = looks
                await until(lambda: looks > before + 3)  # to no avail
                assert 0 < len(came) < 40
                assert listeners.problems
                monkeypatch.setattr(descriptors, "limit", lambda: 1 << 20)
                await until(lambda: len(came) == 40)
                assert not listeners.problems
                for relay in came:
                    relay.refuse()
            assert len(of(log, "descriptors_exhausted")) == 1
            assert len(of(log, "descriptors_there")) == 1
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        run(main)


CONNECT = """
held = [socket.create_connection((sys.argv[1], int(sys.argv[2]))) for _ in range(int(sys.argv[3]))]
print(len(held), "connected", flush=True)
sys.stdin.read()
"""


def lowest_free() -> int:
    number = os.dup(0)
    os.close(number)
    return number


class TestAClient:
    @needs_root
    def test_its_ports_are_for_its_own_user(self, tmp_path: Path) -> None:
        async def main() -> None:
            ports = [free_place().port, free_place().port]
            with log_events() as log:
                async with site(tmp_path, ports) as s:
                    await s.start()
                    await s.connected()
                    async with serving(echo, Target(s.head.address, 8265)):
                        at = Target("127.0.0.1", ports[0])
                        assert await says(at, None) == ["hello"]
                        assert await says(at, NOBODY) == ["reset"]
            assert refused(log) == [("nobody", 1)]

        run(main)

    @needs_root
    def test_and_for_those_that_its_file_names(self, tmp_path: Path) -> None:
        async def main() -> None:
            ports = [free_place().port, free_place().port]
            async with site(tmp_path, ports) as s:
                await s.start(listeners={"users": ["nobody"]})
                await s.connected()
                async with serving(echo, Target(s.head.address, 8265)):
                    assert await says(Target("127.0.0.1", ports[0]), NOBODY) == ["hello"]

        run(main)
