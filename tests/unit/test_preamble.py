"""The marker before the first frame, in whatever pieces it comes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfwd.session.preamble import MARKER, NOISE, Preamble


@given(
    noise=st.binary(max_size=300),
    frames=st.binary(max_size=100),
    cuts=st.lists(st.integers(0, 500), max_size=8),
)
def test_what_is_behind_the_marker_comes_through(
    noise: bytes, frames: bytes, cuts: list[int]
) -> None:
    if MARKER in noise + MARKER[:-1]:
        return
    whole = noise + MARKER + frames
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    preamble, came = Preamble(), b""
    for begin, end in pairwise(places):
        came += preamble.feed(whole[begin:end])
    assert came == frames
    assert preamble.over
    assert preamble.quoted() == ""


def test_noise_without_end_is_given_up() -> None:
    preamble = Preamble()
    assert preamble.feed(b"y\n" * (NOISE // 2)) == b""
    with pytest.raises(ValueError, match="its shell printed 'y"):
        preamble.feed(b"y")
