"""Which step a piece of work is at, and how long each one took."""

from __future__ import annotations

import time
from collections.abc import Callable

Begin = Callable[[str], object]
"""Called with the name of the step that begins now, which ends the one before."""


def no_step(name: str) -> None:
    """Nobody asks where the time went (a `Begin`)."""


class Steps:
    """Steps that follow each other. One thread begins them, and any may read."""

    def __init__(self, first: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = [(first, clock())]

    def begin(self, name: str) -> None:
        self._begun.append((name, self._clock()))

    @property
    def now(self) -> str:
        return self._begun[-1][0]

    def seconds(self) -> dict[str, float]:
        """Of each step so far, in their order, to a tenth; all its times where one came again."""
        begun = list(self._begun)
        ends = [*(at for _, at in begun[1:]), self._clock()]
        took: dict[str, float] = {}
        for (name, began), ended in zip(begun, ends, strict=True):
            took[name] = took.get(name, 0.0) + ended - began
        return {name: round(spent, 1) for name, spent in took.items()}
