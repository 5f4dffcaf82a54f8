"""The daemon's signals: none ends the process by itself once it has said that it starts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rayfwd.daemon.signals import Signals
from tests.unit.loops import run, until


class Daemon:
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def stop(self, why: str) -> None:
        self.asked.append(why)

    def restart(self) -> None:
        self.asked.append("restart")

    def reload(self) -> None:
        self.asked.append("reload")


@contextmanager
def taken() -> Iterator[Signals]:
    loop = asyncio.get_running_loop()
    try:
        yield Signals(loop)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
            loop.remove_signal_handler(number)


def test_what_comes_before_the_daemon_is_there_is_obeyed_by_it() -> None:
    async def main() -> None:
        daemon = Daemon()
        with taken() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)  # the loop has taken it
            signals.obeyed_by(daemon)
            await until(lambda: daemon.asked == ["SIGTERM"])

    run(main)


def test_each_signal_asks_for_its_own() -> None:
    hangup = "SIGHUP" if os.isatty(0) else "reload"
    expected = ["restart", hangup, "SIGINT"]

    async def main() -> None:
        daemon = Daemon()
        with taken() as signals:
            signals.obeyed_by(daemon)
            for number in (signal.SIGUSR2, signal.SIGHUP, signal.SIGINT):
                os.kill(os.getpid(), number)
                so_far = len(daemon.asked)
                await until(partial(_asked, daemon, so_far + 1))
        assert daemon.asked == expected

    run(main)


def _asked(daemon: Daemon, times: int) -> bool:
    return len(daemon.asked) == times
