"""Pieces of a stream that came together are passed on together, and nothing changes its order by
that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from rayfwd.session.events import (
    DataReceived,
    EndReceived,
    Event,
    Gathered,
    StreamWritable,
    gathered,
)

PIECES = st.builds(DataReceived, st.integers(1, 3), st.binary(min_size=1, max_size=20))
OTHERS = st.one_of(
    st.builds(EndReceived, st.integers(1, 3)), st.builds(StreamWritable, st.integers(1, 3))
)


def between_others(
    events: Sequence[Event | Gathered],
) -> list[tuple[Event | None, dict[int, bytes]]]:
    """The events that are no chunks, each with the bytes of every stream before it."""
    found: list[tuple[Event | None, dict[int, bytes]]] = []
    before: defaultdict[int, bytes] = defaultdict(bytes)
    for event in events:
        if isinstance(event, DataReceived):
            before[event.stream] += event.data
        elif isinstance(event, Gathered):
            before[event.stream] += b"".join(event.chunks)
        else:
            found.append((event, dict(before)))
            before.clear()
    return [*found, (None, dict(before))]


@given(st.lists(st.one_of(PIECES, PIECES, PIECES, OTHERS), max_size=12))
def test_every_stream_has_the_same_bytes_before_every_other_event(events: list[Event]) -> None:
    assert between_others(gathered(events)) == between_others(events)


def test_the_pieces_of_a_stream_are_told_at_once() -> None:
    one, other = [DataReceived(1, b"a"), DataReceived(1, b"b")], DataReceived(3, b"x")
    assert gathered([one[0], other, one[1]]) == [Gathered(1, [b"a", b"b"]), Gathered(3, [b"x"])]
    assert gathered([one[0], EndReceived(3), one[1]]) == [
        Gathered(1, [b"a"]),
        EndReceived(3),
        Gathered(1, [b"b"]),
    ]


def test_what_is_told_is_what_came() -> None:
    """To join chunks would copy them once more."""
    long = [DataReceived(1, bytes(100)) for _ in range(2)]
    (told,) = gathered([*long])
    assert isinstance(told, Gathered)
    assert all(a is b.data for a, b in zip(told.chunks, long, strict=True))
