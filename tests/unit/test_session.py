"""Sessions as conversations: what one side does, what the other sees, and by which lane it went."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from enum import Enum
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfwd import codes
from rayfwd.session.answers import ACK_DELAY
from rayfwd.session.events import (
    LaneDead,
    MessageReceived,
    Parked,
    Resumed,
    SessionEnded,
    StreamWritable,
)
from rayfwd.session.frames import MAX_MESSAGE, Chunk, Kind, ProtocolError, encode
from rayfwd.session.lane import (
    DEAD_AFTER,
    OVERDUE_AFTER,
    PING_BUSY,
    UNANSWERED_AFTER,
    WINDOW_START,
    LaneClass,
)
from rayfwd.session.numbers import StreamNumbers
from rayfwd.session.scheduler import CROWD
from rayfwd.session.session import MOST_LANES, Limits, Session
from rayfwd.session.states import (
    SESSION_TRANSITIONS,
    STREAM_TRANSITIONS,
    SessionEvent,
    SessionState,
    StreamEvent,
    StreamState,
)
from rayfwd.session.stream import (
    BULK_BYTES,
    CROWDED_BULK_BYTES,
    FRAME_BYTES,
    PROBE_AFTER,
    ResetReason,
    Stream,
)
from tests.unit.talk import BULK, INTERACTIVE, STEP, Talk

RESERVE = LaneClass.RESERVE
ROUND = PING_BUSY + OVERDUE_AFTER + 4 * STEP
"""Seconds in which a stalled lane is gone round: with the timers' own 0.1 s twice, under one."""

CODES = {
    "ack_ahead", "ack_malformed", "control_ended", "credit_exceeded", "data_after_end",
    "end_moved", "frame_too_long", "frame_unknown", "handshake_late", "message_too_long",
    "stream_number", "stream_unknown",
}  # fmt: skip
"""Every code that `Session.receive` may raise; docs/protocol.md has the same list."""


def opened(talk: Talk) -> int:
    """A stream that the worker opened and the hub has answered."""
    number = talk.worker.session.open(b"to", talk.now)
    talk.run()
    talk.wait(0.2)
    assert talk.worker.session.streams[number].state is StreamState.OPEN
    return number


def code(talk: Talk, data: bytes) -> str:
    """The code with which the hub refuses `data`."""
    with pytest.raises(ProtocolError) as caught:
        talk.receive(talk.hub, data)
    return caught.value.code.name


class TestStreams:
    def test_opening_is_optimistic(self) -> None:
        talk = Talk(INTERACTIVE)
        number = talk.worker.session.open(b"to", talk.now)
        talk.worker.session.send(number, b"hello")
        talk.run()
        assert talk.hub.opened == [number]
        assert talk.hub.bytes_of(number) == b"hello"
        assert talk.worker.session.streams[number].state is StreamState.OPENING
        talk.wait(ACK_DELAY + 0.05)
        assert talk.worker.session.streams[number].state is StreamState.OPEN

    @pytest.mark.parametrize("first", ["opener", "accepter"])
    def test_each_direction_ends_by_itself(self, first: str) -> None:
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        one, two = talk.sides if first == "opener" else talk.sides[::-1]
        one.session.send(number, b"request")
        one.session.end(number)
        talk.wait(1.0)
        assert two.ended == [number]
        assert one.ended == []
        two.session.send(number, b"a late answer")
        talk.wait(1.0)
        assert one.bytes_of(number) == b"a late answer"
        assert number in one.live & two.live
        two.session.end(number)
        talk.wait(1.0)
        for side in talk.sides:
            assert side.ended == side.finished == [number]
            assert side.lost == []
            assert not side.live

    def test_an_end_counts_one_offset(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.worker.session.send(number, b"abc")
        talk.worker.session.end(number)
        talk.run()
        assert [s.frame.offset for s in talk.worker.sent(Kind.END, number)] == [3]
        assert talk.hub.sent(Kind.ACK, number)[-1].frame.offset == 4

    def test_a_reset_reaches_the_other_side_with_its_reason(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.hub.session.reset(number, ResetReason.REFUSED, "nothing listens")
        assert talk.hub.session.streams[number].state is StreamState.RESETTING
        talk.run()
        assert talk.worker.lost == [(number, ResetReason.REFUSED, "nothing listens")]
        assert talk.hub.lost == [], "who resets is told nothing"
        assert talk.worker.live == talk.hub.live == set()
        assert len(talk.worker.sent(Kind.GONE, number)) == 1

    def test_a_reset_drops_what_was_to_be_sent(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.worker.session.send(number, b"x" * 5000)
        talk.worker.session.reset(number, ResetReason.ABORTED)
        assert talk.worker.session.buffered == 0
        talk.run()
        assert talk.hub.bytes_of(number) == b""

    def test_a_stream_may_be_reset_before_its_open_was_sent(self) -> None:
        talk = Talk(INTERACTIVE)
        number = talk.worker.session.open(b"to", talk.now)
        talk.worker.session.reset(number, ResetReason.ABORTED)
        talk.run()
        assert talk.hub.opened == []
        assert talk.worker.sent(Kind.OPEN, number) == []
        assert not talk.worker.live
        talk.worker.session.open(b"to", talk.now)
        talk.run()
        assert talk.hub.opened == [number + 2], "the number left out is no gap"

    def test_resets_that_cross_end_the_stream_on_both_sides(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        for side in talk.sides:
            side.session.reset(number, ResetReason.ABORTED)
        talk.run()
        assert talk.worker.lost == talk.hub.lost == []
        assert talk.worker.live == talk.hub.live == set()

    def test_a_reset_after_an_end_still_counts(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.worker.session.end(number)
        talk.run()
        talk.hub.session.reset(number, ResetReason.ABORTED)
        talk.run()
        assert [lost[0] for lost in talk.worker.lost] == [number]

    def test_an_open_that_comes_again_after_the_stream_is_over_opens_nothing(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.worker.session.reset(number, ResetReason.ABORTED)
        talk.run()
        talk.receive(talk.hub, encode(Kind.OPEN, number, 0, b"to"))
        talk.run()
        assert talk.hub.opened == [number]
        assert len(talk.hub.sent(Kind.GONE, number)) == 2

    def test_an_open_that_comes_twice_opens_once(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.receive(talk.hub, encode(Kind.OPEN, number, 0, b"to"))
        acks = len(talk.hub.sent(Kind.ACK, number))
        talk.run()
        assert talk.hub.opened == [number]
        assert len(talk.hub.sent(Kind.ACK, number)) == acks + 1, "its answer may have been lost"

    def test_an_open_may_come_after_its_reset_by_another_lane(self) -> None:
        talk = Talk(INTERACTIVE, INTERACTIVE)
        talk.receive(talk.hub, encode(Kind.RESET, 1, 1), lane=2)
        talk.receive(talk.hub, encode(Kind.OPEN, 1, 0, b"to"), lane=1)
        assert talk.hub.opened == []

    def test_opens_may_come_in_any_order(self) -> None:
        talk = Talk(INTERACTIVE, INTERACTIVE)
        for number in (5, 1, 3):
            talk.receive(talk.hub, encode(Kind.OPEN, number, 0, b"to"))
        assert talk.hub.opened == [5, 1, 3]

    def test_gone_for_a_stream_that_was_not_over_is_a_reset(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.receive(talk.hub, encode(Kind.GONE, number))
        assert [lost[:2] for lost in talk.hub.lost] == [(number, ResetReason.ABORTED)]

    def test_data_of_a_stream_that_is_over_is_answered_with_gone(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.worker.session.reset(number, ResetReason.ABORTED)
        talk.run()
        before = len(talk.hub.sent(Kind.GONE, number))
        talk.receive(talk.hub, encode(Kind.DATA, number, 0, b"late"))
        talk.run()
        assert len(talk.hub.sent(Kind.GONE, number)) == before + 1

    def test_worker_and_hub_open_with_numbers_that_never_meet(self) -> None:
        talk = Talk(INTERACTIVE)
        mine = [talk.worker.session.open(b"to", talk.now) for _ in range(3)]
        theirs = [talk.hub.session.open(b"to", talk.now) for _ in range(3)]
        talk.run()
        assert mine == talk.hub.opened == [1, 3, 5]
        assert theirs == talk.worker.opened == [2, 4, 6]

    def test_more_streams_than_allowed_are_refused_one_by_one(self) -> None:
        talk = Talk(INTERACTIVE, limits=Limits(streams=4))
        talk.worker.session.limits = Limits()  # it believes that there may be more
        numbers = [talk.worker.session.open(b"to", talk.now) for _ in range(6)]
        talk.run()
        assert talk.hub.opened == numbers[:3]  # the control stream is one of the four
        assert [lost[:2] for lost in talk.worker.lost] == [
            (n, ResetReason.TOO_MANY) for n in numbers[3:]
        ]
        talk.worker.session.reset(numbers[0], ResetReason.ABORTED)
        talk.run()
        again = talk.worker.session.open(b"to", talk.now)
        talk.run()
        assert again in talk.hub.opened, "there is room again"

    def test_who_opens_keeps_to_what_the_other_side_takes(self) -> None:
        talk = Talk(INTERACTIVE, limits=Limits(streams=4))
        session = talk.worker.session
        numbers = [session.open(b"to", talk.now) for _ in range(3)]
        assert session.full
        with pytest.raises(ValueError, match="full"):
            session.open(b"to", talk.now)
        talk.run()
        assert talk.hub.opened == numbers
        assert talk.worker.lost == []
        session.reset(numbers[0], ResetReason.ABORTED)
        talk.run()
        assert not session.full, "there is room again"

    def test_a_stream_that_is_unknown_or_reset_takes_bytes_and_drops_them(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.worker.session.reset(number, ResetReason.ABORTED)
        assert talk.worker.session.send(number, b"x")
        assert talk.worker.session.send(999, b"x")
        talk.worker.session.end(number)
        talk.worker.session.consumed(number, 5, talk.now)
        talk.worker.session.reset(999, ResetReason.ABORTED)
        assert talk.worker.session.buffered == 0


class TestStates:
    """A stream and a session change their states as the tables say, or not at all."""

    @pytest.mark.parametrize("event", StreamEvent)
    @pytest.mark.parametrize("state", StreamState)
    def test_a_stream(self, state: StreamState, event: StreamEvent) -> None:
        stream = Stream(1, True, b"to", 1000, 1000, 0.0)
        stream.state = state

        def change() -> None:
            match event:
                case StreamEvent.ANSWERED:
                    stream.opened()
                case StreamEvent.RESET:
                    stream.give_up(ResetReason.ABORTED, "")
                case _:
                    stream.over(event)

        expected = STREAM_TRANSITIONS[state].get(event)
        if expected is None:
            with pytest.raises(RuntimeError, match=state.value):
                change()
            assert stream.state is state
        else:
            change()
            assert stream.state is expected

    def test_a_session(self) -> None:
        for state, after in SESSION_TRANSITIONS.items():
            for event in SessionEvent:
                session = Session("hub", 5.0, Limits(), 0.0)
                session.state = state
                if event in after:
                    session._move(event)
                    assert session.state is after[event]
                else:
                    with pytest.raises(RuntimeError, match=state.value):
                        session._move(event)
                    assert session.state is state


class TestCredit:
    def test_nobody_sends_more_than_the_reader_allows(self) -> None:
        limits = Limits(window=1000)
        talk = Talk(INTERACTIVE, limits=limits)
        number = opened(talk)
        talk.hub.reads = False
        talk.worker.session.send(number, b"x" * 5000)
        talk.wait(5.0)
        assert len(talk.hub.bytes_of(number)) == 1000
        talk.hub.session.consumed(number, 600, talk.now)
        talk.wait(0.5)
        assert len(talk.hub.bytes_of(number)) == 1600

    def test_a_peer_that_sends_more_is_broken(self) -> None:
        talk = Talk(INTERACTIVE, limits=Limits(window=1000))
        number = opened(talk)
        assert code(talk, encode(Kind.DATA, number, 0, b"x" * 1001)) == "credit_exceeded"

    def test_a_slow_reader_does_not_hold_up_a_fast_one(self) -> None:
        talk = Talk(INTERACTIVE, BULK)
        slow, fast = opened(talk), opened(talk)
        talk.hub.reads = False
        data = b"x" * (1 << 21)
        talk.worker.session.send(slow, data)
        talk.worker.session.send(fast, data)
        for _ in range(200):
            talk.wait(0.05)
            got = len(talk.hub.bytes_of(fast))
            talk.hub.session.consumed(
                fast, got - talk.hub.session.streams[fast].receive.consumed, talk.now
            )
            if got == len(data):
                break
        assert len(talk.hub.bytes_of(fast)) == len(data)
        assert len(talk.hub.bytes_of(slow)) == talk.limits.window
        assert talk.hub.session.streams[slow].receive.held == talk.limits.window

    def test_the_window_grows_for_a_reader_that_keeps_up_within_its_budget(self) -> None:
        limits = Limits(window=1 << 16, window_ceiling=1 << 20, window_budget=3 << 18)
        talk = Talk(INTERACTIVE, BULK, limits=limits)
        numbers = [opened(talk), opened(talk)]
        for lane in talk.lanes:
            lane.rate = 20e6  # a round trip takes a step of the clock
        for _ in range(300):
            for number in numbers:
                if talk.worker.session.must_wait(number):
                    continue
                talk.worker.session.send(number, b"x" * (1 << 18))
            talk.wait(0.05)
        windows = [talk.hub.session.streams[n].receive.window for n in numbers]
        grown = sum(windows) - 2 * limits.window
        assert grown > 0
        assert grown <= limits.window_budget
        assert max(windows) <= limits.window_ceiling
        for number in numbers:
            talk.worker.session.reset(number, ResetReason.ABORTED)
        talk.wait(1.0)
        assert talk.hub.live == set()
        talk.hub.session.check_invariants()  # the budget has come back

    def test_a_writer_waits_at_the_streams_bound_and_goes_on_at_half_of_it(self) -> None:
        talk = Talk(INTERACTIVE, limits=Limits(window=1000, stream_buffer=4000))
        number = opened(talk)
        talk.hub.reads = False
        session = talk.worker.session
        assert session.send(number, b"x" * 3999)
        assert not session.send(number, b"x")
        assert session.must_wait(number)
        talk.run()
        assert session.must_wait(number), "3,000 bytes still wait"
        talk.hub.session.consumed(number, 1000, talk.now)
        talk.wait(0.5)
        assert talk.worker.seen(StreamWritable) == [StreamWritable(number)]
        assert not session.must_wait(number)

    def test_the_sessions_bound_makes_every_writer_wait_and_lets_every_one_go_on(self) -> None:
        limits = Limits(window=1 << 16, stream_buffer=1 << 20, session_buffer=10_000)
        talk = Talk(INTERACTIVE, limits=limits)
        numbers = [opened(talk) for _ in range(5)]
        (lane,) = talk.lanes
        lane.held.add("hub")
        session = talk.worker.session
        assert not session.send(numbers[0], b"x" * 10_000)
        for number in numbers[1:]:
            assert not session.send(number, b"x")
        talk.run()
        assert all(session.must_wait(n) for n in numbers)
        lane.held.clear()
        talk.wait(0.5)
        assert sorted(e.stream for e in talk.worker.seen(StreamWritable)) == numbers
        assert session.buffered == 0

    @staticmethod
    def fill(talk: Talk, number: int) -> None:
        """Write until the session takes no more, its reader taking nothing."""
        while not talk.worker.session.must_wait(number):
            talk.worker.session.send(number, b"x" * 5000)
            talk.wait(0.5)

    def test_writers_go_on_when_the_stream_that_filled_the_session_is_reset(self) -> None:
        limits = Limits(window=1000, stream_buffer=1 << 20, session_buffer=10_000)
        talk = Talk(INTERACTIVE, limits=limits)
        greedy, modest = opened(talk), opened(talk)
        talk.hub.reads = False
        session = talk.worker.session
        self.fill(talk, greedy)
        assert not session.send(modest, b"x")
        talk.wait(1.0)
        assert talk.hub.bytes_of(modest) == b"x"
        assert session.must_wait(modest), "the session is full"
        talk.hub.reads = True
        talk.worker.events.clear()
        session.reset(greedy, ResetReason.ABORTED)
        talk.run()
        assert talk.worker.seen(StreamWritable) == [StreamWritable(modest)]

    def test_and_when_it_is_the_peer_that_resets_it(self) -> None:
        limits = Limits(window=1000, stream_buffer=1 << 20, session_buffer=10_000)
        talk = Talk(INTERACTIVE, limits=limits)
        greedy, modest = opened(talk), opened(talk)
        talk.hub.reads = False
        session = talk.worker.session
        self.fill(talk, greedy)
        assert not session.send(modest, b"x")
        talk.wait(1.0)
        assert session.must_wait(modest), "the session is full"
        talk.worker.events.clear()
        talk.hub.session.reset(greedy, ResetReason.ABORTED)
        talk.run()
        assert talk.worker.seen(StreamWritable) == [StreamWritable(modest)]


class TestAcknowledgements:
    def test_a_small_answer_is_acknowledged_in_company(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        before = len(talk.hub.sent(Kind.ACK, number))
        for _ in range(5):
            talk.worker.session.send(number, b"x")
            talk.run()
        assert len(talk.hub.sent(Kind.ACK, number)) == before
        talk.wait(ACK_DELAY + 0.1)
        assert len(talk.hub.sent(Kind.ACK, number)) == before + 1
        assert talk.worker.session.streams[number].send.acked == 5

    def test_a_quarter_of_the_window_is_acknowledged_at_once(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.worker.session.send(number, b"x" * (talk.limits.window // 4))
        talk.run()
        assert talk.worker.session.buffered == 0

    def test_a_lost_acknowledgement_is_asked_for_again(self) -> None:
        talk = Talk(INTERACTIVE, INTERACTIVE)
        number = opened(talk)
        for lane in talk.lanes:
            lane.loses.add(Kind.ACK)
        talk.worker.session.send(number, b"x")
        talk.wait(ACK_DELAY + 2 * STEP)
        assert talk.hub.sent(Kind.ACK, number)[-1].frame.offset == 1
        assert talk.worker.session.buffered == 1
        for lane in talk.lanes:
            lane.loses.clear()
        talk.wait(PROBE_AFTER * 2 + 1)
        assert talk.worker.session.buffered == 0
        assert len(talk.worker.sent(Kind.DATA, number)) == 2
        assert talk.hub.bytes_of(number) == b"x"

    def test_a_lost_open_and_a_lost_gone_are_mended_too(self) -> None:
        talk = Talk(INTERACTIVE)
        (lane,) = talk.lanes
        lane.loses.add(Kind.OPEN)
        number = talk.worker.session.open(b"to", talk.now)
        talk.run()
        lane.loses.clear()
        talk.wait(PROBE_AFTER * 2 + 1)
        assert talk.hub.opened == [number]
        lane.loses.add(Kind.GONE)
        talk.worker.session.reset(number, ResetReason.ABORTED)
        talk.run()
        lane.loses.clear()
        assert number in talk.worker.live
        talk.wait(PROBE_AFTER * 2 + 1)
        assert [lost[0] for lost in talk.hub.lost] == [number]
        assert number not in talk.worker.live

    def test_probes_come_ever_more_seldom(self) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        (lane,) = talk.lanes
        lane.loses.add(Kind.DATA)
        talk.worker.session.send(number, b"x")
        times: list[float] = []
        start = talk.now
        while talk.now - start < 100:
            talk.run()
            if len(talk.worker.sent(Kind.DATA, number)) > len(times):
                times.append(talk.now - start)
            talk.wait(STEP)
        gaps = [after - before for before, after in pairwise(times)]
        late = PROBE_AFTER / 2 + 2 * STEP  # so often is looked for what waits
        assert gaps == pytest.approx([3.0, 6.0, 12.0, 24.0, 30.0], abs=late)
        assert talk.worker.seen(LaneDead) == [], "the lane lives"


class TestLanes:
    def test_short_messages_and_bulk_have_lanes_of_their_own(self) -> None:
        talk = Talk(INTERACTIVE, BULK)
        short, long = opened(talk), opened(talk)
        talk.worker.session.send(long, b"x" * (1 << 20))
        talk.worker.session.send(short, b"quick")
        talk.wait(0.5)
        assert {s.lane for s in talk.worker.sent(Kind.DATA, short)} == {1}
        assert {s.lane for s in talk.worker.sent(Kind.DATA, long)} == {2}

    def test_a_stream_is_short_again_when_all_of_it_has_arrived(self) -> None:
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        talk.worker.session.send(number, b"x" * (1 << 20))
        talk.wait(1.0)
        assert not talk.worker.session.streams[number].bulk
        talk.worker.session.send(number, b"quick")
        talk.run()
        assert talk.worker.sent(Kind.DATA, number)[-1].lane == 1

    def test_bursts_in_a_crowd_of_them_keep_off_the_lane_for_short_messages(self) -> None:
        """As gradients come, by many streams: a call would wait for the beginnings of all."""
        talk = Talk(INTERACTIVE, BULK)
        session = talk.worker.session
        others = [opened(talk) for _ in range(CROWD)]
        burst, call = opened(talk), opened(talk)

        def lanes(**sizes: int) -> list[int]:
            numbers = {"burst": burst, "call": call}
            for who, size in sizes.items():
                session.send(numbers[who], b"x" * size)
            talk.run()
            return [talk.worker.sent(Kind.DATA, numbers[who])[-1].lane for who in sizes]

        assert lanes(burst=BULK_BYTES) == [1], "nothing is in its way"
        talk.wait(1.0)
        for number in others:
            session.send(number, b"x" * (1 << 20))
        assert lanes(call=CROWDED_BULK_BYTES, burst=CROWDED_BULK_BYTES + 1) == [1, 2]
        talk.wait(5.0)
        assert lanes(burst=BULK_BYTES) == [1], "the crowd has gone"

    @pytest.mark.parametrize("end", ["reset here", "reset there", "handover"])
    def test_a_crowd_is_counted_however_its_streams_end(self, end: str) -> None:
        talk = Talk(INTERACTIVE, BULK)
        for _ in range(CROWD):
            talk.worker.session.send(opened(talk), b"x" * (1 << 20))
        session = talk.worker.session
        if end == "handover":
            for number in list(session.lanes):
                session.lane_down(number, talk.now)
            session = Session.from_snapshot(session.snapshot(), talk.now)
        for number in list(session.streams)[1:]:
            if end == "reset there":
                talk.hub.session.reset(number, ResetReason.ABORTED)
            elif end == "reset here":
                session.reset(number, ResetReason.ABORTED)
        talk.run()
        session.check_invariants()

    @pytest.mark.parametrize("lane_class", LaneClass)
    def test_one_lane_serves_both_short_messages_first(self, lane_class: LaneClass) -> None:
        talk = Talk(lane_class)
        (lane,) = talk.lanes
        short, long = opened(talk), opened(talk)
        talk.worker.session.send(long, b"x" * (1 << 20))
        session = talk.worker.session
        first = b"".join(session.data_to_send(lane.number, FRAME_BYTES, talk.now))
        assert len(first) < 2 * FRAME_BYTES
        session.send(short, b"quick")
        then = b"".join(session.data_to_send(lane.number, FRAME_BYTES, talk.now))
        assert then.index(b"quick") < 100, "it waited behind bulk"

    def test_a_lane_in_reserve_carries_nothing_while_another_is_well(self) -> None:
        talk = Talk(RESERVE, INTERACTIVE, BULK)
        short, long = opened(talk), opened(talk)
        talk.worker.session.send(long, b"x" * (1 << 20))
        talk.worker.session.send(short, b"quick")
        talk.hub.session.send(short, b"answer")
        talk.wait(3.0)
        for side in talk.sides:
            kinds = {s.frame.kind for s in side.frames if s.lane == 1}
            assert kinds == {Kind.PING, Kind.PONG}
        assert talk.hub.bytes_of(long) == b"x" * (1 << 20)

    @pytest.mark.parametrize("silent", [False, True])
    def test_a_lane_in_reserve_takes_over_and_gives_back(self, silent: bool) -> None:
        talk = Talk(RESERVE, INTERACTIVE, BULK)
        reserve, *others = talk.lanes
        number = opened(talk)
        data = bytes(range(256)) * 2048
        for lane in others:
            lane.held |= {"worker", "hub"}
        talk.worker.session.send(number, data)
        talk.run()
        if not silent:
            talk.cut(*others)
        talk.wait(2 * ROUND)
        assert talk.hub.bytes_of(number) == data
        assert talk.worker.seen(Parked) == []
        assert {s.lane for s in talk.hub.sent(Kind.ACK, number)[-1:]} == {reserve.number}
        if silent:
            for lane in others:
                lane.held.clear()
        else:
            others = [talk.lane(INTERACTIVE), talk.lane(BULK)]
        talk.wait(2.0)
        talk.worker.frames.clear()
        talk.worker.session.send(number, data)
        talk.wait(1.0)
        assert talk.hub.bytes_of(number) == 2 * data
        assert reserve.number not in {s.lane for s in talk.worker.sent(Kind.DATA)}

    def test_streams_take_turns(self) -> None:
        talk = Talk(INTERACTIVE, BULK)
        numbers = [opened(talk) for _ in range(3)]
        for number in numbers:
            talk.worker.session.send(number, b"x" * (4 * FRAME_BYTES - 1))
        talk.run()
        order = [s.frame.stream for s in talk.worker.sent(Kind.DATA) if s.lane == 2]
        assert order[:6] == numbers * 2

    def test_the_lane_window_bounds_what_is_under_way(self) -> None:
        talk = Talk(INTERACTIVE, BULK, limits=Limits(window=1 << 24, session_buffer=1 << 28))
        number = opened(talk)
        bulk = talk.lanes[1]
        bulk.held |= {"worker", "hub"}
        talk.worker.session.send(number, b"x" * (1 << 23))
        talk.run()
        size = len(bulk.under_way["hub"])
        assert WINDOW_START <= size <= WINDOW_START + 2 * FRAME_BYTES

    def test_what_was_under_way_on_a_lost_lane_goes_by_the_other(self) -> None:
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        bulk = talk.lanes[1]
        bulk.held |= {"worker", "hub"}
        data = bytes(range(256)) * 2048
        talk.worker.session.send(number, data)
        talk.run()
        assert len(talk.hub.bytes_of(number)) < len(data)
        talk.cut(bulk)
        talk.wait(1.0)
        assert talk.hub.bytes_of(number) == data
        assert talk.worker.seen(Parked) == []

    @pytest.mark.parametrize("stalled", [0, 1])
    def test_a_stalled_lane_is_gone_round_within_a_second(self, stalled: int) -> None:
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        talk.wait(2.0)
        lane = talk.lanes[stalled]
        lane.held |= {"worker", "hub"}
        data = b"x" * ((1 << 17) * (1 if stalled else 0) + 100)
        # What needs the stalled lane: bulk data, or a short message.
        talk.worker.session.send(number, data)
        start = talk.now
        while talk.hub.bytes_of(number) != data:
            talk.wait(0.05)
            assert talk.now - start <= 1.2, "it still waits for the stalled lane"

    @pytest.mark.parametrize("quiet", [0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.1, 1.4])
    def test_nor_does_the_answer_wait_for_it(self, quiet: float) -> None:
        """Each side finds a lane stalled by what it asks itself: one that only answers had asked
        nothing, and would begin when the question has come round."""
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        talk.wait(3.0 + quiet)
        talk.lanes[0].held |= {"worker", "hub"}
        start = talk.now
        talk.worker.session.send(number, b"question")
        while talk.hub.bytes_of(number) != b"question":
            talk.wait(0.05)
        talk.hub.session.send(number, b"answer")
        while talk.worker.bytes_of(number) != b"answer":
            talk.wait(0.05)
        assert talk.now - start <= ROUND

    @pytest.mark.parametrize("phase", range(8))
    def test_nor_does_a_lively_talk(self, phase: int) -> None:
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        start = talk.now
        for turn in range(1, 100):
            if turn == 20 + phase:
                talk.lanes[0].held |= {"worker", "hub"}
            start = talk.now
            talk.worker.session.send(number, b"q")
            while len(talk.hub.bytes_of(number)) < turn:
                talk.wait(0.05)
            talk.hub.session.send(number, b"a")
            while len(talk.worker.bytes_of(number)) < turn:
                talk.wait(0.05)
            assert talk.now - start <= ROUND
            talk.wait(0.05)

    @pytest.mark.parametrize("way", ["worker", "hub"])
    def test_nor_does_a_transfer_whose_acknowledgements_went_by_it(self, way: str) -> None:
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        sender = talk.worker if way == "worker" else talk.hub
        reader = talk.other(sender)
        talk.lanes[1].rate = 2e6
        talk.wait(0.5)

        def send() -> None:
            if not sender.session.must_wait(number):
                sender.session.send(number, bytes(1 << 16))

        came, since, longest = 0, talk.now, 0.0
        for turn in range(120):
            if turn == 40:
                talk.lanes[0].held |= {"worker", "hub"}
            for _ in range(4):
                send()
            talk.wait(0.05)
            if len(reader.bytes_of(number)) > came:
                came, since = len(reader.bytes_of(number)), talk.now
            longest = max(longest, talk.now - since)
        assert came > 5e6
        assert longest <= ROUND

    def test_a_lane_that_goes_on_is_used_again(self) -> None:
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        bulk = talk.lanes[1]
        bulk.held |= {"worker", "hub"}
        talk.worker.session.send(number, b"x" * (1 << 17))
        talk.wait(1.5)
        assert talk.state(talk.worker, bulk).sidelined
        bulk.held.clear()
        talk.wait(0.5)
        assert not talk.state(talk.worker, bulk).sidelined
        talk.worker.session.send(number, b"y" * (1 << 17))
        talk.run()
        assert talk.worker.sent(Kind.DATA, number)[-1].lane == bulk.number
        assert talk.hub.bytes_of(number) == b"x" * (1 << 17) + b"y" * (1 << 17)

    def test_with_no_other_lane_a_stalled_one_is_waited_for(self) -> None:
        talk = Talk(BULK)
        opened(talk)
        (lane,) = talk.lanes
        lane.held |= {"worker", "hub"}
        talk.wait(2.0)
        assert not talk.state(talk.worker, lane).sidelined

    @pytest.mark.parametrize("busy", [False, True])
    def test_a_silent_lane_is_dropped_within_six_seconds(self, busy: bool) -> None:
        talk = Talk(INTERACTIVE)
        number = opened(talk)
        talk.wait(3.0)
        (lane,) = talk.lanes
        lane.held |= {"worker", "hub"}
        if busy:
            talk.worker.session.send(number, b"x" * 100_000)
        talk.wait(6.0)
        for side in talk.sides:
            assert side.seen(LaneDead) == [LaneDead(lane.number)]
            assert side.session.state is SessionState.PARKED

    @pytest.mark.parametrize("deaf", ["worker", "hub"])
    def test_one_silent_direction_is_enough(self, deaf: str) -> None:
        talk = Talk(INTERACTIVE)
        opened(talk)
        (lane,) = talk.lanes
        lane.held.add(deaf)
        side = talk.worker if deaf == "worker" else talk.hub
        talk.wait(6.0)
        assert side.seen(LaneDead), "it hears nothing"
        talk.wait(UNANSWERED_AFTER - 2.0)
        assert talk.other(side).seen(LaneDead), "it is not heard"

    def test_a_lane_that_takes_no_bytes_any_more_is_dropped_too(self) -> None:
        """A full transport: the PING that would find it dead cannot even be sent."""
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        talk.wait(2.0)
        bulk = talk.lanes[1]
        bulk.held |= {"worker", "hub"}
        for _ in range(10):  # as much as leaves no PING unanswered
            if talk.state(talk.worker, bulk)._pings:
                bulk.held.clear()
                talk.wait(0.05)
                bulk.held |= {"worker", "hub"}
        assert not talk.state(talk.worker, bulk)._pings
        bulk.full |= {"worker", "hub"}
        data = b"x" * (1 << 17)
        talk.worker.session.send(number, data)
        talk.wait(6.5)
        assert LaneDead(bulk.number) in talk.worker.seen(LaneDead)
        talk.wait(1.0)
        assert talk.hub.bytes_of(number) == data

    def test_a_slow_lane_is_not_taken_for_dead_and_its_window_shrinks(self) -> None:
        talk = Talk(INTERACTIVE, BULK, limits=Limits(window=1 << 22))
        number = opened(talk)
        bulk = talk.lanes[1]
        bulk.rate = 100_000.0
        data = b"x" * (3 << 20)
        talk.worker.session.send(number, data)
        talk.wait(60.0)
        assert talk.worker.seen(LaneDead) == talk.hub.seen(LaneDead) == []
        assert talk.hub.bytes_of(number) == data
        assert talk.state(talk.worker, bulk).window < WINDOW_START

    def test_a_slow_lane_alone_still_lets_short_messages_through(self) -> None:
        talk = Talk(BULK, limits=Limits(window=1 << 22))
        long, short = opened(talk), opened(talk)
        (lane,) = talk.lanes
        lane.rate = 1_000_000.0
        talk.worker.session.send(long, b"x" * (20 << 20))
        talk.wait(8.0)
        talk.worker.session.send(short, b"quick")
        start = talk.now
        while talk.hub.bytes_of(short) != b"quick":
            talk.wait(0.05)
            assert talk.now - start <= 1.5
        assert len(talk.hub.bytes_of(long)) < 20 << 20, "bulk was still under way"


class TestParking:
    def test_with_no_lane_streams_wait_and_go_on(self) -> None:
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        talk.worker.session.send(number, b"before ")
        talk.cut()
        talk.worker.session.send(number, b"while ")
        other = talk.hub.session.open(b"to", talk.now)
        talk.wait(60.0)
        for side in talk.sides:
            assert side.seen(Parked) == [Parked()]
            assert side.session.state is SessionState.PARKED
            assert side.session.cuts == 1
        talk.lane(BULK)
        talk.worker.session.send(number, b"after")
        talk.run()
        assert talk.hub.bytes_of(number) == b"before while after"
        assert talk.worker.opened == [other]
        assert talk.worker.seen(Resumed)[0].seconds == pytest.approx(60.0)

    def test_an_end_and_a_reset_are_as_reliable_as_data(self) -> None:
        talk = Talk(INTERACTIVE)
        ends, resets = opened(talk), opened(talk)
        talk.worker.session.end(ends)
        talk.worker.session.reset(resets, ResetReason.ABORTED, "bye")
        talk.worker.session.data_to_send(1, 1 << 18, talk.now)  # goes down with the lane
        talk.cut()
        talk.lane(INTERACTIVE)
        talk.run()
        assert talk.hub.ended == [ends]
        assert talk.hub.lost == [(resets, ResetReason.ABORTED, "bye")]

    def test_before_ride_through_is_over_nothing_is_lost_after_it_everything_once(self) -> None:
        talk = Talk(INTERACTIVE, ride_through=10.0)
        numbers = {opened(talk), opened(talk)}
        talk.cut()
        talk.wait(9.9)
        assert not talk.worker.session.ended
        talk.lane(INTERACTIVE)
        talk.wait(1.0)
        talk.cut()
        talk.wait(9.9)
        assert talk.worker.lost == []
        talk.wait(0.2)
        for side in talk.sides:
            assert {lost[0] for lost in side.lost} == numbers
            assert {lost[1] for lost in side.lost} == {ResetReason.SESSION_ENDED}
            assert len(side.seen(SessionEnded)) == 1
            assert isinstance(side.events[-1], SessionEnded)
            assert side.session.ended
        talk.wait(30.0)
        assert len(talk.worker.seen(SessionEnded)) == 1

    def test_a_session_that_never_got_a_lane_ends_too(self) -> None:
        talk = Talk(ride_through=10.0)
        talk.wait(10.1)
        assert talk.worker.session.state is SessionState.ENDED

    def test_a_parked_session_is_looked_at_when_its_time_is_over(self) -> None:
        talk = Talk(INTERACTIVE, ride_through=10.0)
        talk.cut()
        assert talk.worker.session.deadline(talk.now + 3) == talk.now + 10.0

    def test_a_session_takes_so_many_lanes(self) -> None:
        """Each frame costs time for every lane."""
        talk = Talk(*[BULK] * MOST_LANES)
        with pytest.raises(ValueError, match="lanes at most"):
            talk.worker.session.lane_up(BULK, talk.now)
        talk.worker.session.lane_down(1, talk.now)
        talk.worker.session.lane_up(BULK, talk.now)

    def test_an_ended_session_takes_no_lane_and_no_stream(self) -> None:
        talk = Talk(INTERACTIVE)
        talk.take(talk.worker, talk.worker.session.close("bye"))
        with pytest.raises(ValueError, match="ended"):
            talk.worker.session.open(b"to", talk.now)
        with pytest.raises(ValueError, match="ended"):
            talk.worker.session.lane_up(INTERACTIVE, talk.now)
        assert talk.worker.session.receive(1, b"\xff" * 40, talk.now) == []
        assert talk.worker.session.tick(talk.now + 1e6) == []
        assert talk.worker.session.lane_down(1, talk.now) == []


class TestControl:
    def test_messages_arrive_in_order_through_cuts(self) -> None:
        talk = Talk(INTERACTIVE, BULK)
        said = [b"", b"one", b"x" * MAX_MESSAGE, b"last"]
        for message in said:
            talk.hub.session.send_message(message)
        talk.hub.session.data_to_send(1, 1 << 16, talk.now)
        talk.cut()
        talk.lane(INTERACTIVE)
        talk.wait(2.0)
        assert talk.worker.messages == said

    def test_what_is_not_heard_yet_is_bounded_by_the_window_and_a_message(self) -> None:
        """Also where each message is longer than the window, so that most of it completes none."""
        size, count = MAX_MESSAGE // 2, 12
        talk = Talk(INTERACTIVE)
        talk.hub.session.inbox.holds = True
        for _ in range(count):
            talk.worker.session.send_message(b"x" * size)
        heard = 0
        while heard < count:
            talk.wait(2.0)
            waiting = talk.hub.seen(MessageReceived)[heard:]
            kept = sum(len(event.data) for event in waiting) + talk.hub.session.memory
            assert waiting
            assert kept < 2 * (size + talk.limits.window)
            heard += 1
            talk.hub.session.message_done(waiting[0], talk.now)
        assert talk.hub.messages == [b"x" * size] * count

    def test_a_message_that_is_too_long_is_refused_on_both_sides(self) -> None:
        talk = Talk(INTERACTIVE)
        with pytest.raises(ValueError, match="1048577"):
            talk.worker.session.send_message(b"x" * (MAX_MESSAGE + 1))
        length = struct.pack(">I", MAX_MESSAGE + 1)
        assert code(talk, encode(Kind.DATA, 0, 0, length)) == "message_too_long"

    def test_close_ends_both_sides_and_resets_every_stream(self) -> None:
        talk = Talk(INTERACTIVE, BULK)
        number = opened(talk)
        talk.take(talk.worker, talk.worker.session.close("the worker stops"))
        talk.run()
        for side in talk.sides:
            assert [lost[:2] for lost in side.lost] == [(number, ResetReason.SESSION_ENDED)]
            assert side.seen(SessionEnded) == [SessionEnded("the worker stops")]
        assert {s.lane for s in talk.worker.sent(Kind.CLOSE)} == {1, 2}

    def test_a_writer_that_waited_is_not_called_after_the_end(self) -> None:
        talk = Talk(INTERACTIVE, limits=Limits(window=10, stream_buffer=10))
        number = opened(talk)
        assert not talk.worker.session.send(number, b"x" * 100)
        talk.take(talk.worker, talk.worker.session.close("bye"))
        assert talk.worker.session.drained() == []


class TestBrokenPeers:
    @pytest.mark.parametrize(
        ("frame", "expected"),
        [
            (encode(Kind.HELLO, 0, 1), "handshake_late"),
            (encode(Kind.WELCOME, 0, 1), "handshake_late"),
            (encode(Kind.REFUSE, 0, 1), "handshake_late"),
            (encode(Kind.OPEN, 0, 0), "stream_number"),
            (encode(Kind.OPEN, 2, 0), "stream_number"),
            (encode(Kind.OPEN, (1 << 63) + 1, 0), "stream_number"),
            (encode(Kind.RESET, (1 << 63) + 1, 0), "stream_number"),
            (encode(Kind.DATA, 1, 0, b"x"), "stream_unknown"),
            (encode(Kind.END, 1, 0), "stream_unknown"),
            (encode(Kind.RESET, 2, 1), "stream_unknown"),
            (encode(Kind.END, 0, 0), "control_ended"),
            (encode(Kind.RESET, 0, 1), "control_ended"),
            (encode(Kind.ACK, 0, 0, b"short"), "ack_malformed"),
            (encode(Kind.ACK, 0, 5, bytes(8)), "ack_ahead"),
            (b"\x00" * 20, "frame_unknown"),
            (b"\x05\xff\xff\xff" + bytes(16), "frame_too_long"),
        ],
    )
    def test_is_told_apart_by_a_code(self, frame: bytes, expected: str) -> None:
        assert code(Talk(INTERACTIVE), frame) == expected
        assert expected in CODES

    def test_streams_that_are_left_out_do_not_fill_the_memory(self) -> None:
        talk = Talk(INTERACTIVE, limits=Limits(streams=100))

        def flood() -> None:
            for number in range(799, 80_000, 800):  # each as far ahead as is allowed
                talk.receive(talk.hub, encode(Kind.OPEN, number, 0, b"to"))

        with pytest.raises(ProtocolError) as caught:
            flood()
        assert caught.value.code == codes.STREAM_NUMBER
        talk.cut()
        assert len(talk.hub.session.snapshot()["peer_gaps"]) <= 2 * 8 * 100

    def test_a_number_far_ahead_takes_no_memory_for_those_below_it(self) -> None:
        numbers = StreamNumbers("hub", 1 << 14)
        numbers.note_peers((1 << 17) - 1)
        numbers.check_invariants()
        assert len(numbers._gaps) == 1
        assert not numbers.peer_used(1)
        for number in (1, (1 << 17) - 3, 5001):
            numbers.note_peers(number)
            assert numbers.peer_used(number)
            assert not numbers.peer_used(number + 2) or number == (1 << 17) - 3
            numbers.check_invariants()
        assert len(numbers._gaps) == 2

    def test_nor_do_numbers_that_leave_out_each_second_one(self) -> None:
        numbers = StreamNumbers("hub", 100)
        for number in range(3, 400, 4):
            numbers.note_peers(number)
        with pytest.raises(ProtocolError) as caught:
            numbers.note_peers(407)
        assert caught.value.code == codes.STREAM_NUMBER
        assert len(numbers._gaps) <= 101

    @given(st.lists(st.integers(0, 60), max_size=80))
    def test_numbers_that_were_left_out_are_those_that_did_not_come(self, order: list[int]) -> None:
        numbers, used = StreamNumbers("hub", 100), set[int]()
        for index in order:
            numbers.note_peers(2 * index + 1)
            used.add(2 * index + 1)
            numbers.check_invariants()
            assert {n for n in range(1, 123, 2) if numbers.peer_used(n)} == used
        again = StreamNumbers.from_snapshot(numbers.snapshot(), 100)
        assert again.snapshot() == numbers.snapshot()
        again.check_invariants()

    @pytest.mark.interpreted
    def test_what_is_owed_does_not_fill_the_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of streams that were given up before they came, each of which is answered once."""
        monkeypatch.setattr("rayfwd.session.answers.MOST_GONE", 50)
        talk = Talk(INTERACTIVE)
        for number in range(1, 400, 2):
            talk.receive(talk.hub, encode(Kind.RESET, number, 1))
        answers = talk.hub.session._answers
        assert len(answers.gone) == 50
        out: list[Chunk] = []
        assert answers.put(out, 100) == 100
        assert len(answers.gone) == 45

    @pytest.mark.interpreted
    def test_streams_opened_without_end_do_not_fill_the_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("rayfwd.session.session.REFUSED_STREAMS", 50)
        talk = Talk(INTERACTIVE, limits=Limits(streams=100))

        def flood() -> None:
            for i in range(200):
                talk.receive(talk.hub, encode(Kind.OPEN, 2 * i + 1, 0, b"to"))

        with pytest.raises(ProtocolError) as caught:
            flood()
        assert caught.value.code == codes.STREAM_NUMBER
        assert len(talk.hub.session.streams) <= 152

    def test_pings_without_end_do_not_fill_the_memory(self) -> None:
        talk = Talk(INTERACTIVE)
        talk.receive(talk.hub, encode(Kind.PING, 0, 1) * 1000)
        assert len(talk.hub.session.lanes[1].pongs) <= 64

    @given(
        st.lists(
            st.tuples(
                st.integers(4, 12),
                st.sampled_from((0, 1, 2, 3, 5, 1 << 63)),
                st.sampled_from((0, 1, 3, 10, 1 << 62)),
                st.binary(max_size=12) | st.just(struct.pack(">Q", 1 << 40)),
            ),
            max_size=30,
        )
    )
    def test_any_frames_end_in_a_documented_code_or_in_order(
        self, frames: list[tuple[int, int, int, bytes]]
    ) -> None:
        talk = Talk(INTERACTIVE, limits=Limits(window=100, streams=20))
        two = talk.hub.session.open(b"to", talk.now)
        assert two == 2
        talk.hub.session.send(2, b"hello")
        broken = ""
        for kind, stream, offset, payload in frames:
            try:
                talk.receive(talk.hub, encode(Kind(kind), stream, offset, payload))
            except ProtocolError as exc:
                broken = exc.code.name
                break
            talk.hub.session.data_to_send(1, 1 << 16, talk.now)
            talk.take(talk.hub, talk.hub.session.tick(talk.now))
            talk.hub.session.check_invariants()
        assert broken in CODES | {""}
        assert sum(s.receive.held for s in talk.hub.session.streams.values()) <= 100 * 25


def test_every_side_counts_its_bytes() -> None:
    talk = Talk(INTERACTIVE, BULK)
    number = opened(talk)
    talk.worker.session.send(number, b"x" * 1000)
    talk.wait(1.0)
    assert talk.worker.session.bytes_out == talk.hub.session.bytes_in > 1000
    assert talk.hub.session.bytes_out == talk.worker.session.bytes_in


def test_the_clock_is_asked_for_no_later_than_anything_is_due() -> None:
    talk = Talk(INTERACTIVE)
    number = opened(talk)
    talk.worker.session.send(number, b"x")
    talk.run()
    assert talk.hub.session.deadline(talk.now) <= talk.now + ACK_DELAY
    talk.wait(0.5)
    assert talk.hub.session.deadline(talk.now) <= talk.now + DEAD_AFTER
    assert Session("hub", 5.0, Limits(), 0.0).deadline(0.0) == 5.0


class TestDocument:
    """docs/protocol.md says what the code does, as far as a test can see."""

    TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()

    @pytest.mark.parametrize("row", [*Kind, *ResetReason])
    def test_numbers_and_names_are_the_codes(self, row: Kind | ResetReason) -> None:
        assert re.search(rf"^\| {row.value} \| {row.name} \|", self.TEXT, re.MULTILINE)

    @pytest.mark.parametrize("table", [STREAM_TRANSITIONS, SESSION_TRANSITIONS])
    def test_the_drawings_are_the_tables(self, table: Mapping[Enum, Mapping[Enum, Enum]]) -> None:
        states = {state.name for state in table}
        drawn = {
            (before, event, after)
            for line in re.findall(r"^    ([A-Z].*-->.*)$", self.TEXT, re.MULTILINE)
            for many, event, after in re.findall(r"([A-Z |]+?) +--(.+?)--> +(\w+)", line)
            for before in many.split(" | ")
            if before in states
        }
        assert drawn == {
            (before.name, event.value, after.name)
            for before, events in table.items()
            for event, after in events.items()
        }

    def test_every_breach_is_documented(self) -> None:
        breaches = {code.name for code in codes.ALL.values() if code.breach}
        assert breaches >= CODES
        for name in breaches:
            assert f"`{name}`" in self.TEXT, f"{name} is not in docs/protocol.md"
