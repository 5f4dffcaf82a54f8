"""The waits between tries."""

from __future__ import annotations

from rayfwd.system.backoff import Backoff


def test_each_wait_is_twice_the_one_before_up_to_the_last() -> None:
    backoff = Backoff(1.0, 5.0)
    assert [backoff.next() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    backoff.reset()
    assert [backoff.next() for _ in range(2)] == [1.0, 2.0]


def test_a_bound_that_comes_later_holds_at_once_and_one_that_goes_lets_it_grow() -> None:
    backoff = Backoff(1.0, 60.0)
    assert [backoff.next() for _ in range(4)] == [1.0, 2.0, 4.0, 8.0]
    assert [backoff.next(5.0) for _ in range(2)] == [5.0, 5.0]
    assert [backoff.next(60.0) for _ in range(3)] == [5.0, 10.0, 20.0]


def test_waits_of_many_are_spread_within_the_jitter() -> None:
    waits = [Backoff(10.0, 10.0, jitter=0.2).next() for _ in range(200)]
    assert 8.0 <= min(waits) < 9.0
    assert 11.0 < max(waits) <= 12.0
