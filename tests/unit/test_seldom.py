"""What is due to be said, and when again."""

from __future__ import annotations

from rayfwd.system.seldom import Seldom


def test_the_first_time_and_again_after_so_long() -> None:
    said = Seldom(60.0)
    assert said.due(0.0)
    assert not said.due(59.9)
    assert said.due(60.0)
    assert not said.due(119.9), "counted from when it was said last"


def test_each_thing_by_itself() -> None:
    said = Seldom(60.0, most=2)
    assert [said.due(now, "a") for now in (0.0, 10.0)] == [True, False]
    assert said.due(10.0, "b")
    assert said.due(60.0, "a")
    assert not said.due(60.0, "b")


def test_what_comes_on_top_is_not_said_and_not_kept() -> None:
    said = Seldom(60.0, most=2)
    assert [said.due(0.0, thing) for thing in range(1000)] == [True] * 2 + [False] * 998
    assert said.due(60.0, 999), "there is room again"
