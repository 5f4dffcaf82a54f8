"""Long work of the loop in several turns, so that others have theirs in between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

ONE_TURN = 100
"""Things that are made in one turn. A thousand links that are looked at in one take 15 ms."""


async def gathered(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    """What `pairs` makes, by name; each is made when its turn comes."""
    made = {}
    for number, (name, one) in enumerate(pairs, 1):
        made[name] = one
        if number % ONE_TURN == 0:
            await asyncio.sleep(0)
    return made
