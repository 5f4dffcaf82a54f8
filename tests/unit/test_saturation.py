"""Whether a link's lanes are full."""

from __future__ import annotations

import pytest

from rayfwd.transport.saturation import CHANNEL_BYTES, Saturation


@pytest.mark.parametrize("moved", [(0, 38_000_000), (38_000_000, 0)])
def test_a_lane_that_a_channel_s_window_holds_back_is_full(moved: tuple[int, int]) -> None:
    """What one lane was seen to carry where a round trip takes 50 ms."""
    assert Saturation(10.0, (0, 0)).saturated(11.0, moved, 0.05, 1)
    assert not Saturation(10.0, (0, 0)).saturated(11.0, moved, 0.05, 4)


def test_a_fast_transfer_close_by_fills_no_lane() -> None:
    assert not Saturation(0.0, (0, 0)).saturated(0.25, (0, 150_000_000), 0.0005, 1)


def test_only_what_moved_since_the_last_look_counts() -> None:
    saturation = Saturation(0.0, (0, 0))
    assert saturation.saturated(1.0, (0, 20 * CHANNEL_BYTES), 0.05, 1)
    assert not saturation.saturated(2.0, (0, 20 * CHANNEL_BYTES), 0.05, 1)
    assert saturation.saturated(3.0, (0, 40 * CHANNEL_BYTES), 0.05, 1)


def test_a_lane_that_came_up_under_load_does_not_make_the_way_longer() -> None:
    saturation = Saturation(0.0, (0, 0))
    assert not saturation.saturated(1.0, (0, 0), 0.0005, 2)
    assert not saturation.saturated(2.0, (0, 100_000_000), 0.08, 1)


def test_without_a_round_trip_nothing_is_known() -> None:
    assert not Saturation(0.0, (0, 0)).saturated(1.0, (0, 100_000_000), float("inf"), 1)


def test_it_is_idle_until_more_moves_than_fills_a_lane() -> None:
    saturation = Saturation(0.0, (0, 0))
    idle = [saturation.idle]
    for second, moved in enumerate([CHANNEL_BYTES, 2 * CHANNEL_BYTES, 2 * CHANNEL_BYTES + 1000]):
        saturation.saturated(second + 1.0, (moved, 0), 0.05, 1)
        idle.append(saturation.idle)
    assert idle == [True, False, False, True]
