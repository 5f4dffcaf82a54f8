"""The session under faults: seeded random schedules of everything that can go wrong on lanes."""

from __future__ import annotations

import os

import pytest
from tests.unit.wire import Wire

from rayfwd.session.lane import LaneClass
from rayfwd.session.session import Limits

SCHEDULES = int(os.environ.get("RAYFWD_SCHEDULES", "1500"))
"""How many; a deep run sets 100,000 and more."""
BATCHES = 20

TINY = Limits(
    window=2000,
    window_ceiling=16000,
    window_budget=30000,
    stream_buffer=3000,
    session_buffer=40000,
    streams=400,
)
ROOMY = Limits()


def run_schedule(seed: int) -> Wire:
    wire = Wire(seed, TINY if seed % 3 else ROOMY)
    for kind in (LaneClass.INTERACTIVE, LaneClass.BULK)[: 1 + seed % 2]:
        wire.add_lane(kind)
    for _ in range(wire.random.choice((20, 150, 600))):
        wire.step()
    wire.heal()
    wire.check()
    wire.finish()
    wire.heal()
    wire.check()
    return wire


@pytest.mark.parametrize("batch", range(BATCHES))
def test_what_went_in_comes_out(batch: int) -> None:
    first = int(os.environ.get("RAYFWD_FIRST_SEED", "0"))
    for seed in range(first + batch, first + SCHEDULES, BATCHES):
        try:
            run_schedule(seed)
        except Exception as exc:
            raise AssertionError(f"schedule of seed {seed}: {exc!r}") from exc
