"""Goes a way to a hub as a lane does, by either SSH, and says what came of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from rayfwd.config import HeadConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.ssh.carriers import carrier_for
from rayfwd.transport.hubanswer import why_no_answer

SAID = b"is anybody there"


class Owner:
    """Of a pipe."""

    def __init__(self) -> None:
        self.came = bytearray()
        self.said = bytearray()
        self.answered = asyncio.Event()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def pipe_data(self, data: bytes | memoryview) -> None:
        self.came += data
        self.answered.set()

    def pipe_said(self, data: bytes) -> None:
        self.said += data

    def pipe_writable(self) -> None: ...

    def pipe_lost(self, why: str) -> None:
        self.answered.set()
        if not self.lost.done():
            self.lost.set_result(why)


async def answer(head: HeadConfig, within: float = 30) -> bytes:
    """What comes back over it. Raises ProblemError."""
    carrier, owner = carrier_for(head), Owner()
    try:
        connection = await carrier.dial(asyncio.Event())
        try:
            pipe = await connection.open(owner)
            with suppress(OSError):
                pipe.write([SAID])
            with suppress(TimeoutError):
                async with asyncio.timeout(within):
                    await owner.answered.wait()
            if not owner.came and owner.lost.done():
                said = owner.said.decode(errors="replace").strip()
                raise ProblemError(why_no_answer(said, owner.lost.result(), head.destination))
            return bytes(owner.came)
        finally:
            connection.abort()
    finally:
        carrier.close()


async def problem(head: HeadConfig, within: float = 30) -> Problem:
    """What keeps it from standing; something does."""
    try:
        came = await answer(head, within)
    except ProblemError as exc:
        return exc.problem
    raise AssertionError(f"it stands, and brought {came!r}")
