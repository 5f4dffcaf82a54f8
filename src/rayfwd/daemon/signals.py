"""The signals of the daemon's own process: taken before it says that it starts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Protocol


class Obeying(Protocol):
    """Does what a signal asks for."""

    def stop(self, why: str) -> None: ...

    def restart(self) -> None: ...

    def reload(self) -> object: ...


Order = Callable[[Obeying], object]


class Signals:
    """From its making on no signal ends this process by itself. SIGTERM and SIGINT stop the
    daemon, SIGUSR2 restarts it, SIGHUP reads its file again, or stops it in a terminal."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._obeying: Obeying | None = None
        self._early: list[Order] = []
        """Those that came before there was somebody to obey them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._take, _stop(number))
        loop.add_signal_handler(signal.SIGUSR2, self._take, lambda daemon: daemon.restart())
        # Where there is a terminal, this is its end.
        hangup = _stop(signal.SIGHUP) if os.isatty(0) else lambda daemon: daemon.reload()
        loop.add_signal_handler(signal.SIGHUP, self._take, hangup)

    def obeyed_by(self, daemon: Obeying) -> None:
        """From now on; what came before is obeyed at once."""
        self._obeying = daemon
        for order in self._early:
            order(daemon)

    def _take(self, order: Order) -> None:
        if self._obeying is None:
            self._early.append(order)
        else:
            order(self._obeying)


def _stop(number: int) -> Order:
    return lambda daemon: daemon.stop(signal.Signals(number).name)
