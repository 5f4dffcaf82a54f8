"""What goes over lanes can be seen, a line a frame, and never what is in it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rayfwd import codes
from rayfwd.daemon import trace_verb as module
from rayfwd.daemon.trace_verb import LINE_BYTES, MOST_FRAMES, MOST_SECONDS, TraceVerb
from rayfwd.problems import ProblemError
from rayfwd.session.frames import MAX_U64, Kind
from rayfwd.session.lane import LaneClass
from rayfwd.session.states import STREAM_TRANSITIONS, StreamEvent, StreamState
from rayfwd.session.stream import ResetReason
from rayfwd.session.trace import (
    FrameTraced,
    LaneTraced,
    MessageTraced,
    StreamTraced,
    Traced,
    line,
)
from rayfwd.system.control import ControlServer
from rayfwd.transport.tracing import Collector, tracing
from tests import shown
from tests.commands import main as command
from tests.unit.loops import log_events, of, run, until
from tests.unit.talk import BULK, INTERACTIVE, Talk
from tests.unit.test_mux import Owner, Pair, pair

SECRET = "hunter2"


def traced_talk() -> tuple[Talk, dict[str, list[Traced]]]:
    talk = Talk(INTERACTIVE, BULK)
    seen: dict[str, list[Traced]] = {}
    for side in talk.sides:
        seen[side.name] = []
        side.session.trace = seen[side.name].append
    return talk, seen


def traced_frames(seen: list[Traced], direction: str) -> list[tuple[int, Kind, int, int, int]]:
    return [
        (each.lane, each.kind, each.stream, each.offset, each.length)
        for each in seen
        if isinstance(each, FrameTraced) and each.direction == direction
    ]


def busy(talk: Talk) -> None:
    """Everything happens that puts bytes of somebody on a lane."""
    secret = SECRET.encode()
    worker, hub = talk.worker.session, talk.hub.session
    number = worker.open(secret, talk.now)
    worker.send(number, secret)
    other = worker.open(secret, talk.now)
    worker.send(other, secret * 50_000)
    hub.send_message(json.dumps({"type": "ray_auth", "token": SECRET}).encode())
    hub.send_message(json.dumps({"type": SECRET.upper(), "x": 1}).encode())
    hub.send_message(json.dumps([SECRET]).encode())
    hub.send_message(secret)
    talk.wait(1.0)
    worker.end(number)
    hub.end(number)
    hub.reset(other, ResetReason.REFUSED, SECRET)
    talk.wait(3.0)
    talk.cut(talk.lanes[1])
    talk.take(talk.worker, worker.close(SECRET))
    talk.run()


class TestSession:
    def test_every_frame_is_traced_as_it_was_sent_and_as_it_came(self) -> None:
        talk, seen = traced_talk()
        busy(talk)
        for side in talk.sides:
            sent = [
                (lane, frame.kind, frame.stream, frame.offset, frame.size)
                for lane, frame in side.frames
            ]
            assert traced_frames(seen[side.name], "out") == sent
            came = traced_frames(seen[talk.other(side).name], "in")
            assert came == sent[: len(came)], "what a closed session did not hear is missing"
            assert len(sent) - len(came) <= 5
        kinds = {each.kind for each in seen["worker"] if isinstance(each, FrameTraced)}
        handshake = {Kind.HELLO, Kind.WELCOME, Kind.REFUSE, Kind.CHALLENGE, Kind.PROOF, Kind.VOUCH}
        assert kinds == set(Kind) - {*handshake, Kind.CHECK}

    def test_no_payload_is_in_it(self) -> None:
        talk, seen = traced_talk()
        busy(talk)
        for each in (*seen["worker"], *seen["hub"]):
            assert SECRET not in (repr(each) + line(each)).lower()
            assert not any(isinstance(part, bytes | memoryview) for part in each)

    def test_of_a_message_its_type_is_told(self) -> None:
        talk, seen = traced_talk()
        busy(talk)
        for name, direction in (("hub", "out"), ("worker", "in")):
            found = [each for each in seen[name] if isinstance(each, MessageTraced)]
            assert [(each.direction, each.type) for each in found] == [
                (direction, kind) for kind in ("ray_auth", "?", "?", "?")
            ]

    def test_changes_of_state_are_told(self) -> None:
        talk, seen = traced_talk()
        busy(talk)
        lines = [line(each) for each in seen["worker"] if not isinstance(each, FrameTraced)]
        for expected in (
            "stream 1: opening -> open (any ACK)",
            "stream 1: open -> over (both ENDs through)",
            "stream 3: open -> over (RESET in)",
            "lane 2 bulk: down",
            "session: up -> ended (close())",
        ):
            assert expected in lines
        lines = [line(each) for each in seen["hub"] if not isinstance(each, FrameTraced)]
        assert "stream 3: open -> resetting (reset())" in lines
        assert "stream 3: resetting -> over (GONE in)" in lines
        assert "session: up -> ended (CLOSE in)" in lines

    def test_a_lane_that_is_gone_round_is_told(self) -> None:
        talk, seen = traced_talk()
        talk.worker.session.open(b"to", talk.now)
        talk.wait(2.0)
        talk.lanes[1].held |= {"worker", "hub"}
        talk.wait(10.0)
        told = [each.what for each in seen["worker"] if isinstance(each, LaneTraced)]
        assert told == ["sidelined", "dead", "down"]


@asynccontextmanager
async def named_pair(name: str) -> AsyncIterator[Pair]:
    """Two joined sessions, whose worker is called `name` where it is traced."""
    async with pair(INTERACTIVE, BULK) as p:
        tracing.began(p.hub.mux.session, name)
        yield p


def is_traced(p: Pair) -> bool:
    return p.hub.mux.session.trace is not None


async def talk_a_little(p: Pair) -> None:
    owner = Owner()
    p.worker.open(owner).send(SECRET.encode())
    await until(lambda: p.hub.accepted and p.hub.accepted[-1].got)


class TestTracing:
    def test_nobody_traces_and_no_session_knows_of_it(self) -> None:
        async def main() -> None:
            async with named_pair("gpu-1") as p:
                collector = Collector(10)
                told = [is_traced(p)]
                tracing.add(collector)
                told.append(is_traced(p))
                tracing.remove(collector)
                told.append(is_traced(p))
                assert told == [False, True, False]

        run(main)

    def test_a_session_that_begins_meanwhile_is_traced_from_its_beginning(self) -> None:
        async def main() -> None:
            collector = Collector(1000)
            tracing.add(collector)
            try:
                async with pair(INTERACTIVE) as p:
                    await talk_a_little(p)
            finally:
                tracing.remove(collector)
            assert "fresh -> up" in "\n".join(collector.lines())

        run(main)

    def test_a_session_that_has_ended_is_let_go_of(self) -> None:
        async def main() -> None:
            before = len(tracing._sessions)
            async with named_pair("gpu-1"):
                assert len(tracing._sessions) == before + 2
            assert len(tracing._sessions) == before

        run(main)

    def test_of_one_peer_alone(self) -> None:
        async def main() -> None:
            async with named_pair("gpu-1") as one, named_pair("gpu-2") as two:
                collector = Collector(1000, "gpu-2")
                tracing.add(collector)
                await talk_a_little(one)
                await talk_a_little(two)
                tracing.remove(collector)
                assert {row.split("  ")[1] for row in collector.lines()} == {"gpu-2"}

        run(main)

    def test_at_level_debug_it_goes_to_the_log(self) -> None:
        async def main() -> None:
            async with named_pair("gpu-1") as p:
                tracing.follow("debug")
                tracing.follow("debug")
                await talk_a_little(p)
                tracing.follow("info")
                assert p.hub.mux.session.trace is None

        with log_events() as log:
            run(main)
        (data,) = [
            entry
            for entry in of(log, "frame_traced")
            if (entry["peer"], entry["kind"]) == ("gpu-1", "DATA")
        ]
        assert (data["direction"], data["stream"], data["offset"]) == ("in", 1, 0)
        assert (data["lane_class"], data["length"]) == ("interactive", len(SECRET))
        assert {entry["log_level"] for entry in of(log, "frame_traced")} == {"debug"}
        assert SECRET not in repr(log)


class TestVerb:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"frames": 0},
            {"frames": MOST_FRAMES + 1},
            {"frames": "5"},
            {"frames": True},
            {"seconds": MOST_SECONDS + 1},
            {"seconds": 0.5},
            {"seconds": None},
            {"peer": 7},
        ],
    )
    def test_what_it_does_not_take(self, wrong: dict[str, Any]) -> None:
        async def main() -> None:
            with pytest.raises(ProblemError) as caught:
                await TraceVerb()({"seconds": 1, "frames": 1, "peer": None, **wrong})
            assert caught.value.problem.code == codes.CONTROL_BAD_REQUEST

        run(main)

    def test_it_ends_when_there_are_enough_lines(self) -> None:
        async def main() -> None:
            async with named_pair("gpu-1") as p:
                asked = asyncio.create_task(TraceVerb()({"seconds": 50, "frames": 3}))
                await asyncio.sleep(0)
                await talk_a_little(p)
                async with asyncio.timeout(5):
                    answer = await asked
                assert len(answer["lines"]) == 3
                assert "gpu-1" in answer["peers"]
                assert p.hub.mux.session.trace is None

        run(main)

    def test_it_ends_when_its_time_is_over(self) -> None:
        async def main() -> None:
            async with asyncio.timeout(5):
                assert (await TraceVerb()({"seconds": 1, "frames": 3}))["lines"] == []

        run(main)

    def test_few_at_the_same_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "AT_ONCE", 1)

        async def main() -> None:
            verb = TraceVerb()
            first = asyncio.create_task(verb({"seconds": 1, "frames": 3}))
            await asyncio.sleep(0)
            with pytest.raises(ProblemError) as caught:
                await verb({"seconds": 1, "frames": 3})
            assert caught.value.problem.code == codes.CONTROL_BUSY
            await first
            await verb({"seconds": 1, "frames": 3})

        run(main)

    def test_a_line_is_no_longer_than_it_says(self) -> None:
        longest: list[Traced] = [
            FrameTraced("out", 10**9, LaneClass.INTERACTIVE, k, MAX_U64, MAX_U64, 1 << 24)
            for k in Kind
        ]
        longest += [
            StreamTraced(MAX_U64, event, state, state)
            for state, events in STREAM_TRANSITIONS.items()
            for event in events
        ]
        collector = Collector(MOST_FRAMES)
        for each in longest:
            collector("client " + "é" * 63, each)
        assert max(len(row.encode()) for row in collector.lines()) <= LINE_BYTES


def test_a_trace_is_as_the_document_shows_it() -> None:
    collector = Collector(MOST_FRAMES)
    shared: tuple[Traced, ...] = (
        FrameTraced("out", 2, LaneClass.BULK, Kind.DATA, 5, 131072, 65536),
        FrameTraced("in", 1, LaneClass.INTERACTIVE, Kind.ACK, 5, 65536, 8),
        LaneTraced(2, LaneClass.BULK, "sidelined"),
        StreamTraced(5, StreamEvent.ENDS_THROUGH, StreamState.OPEN, StreamState.OVER),
    )
    for each in shared:
        collector("gpu-1", each)
    shown.compare("docs/operations.md", "15:21", "\n".join(collector.lines()))


@pytest.mark.runs("rayfwd trace", "rayfwd trace --seconds * --peer *")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over the control socket, of two sessions that are joined by sockets."""
    file = tmp_path / "rayfwd.toml"
    file.write_text(f'role = "head"\nruntime_dir = "{tmp_path}"\nstate_dir = "{tmp_path}"\n')

    async def main() -> None:
        server = ControlServer(tmp_path / "control.sock", {"trace": TraceVerb()})
        await server.start()
        async with named_pair("gpu-1") as p:
            words = ["trace", "--config", str(file), "--frames", "4", "--peer", "gpu-1"]
            asked = asyncio.create_task(asyncio.to_thread(command, words))
            await until(lambda: p.hub.mux.session.trace is not None)
            await talk_a_little(p)
            assert await asked == 0
            words = ["trace", "--config", str(file), "--seconds", "1", "--peer", "gpu-9"]
            assert await asyncio.to_thread(command, words) == 0
        await server.close()

    run(main)
    out, err = capsys.readouterr()
    rows = out.splitlines()
    assert len(rows) == 4
    pattern = r"[\d:]{8}\.\d{6}  gpu-1  lane 1 interactive  in   (OPEN |DATA )  stream 1  offset 0"
    assert sum(bool(re.match(pattern, row)) for row in rows) == 2
    assert SECRET not in out
    assert re.search("no frame in 1 s; connected: .*gpu-1", err)
