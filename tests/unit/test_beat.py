"""Pauses that begin at different moments end together."""

from __future__ import annotations

import asyncio

import pytest

from rayfwd.beat import BEAT, end_of_pause, pause
from tests.unit.loops import run


def test_pauses_end_in_one_turn_of_the_loop() -> None:
    ended: list[float] = []

    async def one(after: float, seconds: float) -> None:
        await asyncio.sleep(after)
        await pause(seconds)
        ended.append(asyncio.get_running_loop().time())

    async def main() -> None:
        await pause(BEAT)  # from here on none of them begins in the middle between two beats
        await asyncio.gather(one(0.0, BEAT), one(0.1, BEAT), one(0.3, BEAT))
        assert max(ended) - min(ended) < 0.05

    run(main)


@pytest.mark.parametrize("seconds", [BEAT, 2.5 * BEAT, 8 * BEAT])
def test_a_pause_is_as_long_as_it_says_by_half_a_beat(seconds: float) -> None:
    async def main() -> None:
        now = asyncio.get_running_loop().time()
        assert end_of_pause(seconds) - now == pytest.approx(seconds, abs=0.51 * BEAT)
        assert end_of_pause(seconds) % BEAT == 0

    run(main)


def test_a_short_one_is_exact() -> None:
    async def main() -> None:
        now = asyncio.get_running_loop().time()
        assert end_of_pause(0.25) - now == pytest.approx(0.25, abs=0.01)

    run(main)
