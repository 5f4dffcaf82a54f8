"""Pieces of a stream that came together are joined, and nothing changes its order by that."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from rayfwd.session.events import DataReceived, EndReceived, Event, StreamWritable, joined
from rayfwd.session.stream import COALESCE_BYTES

SIZES = st.sampled_from([1, 20, COALESCE_BYTES - 1, COALESCE_BYTES, 4 * COALESCE_BYTES])
PIECES = st.builds(
    lambda stream, size, byte: DataReceived(stream, bytes([byte]) * size),
    st.integers(1, 3), SIZES, st.integers(0, 255),
)  # fmt: skip
OTHERS = st.one_of(
    st.builds(EndReceived, st.integers(1, 3)), st.builds(StreamWritable, st.integers(1, 3))
)


def between_others(events: list[Event]) -> list[tuple[Event | None, dict[int, bytes]]]:
    """The events that are no pieces, each with the bytes of every stream before it."""
    found: list[tuple[Event | None, dict[int, bytes]]] = []
    before: defaultdict[int, bytes] = defaultdict(bytes)
    for event in events:
        if isinstance(event, DataReceived):
            before[event.stream] += event.data
        else:
            found.append((event, dict(before)))
            before.clear()
    return [*found, (None, dict(before))]


@given(st.lists(st.one_of(PIECES, PIECES, PIECES, OTHERS), max_size=12))
def test_every_stream_has_the_same_bytes_before_every_other_event(events: list[Event]) -> None:
    assert between_others(joined(list(events))) == between_others(events)


def test_short_pieces_of_a_stream_become_one() -> None:
    one, other = [DataReceived(1, b"a"), DataReceived(1, b"b")], DataReceived(3, b"x")
    assert joined([one[0], other, one[1]]) == [DataReceived(1, b"ab"), other]
    assert joined([one[0], EndReceived(3), one[1]]) == [one[0], EndReceived(3), one[1]]


def test_long_ones_are_left_as_they_are() -> None:
    """To join them would copy them once more."""
    long = [DataReceived(1, bytes(COALESCE_BYTES)) for _ in range(2)]
    assert all(a is b for a, b in zip(joined(list(long)), long, strict=True))
