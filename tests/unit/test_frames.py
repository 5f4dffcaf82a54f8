"""Frames as bytes and back, whatever the bytes."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rayfwd.session.frames import (
    HEADER_SIZE,
    MAX_PAYLOAD,
    MAX_U64,
    Frame,
    FrameDecoder,
    Kind,
    ProtocolError,
    encode,
    first_frame,
    header,
)

CODES = {"frame_unknown", "frame_too_long"}

frames = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.integers(0, MAX_U64),
    st.integers(0, MAX_U64),
    st.binary(max_size=300),
)


def as_bytes(many: list[Frame]) -> bytes:
    return b"".join(encode(*frame) for frame in many)


@given(frames)
def test_a_frame_comes_back_as_it_was(frame: Frame) -> None:
    data = encode(*frame)
    assert len(data) == HEADER_SIZE + len(frame.payload)
    assert data == header(frame.kind, frame.stream, frame.offset, len(frame.payload)) + (
        frame.payload
    )
    assert FrameDecoder().feed(data) == [frame]


def test_the_layout_is_the_documented_one() -> None:
    layout = "05 000002 0000000000000003 0000000000000102 6162"
    assert encode(Kind.DATA, 3, 0x0102, b"ab") == bytes.fromhex(layout)


@given(st.lists(frames, max_size=6), st.data())
def test_frames_may_be_cut_anywhere(many: list[Frame], data: st.DataObject) -> None:
    whole = as_bytes(many)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    decoder = FrameDecoder()
    out: list[Frame] = []
    for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        out += decoder.feed(whole[start:stop])
    assert out == many
    assert decoder.held == 0


def test_frames_cut_at_every_single_byte() -> None:
    many = [Frame(kind, 7, 9, b"x" * size) for kind in Kind for size in (0, 1, 40)]
    whole = as_bytes(many)
    for cut in range(len(whole) + 1):
        decoder = FrameDecoder()
        assert decoder.feed(whole[:cut]) + decoder.feed(whole[cut:]) == many
    decoder = FrameDecoder()
    assert [frame for byte in whole for frame in decoder.feed(bytes([byte]))] == many


@pytest.mark.parametrize("kind_of", [bytes, bytearray, memoryview])
def test_any_kind_of_buffer_will_do(kind_of: type) -> None:
    decoder = FrameDecoder()
    data = as_bytes([Frame(Kind.DATA, 1, 0, b"abc")])
    assert decoder.feed(kind_of(data[:5])) == []
    assert decoder.feed(kind_of(data[5:])) == [Frame(Kind.DATA, 1, 0, b"abc")]


@given(st.lists(st.binary(max_size=60), max_size=12))
@example([b"\x00" * 20])
@example([b"\xff" * 20])
@example([b"\x05\x04\x00\x01" + b"\x00" * 16])
def test_any_bytes_are_frames_or_a_protocol_error(pieces: list[bytes]) -> None:
    decoder = FrameDecoder()
    broken = ""
    try:
        for piece in pieces:
            for frame in decoder.feed(piece):
                assert len(frame.payload) <= MAX_PAYLOAD
    except ProtocolError as exc:
        broken = exc.code
    assert broken in CODES | {""}


def test_the_longest_payload_passes_and_one_more_byte_does_not() -> None:
    longest = encode(Kind.DATA, 1, 0, bytes(MAX_PAYLOAD))
    assert len(FrameDecoder().feed(longest)[0].payload) == MAX_PAYLOAD
    with pytest.raises(ValueError, match="262145"):
        encode(Kind.DATA, 1, 0, bytes(MAX_PAYLOAD + 1))
    with pytest.raises(ProtocolError) as caught:
        FrameDecoder().feed(header(Kind.DATA, 1, 0, MAX_PAYLOAD + 1))
    assert caught.value.code == "frame_too_long"


@given(st.lists(st.binary(min_size=1, max_size=4000), max_size=20))
def test_no_more_is_held_than_one_unfinished_frame(pieces: list[bytes]) -> None:
    """A header that announces the longest payload, then whatever comes."""
    decoder = FrameDecoder()
    decoder.feed(header(Kind.DATA, 1, 0, MAX_PAYLOAD))
    fed = HEADER_SIZE
    for piece in pieces:
        decoder.feed(piece)
        fed += len(piece)
        assert decoder.held == fed <= HEADER_SIZE + MAX_PAYLOAD


def test_a_frame_that_cannot_be_is_refused_by_its_header_alone() -> None:
    for bad in (header(Kind.DATA, 1, 0, MAX_PAYLOAD + 1), b"\x63" + bytes(19)):
        decoder = FrameDecoder()
        assert decoder.feed(bad[:-1]) == []
        with pytest.raises(ProtocolError):
            decoder.feed(bad[-1:])


@given(frames, st.binary(max_size=50))
def test_the_first_frame_is_taken_off_and_the_rest_stays(frame: Frame, rest: bytes) -> None:
    data = encode(*frame)
    for cut in {0, 1, HEADER_SIZE - 1, len(data) - 1}:
        buffer = bytearray(data[:cut])
        if cut < len(data):
            assert first_frame(buffer, MAX_PAYLOAD) is None
            assert buffer == data[:cut]
    buffer = bytearray(data + rest)
    assert first_frame(buffer, MAX_PAYLOAD) == frame
    assert buffer == rest


def test_the_first_frame_has_a_limit_of_its_own() -> None:
    buffer = bytearray(header(Kind.HELLO, 0, 1, 101))
    assert first_frame(buffer, 101) is None
    with pytest.raises(ProtocolError) as caught:
        first_frame(buffer, 100)
    assert caught.value.code == "frame_too_long"
