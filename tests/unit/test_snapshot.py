"""A session as bytes: what is read back, and what is refused with a reason."""

from __future__ import annotations

import struct

import pytest

from rayfwd.session import snapshot
from rayfwd.session.lane import LaneClass
from rayfwd.session.session import Limits, Session
from rayfwd.session.snapshot import FORMAT, MAGIC, SnapshotError, Tree, dump, load


def as_bytes(tree: Tree) -> bytes:
    return b"".join(dump(tree))


def parked() -> Session:
    session = Session("worker", 120.0, Limits(), 5.0)
    lane, _ = session.lane_up(LaneClass.INTERACTIVE, 5.0)
    number = session.open(b"target", 5.0)
    session.send(number, b"never acknowledged")
    session.data_to_send(lane, 1 << 16, 5.0)
    session.lane_down(lane, 6.0)
    return session


def test_a_tree_comes_back() -> None:
    tree: Tree = {"a": [b"\x00\xff", memoryview(b"xyz")[1:], b""], "b": {"c": None, "d": 1 << 63}}
    assert load(as_bytes(tree)) == {"a": [b"\x00\xff", b"yz", b""], "b": {"c": None, "d": 1 << 63}}


def test_what_is_neither_bytes_nor_json_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="set in a snapshot"):
        dump({"a": {1}})


def test_another_format_is_refused_with_both_numbers() -> None:
    data = bytearray(as_bytes({}))
    struct.pack_into(">I", data, len(MAGIC), FORMAT + 1)
    with pytest.raises(SnapshotError, match=rf"format {FORMAT + 1}.* reads format {FORMAT}$"):
        load(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC,
        b"x" * 200,
        as_bytes({"a": b"abc"})[:-1],
        as_bytes({"a": 1})[:-1],
        MAGIC + struct.pack(">IQ", FORMAT, 2) + b"[]",
        MAGIC + struct.pack(">IQ", FORMAT, 15) + b'{"bytes": "no"}',
    ],
)
def test_damage_is_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError, match=r"^it "):
        load(bytes(data))


def test_only_a_parked_session_has_a_snapshot() -> None:
    session = Session("worker", 120.0, Limits(), 5.0)
    with pytest.raises(ValueError, match="fresh"):
        session.snapshot()
    session.lane_up(LaneClass.INTERACTIVE, 5.0)
    with pytest.raises(ValueError, match="up"):
        session.snapshot()


@pytest.mark.parametrize("missing", sorted(parked().snapshot()))
def test_a_session_that_does_not_fit_is_refused(missing: str) -> None:
    tree = parked().snapshot()
    del tree[missing]
    with pytest.raises(SnapshotError, match="does not fit"):
        Session.from_snapshot(tree, 7.0)


def test_ride_through_goes_on_from_when_the_lanes_went() -> None:
    tree = snapshot.load(as_bytes(parked().snapshot()))
    session = Session.from_snapshot(tree, 100.0)
    assert session.deadline(100.0) == 126.0
    assert session.tick(125.9) == []
    assert [type(event).__name__ for event in session.tick(126.0)] == [
        "StreamReset",
        "SessionEnded",
    ]
