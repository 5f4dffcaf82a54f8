"""Runs a command for what it prints, and leaves nothing of it: no process, no open pipe.

asyncio's own `communicate` and `wait` end when the command's pipes do. Whatever the command has
started may have these open too: a wrapper that is killed leaves its program behind, which says
nothing and ends in an hour. Here the pipes are closed with the command.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that came to its end."""

    code: int
    """Negative: the signal that ended it."""
    out: bytes
    err: bytes

    @property
    def last_line(self) -> str:
        """Of what it said: of its errors, or if there are none, of its output. Empty: nothing."""
        said = (self.err.strip() or self.out).decode(errors="replace")
        return (said.strip().splitlines() or [""])[-1]


class _Listening(asyncio.SubprocessProtocol):
    def __init__(self) -> None:
        self.said = {1: bytearray(), 2: bytearray()}
        self.over = asyncio.get_running_loop().create_future()
        """When it has ended, and its pipes have."""

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.said[fd] += data

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():  # whoever waited may have been cancelled
            self.over.set_result(None)


async def run(
    *argv: str,
    seconds: float,
    env: Mapping[str, str] | None = None,
    start_new_session: bool = False,
) -> Ended:
    """Run a command with no input. `env`: all that it is given; None: what this process has.

    After `seconds`, or where this is cancelled, it is killed. What it has started goes on, with
    nobody at the other end. Raises OSError where it cannot be started, TimeoutError (an OSError
    too: catch it first).
    """
    loop = asyncio.get_running_loop()
    transport, listening = await loop.subprocess_exec(
        _Listening,
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=None if env is None else dict(env),
        start_new_session=start_new_session,
    )
    try:
        async with asyncio.timeout(seconds):
            await asyncio.shield(listening.over)
    finally:
        transport.close()  # kills it, if it still runs
        await listening.over
    code = transport.get_returncode()
    assert code is not None, "it has ended"
    return Ended(code, bytes(listening.said[1]), bytes(listening.said[2]))
