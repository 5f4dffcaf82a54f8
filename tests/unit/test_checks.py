"""What `rayfwd doctor` asks a real hub: it is answered, nothing joins, and it costs little."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfwd import codes
from rayfwd.cluster.probe import HeldPorts
from rayfwd.hub import doctor_answers, pending
from rayfwd.hub import gate as gate_module
from rayfwd.problems import Problem
from rayfwd.session import checks
from rayfwd.session.checks import FILLER, FILLER_CHUNK, MOST_FILLER, CheckReply
from rayfwd.session.frames import MAX_PAYLOAD, Frame, Kind, ProtocolError, encode, first_frame
from rayfwd.session.handshake import PROTOCOL_VERSION, Hello, Refusal, Welcome
from tests.unit.cluster import Cluster, cluster, free_place, hello_of
from tests.unit.loops import log_events, of, run, until
from tests.unit.test_handshake import HELLO, REFUSAL, WELCOME, frame_of

ANSWER = CheckReply(replace(WELCOME, ray_auth=None), 1.5e9, REFUSAL.problem)
NONCE = "0123456789abcdef" * 2


class Caller:
    """A doctor at the hub's socket, byte for byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._buffer = bytearray()

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def frame(self) -> Frame | None:
        """The next one; None: the hub has closed."""
        while (frame := first_frame(self._buffer, MAX_PAYLOAD)) is None:
            data = await self._reader.read(1 << 16)
            if not data:
                return None
            self._buffer += data
        return frame

    async def begin(self, hello: Hello) -> CheckReply | Problem:
        self.send(checks.first_question(hello))
        frame = await self.frame()
        assert frame is not None
        return (
            Refusal.decode(frame).problem if frame.kind is Kind.REFUSE else CheckReply.decode(frame)
        )

    async def ask(self, **body: Any) -> dict[str, Any] | Problem:
        self.send(checks.talk(body))
        frame = await self.frame()
        assert frame is not None
        return Refusal.decode(frame).problem if frame.kind is Kind.REFUSE else checks.read(frame)

    async def refused(self) -> str:
        """The code with which the hub refuses, and closes."""
        frame = await self.frame()
        assert frame is not None
        assert frame.kind is Kind.REFUSE, frame
        assert await self.frame() is None
        return Refusal.decode(frame).problem.code.name


@asynccontextmanager
async def caller(c: Cluster) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_unix_connection(c.hub.socket.path)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


# -- the messages


def test_what_is_said_comes_back() -> None:
    assert CheckReply.decode(frame_of(ANSWER.encode())) == ANSWER
    assert CheckReply.decode(frame_of(replace(ANSWER, refusal=None).encode())).refusal is None
    assert checks.read_hello(frame_of(checks.first_question(HELLO))) == HELLO


@pytest.mark.parametrize(
    "changes",
    [
        {"welcome": None}, {"welcome": {}}, {"welcome": 5}, {"time": None}, {"time": "1"},
        {"time": True}, {"time": float("nan")}, {"refusal": 5}, {"refusal": {}},
    ],
)  # fmt: skip
def test_an_answer_that_is_none(changes: dict[str, Any]) -> None:
    body = json.loads(ANSWER.encode()[20:]) | changes
    with pytest.raises(ProtocolError):
        CheckReply.decode(frame_of(checks.talk(body)))
    del body[next(iter(changes))]
    if "refusal" not in changes:
        with pytest.raises(ProtocolError):
            CheckReply.decode(frame_of(checks.talk(body)))


@given(st.sampled_from(Kind), st.integers(0, 2), st.binary(max_size=60))
def test_nothing_that_comes_in_can_hurt(kind: Kind, stream: int, payload: bytes) -> None:
    frame = Frame(kind, stream, PROTOCOL_VERSION, payload)
    for read in (checks.read, checks.read_hello, CheckReply.decode):
        try:
            read(frame)
        except ProtocolError:
            pass


# -- the hub


def test_nothing_joins(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1") as c, caller(c) as doctor:
            auth = {"mode": "token", "token": "sesame"}
            c.offered = replace(c.offered, ray_auth=auth)
            kept = (tmp_path / "roster.json").read_bytes()
            answer = await doctor.begin(hello_of("w2"))
            assert isinstance(answer, CheckReply)
            assert answer.refusal is None
            assert answer.welcome.ray_auth is None
            assert (answer.welcome.node["name"], answer.welcome.node["base"]) == ("w2", 20096)
            assert [node["name"] for node in answer.welcome.nodes] == ["head", "w1"]
            assert (answer.welcome.ray, answer.welcome.ride_through) == ("2.60.0", 60.0)
            assert "w2" not in c.hub.nodes
            assert (tmp_path / "roster.json").read_bytes() == kept

    with log_events() as log:
        run(main)
    assert [e["node"] for e in of(log, "hub_asked")] == ["w2"]
    assert [e["node"] for e in of(log, "node_joined")] == ["w1"]


def test_a_client_is_told_what_a_client_is_told(tmp_path: Path) -> None:
    """The head's plan alone, and no address is dialled back for it."""
    hello = hello_of("laptop", role="client", worker_ports=0, advertise="203.0.113.9")

    async def main() -> None:
        async with cluster(tmp_path, "w1") as c, caller(c) as doctor:
            answer = await doctor.begin(hello)
            assert isinstance(answer, CheckReply)
            assert answer.refusal is None
            assert answer.welcome.node == {}
            assert [node["name"] for node in answer.welcome.nodes] == ["head"]
            assert c.hub.clients == {}
            refused = await doctor.ask(ask="dial_back", ports=[22], nonce=NONCE)
            assert isinstance(refused, Problem)
            assert refused.code == codes.CHECK_MALFORMED

    run(main)


def test_a_client_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "MAX_CLIENTS", 0)

    async def main() -> None:
        async with cluster(tmp_path, "w1") as c, caller(c) as doctor:
            answer = await doctor.begin(hello_of("laptop", role="client", worker_ports=0))
            assert isinstance(answer, CheckReply)
            assert answer.refusal is not None
            assert answer.refusal.code == codes.CLIENTS_FULL
            assert [node["name"] for node in answer.welcome.nodes] == ["head"]

    run(main)


def test_beside_the_nodes_own_session(tmp_path: Path) -> None:
    """The same name and the same key as the daemon's, whose session does not notice."""

    async def main() -> None:
        async with cluster(tmp_path, "w1") as c, caller(c) as doctor:
            session, lanes = c.hub.nodes["w1"].session, len(c.workers["w1"].lanes)
            answer = await doctor.begin(c.workers["w1"].hello)
            assert isinstance(answer, CheckReply)
            assert answer.welcome.node == c.workers["w1"].welcome.node  # type: ignore[union-attr]
            assert isinstance(await doctor.ask(ask="time"), dict)
            assert (c.hub.nodes["w1"].state, c.hub.nodes["w1"].session) == ("up", session)
            assert c.hub.nodes["w1"].mux is not None
            assert len(c.hub.nodes["w1"].mux.lanes) == lanes
            assert c.workers["w1"].changes == []

    run(main)


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        (hello_of("w1", key="another key".ljust(32)), "name_taken"),
        (hello_of("head"), "name_taken"),
        (hello_of("w2", worker_ports=10_000), "plan_full"),
        (hello_of("no name"), "join_bad"),
    ],
)
def test_who_would_not_be_let_in_hears_why(tmp_path: Path, hello: Hello, code: str) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1") as c, caller(c) as doctor:
            c.roster.join("large", "k" * 32, 4000, None)
            answer = await doctor.begin(hello)
            assert isinstance(answer, CheckReply)
            assert answer.refusal is not None
            assert answer.refusal.code.name == code
            assert answer.welcome.node == {}
            assert c.hub.gate.refusals.lately() == []
            assert isinstance(await doctor.ask(ask="time"), dict), "it may ask on"

    run(main)


def test_filler_both_ways(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as c, caller(c) as doctor:
            await doctor.begin(hello_of("w1"))
            size = 5 * FILLER_CHUNK + 17
            doctor.send(checks.talk({"ask": "send", "bytes": size}))
            came = 0
            while came < size:
                frame = await doctor.frame()
                assert frame is not None
                assert (frame.kind, frame.stream) == (Kind.CHECK, FILLER)
                came += len(frame.payload)
            assert came == size
            doctor.send(checks.talk({"ask": "take", "bytes": size}))
            doctor.send(checks.filler(bytes(FILLER_CHUNK)) * 5 + checks.filler(bytes(17)))
            frame = await doctor.frame()
            assert frame is not None
            assert checks.read(frame) == {"took": size}

    run(main)


def test_dial_back_of_the_nodes_own_ports_alone(tmp_path: Path) -> None:
    async def main() -> None:
        address = free_place().address.replace("127.", "126.", 1)
        async with cluster(tmp_path) as c:
            async with caller(c) as doctor:
                answer = await doctor.begin(hello_of("w1", advertise=address))
                assert isinstance(answer, CheckReply)
                base = int(answer.welcome.node["base"])
                for ports in ([22], [6379], [base, 22], [], "x"):
                    async with caller(c) as other:
                        await other.begin(hello_of("w1", advertise=address))
                        said = await other.ask(ask="dial_back", ports=ports, nonce=NONCE)
                        assert isinstance(said, Problem)
                        assert said.code == codes.CHECK_MALFORMED
            async with caller(c) as doctor:  # without an address there is nothing to dial
                await doctor.begin(hello_of("w2"))
                said = await doctor.ask(ask="dial_back", ports=[base], nonce=NONCE)
                assert isinstance(said, Problem)

    run(main)


def test_dial_back_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own addresses are loopback ones, which no node may advertise; the roster's
    word on that is left out, and nothing else."""
    place = free_place()
    monkeypatch.setattr("rayfwd.hub.roster._check_request", lambda *_: None)

    async def main() -> None:
        async with cluster(tmp_path) as c, caller(c) as doctor:
            answer = await doctor.begin(hello_of("w1", advertise=place.address))
            assert isinstance(answer, CheckReply)
            base = int(answer.welcome.node["base"])
            async with HeldPorts(place.address, [base], NONCE):
                said = await doctor.ask(ask="dial_back", ports=[base, base + 1], nonce=NONCE)
            assert said == {"results": {str(base): "answered", str(base + 1): "refused"}}
            doctor.send(checks.talk({"ask": "dial_back", "ports": [base], "nonce": NONCE}))

    run(main)  # the last one is under way when the connection ends: no task is left


class TestBounds:
    @pytest.mark.parametrize(
        "data",
        [
            checks.talk({"ask": "sing"}),
            checks.talk({}),
            checks.talk({"ask": "send", "bytes": 0}),
            checks.talk({"ask": "send", "bytes": MOST_FILLER + 1}),
            checks.talk({"ask": "take", "bytes": "5"}),
            checks.talk({"ask": "take", "bytes": 5}) + checks.talk({"ask": "time"}),
            checks.talk({"ask": "take", "bytes": 5}) + checks.filler(b"123456"),
            checks.filler(b"1"),
            encode(Kind.CHECK, 0, PROTOCOL_VERSION, b"[]"),
            encode(Kind.PING),
        ],
    )
    def test_what_is_no_question(self, tmp_path: Path, data: bytes) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c, caller(c) as doctor:
                await doctor.begin(hello_of("w1"))
                doctor.send(data)
                assert await doctor.refused() == "check_malformed"
                assert c.hub.gate.refusals.lately() == [], "it is no condition of the cluster's"

        run(main)

    def test_a_first_question_that_is_none(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c, caller(c) as doctor:
                doctor.send(checks.talk({"ask": "time"}))
                assert await doctor.refused() == "hello_malformed"

        run(main)

    def test_bytes_in_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor_answers, "TOTAL_FILLER", 3 * FILLER_CHUNK)

        async def main() -> None:
            async with cluster(tmp_path) as c, caller(c) as doctor:
                await doctor.begin(hello_of("w1"))
                for _ in range(3):
                    doctor.send(checks.talk({"ask": "take", "bytes": FILLER_CHUNK}))
                    doctor.send(checks.filler(bytes(FILLER_CHUNK)))
                    assert await doctor.frame() is not None
                doctor.send(checks.talk({"ask": "send", "bytes": 1}))
                assert await doctor.refused() == "check_malformed"

        run(main)

    def test_questions_in_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor_answers, "TOTAL_QUESTIONS", 3)

        async def main() -> None:
            async with cluster(tmp_path) as c, caller(c) as doctor:
                await doctor.begin(hello_of("w1"))
                for _ in range(3):
                    assert isinstance(await doctor.ask(ask="time"), dict)
                doctor.send(checks.talk({"ask": "time"}))
                assert await doctor.refused() == "check_malformed"

        run(main)

    def test_time_in_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor_answers, "CHECKUP_TIMEOUT", 0.05)

        async def main() -> None:
            async with cluster(tmp_path) as c, caller(c) as doctor:
                await doctor.begin(hello_of("w1"))
                assert await doctor.refused() == "check_long"

        run(main)

    def test_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pending, "MAX_CHECKUPS", 1)

        async def main() -> None:
            async with cluster(tmp_path) as c:
                async with caller(c) as first, caller(c) as second:
                    assert isinstance(await first.begin(hello_of("w1")), CheckReply)
                    refusal = await second.begin(hello_of("w1"))
                    assert isinstance(refusal, Problem)
                    assert refusal.code == codes.CHECK_BUSY
                await until(lambda: not c.hub.gate.pending._asking)
                async with caller(c) as third:
                    assert isinstance(await third.begin(hello_of("w1")), CheckReply)

        run(main)

    def test_who_does_not_read_fills_no_memory(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c, caller(c) as doctor:
                await doctor.begin(hello_of("w1"))
                doctor.send(checks.talk({"ask": "send", "bytes": MOST_FILLER}))
                (lane,) = c.hub.gate.pending._asking
                await until(lambda: lane.paused)
                assert lane._transport is not None
                assert lane._transport.get_write_buffer_size() < MOST_FILLER / 16

        run(main)

    def test_the_end_of_the_hub(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c, caller(c) as doctor:
                await doctor.begin(hello_of("w1"))
                await c.hub.close("enough")
                assert await doctor.frame() is None

        run(main)


def test_another_welcome_is_the_same_but_for_the_token(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1") as c, caller(c) as doctor:
            answer = await doctor.begin(c.workers["w1"].hello)
            assert isinstance(answer, CheckReply)
            welcome = c.workers["w1"].welcome
            assert isinstance(welcome, Welcome)
            assert replace(welcome, ray_auth=None) == answer.welcome

    run(main)
