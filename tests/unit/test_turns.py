"""Long work leaves the loop to others in between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from rayfwd.system.turns import ONE_TURN, gathered
from tests.unit.loops import run


def test_each_turn_makes_a_part_and_others_have_theirs_between() -> None:
    made: list[int] = []
    seen: list[int] = []

    def pairs() -> Iterator[tuple[str, int]]:
        for number in range(10 * ONE_TURN):
            made.append(number)
            yield str(number), number

    async def look() -> None:
        while len(made) < 10 * ONE_TURN:
            seen.append(len(made))
            await asyncio.sleep(0)

    async def main() -> None:
        looking = asyncio.create_task(look())
        found = await gathered(pairs())
        await looking
        assert found == {str(number): number for number in range(10 * ONE_TURN)}

    run(main)
    assert seen == list(range(ONE_TURN, 10 * ONE_TURN, ONE_TURN))


def test_few_are_made_at_once() -> None:
    async def main() -> None:
        others = asyncio.create_task(asyncio.sleep(0))
        assert await gathered(iter([("a", 1)])) == {"a": 1}
        assert not others.done()
        await others

    run(main)
