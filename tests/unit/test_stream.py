"""The two sides of a stream: offsets, acknowledgements, credit, order, and its end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfwd.session.frames import MAX_U64, ProtocolError
from rayfwd.session.stream import (
    COALESCE_BYTES,
    FRAME_BYTES,
    ReceiveSide,
    ResetReason,
    Segment,
    SendSide,
)

LOTS = 1 << 30


def taken(side: SendSide, lane: int = 1) -> list[Segment]:
    """All that the side would send now, by `lane`."""
    out = []
    while side.ready:
        segment = side.take()
        assert segment is not None
        segment.lane = lane
        out.append(segment)
    assert side.take() is None
    return out


def code_of(error: pytest.ExceptionInfo[ProtocolError]) -> str:
    return error.value.code.name


class TestSending:
    def test_small_chunks_are_joined_and_large_ones_cut(self) -> None:
        side = SendSide(LOTS)
        for _ in range(10):
            side.write(b"x" * 100)
        side.write(b"y" * (FRAME_BYTES + 5))
        sizes = [len(s.data) for s in taken(side)]
        assert sum(sizes) == 1000 + FRAME_BYTES + 5
        assert max(sizes) <= FRAME_BYTES
        assert sizes[0] == 1000

    def test_large_chunks_are_not_copied_together(self) -> None:
        side = SendSide(LOTS)
        side.write(b"x" * COALESCE_BYTES)
        side.write(b"y")
        assert [len(s.data) for s in taken(side)] == [COALESCE_BYTES, 1]

    def test_no_more_is_sent_than_the_credit_allows(self) -> None:
        side = SendSide(10)
        side.write(b"0123456789abc")
        assert [bytes(s.data) for s in taken(side)] == [b"0123456789"]
        side.acknowledge(0, 12)
        assert [bytes(s.data) for s in taken(side)] == [b"ab"]
        side.acknowledge(0, 11)
        assert not side.ready, "credit that was given is not taken back"

    def test_an_end_takes_one_offset_and_no_credit(self) -> None:
        side = SendSide(3)
        side.write(b"abc")
        side.end()
        data, end = taken(side)
        assert (data.offset, data.stop, end.offset, end.stop, end.end) == (0, 3, 3, 4, True)
        assert side.acknowledge(3, 3) == 3
        assert not side.complete
        side.acknowledge(4, 3)
        assert side.complete

    def test_an_end_waits_for_the_bytes_before_it(self) -> None:
        side = SendSide(2)
        side.write(b"abc")
        side.end()
        assert [s.end for s in taken(side)] == [False]
        side.acknowledge(2, 3)
        assert [s.end for s in taken(side)] == [False, True]

    def test_nothing_is_written_after_the_end(self) -> None:
        side = SendSide(10)
        side.end()
        with pytest.raises(ValueError, match="after the end"):
            side.write(b"x")

    def test_old_acknowledgements_do_nothing_and_part_of_a_segment_keeps_it(self) -> None:
        side = SendSide(LOTS)
        side.write(b"x" * COALESCE_BYTES)
        side.write(b"y" * COALESCE_BYTES)
        taken(side)
        assert side.acknowledge(COALESCE_BYTES + 1, LOTS) == COALESCE_BYTES
        assert side.buffered == COALESCE_BYTES
        assert side.acknowledge(5, LOTS) == 0
        assert side.acked == COALESCE_BYTES + 1

    def test_what_was_never_sent_cannot_be_acknowledged(self) -> None:
        side = SendSide(LOTS)
        side.write(b"abc")
        with pytest.raises(ProtocolError) as caught:
            side.acknowledge(1, LOTS)
        assert code_of(caught) == "ack_ahead"

    def test_a_lost_lane_is_sent_again_in_order_before_new_bytes(self) -> None:
        side = SendSide(LOTS)
        for lane in (1, 2, 1):
            side.write(bytes([lane]) * COALESCE_BYTES)
            taken(side, lane)
        side.write(b"new")
        assert side.lane_lost(1)
        assert not side.lane_lost(1), "it is lost once"
        assert [(s.offset // COALESCE_BYTES) for s in taken(side, 2)] == [0, 2, 3]
        assert side.lane_lost(2)
        assert len(taken(side, 3)) == 4

    def test_an_acknowledgement_takes_back_what_was_to_be_sent_again(self) -> None:
        side = SendSide(LOTS)
        for _ in range(2):
            side.write(b"x" * COALESCE_BYTES)
        taken(side)
        side.lane_lost(1)
        side.acknowledge(COALESCE_BYTES, LOTS)
        assert [s.offset for s in taken(side)] == [COALESCE_BYTES]

    def test_a_probe_sends_the_oldest_once_more(self) -> None:
        side = SendSide(LOTS)
        assert not side.probe()
        for _ in range(2):
            side.write(b"x" * COALESCE_BYTES)
        taken(side)
        assert side.probe()
        assert not side.probe(), "it waits to be sent already"
        assert [s.offset for s in taken(side)] == [0]


class TestReceiving:
    def test_bytes_out_of_order_wait_for_those_before_them(self) -> None:
        side = ReceiveSide(100, 0.0)
        assert side.data(6, b"ghi") == []
        assert side.data(3, b"def") == []
        assert (side.held, side.early_bytes) == (6, 6)
        assert side.data(0, b"abc") == [b"abc", b"def", b"ghi"]
        assert (side.held, side.early_bytes, side.next) == (9, 0, 9)

    def test_bytes_that_came_already_are_dropped(self) -> None:
        side = ReceiveSide(100, 0.0)
        side.data(0, b"abc")
        assert side.data(0, b"abc") == []
        assert side.data(1, b"bcde") == [b"de"]
        assert side.data(3, b"d", b"efg", b"h") == [b"fg", b"h"], "of a payload in chunks too"

    def test_a_payload_in_pieces_waits_in_one(self) -> None:
        side = ReceiveSide(100, 0.0)
        assert side.data(3, b"de", b"f") == []
        assert side.early_bytes == 3
        assert side.data(0, b"a", b"bc") == [b"a", b"bc", b"def"]

    def test_an_end_out_of_order_waits_too(self) -> None:
        side = ReceiveSide(100, 0.0)
        assert [side.end(3), side.complete] == [False, False]
        assert side.data(0, b"abc") == [b"abc"]
        assert side.complete
        assert side.next == 4
        assert side.held == 3
        assert not side.end(3), "an END that comes twice is no news"

    @pytest.mark.parametrize(
        ("offset", "payload"), [(0, b"x" * 11), (10, b"x"), (MAX_U64, b"x"), (5, b"x" * 6)]
    )
    def test_more_than_the_credit_is_refused(self, offset: int, payload: bytes) -> None:
        side = ReceiveSide(10, 0.0)
        with pytest.raises(ProtocolError) as caught:
            side.data(offset, payload)
        assert code_of(caught) == "credit_exceeded"

    def test_an_end_beyond_the_credit_is_refused_and_one_at_it_is_not(self) -> None:
        side = ReceiveSide(10, 0.0)
        with pytest.raises(ProtocolError) as caught:
            side.end(11)
        assert code_of(caught) == "credit_exceeded"
        side.data(0, b"x" * 10)
        assert side.end(10)

    def test_an_end_cannot_move_and_nothing_follows_it(self) -> None:
        side = ReceiveSide(100, 0.0)
        side.data(4, b"ef")
        with pytest.raises(ProtocolError) as caught:
            side.end(5)
        assert code_of(caught) == "end_moved"
        side.end(6)
        with pytest.raises(ProtocolError) as caught:
            side.end(7)
        assert code_of(caught) == "end_moved"
        with pytest.raises(ProtocolError) as caught:
            side.data(6, b"g")
        assert code_of(caught) == "data_after_end"

    def test_bytes_that_overlap_on_purpose_do_not_fill_the_memory(self) -> None:
        side = ReceiveSide(1000, 0.0)

        def flood() -> None:
            for offset in range(1, 1000):
                side.data(offset, b"x" * (1000 - offset))

        with pytest.raises(ProtocolError) as caught:
            flood()
        assert code_of(caught) == "credit_exceeded"
        assert side.early_bytes < 3000

    def test_credit_follows_the_reader(self) -> None:
        side = ReceiveSide(100, 0.0)
        side.data(0, b"x" * 100)
        assert side.limit == 100
        side.consumed = 40
        assert side.limit == 140
        side.limit_sent = 140
        side.window = 10
        assert side.limit == 140, "credit that was given is not taken back"

    def test_the_limit_stays_in_64_bits(self) -> None:
        side = ReceiveSide(100, 0.0)
        side.consumed = MAX_U64 - 5
        assert side.limit == MAX_U64

    def test_an_acknowledgement_is_urgent_by_a_quarter_of_the_window_or_at_the_end(self) -> None:
        side = ReceiveSide(100, 0.0)
        assert not side.ack_due()
        side.data(0, b"x" * 24)
        assert side.ack_due()
        assert not side.ack_urgent()
        side.data(24, b"x")
        assert side.ack_urgent()
        side.ack_sent, side.limit_sent = 25, 100
        assert not side.ack_due()
        side.consumed = 24
        assert side.ack_due()
        assert not side.ack_urgent()
        side.consumed = 25
        assert side.ack_urgent(), "a quarter of the window was given back"
        side.limit_sent = 125
        side.end(25)
        assert side.ack_urgent()

    def test_a_reader_that_takes_half_the_window_a_round_trip_gets_four_times_as_much(self) -> None:
        side = ReceiveSide(100, 0.0)
        side.consumed = 49
        assert side.wanted_window(0.9, 1.0, LOTS) == 100, "asked before a round trip was over"
        assert side.wanted_window(1.0, 1.0, LOTS) == 100
        side.consumed += 50
        assert side.wanted_window(2.0, 1.0, LOTS) == 400
        side.consumed += 50
        assert side.wanted_window(3.0, 1.0, 150) == 150


@given(st.data())
def test_any_cut_any_order_any_repeat_gives_the_same_bytes(data: st.DataObject) -> None:
    content = bytes(range(120))
    send, receive = SendSide(LOTS), ReceiveSide(len(content), 0.0)
    for start, stop in ((0, 1), (1, 40), (40, 41), (41, 120)):
        send.write(content[start:stop])
        if data.draw(st.booleans()):
            taken(send)
    send.end()
    taken(send)
    segments = list(send.unacked)
    order = data.draw(st.permutations(segments + segments[: data.draw(st.integers(0, 3))]))
    out = b""
    ends = 0
    for segment in order:
        before = receive.complete
        if segment.end:
            receive.end(segment.offset)
        else:
            cut = data.draw(st.integers(0, len(segment.data)))
            chunks = bytes(segment.data[:cut]), segment.data[cut:]
            out += b"".join(receive.data(segment.offset, *chunks))
        ends += receive.complete and not before
        send.acknowledge(receive.next, LOTS)
        send.check_invariants()
        receive.check_invariants()
    assert out == content
    assert ends == 1
    assert send.complete
    assert send.buffered == 0


@pytest.mark.parametrize("reason", list(ResetReason))
def test_a_reason_comes_back_from_its_number(reason: ResetReason) -> None:
    assert ResetReason.from_wire(int(reason)) is reason


@pytest.mark.parametrize("number", [0, 10, 1 << 63])
def test_an_unknown_reason_reads_as_aborted(number: int) -> None:
    assert ResetReason.from_wire(number) is ResetReason.ABORTED
