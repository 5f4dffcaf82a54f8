"""Pauses that begin at different moments end together."""

from __future__ import annotations

import asyncio

import pytest

from rayfwd.system.coalesce import WAKE_INTERVAL, end_of_pause, sleep_coalesced
from tests.unit.loops import run_on_fake_clock as run


@pytest.mark.parametrize("seconds", [WAKE_INTERVAL, 8 * WAKE_INTERVAL])
def test_pauses_end_in_one_turn_of_the_loop(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        ends = set()
        for moment in (99.6, 100.0, 100.1, 100.4):
            with monkeypatch.context() as patch:
                patch.setattr(loop, "time", lambda at=moment: at)
                ends.add(end_of_pause(seconds))
        assert ends == {100.0 + seconds}

    run(main)


@pytest.mark.parametrize("seconds", [WAKE_INTERVAL, 2.5 * WAKE_INTERVAL, 8 * WAKE_INTERVAL])
def test_a_pause_is_as_long_as_it_says_by_half_a_beat(seconds: float) -> None:
    async def main() -> None:
        now = asyncio.get_running_loop().time()
        assert end_of_pause(seconds) - now == pytest.approx(seconds, abs=0.51 * WAKE_INTERVAL)
        assert end_of_pause(seconds) % WAKE_INTERVAL == 0

    run(main)


def test_a_short_one_is_exact() -> None:
    async def main() -> None:
        now = asyncio.get_running_loop().time()
        assert end_of_pause(0.25) - now == pytest.approx(0.25, abs=0.01)

    run(main)


def test_it_is_slept_to_its_end() -> None:
    async def main() -> None:
        end = end_of_pause(WAKE_INTERVAL)
        await sleep_coalesced(WAKE_INTERVAL)
        assert asyncio.get_running_loop().time() >= end - 0.001  # the resolution of a timer

    run(main)
