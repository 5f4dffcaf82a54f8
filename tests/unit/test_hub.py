"""The hub on a real socket: whom it welcomes, whom it refuses and why; that none can hurt it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.daemon.handover import ACCEPT_TURNS
from rayfwd.hub import Hub
from rayfwd.hub import connection as connection_module
from rayfwd.hub.pending import MAX_UNGREETED
from rayfwd.problems import ProblemError
from rayfwd.session import checks, messages
from rayfwd.session.events import Parked, Resumed, SessionEnded
from rayfwd.session.frames import Kind, encode
from rayfwd.session.handshake import Hello, Refusal, Welcome
from rayfwd.session.session import MOST_LANES
from rayfwd.session.target import Target
from rayfwd.system.users import allowed_uids
from tests.unit.cluster import (
    BULK,
    Cluster,
    Worker,
    answer_to,
    cluster,
    connect_and_read,
    echo,
    hello_of,
    knock,
    serving,
)
from tests.unit.loops import log_events, of, until
from tests.unit.loops import run as run_in_real_time
from tests.unit.loops import run_on_fake_clock as run

CODES = {
    "frame_unknown", "frame_too_long", "handshake_expected", "protocol_version",
    "hello_malformed", "join_bad", "name_taken",
}  # fmt: skip
"""Refusals that bytes without a good key can lead to."""


async def works(c: Cluster, name: str) -> bool:
    """A connection from a worker to the head passes bytes."""
    listeners = c.workers[name].listeners
    place = Target(c.address, 6379)
    listen = next((x for x, to in listeners._wanted.items() if to == place), None)
    listen = listen or await c.listener(name, place)
    async with serving(echo, place):
        reader, writer = await asyncio.open_connection(*listen)
        writer.write(b"hello")
        writer.write_eof()
        got = await reader.read()
        writer.close()
        await writer.wait_closed()
    return got == b"hello"


async def refusal(c: Cluster, hello: Hello) -> str:
    """The code with which a hello is refused; empty if it is welcomed."""
    answer = await answer_to(c.hub.socket.path, hello.encode())
    assert answer is not None
    return answer.problem.code.name if isinstance(answer, Refusal) else ""


def test_a_worker_is_welcomed_with_the_plan(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1", "w2") as c:
            welcome = c.workers["w2"].welcome
            assert welcome is not None
            assert welcome.node["name"] == "w2"
            assert [n["name"] for n in welcome.nodes] == ["head", "w1", "w2"]
            assert len({n["address"] for n in welcome.nodes}) == 3
            assert (welcome.ray, welcome.python) == ("2.60.0", "3.11")
            await until(lambda: c.workers["w1"].messages)
            told = c.workers["w1"].messages[0]
            assert isinstance(told, messages.Nodes)
            assert [n["name"] for n in told.nodes] == ["head", "w1", "w2"]
            assert c.hub.nodes["w1"].state == "up"
            assert await works(c, "w1")

    run(main)


def test_messages_pass_both_ways(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1") as c:
            worker = c.workers["w1"]
            assert worker.mux is not None
            said, told = messages.Ray("up", None, "3.11"), messages.Cluster({"x": "ä" * 70_000})
            worker.mux.send_message(said)
            c.hub.tell_all(told)
            await until(lambda: c.messages and worker.messages)
            assert c.messages == [("w1", said)]
            assert worker.messages == [told]

    run(main)


def test_a_message_that_is_too_long_is_left_out_and_said(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1") as c:
            with log_events() as log:
                c.hub.tell_all(messages.Cluster({"text": "\U0001f4a5" * 90_000}))
                c.hub.tell_all(messages.Cluster({"text": "short"}))
                await until(lambda: c.workers["w1"].messages)
            (said,) = of(log, "message_too_long")
            assert (said["type"], said["most"]) == ("cluster", 1 << 20)
            assert c.workers["w1"].messages == [messages.Cluster({"text": "short"})]

    run(main)


def test_bytes_right_behind_the_hello_are_the_sessions(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as c:
            hello = hello_of("w1").encode()
            body = json.dumps({"type": "ray", "phase": "up"}).encode()
            message = len(body).to_bytes(4, "big") + body
            lane = await knock(c.hub.socket.path, hello + encode(Kind.DATA, 0, 0, message))
            await until(lambda: c.messages)
            assert c.messages == [("w1", messages.Ray("up", None, None))]
            lane.close()
            await lane.closed

    run(main)


def test_a_farewell_is_heard_where_a_write_meets_the_closed_socket_first(tmp_path: Path) -> None:
    """sshd closes the socket behind a CLOSE; the hub may write before it reads."""

    async def main() -> None:
        async with cluster(tmp_path) as c:
            reader, writer = await asyncio.open_unix_connection(c.hub.socket.path)
            writer.write(hello_of("w1").encode())
            await until(lambda: c.hub.nodes.get("w1") and c.hub.nodes["w1"].state == "up")
            await reader.read(1)
            with log_events() as log:
                raw = os.dup(writer.get_extra_info("socket").fileno())
                os.write(raw, encode(Kind.CLOSE, payload=b"the worker stops"))
                os.close(raw)
                writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
                # No turn of the loop since: nothing of it is read yet.
                c.hub.tell_all(messages.Cluster({}))
                await until(lambda: c.hub.nodes["w1"].state == "down")
            assert [e["cause"] for e in of(log, "session_ended")] == ["the worker stops"]
            assert of(log, "lane_lost") == []
            writer.close()

    run(main)


class TestRefusals:
    def test_each_has_its_code(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c:
                w1 = c.workers["w1"] = Worker("w1", c.hub.socket.path, c.limits)
                w1.hello = replace(w1.hello, session="100", advertise="203.0.113.7")
                await w1.connect()
                cases = {
                    "name_taken": hello_of("w1", key="another key".ljust(32)),
                    "join_bad": hello_of("no name"),
                    "address_taken": hello_of("w2", advertise="203.0.113.7"),
                    "session_unknown": hello_of("w3", resumes=True),
                    "session_stale": replace(w1.hello, session="ff"),
                    "name_in_use": replace(w1.hello, session="101"),
                }
                for code, hello in cases.items():
                    assert await refusal(c, hello) == code
                assert await refusal(c, hello_of("head")) == "name_taken"
                assert await refusal(c, hello_of("w4", key="short")) == "join_bad"
                assert await refusal(c, hello_of("w4", advertise="127.0.0.1")) == "join_bad"
                assert await refusal(c, hello_of("w4", advertise="a.example")) == "join_bad"
                newer = encode(Kind.HELLO, 0, 2, hello_of("w5").encode()[20:])
                answer = await answer_to(c.hub.socket.path, newer)
                assert isinstance(answer, Refusal)
                assert answer.problem.code == codes.PROTOCOL_VERSION
                assert c.hub.nodes["w1"].state == "up"
                assert w1.changes == []

        run(main)

    def test_each_is_logged_with_its_cause_and_without_the_key(self, tmp_path: Path) -> None:
        async def main() -> None:
            with log_events() as log:
                async with cluster(tmp_path, "w1") as c:
                    await refusal(c, hello_of("w1", key="a wrong secret".ljust(32, "!")))
            (entry,) = of(log, "lane_refused")
            assert entry["code"] == "name_taken"
            assert "w1" in entry["cause"]
            assert "secret" not in repr(log)
            assert "the key of" not in repr(log)

        run(main)

    def test_who_says_nothing_is_dropped(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                for first in (b"", hello_of("w2").encode()[:-1]):
                    answer = await answer_to(c.hub.socket.path, first)
                    assert isinstance(answer, Refusal)
                    assert answer.problem.code == codes.HELLO_MISSING
                await asyncio.sleep(2 * connection_module.HELLO_TIMEOUT)
                assert c.hub.nodes["w1"].state == "up", "who was welcomed is left alone"

        run(main)

    def test_too_many_who_say_nothing_are_closed_and_hurt_nobody(self, tmp_path: Path) -> None:
        """The oldest make room: who comes then is let in, again and again."""

        async def main() -> None:
            with log_events() as log:
                async with cluster(tmp_path, "w1") as c:
                    lanes = [await knock(c.hub.socket.path) for _ in range(MAX_UNGREETED + 8)]
                    await until(lambda: sum(lane.closed.done() for lane in lanes) >= 8)
                    assert await works(c, "w1")
                    gone = [lane.closed.done() for lane in lanes]
                    assert gone == [True] * 8 + [False] * MAX_UNGREETED
                    assert not await refusal(c, hello_of("w3"))
                    assert len(of(log, "hub_crowded")) == 1, "said once in a minute"
                    for lane in lanes:
                        lane.close()
                        await lane.closed
                    await c.worker("w2")
                    again = [await knock(c.hub.socket.path) for _ in range(MAX_UNGREETED)]
                    await asyncio.sleep(connection_module.HELLO_TIMEOUT / 2)
                    assert not any(lane.closed.done() for lane in again), "who went still counts"

        run(main)

    def test_lanes_have_a_number(self, tmp_path: Path) -> None:
        """Each frame costs time for every lane of its session."""

        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                hello = replace(hello_of("w1"), session=c.hub.nodes["w1"].session, resumes=True)
                more = [await knock(c.hub.socket.path, hello.encode()) for _ in range(MOST_LANES)]
                frames = [await lane.answer for lane in more]
                answers = [frame.kind for frame in frames if frame is not None]
                assert answers.count(Kind.WELCOME) == MOST_LANES - 2, "it had two"
                assert answers.count(Kind.REFUSE) == 2
                assert await works(c, "w1")
                for lane in more:
                    lane.close()

        run(main)

    def test_who_does_not_read_is_cut(self, tmp_path: Path) -> None:
        """Also where bytes wait that it never takes, and its session is over: nothing is left."""

        async def main() -> None:
            async with cluster(tmp_path) as c:
                lane = await knock(c.hub.socket.path, hello_of("w5").encode())
                await lane.answer
                assert lane.transport is not None
                lane.transport.pause_reading()
                mux = c.hub.nodes["w5"].mux
                assert mux is not None
                (ours,) = (record.transport for record in mux.lanes.values())
                assert isinstance(ours, connection_module.HubConnection)
                ours.write([bytes(8 << 20)])
                mux.close("nobody looks after its lanes any more")
                await asyncio.sleep(2 * connection_module.CLOSE_TIMEOUT)
                assert ours._transport is None, "it is gone"
                lane.transport.abort()

        run(main)

    def test_any_bytes_lead_to_a_refusal_or_a_close(self, tmp_path: Path) -> None:
        rng = random.Random(2)
        good = hello_of("w1", key="another".ljust(32)).encode()

        def some_bytes() -> bytes:
            match rng.randrange(4):
                case 0:
                    return rng.randbytes(rng.choice((1, 19, 20, 21, 200)))
                case 1:  # a hello with some bytes changed
                    data = bytearray(good)
                    for _ in range(rng.choice((1, 2, 5))):
                        data[rng.randrange(len(data))] = rng.randrange(256)
                    return bytes(data)
                case 2:  # a hello with a field changed
                    body = json.loads(good[20:])
                    values: tuple[object, ...] = (
                        None,
                        5,
                        "",
                        "x" * 99,
                        [],
                        {},
                        "\ud800" * 20,
                        10**400,
                    )
                    body[rng.choice(list(body))] = rng.choice(values)
                    body["key"] = rng.choice((body["key"], "\ud800" * 40))
                    return encode(Kind.HELLO, 0, 1, json.dumps(body).encode())
                case _:
                    kind = rng.choice(list(Kind))
                    return encode(kind, rng.getrandbits(64), rng.randrange(3), rng.randbytes(30))

        async def main() -> None:
            said = set()
            async with cluster(tmp_path, "w1") as c:
                for _ in range(400):
                    lane = await knock(c.hub.socket.path, some_bytes())
                    assert lane.transport is not None
                    if not lane.transport.is_closing():
                        lane.transport.write_eof()
                    async with asyncio.timeout(5):
                        frame = await lane.answer
                        await lane.closed
                    if frame is not None and frame.kind is Kind.REFUSE:
                        said.add(Refusal.decode(frame).problem.code.name)
                assert c.workers["w1"].changes == []
                assert await works(c, "w1")
            assert said <= CODES, said - CODES
            assert len(said) >= 5

        run(main)


class TestUsers:
    SCRIPT = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as sock:
    try:
        sock.connect(sys.argv[1])
    except OSError as exc:
        print(type(exc).__name__)
    else:
        sock.settimeout(10)
        data = b""
        while more := sock.recv(65536):
            data += more
        sys.stdout.buffer.write(data)
"""

    @pytest.fixture
    def open_directory(self) -> Iterator[Path]:
        """A directory that other users can enter."""
        with tempfile.TemporaryDirectory(prefix="rayfwd-hub-") as name:
            os.chmod(name, 0o755)
            yield Path(name)

    def as_nobody(self, path: Path) -> bytes:
        done = subprocess.run(
            [sys.executable, "-c", self.SCRIPT, str(path)], capture_output=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def hub(self, directory: Path, users: tuple[str, ...]) -> Hub:
        c = Cluster(directory)
        return Hub(c, c.hub.socket.path, c.roster, users, "127.77.0.0/16", 60.0, c.limits)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
    def test_a_stranger_is_told_so_where_several_users_are_allowed(
        self, open_directory: Path
    ) -> None:
        async def main() -> None:
            hub = self.hub(open_directory, ("daemon",))
            await hub.start()
            data = await asyncio.to_thread(self.as_nobody, hub.socket.path)
            await hub.close("over")
            assert data[0] == Kind.REFUSE
            said = json.loads(data[20:])
            assert said["code"] == "user_not_allowed"
            assert "nobody" in said["cause"]
            assert "hub.users" in said["remedy"]

        run_in_real_time(main)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
    def test_a_named_user_may_stay(
        self, open_directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection_module, "HELLO_TIMEOUT", 0.3)

        async def main() -> None:
            hub = self.hub(open_directory, ("nobody",))
            await hub.start()
            data = await asyncio.to_thread(self.as_nobody, hub.socket.path)
            await hub.close("over")
            assert json.loads(data[20:])["code"] == "hello_missing"

        run_in_real_time(main)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
    def test_where_no_user_is_named_others_cannot_even_connect(self, open_directory: Path) -> None:
        async def main() -> None:
            hub = self.hub(open_directory, ())
            await hub.start()
            assert os.stat(hub.socket.path).st_mode & 0o777 == 0o600
            said = await asyncio.to_thread(self.as_nobody, hub.socket.path)
            await hub.close("over")
            assert said.strip() == b"PermissionError"

        run_in_real_time(main)

    STALLER = """
import os, socket, sys, time
os.setgroups([]); os.setgid(65534); os.setuid(65534)
near, into = os.pipe()
out, far = os.pipe()
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    socket.send_fds(sock, [bytes.fromhex(sys.argv[2])], [near, far])
    taken = sock.recv(1) == bytes(1)
    os.set_blocking(far, True)
    os.set_blocking(near, True)
    os.write(into, bytes.fromhex(sys.argv[3]))
    if taken:
        os.read(out, 30000)
    time.sleep(3)
print(taken)
"""

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
    def test_a_named_user_cannot_make_the_hub_wait(self, open_directory: Path) -> None:
        """By descriptors that are passed, and made ones that wait afterwards."""
        check = checks.first_question(hello_of("slow"))
        ask = checks.talk({"ask": "send", "bytes": checks.MOST_FILLER})

        async def main() -> None:
            hub = self.hub(open_directory, ("nobody",))
            await hub.start()
            words = [str(hub.socket.path), check.hex(), ask.hex()]
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", self.STALLER, *words), stdout=subprocess.PIPE
            )
            turned = asyncio.get_running_loop().time()
            longest = 0.0
            ended = asyncio.create_task(child.communicate())
            while not ended.done():
                await asyncio.sleep(0.01)
                now = asyncio.get_running_loop().time()
                longest, turned = max(longest, now - turned), now
            out, _ = ended.result()
            await hub.close("over")
            assert longest < 1.0, f"the loop stood for {longest} s"
            assert out == b"False\n"

        run_in_real_time(main)

    def test_an_unknown_user_is_a_problem_with_a_remedy(self) -> None:
        assert allowed_uids([], "hub.users") == {0, os.geteuid()}
        with pytest.raises(ProblemError) as caught:
            allowed_uids(["no-such-user"], "hub.users")
        assert caught.value.problem.code == codes.USER_UNKNOWN
        assert "no-such-user" in caught.value.problem.cause


class TestSessions:
    def test_a_session_outlives_its_lanes(self, tmp_path: Path) -> None:
        async def main() -> None:
            with log_events() as log:
                async with cluster(tmp_path, "w1") as c:
                    worker, node = c.workers["w1"], c.hub.nodes["w1"]
                    place = Target(c.address, 6379)
                    listen = await c.listener("w1", place)
                    async with serving(echo, place):
                        reader, writer = await asyncio.open_connection(*listen)
                        writer.write(b"before ")
                        assert await reader.readexactly(7) == b"before "
                        worker.cut()
                        await until(lambda: node.state == "parked")
                        writer.write(b"while ")
                        await worker.connect()
                        writer.write(b"after")
                        writer.write_eof()
                        assert await reader.read() == b"while after"
                        writer.close()
                        await writer.wait_closed()
                    past = node.link_stats
                    assert (node.state, past.cuts, past.ridden_through) == ("up", 1, 1)
                    assert [type(change) for change in worker.changes] == [Parked, Resumed]
            assert len(of(log, "link_parked")) == len(of(log, "link_resumed")) == 1

        run(main)

    def test_after_ride_through_the_session_ends_and_a_new_one_begins(self, tmp_path: Path) -> None:
        async def main() -> None:
            with log_events() as log:
                async with cluster(tmp_path, "w1", ride_through=1.0) as c:
                    worker, node = c.workers["w1"], c.hub.nodes["w1"]
                    worker.cut()
                    await until(lambda: node.state == "down")
                    await until(lambda: worker.mux is None or worker.mux.ended)
                    assert isinstance(worker.changes[-1], SessionEnded)
                    resumed = replace(worker.hello, resumes=True)
                    assert await refusal(c, resumed) == "session_unknown"
                    worker.mux = None
                    worker.hello = replace(worker.hello, session=hello_of("x").session)
                    await worker.connect()
                    assert node.state == "up"
                    assert await works(c, "w1")
                    assert len(of(log, "session_ended")) == 1

        run(main)

    def test_a_restarted_worker_replaces_its_old_session(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                old = c.workers["w1"]
                old.cut()
                await until(lambda: c.hub.nodes["w1"].state == "parked")
                new = await c.worker("w1")
                assert new.address == old.address
                assert c.hub.nodes["w1"].state == "up"
                assert await works(c, "w1")
                await old.close()

        run(main)

    @pytest.mark.parametrize("cut", [True, False])
    def test_a_clock_that_was_set_back_keeps_nobody_out(self, tmp_path: Path, cut: bool) -> None:
        """With the old session silent for a while the new one wins, whatever its number."""

        async def main() -> None:
            async with cluster(tmp_path) as c:
                old = c.workers["w1"] = Worker("w1", c.hub.socket.path, c.limits)
                old.hello = replace(old.hello, session="100")
                await old.connect()
                node = c.hub.nodes["w1"]
                if cut:
                    old.cut()
                    await until(lambda: node.state == "parked")
                earlier = replace(old.hello, session="ff")
                assert await refusal(c, earlier) == "session_stale"
                assert node.mux is not None
                if cut:
                    await asyncio.sleep(4.0)
                else:
                    # As if its machine had stood still: the lane is there, and nothing came.
                    node.mux.session.lanes[1].heard -= 4.0
                assert await refusal(c, earlier) == ""
                assert node.session == "ff"

        run(main)

    def test_garbage_on_a_lane_ends_that_session_and_no_other(self, tmp_path: Path) -> None:
        async def main() -> None:
            with log_events() as log:
                async with cluster(tmp_path, "w1", "w2") as c:
                    broken = c.workers["w1"]
                    lane = broken.lanes[0]
                    assert lane.transport is not None
                    lane.transport.write(b"\xff" * 100)
                    await until(lambda: c.hub.nodes["w1"].state == "down")
                    await until(lambda: broken.changes)
                    assert isinstance(broken.changes[-1], SessionEnded)
                    assert c.workers["w2"].changes == []
                    assert await works(c, "w2")
                    await asyncio.wait([x.closed for x in broken.lanes])
                    await c.worker("w1")
                    assert await works(c, "w1")
            (entry,) = of(log, "session_broken")
            assert entry["code"] == "frame_unknown"

        run(main)

    def test_closing_the_hub_ends_every_session_in_order(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1", "w2") as c:
                await c.hub.close("maintenance")
                for worker in c.workers.values():
                    await until(lambda worker=worker: worker.changes)  # type: ignore[misc]
                    assert worker.changes == [SessionEnded("maintenance")]
                assert not c.hub.socket.path.exists()

        run(main)

    def test_a_forgotten_node_is_ended_and_its_place_is_free(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1", "w2") as c:
                was = c.workers["w1"].address
                assert c.hub.forget("w1")
                assert not c.hub.forget("w1")
                await until(lambda: c.workers["w1"].changes)
                await until(lambda: c.workers["w2"].messages)
                told = c.workers["w2"].messages[-1]
                assert isinstance(told, messages.Nodes)
                assert [n["name"] for n in told.nodes] == ["head", "w2"]
                answer = await answer_to(c.hub.socket.path, hello_of("w9").encode())
                assert isinstance(answer, Welcome)
                assert answer.node["address"] == was

        run(main)

    def test_the_smaller_ride_through_holds(self, tmp_path: Path) -> None:
        async def main() -> None:
            with log_events() as log:
                async with cluster(tmp_path) as c:
                    hello = hello_of("w1", ride_through=7.0)
                    answer = await answer_to(c.hub.socket.path, hello.encode())
                    assert isinstance(answer, Welcome)
                    assert answer.ride_through == 7.0
                    answer = await answer_to(c.hub.socket.path, hello_of("w2").encode())
                    assert isinstance(answer, Welcome)
                    assert answer.ride_through == 60.0
            assert {e["used"] for e in of(log, "ride_through_differs")} == {7.0, 60.0}

        run(main)


class TestRouting:
    @pytest.mark.parametrize(
        ("target", "lost"),
        [
            (b"", "NOT_IN_PLAN"),
            (b"x" * 7, "NOT_IN_PLAN"),
            (Target("127.255.255.1", 80).encode(), "NOT_IN_PLAN"),
        ],
    )
    def test_a_target_of_no_node_is_refused(self, tmp_path: Path, target: bytes, lost: str) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                assert await self.outcome(c, target) == lost

        run(main)

    def test_a_worker_does_not_reach_itself_nor_one_that_is_away(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1", "w2") as c:
                own = Target(c.workers["w1"].address, 80)
                assert await self.outcome(c, own.encode()) == "NOT_IN_PLAN"
                other = Target(c.workers["w2"].address, 80)
                await c.workers["w2"].close()
                await until(lambda: c.hub.nodes["w2"].state == "down")
                assert await self.outcome(c, other.encode()) == "NODE_AWAY"

        run(main)

    @staticmethod
    async def outcome(c: Cluster, target: bytes) -> str:
        owner = Owner()
        mux = c.workers["w1"].mux
        assert mux is not None
        mux.open(target, owner)
        await until(lambda: owner.lost)
        return owner.lost

    def test_the_heads_connections_wait_for_a_node_after_a_restart(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                place = Target(c.workers["w1"].address, 20100)
            again = Cluster(tmp_path)
            await again.start()
            try:
                listen = await again.listener("head", place)
                async with serving(echo, place):
                    reader, writer = await asyncio.open_connection(*listen)
                    writer.write(b"early")
                    writer.write_eof()
                    await until(lambda: again.hub.nodes["w1"].waiting)
                    await again.worker("w1")
                    assert await reader.read() == b"early"
                    writer.close()
                    await writer.wait_closed()
            finally:
                await again.close()

        run(main)

    def test_and_are_refused_when_it_does_not_come(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                place = Target(c.workers["w1"].address, 20100)
            again = Cluster(tmp_path, ride_through=0.5)
            await again.start()
            try:
                listen = await again.listener("head", place)
                for _ in range(2):  # the second comes when the time of grace is over
                    with pytest.raises(ConnectionResetError):
                        await connect_and_read(listen)
            finally:
                await again.close()

        run(main)


class Owner:
    """A stream's owner that only notes how it was lost."""

    def __init__(self) -> None:
        self.lost = ""

    def stream_data(self, chunks: object) -> None: ...

    def stream_ended(self) -> None: ...

    def stream_writable(self) -> None: ...

    def stream_lost(self, reason: object, text: str) -> None:
        self.lost = getattr(reason, "name", "")

    def stream_finished(self) -> None: ...


def test_a_second_lane_joins_the_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1") as c:
            mux = c.hub.nodes["w1"].mux
            assert mux is not None
            assert len(mux.lanes) == 2
            await c.workers["w1"].connect(BULK)
            assert len(mux.lanes) == 3

    run(main)


async def accepted(path: Path) -> socket.socket:
    """A connection that the hub has accepted, in the turn of the loop before asyncio makes its
    transport."""
    late = socket.socket(socket.AF_UNIX)
    late.connect(str(path))
    await asyncio.sleep(0)  # to before the loop's look at its sockets
    await asyncio.sleep(0)  # to behind it, and before the task that it began
    late.setblocking(False)
    return late


class TestHandOver:
    @pytest.mark.parametrize("by", ["hand_over", "close"])
    def test_a_connection_that_was_accepted_just_before_is_closed(
        self, tmp_path: Path, by: str
    ) -> None:
        """And not lost by asyncio, open, until it is garbage."""

        async def main() -> None:
            async with cluster(tmp_path) as c:
                with await accepted(c.hub.socket.path) as late:
                    if by == "close":
                        await c.hub.close("maintenance")
                    else:
                        listening = c.hub.socket.hand_over()
                        assert listening is not None
                        listening.close()
                        for _ in range(ACCEPT_TURNS):
                            await asyncio.sleep(0)
                        c.hub.hand_over()
                    async with asyncio.timeout(5):
                        assert await asyncio.get_running_loop().sock_recv(late, 1) == b""

        run_in_real_time(main)

    def test_nobody_is_answered_after_it(self, tmp_path: Path) -> None:
        """A hub without its sessions would say that it knows none, and they would end."""

        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                hello = replace(c.workers["w1"].hello, resumes=True)
                lane = await knock(c.hub.socket.path)
                await until(lambda: c.hub.gate.pending._ungreeted)
                c.hub.hand_over()
                assert lane.transport is not None
                lane.transport.write(hello.encode())
                assert await lane.answer is None, "it dials again, and finds the next process"
                await lane.closed

        run_in_real_time(main)
