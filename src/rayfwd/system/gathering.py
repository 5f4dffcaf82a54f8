"""Work that follows news: at once, and then no sooner than after a pause."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Gathering:
    """Calls `act` for the first news, and again after a pause if there was more by then."""

    def __init__(self, seconds: float, act: Callable[[], None]) -> None:
        """`seconds`: how long the pause after each call is."""
        self._seconds = seconds
        self._act = act
        self._news = False
        """There was some that nobody has acted on."""
        self._pause: asyncio.TimerHandle | None = None

    def news(self, pressing: bool = False) -> None:
        """`pressing`: it does not wait for the end of the pause."""
        self._news = True
        if self._pause is None or pressing:
            self.settle()

    def settle(self) -> None:
        """End the pause. Where there was news, act on it, and begin the next one."""
        self.stop()
        self._pause = None
        if self._news:
            self._news = False
            self._pause = asyncio.get_running_loop().call_later(self._seconds, self.settle)
            self._act()

    def stop(self) -> None:
        """The pause never ends: only pressing news is acted on."""
        if self._pause is not None:
            self._pause.cancel()
