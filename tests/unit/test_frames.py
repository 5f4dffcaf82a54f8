"""Frames as bytes and back, whatever the bytes."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rayfwd import codes
from rayfwd.session.frames import (
    HEADER_SIZE,
    LONG,
    MAX_PAYLOAD,
    MAX_U64,
    MOST_PARTS,
    Frame,
    FrameDecoder,
    Kind,
    ProtocolError,
    encode,
    first_frame,
    frame_header,
)

CODES = {"frame_unknown", "frame_too_long"}

frames = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.integers(0, MAX_U64),
    st.integers(0, MAX_U64),
    st.binary(max_size=300),
    st.just(()),
)


def as_bytes(many: list[Frame]) -> bytes:
    return b"".join(encode(*frame[:4]) for frame in many)


@given(frames)
def test_a_frame_comes_back_as_it_was(frame: Frame) -> None:
    data = as_bytes([frame])
    assert len(data) == HEADER_SIZE + len(frame.payload)
    assert data == frame_header(frame.kind, frame.stream, frame.offset, len(frame.payload)) + (
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
def test_any_bytes_are_frames_or_a_protocol_error(chunks: list[bytes]) -> None:
    decoder = FrameDecoder()
    broken = ""
    try:
        for chunk in chunks:
            for frame in decoder.feed(chunk):
                assert frame.size <= MAX_PAYLOAD
    except ProtocolError as exc:
        broken = exc.code.name
    assert broken in CODES | {""}


LONG_FRAMES = st.builds(
    lambda size, byte: encode(Kind.DATA, 1, 0, bytes([byte]) * size),
    st.sampled_from([LONG - 1, LONG, 3 * LONG, MAX_PAYLOAD]), st.integers(0, 255),
)  # fmt: skip


@given(st.lists(LONG_FRAMES, max_size=3), st.data())
def test_a_long_payload_comes_in_pieces_of_the_same_bytes(
    many: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(many)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    decoder = FrameDecoder()
    out: list[Frame] = []
    for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        out += decoder.feed(whole[start:stop])
    assert [b"".join(f.chunks) or f.payload for f in out] == [d[HEADER_SIZE:] for d in many]
    assert [f.size for f in out] == [len(d) - HEADER_SIZE for d in many]


def test_a_long_payload_is_not_copied() -> None:
    data = encode(Kind.DATA, 1, 0, bytes(2 * LONG)) * 2
    first, second = data[: 3 * LONG], data[3 * LONG :]
    decoder = FrameDecoder()
    chunks = [p for part in (first, second) for f in decoder.feed(part) for p in f.chunks]
    assert len(chunks) == 3
    assert all(isinstance(chunk, memoryview) for chunk in chunks)
    assert [chunk.obj for chunk in chunks if isinstance(chunk, memoryview)] == [
        first, first, second,
    ]  # fmt: skip


def test_what_is_kept_of_a_payload_keeps_little_else() -> None:
    """A reader that takes its time would else keep a whole read for a small part of it."""
    other = encode(Kind.DATA, 3, 0, bytes(MAX_PAYLOAD))
    long = encode(Kind.DATA, 1, 0, bytes(LONG))
    frame, _ = FrameDecoder().feed(long + other)
    assert [type(chunk) for chunk in frame.chunks] == [bytes]
    decoder = FrameDecoder()
    frames = decoder.feed(other + long[:40]) + decoder.feed(long[40:])
    assert [type(chunk) for chunk in frames[1].chunks] == [bytes, memoryview]


def test_a_payload_in_many_parts_is_joined() -> None:
    decoder = FrameDecoder()
    data = encode(Kind.DATA, 1, 0, bytes(LONG))
    (frame,) = [f for at in range(0, len(data), 100) for f in decoder.feed(data[at : at + 100])]
    assert frame.payload == bytes(LONG)
    assert not frame.chunks


def test_only_bytes_of_streams_come_in_pieces() -> None:
    (frame,) = FrameDecoder().feed(encode(Kind.CLOSE, 0, 0, bytes(LONG)))
    assert frame.payload == bytes(LONG)


def test_the_longest_payload_passes_and_one_more_byte_does_not() -> None:
    longest = encode(Kind.DATA, 1, 0, bytes(MAX_PAYLOAD))
    assert FrameDecoder().feed(longest)[0].size == MAX_PAYLOAD
    with pytest.raises(ValueError, match="262145"):
        encode(Kind.DATA, 1, 0, bytes(MAX_PAYLOAD + 1))
    with pytest.raises(ProtocolError) as caught:
        FrameDecoder().feed(frame_header(Kind.DATA, 1, 0, MAX_PAYLOAD + 1))
    assert caught.value.code == codes.FRAME_TOO_LONG


@given(st.lists(st.binary(min_size=1, max_size=4000), max_size=20))
def test_no_more_is_held_than_one_unfinished_frame(chunks: list[bytes]) -> None:
    """A header that announces the longest payload, then whatever comes."""
    decoder = FrameDecoder()
    decoder.feed(frame_header(Kind.DATA, 1, 0, MAX_PAYLOAD))
    fed = HEADER_SIZE
    for chunk in chunks:
        decoder.feed(chunk)
        fed += len(chunk)
        assert decoder.held == fed <= HEADER_SIZE + MAX_PAYLOAD


def test_a_frame_that_cannot_be_is_refused_by_its_header_alone() -> None:
    for bad in (frame_header(Kind.DATA, 1, 0, MAX_PAYLOAD + 1), b"\x63" + bytes(19)):
        decoder = FrameDecoder()
        assert decoder.feed(bad[:-1]) == []
        with pytest.raises(ProtocolError):
            decoder.feed(bad[-1:])


@given(frames, st.binary(max_size=50))
def test_the_first_frame_is_taken_off_and_the_rest_stays(frame: Frame, rest: bytes) -> None:
    data = as_bytes([frame])
    for cut in {0, 1, HEADER_SIZE - 1, len(data) - 1}:
        buffer = bytearray(data[:cut])
        if cut < len(data):
            assert first_frame(buffer, MAX_PAYLOAD) is None
            assert buffer == data[:cut]
    buffer = bytearray(data + rest)
    assert first_frame(buffer, MAX_PAYLOAD) == frame
    assert buffer == rest


def test_the_first_frame_has_a_limit_of_its_own() -> None:
    buffer = bytearray(frame_header(Kind.HELLO, 0, 1, 101))
    assert first_frame(buffer, 101) is None
    with pytest.raises(ProtocolError) as caught:
        first_frame(buffer, 100)
    assert caught.value.code == codes.FRAME_TOO_LONG


def test_a_frame_that_comes_byte_by_byte_takes_little_more_than_its_bytes() -> None:
    decoder, frame = FrameDecoder(), encode(Kind.DATA, 1, 0, bytes(range(256)) * 40)
    found = []
    for index in range(len(frame)):
        found += decoder.feed(frame[index : index + 1])
        assert len(decoder._parts) <= MOST_PARTS
    (one,) = found
    assert one.payload == frame[HEADER_SIZE:]
