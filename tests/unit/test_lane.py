"""A lane's pings, its silence, and how much may be under way on it."""

from __future__ import annotations

import pytest

from rayfwd.session.lane import (
    DEAD_AFTER,
    HUB_WAITS,
    OVERDUE_AFTER,
    PING_BUSY,
    PING_HEARD,
    PING_IDLE,
    UNANSWERED_AFTER,
    WINDOW_CEILING,
    WINDOW_FLOOR,
    WINDOW_START,
    Lane,
    LaneClass,
)
from rayfwd.transport.mux import TIMER_GRID


def lane_at(now: float = 0.0) -> Lane:
    return Lane(1, LaneClass.BULK, now)


def answered(lane: Lane, now: float, after: float) -> None:
    """A PING at `now`, with its PONG `after` seconds later."""
    token = lane.ping(now)
    lane.heard = now + after
    lane.pong(token, now + after)


def test_an_idle_lane_is_pinged_now_and_then() -> None:
    lane = lane_at()
    assert lane.wants_ping(0.0)
    answered(lane, 0.0, 0.01)
    assert not lane.wants_ping(PING_IDLE - 0.01)
    assert lane.wants_ping(PING_IDLE)


def test_a_hub_leaves_it_to_its_workers_to_ask() -> None:
    """It asks itself once in a while, for the round trip, and when it hears them no more."""
    lane = Lane(1, LaneClass.BULK, 0.0, of_hub=True)
    assert lane.wants_ping(0.0), "the round trip is not known yet"
    answered(lane, 0.0, 0.01)
    asked = 0
    now = 0.0
    while now < 60:
        now += PING_IDLE + 0.2  # two timers' 0.1 s
        assert lane.deadline(now - 0.1) > now - 0.1
        lane.heard = now
        if lane.wants_ping(now):
            asked += 1
            answered(lane, now, 0.01)
    assert 60 / (PING_HEARD + PING_IDLE + 0.2) <= asked <= 60 / PING_HEARD
    heard = lane.heard
    assert not lane.wants_ping(heard + PING_IDLE)
    assert lane.deadline(heard + 0.1) <= heard + PING_IDLE + HUB_WAITS
    assert lane.wants_ping(heard + PING_IDLE + HUB_WAITS)
    lane.ping(heard + PING_IDLE + HUB_WAITS)
    assert lane.dead(heard + PING_IDLE + HUB_WAITS + DEAD_AFTER)
    late = 2 * TIMER_GRID  # of the PING, and of the look at whether it was answered
    assert PING_IDLE + HUB_WAITS + DEAD_AFTER + late <= 5.95, "docs/faults.md promises 6 s"


def test_a_busy_lane_is_pinged_oftener_and_by_bytes() -> None:
    lane = lane_at()
    answered(lane, 0.0, 0.01)
    lane.sent += 100
    assert not lane.wants_ping(PING_BUSY - 0.01)
    assert lane.wants_ping(PING_BUSY)
    lane.sent += lane.window // 4
    assert lane.wants_ping(0.02)


def test_a_pong_gives_the_round_trip_and_confirms_what_was_sent_before_its_ping() -> None:
    lane = lane_at()
    lane.sent = 1000
    token = lane.ping(1.0)
    lane.sent = 5000
    lane.pong(token, 1.25)
    assert lane.confirmed == 1000
    assert lane.rtt == pytest.approx(0.25)
    assert lane.base_rtt == pytest.approx(0.25)


def test_a_pong_answers_earlier_pings_too() -> None:
    lane = lane_at()
    lane.ping(0.0)
    lane.ping(0.1)
    lane.pong(lane.ping(0.2), 0.3)
    assert lane.rtt == pytest.approx(0.1)
    assert not lane.dead(0.4)


def test_a_silence_that_is_over_is_soon_forgotten() -> None:
    """The PINGs of its time were answered late; what comes after them is as quick as ever."""
    lane = lane_at()
    for i in range(10):
        answered(lane, 1.5 * i, 0.001)
    tokens = [lane.ping(at) for at in (15.0, 16.5, 18.0)]
    for token in tokens:
        lane.pong(token, 18.5)
    assert lane.newest_rtt == pytest.approx(0.5)
    for i in range(4):
        answered(lane, 19.0 + PING_BUSY * i, 0.001)
    assert lane.newest_rtt == pytest.approx(0.001)
    lane.heard = lane.answered_at
    lane.ping(20.0)
    assert lane.overdue(20.0 + OVERDUE_AFTER), "patience with it is still that of the silence"


@pytest.mark.parametrize("token", [0, 2, 1 << 63])
def test_a_pong_that_answers_no_ping_does_nothing(token: int) -> None:
    lane = lane_at()
    lane.sent = 10
    lane.ping(0.0)
    lane.pong(token, 1.0)
    assert lane.rtt is None
    assert lane.confirmed == 0


def test_the_window_bounds_what_is_under_way() -> None:
    lane = lane_at()
    lane.sent = WINDOW_START - 1
    assert lane.has_room()
    lane.sent = WINDOW_START
    assert not lane.has_room()
    lane.pong(lane.ping(0.0), 0.01)
    assert lane.has_room()


def test_the_window_grows_only_while_it_limits_and_no_queue_builds_up() -> None:
    lane = lane_at()
    now = 0.0
    answered(lane, now, 0.02)
    lane.sent += WINDOW_START // 2
    assert lane.has_room()
    answered(lane, 1.0, 0.02)
    assert lane.window == WINDOW_START, "it grew though it did not limit"
    lane.sent += WINDOW_START
    assert not lane.has_room()
    answered(lane, 2.0, 0.02)
    assert lane.window == 2 * WINDOW_START
    lane.sent += lane.window
    assert not lane.has_room()
    answered(lane, 3.0, 0.25)
    assert lane.window == 2 * WINDOW_START, "it grew though a queue had built up"


def test_the_window_shrinks_when_a_queue_builds_up_but_not_below_its_floor() -> None:
    lane = lane_at()
    answered(lane, 0.0, 0.02)
    answered(lane, 1.0, 0.6)
    assert lane.window == int(WINDOW_START * 0.7)
    for i in range(40):
        answered(lane, 2.0 + i, 0.6)
    assert lane.window == WINDOW_FLOOR


def test_the_window_has_a_ceiling() -> None:
    lane = lane_at()
    answered(lane, 0.0, 0.02)
    for i in range(20):
        lane.sent += lane.window
        lane.has_room()
        answered(lane, 1.0 + i, 0.02)
    assert lane.window == WINDOW_CEILING


def test_a_lane_that_hears_nothing_is_stalled_then_silent() -> None:
    lane = lane_at()
    lane.ping(0.0)
    assert not lane.overdue(OVERDUE_AFTER - 0.01)
    assert lane.overdue(OVERDUE_AFTER)
    assert not lane.dead(DEAD_AFTER - 0.01)
    assert lane.dead(DEAD_AFTER)


def test_a_lane_with_a_long_round_trip_is_not_stalled_so_soon() -> None:
    lane = lane_at()
    answered(lane, 0.0, 0.5)
    lane.ping(10.0)
    assert not lane.overdue(11.9)
    assert lane.overdue(12.0)


def test_a_lane_that_hears_something_is_silent_only_when_a_ping_stays_unanswered() -> None:
    lane = lane_at()
    lane.ping(0.0)
    lane.heard = UNANSWERED_AFTER - 0.2
    assert not lane.dead(UNANSWERED_AFTER - 0.1)
    assert lane.dead(UNANSWERED_AFTER)


def test_a_slow_lane_whose_pongs_keep_coming_is_alive() -> None:
    """A megabyte at 100 kB/s: the last of its PINGs waits for 10 s behind the data."""
    lane = lane_at()
    tokens = []
    for _ in range(4):
        lane.sent += WINDOW_START // 4
        tokens.append(lane.ping(0.0))
    for i, token in enumerate(tokens):
        now = 2.6 * (i + 1)
        assert not lane.dead(now), f"given up at {now} s, though the one before was answered"
        lane.heard = now
        lane.pong(token, now)


def test_a_lane_that_takes_no_ping_is_not_alive_for_ever() -> None:
    """The transport is full, so that the PING which is due cannot be put on the lane."""
    lane = lane_at()
    answered(lane, 0.0, 0.01)
    lane.sent += 1000
    due = PING_BUSY
    assert lane.wants_ping(due)
    assert not lane.overdue(due + OVERDUE_AFTER - 0.01)
    assert lane.overdue(due + OVERDUE_AFTER)
    assert not lane.dead(due + DEAD_AFTER - 0.01)
    assert lane.dead(due + DEAD_AFTER)


def test_an_idle_lane_is_not_silent_before_its_ping_is_due() -> None:
    lane = lane_at()
    answered(lane, 0.0, 0.01)
    assert not lane.dead(PING_IDLE)
    assert not lane.overdue(PING_IDLE)


def test_a_lane_wants_to_be_looked_at_before_anything_is_late() -> None:
    lane = lane_at()
    answered(lane, 0.0, 0.01)
    assert lane.deadline(0.02) == PING_IDLE
    lane.sent += 1
    assert lane.deadline(0.02) == PING_BUSY
    lane.ping(0.02)
    stalled = 0.02 + OVERDUE_AFTER
    assert lane.deadline(0.02) == pytest.approx(stalled)
    assert not lane.overdue(stalled - 0.01)
    assert lane.overdue(stalled)
    # No other is better: it is looked at again, and that may change.
    assert lane.deadline(stalled) == pytest.approx(stalled + PING_BUSY)
    lane.sidelined = True
    assert lane.deadline(stalled) == pytest.approx(0.02 + PING_IDLE)
    lane.ping(0.02 + PING_IDLE)
    lane.ping(0.02 + 2 * PING_IDLE)
    silent = 0.02 + DEAD_AFTER
    assert lane.deadline(silent - 0.5) == pytest.approx(silent)
    assert not lane.dead(silent - 0.01)
    assert lane.dead(silent)


@pytest.mark.parametrize("why", ["spoke", "sidelined"])
def test_a_lane_is_asked_soon_after_it_carried_an_acknowledgement_or_looked_stalled(
    why: str,
) -> None:
    lane = lane_at()
    answered(lane, 0.0, 0.01)
    setattr(lane, why, True)
    assert lane.deadline(0.02) == PING_BUSY
    answered(lane, PING_BUSY, 0.01)
    assert lane.deadline(PING_BUSY + 0.02) == PING_BUSY + PING_IDLE
