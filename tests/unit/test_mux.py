"""A session on an event loop: two of them joined by real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from rayfwd.session import lane as lane_module
from rayfwd.session.events import Parked, Resumed, SessionEnded
from rayfwd.session.frames import Chunk, FrameDecoder, Kind, encode
from rayfwd.session.lane import LaneClass
from rayfwd.session.messages import HeadRay, Message
from rayfwd.session.session import Limits, Session
from rayfwd.session.stream import ResetReason
from rayfwd.transport import mux as mux_module
from rayfwd.transport.mux import MANY_WAIT, SHORT_BYTES, Mux, MuxStream, StreamOwner
from rayfwd.transport.readpacing import SHORT_MESSAGE, Pace
from tests.unit.cluster import BULK, INTERACTIVE, SocketLane
from tests.unit.fake_clock import FakeClockLoop
from tests.unit.loops import log_events, of, until
from tests.unit.loops import run_on_fake_clock as run


@dataclass
class Owner:
    """A stream's owner that notes what it is told."""

    stream: MuxStream | None = None
    got: bytearray = field(default_factory=bytearray)
    told: list[str] = field(default_factory=list)
    reads: bool = True

    def stream_data(self, chunks: Sequence[Chunk]) -> None:
        data = b"".join(chunks)
        self.got += data
        if self.reads and self.stream is not None:
            self.stream.consumed(len(data))

    def stream_ended(self) -> None:
        self.told.append("ended")

    def stream_writable(self) -> None:
        self.told.append("writable")

    def stream_lost(self, reason: ResetReason, text: str) -> None:
        self.told.append(f"lost: {reason.name} {text}".strip())

    def stream_finished(self) -> None:
        self.told.append("finished")


class End:
    """One side: a mux and all that it reported."""

    def __init__(self, side: Literal["worker", "hub"], limits: Limits, ride_through: float) -> None:
        session = Session(side, ride_through, limits, asyncio.get_running_loop().time())
        self.messages: list[Message] = []
        self.changes: list[Parked | Resumed | SessionEnded] = []
        self.accepted: list[Owner] = []
        self.refuses = False
        self.reads = True
        self.mux = Mux(session, self._accept, self.messages.append, self.changes.append)
        self.lanes: list[SocketLane] = []

    def _accept(self, stream: MuxStream, target: bytes) -> StreamOwner | None:
        if self.refuses:
            stream.reset(ResetReason.REFUSED, target.decode())
            return None
        self.accepted.append(Owner(stream, reads=self.reads))
        return self.accepted[-1]

    def open(self, owner: Owner) -> MuxStream:
        owner.stream = self.mux.open(b"to", owner)
        return owner.stream


class Pair:
    """Two ends and the lanes between them."""

    def __init__(self, limits: Limits | None = None, ride_through: float = 60.0) -> None:
        self.worker = End("worker", limits or Limits(), ride_through)
        self.hub = End("hub", limits or Limits(), ride_through)

    async def lane(self, kind: LaneClass = INTERACTIVE) -> tuple[SocketLane, SocketLane]:
        loop = asyncio.get_running_loop()
        made = []
        for end, sock in zip((self.worker, self.hub), socket.socketpair(), strict=True):
            _, lane = await loop.create_unix_connection(SocketLane, sock=sock)
            lane.join(end.mux, kind)
            end.lanes.append(lane)
            made.append(lane)
        return made[0], made[1]

    async def close(self) -> None:
        for end in (self.worker, self.hub):
            end.mux.close("over")
            for lane in end.lanes:
                await lane.closed


@asynccontextmanager
async def pair(
    *lanes: LaneClass, limits: Limits | None = None, ride_through: float = 60.0
) -> AsyncIterator[Pair]:
    made = Pair(limits, ride_through)
    try:
        for kind in lanes:
            await made.lane(kind)
        yield made
    finally:
        await made.close()


def test_owners_are_told_what_happens_to_their_streams() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE, BULK) as p:
            mine = Owner()
            stream = p.worker.open(mine)
            stream.send(b"question")
            stream.end()
            await until(lambda: p.hub.accepted and p.hub.accepted[0].told == ["ended"])
            theirs = p.hub.accepted[0]
            assert theirs.got == b"question"
            assert theirs.stream is not None
            theirs.stream.send(b"answer")
            theirs.stream.end()
            await until(lambda: mine.told == ["ended", "finished"])
            assert mine.got == b"answer"
            await until(lambda: theirs.told == ["ended", "finished"])
            assert p.worker.mux.owners == p.hub.mux.owners == {}

    run(main)


def test_pieces_that_came_together_are_passed_on_together() -> None:
    told: list[Sequence[Chunk]] = []

    class Reader(Owner):
        def stream_data(self, chunks: Sequence[Chunk]) -> None:
            told.append(chunks)
            super().stream_data(chunks)

    async def main() -> None:
        async with pair(INTERACTIVE) as p:
            stream = p.worker.open(Reader())
            await until(lambda: p.hub.accepted)
            (theirs,) = p.hub.accepted
            assert theirs.stream is not None
            # A frame and a write each, before the loop reads any of them.
            for word in (b"one ", b"two ", b"three"):
                theirs.stream.send(word)
            await until(lambda: told)
            assert told == [[b"one ", b"two ", b"three"]]
            stream.end()

    run(main)


def others_wait() -> None:
    """Have the loop much to do in its next turn."""
    for _ in range(MANY_WAIT):
        asyncio.get_running_loop().call_soon(lambda: None)


def test_what_many_streams_have_to_say_in_one_turn_goes_out_together() -> None:
    """Where the loop has much to do in it; what comes alone, or is long, does not wait."""

    async def main() -> None:
        async with pair(INTERACTIVE) as p:
            for _ in range(5):
                p.worker.open(Owner())
            await until(lambda: len(p.hub.accepted) == 5)
            await asyncio.sleep(1)
            writes: list[int] = []
            lane = p.hub.lanes[0]
            write = lane.write

            def counted(chunks: Sequence[Chunk]) -> None:
                writes.append(len(chunks))
                write(chunks)

            lane.write = counted  # type: ignore[method-assign]
            streams = [owner.stream for owner in p.hub.accepted if owner.stream is not None]
            for stream in streams:
                stream.send(b"alone")
            assert len(writes) == 5
            others_wait()
            for stream in streams:
                stream.send(b"together")
            assert len(writes) == 5
            await asyncio.sleep(0)
            assert len(writes) == 6
            others_wait()
            for stream in streams:
                stream.send(b"long" * SHORT_BYTES)
            assert len(writes) == 11

    run(main)


def test_a_session_that_stops_takes_along_what_was_to_go_out_together() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE) as p:
            stream = p.worker.open(Owner())
            await until(lambda: p.hub.accepted)
            await asyncio.sleep(1)
            others_wait()
            for word in (b"one ", b"two"):
                stream.send(word)
            tree = p.worker.mux.stop()
            assert tree is not None
            (sent,) = [each["send"] for each in tree["streams"] if each["id"] == stream.number]
            assert sent["pending"] == b"one two"
            await asyncio.sleep(1)
            assert p.worker.mux.late() == 0.0
            assert not p.worker.mux.lanes

    run(main)


def test_a_refused_stream_is_lost_with_its_reason() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE) as p:
            p.hub.refuses = True
            mine = Owner()
            p.worker.open(mine).send(b"lost")
            await until(lambda: mine.told)
            assert mine.told == ["lost: REFUSED to"]

    run(main)


def test_who_resets_hears_no_more_of_the_stream() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE) as p:
            mine = Owner()
            stream = p.worker.open(mine)
            stream.send(b"x")
            await until(lambda: p.hub.accepted and p.hub.accepted[0].got)
            stream.reset(ResetReason.ABORTED, "enough")
            await until(lambda: p.hub.accepted[0].told)
            assert p.hub.accepted[0].told == ["lost: ABORTED enough"]
            assert mine.told == []

    run(main)


def test_a_writer_waits_for_a_reader_and_is_called_when_it_may_go_on() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE, BULK, limits=Limits(window=1000, stream_buffer=2000)) as p:
            p.hub.reads = False
            mine = Owner()
            stream = p.worker.open(mine)
            sent = 0
            while stream.send(b"x" * 500):
                sent += 500
                assert sent < 10_000, "it never has to wait"
            await asyncio.sleep(10)
            assert mine.told == [], "there is no room yet"
            theirs = p.hub.accepted[0]
            theirs.reads = True
            assert theirs.stream is not None
            theirs.stream.consumed(len(theirs.got))
            await until(lambda: mine.told == ["writable"])

    run(main)


def test_everything_moves_by_itself_through_slow_transports() -> None:
    data = bytes(range(256)) * 40_000

    async def main() -> None:
        async with pair(INTERACTIVE, BULK) as p:
            owners = [Owner() for _ in range(3)]
            for owner in owners:
                stream = p.worker.open(owner)
                stream.send(data)
                stream.end()
            await until(lambda: len(p.hub.accepted) == 3)
            await until(lambda: all(len(a.got) == len(data) for a in p.hub.accepted), 20)
            assert all(a.got == data for a in p.hub.accepted)

    run(main)


@pytest.mark.interpreted
def test_a_message_is_short_unless_it_answers_a_long_transfer_or_begins_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short: list[str] = []
    pace = Pace()
    monkeypatch.setattr(pace, "short_message", lambda: short.append("one"))
    monkeypatch.setattr(mux_module, "pace", pace)

    async def main() -> None:
        limits = Limits(window=1 << 20)
        async with pair(INTERACTIVE, BULK, limits=limits) as p:
            p.hub.reads = False  # so that the transfer goes on for as long as it takes
            transfer, call = Owner(), Owner()
            p.worker.open(transfer).send(bytes(1 << 19))
            p.worker.open(call).send(b"question")
            await until(lambda: len(p.hub.accepted) == 2 and p.hub.accepted[1].got)
            theirs = [owner.stream for owner in p.hub.accepted]
            assert theirs[0] is not None
            assert theirs[1] is not None
            monkeypatch.setattr(p.worker.mux.session.streams[theirs[0].number], "bulk", True)
            short.clear()
            theirs[0].send(b"thanks so far")
            await until(lambda: transfer.got)
            assert short == []
            theirs[1].send(b"answer")
            await until(lambda: call.got)
            assert short == ["one"]
            burst = bytes(SHORT_MESSAGE + 1)
            theirs[1].send(burst)
            await until(lambda: call.got == b"answer" + burst)
            assert short == ["one"], "the beginning of a burst"

    run(main)


@pytest.mark.parametrize("takes_bytes", [True, False])
def test_acknowledgements_go_by_the_lane_for_short_messages(takes_bytes: bool) -> None:
    """Also where it is the youngest, as after it was lost: elsewhere they wait behind bulk."""

    async def main() -> None:
        async with pair(BULK, BULK, INTERACTIVE) as p:
            decoders = [FrameDecoder() for _ in p.hub.lanes]
            acks = [0, 0, 0]
            for number, lane in enumerate(p.hub.lanes):
                write = lane.write

                def spy(chunks: Sequence[bytes], n: int = number, write: Any = write) -> None:
                    frames = decoders[n].feed(b"".join(chunks))
                    acks[n] += sum(frame.kind is Kind.ACK for frame in frames)
                    write(chunks)

                lane.write = spy  # type: ignore[method-assign, assignment]
            p.hub.lanes[2].paused = not takes_bytes
            mine = Owner()
            stream = p.worker.open(mine)
            stream.send(bytes(1 << 17))
            await until(lambda: bool(p.hub.accepted) and len(p.hub.accepted[0].got) == 1 << 17)
            await until(lambda: not p.worker.mux.session.buffered)
            assert (acks[2] > 0, acks[0] + acks[1] > 0) == (takes_bytes, not takes_bytes)
            p.hub.lanes[2].paused = False

    run(main)


def test_long_transfers_take_turns_among_the_bulk_lanes() -> None:
    """Filled one after another, the first would queue what a reader waits for, and the last would
    carry nothing."""

    async def main() -> None:
        async with pair(INTERACTIVE, BULK, BULK, BULK) as p:
            went: list[int] = []
            for number, lane in enumerate(p.worker.lanes):
                write = lane.write

                def spy(chunks: Sequence[bytes], n: int = number, write: Any = write) -> None:
                    if sum(map(len, chunks)) > 1 << 14:
                        went.append(n)
                    write(chunks)

                lane.write = spy  # type: ignore[method-assign, assignment]
            mine = Owner()
            stream = p.worker.open(mine)
            for number in range(6):
                stream.send(bytes(1 << 17))
                came = (number + 1) << 17
                await until(lambda n=came: p.hub.accepted and len(p.hub.accepted[0].got) == n)  # type: ignore[misc]
                await until(lambda: not p.worker.mux.session.buffered)
            by_bulk = [number for number in went if number]
            assert by_bulk[:4] == [1, 2, 3, 1], went

    run(main)


def test_lanes_come_and_go() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE, BULK) as p:
            mine = Owner()
            stream = p.worker.open(mine)
            for lane in p.worker.lanes:
                lane.abort("cut")
            await until(lambda: p.worker.changes and p.hub.changes)
            stream.send(b"held")
            await p.lane(BULK)
            await until(lambda: p.hub.accepted and p.hub.accepted[0].got == b"held")
            for end in (p.worker, p.hub):
                assert [type(change) for change in end.changes] == [Parked, Resumed]

    run(main)


def test_ride_through_ends_the_session_by_itself() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE, ride_through=0.3) as p:
            mine = Owner()
            p.worker.open(mine)
            p.worker.lanes[0].abort("cut")
            await until(lambda: p.worker.mux.ended and p.hub.mux.ended)
            assert mine.told == ["lost: SESSION_ENDED no lane for 0 s"]
            assert isinstance(p.worker.changes[-1], SessionEnded)
            assert p.worker.mux._timer is None

    run(main)


def test_a_silent_lane_is_aborted() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE) as p:
            await asyncio.sleep(10 * lane_module.DEAD_AFTER)
            assert p.worker.changes == p.hub.changes == [], "a lane that answers is left alone"
            deaf = p.hub.lanes[0].transport
            assert deaf is not None
            deaf.pause_reading()  # no PING is answered, and no PONG heard
            await until(lambda: p.worker.changes and p.hub.changes, 2 * lane_module.DEAD_AFTER)
            assert {lane.why_aborted for lane in p.worker.lanes + p.hub.lanes} >= {
                "no answer came in time"
            }

    run(main)


def test_a_process_that_was_stopped_does_not_take_its_lanes_for_silent() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE, BULK) as p:
            await asyncio.sleep(0.1)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, FakeClockLoop)
            loop.jump(mux_module.LATE_SECONDS + 2 * lane_module.DEAD_AFTER)
            await asyncio.sleep(2 * lane_module.DEAD_AFTER)
            assert p.worker.changes == p.hub.changes == []
            assert len(p.worker.mux.lanes) == 2

    run(main)


def test_a_broken_peer_ends_the_session_and_is_said_with_its_code() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE) as p:
            mine = Owner()
            p.worker.open(mine)
            lane = p.hub.lanes[0]
            assert lane.transport is not None
            lane.transport.write(encode(Kind.WELCOME, 0, 1))
            await until(lambda: p.worker.changes)
            (change,) = p.worker.changes
            assert isinstance(change, SessionEnded)
            assert change.why.startswith("handshake_late")
            assert mine.told[0].startswith("lost: SESSION_ENDED")
            await until(lambda: p.hub.changes)
            assert isinstance(p.hub.changes[-1], SessionEnded), "the peer is told why"

    with log_events() as log:
        run(main)
    assert [entry["code"] for entry in of(log, "session_broken")] == ["handshake_late"]


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_message_that_is_no_object_is_left_out(text: bytes) -> None:
    async def main() -> None:
        async with pair(INTERACTIVE) as p:
            p.hub.mux.session.send_message(text)
            p.hub.mux.send_message(HeadRay("up"))
            await until(lambda: p.worker.messages)
            assert p.worker.messages == [HeadRay("up")]

    with log_events() as log:
        run(main)
    assert len(of(log, "message_malformed")) == 1


def test_closing_ends_both_sides_and_their_lanes() -> None:
    async def main() -> None:
        async with pair(INTERACTIVE, BULK) as p:
            mine = Owner()
            p.worker.open(mine)
            p.hub.mux.close("maintenance")
            await until(lambda: p.worker.changes)
            assert p.worker.changes == p.hub.changes == [SessionEnded("maintenance")]
            assert mine.told == ["lost: SESSION_ENDED maintenance"]
            for end in (p.worker, p.hub):
                for lane in end.lanes:
                    await lane.closed
                assert end.mux.lanes == {}
                end.mux.send_message(HeadRay("too late"))
                end.mux.close("again")

    run(main)


def test_the_end_is_said_on_a_lane_that_takes_no_more() -> None:
    """Else the peer would take it for a cut, and hold its streams for all of `ride_through`."""

    async def main() -> None:
        async with pair(INTERACTIVE) as p:
            p.worker.lanes[0].paused = True
            p.worker.mux.close("maintenance")
            await until(lambda: p.hub.changes)
            assert p.hub.changes == [SessionEnded("maintenance")]

    run(main)
