"""Asks the hub over an SSH channel of its own, as docs/protocol.md has it under "Checks".

A probe makes no session: what runs on this machine or on the head does not notice it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from rayfwd import codes
from rayfwd.cluster.identity import Identity
from rayfwd.config import HEAD, Destination
from rayfwd.doctor.judgements import RATE_SLOW, Tick
from rayfwd.problems import Problem, ProblemError
from rayfwd.session import checks
from rayfwd.session.checks import FILLER, FILLER_CHUNK, MOST_FILLER, CheckReply
from rayfwd.session.frames import Frame, FrameDecoder, Kind, ProtocolError, first_frame
from rayfwd.session.handshake import MAX_HANDSHAKE, Challenge, Hello
from rayfwd.transport.carrier import CLOSED, Pipe
from rayfwd.transport.hubanswer import not_the_hubs, refusal_in, why_no_answer

T = TypeVar("T")

ANSWER_TIMEOUT = 15.0
"""Seconds for an answer."""
CLOCK_SAMPLES = 7
FIRST_TRANSFER = 1 << 16
OLDER = codes.HUB_OLDER.problem(
    "the head's rayfwd is older than this one and does not answer a doctor's questions",
    "upgrade rayfwd on the head (the head first, then the workers)",
)
SHORTEST_TRANSFER = 0.4
"""Seconds that a transfer must take for its speed to be believed."""
CONFIRMED = 2
"""Times that a slow transfer is made again: the same is seen where one of the two machines was busy
for that moment."""


class HubProbe:
    """Owns a pipe to the hub, or to another worker; one question at a time."""

    def __init__(self, to: Destination = HEAD) -> None:
        self._to = to
        self._pipe: Pipe | None = None
        self._decoder = FrameDecoder()
        self._stderr = bytearray()
        """What came on standard error."""
        self._answers: asyncio.Queue[Frame | Problem] = asyncio.Queue()
        self._writable = asyncio.Event()
        self._wanted = 0
        """Bytes of filler that are still to come."""
        self._all_here = asyncio.Event()
        self._over: Problem | None = None

    # -- as the pipe's owner ---------------------------------------------------------

    def pipe_said(self, data: bytes) -> None:
        self._stderr += data[: 4096 - len(self._stderr)]

    def pipe_data(self, data: bytes | memoryview) -> None:
        try:
            for frame in self._decoder.feed(data):
                if frame.kind is Kind.CHECK and frame.stream == FILLER:
                    self._wanted -= frame.size
                    if self._wanted <= 0:
                        self._all_here.set()
                else:
                    self._answers.put_nowait(frame)
        except ProtocolError as exc:
            self._end(not_the_hubs(exc, self._to))

    def pipe_writable(self) -> None:
        self._writable.set()

    def pipe_lost(self, why: str) -> None:
        self._end(why_no_answer(self._stderr.decode(errors="replace").strip(), why, self._to))

    def _end(self, problem: Problem) -> None:
        if self._over is None:
            self._over = problem
            self._answers.put_nowait(problem)
            self._all_here.set()
            self._writable.set()

    # -- questions --------------------------------------------------------

    async def opened(self, opening: Awaitable[Pipe]) -> Pipe:
        """The pipe, once the SSH server there has opened its channel. Raises ProblemError."""
        return await _within(
            ANSWER_TIMEOUT,
            opening,
            f"{self._to.name}'s sshd opened no channel in {ANSWER_TIMEOUT:.0f} s",
            f"check {self._to.name}'s load and its sshd log",
        )

    async def begin(self, pipe: Pipe, hello: Hello, identity: Identity) -> CheckReply:
        """What would come of this HELLO, whose key is that of `identity`. Raises ProblemError."""
        self._pipe = pipe
        question = checks.first_question(hello)
        with suppress(OSError):  # a command that has ended already: its end says why
            pipe.write([question])
        frame = await self._answer()
        try:
            if frame.kind is Kind.CHALLENGE:
                asked = first_frame(bytearray(question), MAX_HANDSHAKE)
                assert asked is not None, "it is whole"
                self._write(identity.prove(asked, Challenge.decode(frame)).encode())
                frame = await self._answer()
            return CheckReply.decode(frame)
        except ProtocolError as exc:
            raise ProblemError(not_the_hubs(exc, self._to)) from None

    async def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A question and its answer. Raises ProblemError."""
        self._write(checks.talk(body))
        try:
            return checks.read(await self._answer())
        except ProtocolError as exc:
            raise ProblemError(not_the_hubs(exc, self._to)) from None

    async def ticks(self) -> list[Tick]:
        """Ask for the head's clock, several times. Raises ProblemError."""
        found = []
        for _ in range(CLOCK_SAMPLES):
            asked, began = time.time(), time.monotonic()
            answer = await self.ask({"ask": "time"})
            trip = time.monotonic() - began
            try:
                found.append(Tick(asked, checks.read_time(answer), trip))
            except ProtocolError as exc:
                raise ProblemError(not_the_hubs(exc, self._to)) from None
        return found

    async def rates(self, trip: float) -> tuple[float, float]:
        """Bytes a second from the head and to it; `trip` is a round trip's time, in seconds.

        Each way takes a moment where the link is quick, and some seconds where it is very slow.
        Raises ProblemError.
        """
        return await _rate(self._pull, trip), await _rate(self._push, trip)

    async def _pull(self, size: int) -> None:
        self._wanted = size
        self._all_here.clear()
        self._write(checks.talk({"ask": "send", "bytes": size}))
        await self._bounded(self._all_here.wait(), "filler", 4 * ANSWER_TIMEOUT)
        self._check()

    async def _push(self, size: int) -> None:
        self._write(checks.talk({"ask": "take", "bytes": size}))
        chunk = checks.filler(bytes(FILLER_CHUNK))
        for _ in range(size // FILLER_CHUNK):
            if self._opened.paused:
                self._writable.clear()
                await self._bounded(self._writable.wait(), "room", 4 * ANSWER_TIMEOUT)
            self._write(chunk)
        checks.read(await self._answer(4 * ANSWER_TIMEOUT))

    def _write(self, data: bytes) -> None:
        self._check()
        try:
            self._opened.write([data])
        except OSError:
            self._end(why_no_answer("", CLOSED, self._to))
            self._check()

    @property
    def _opened(self) -> Pipe:
        assert self._pipe is not None, "it has begun"
        return self._pipe

    def _check(self) -> None:
        if self._over is not None:
            raise ProblemError(self._over)

    async def _answer(self, seconds: float = ANSWER_TIMEOUT) -> Frame:
        found = await self._bounded(self._answers.get(), "answer", seconds)
        if isinstance(found, Problem):
            raise ProblemError(found)
        if found.kind is Kind.REFUSE:
            raise ProblemError(_refused(found, self._to))
        return found

    async def _bounded(self, what: Awaitable[T], name: str, seconds: float) -> T:
        return await _within(
            seconds,
            what,
            f"{self._to.answerer} gave no {name} within {seconds:.0f} s",
            f"read rayfwd's log on {self._to.name}",
        )


async def _within(seconds: float, what: Awaitable[T], silence: str, remedy: str) -> T:
    """Raises ProblemError where it does not come in time."""
    try:
        async with asyncio.timeout(seconds):
            return await what
    except TimeoutError:
        raise codes.HUB_SILENT.error(silence, remedy) from None


async def _rate(move: Callable[[int], Awaitable[None]], trip: float) -> float:
    """Move ever more until it takes long enough to tell; bytes a second."""
    size, enough = FIRST_TRANSFER, max(SHORTEST_TRANSFER, 4 * trip)
    while True:
        took = await _seconds(move, size)
        for _ in range(CONFIRMED):
            if took >= enough and size / max(took - trip, took / 4) < RATE_SLOW:
                took = min(took, await _seconds(move, size))
        if took >= enough or size >= MOST_FILLER:
            return size / max(took - trip, took / 4, 1e-6)
        size = min(4 * size, MOST_FILLER)


async def _seconds(move: Callable[[int], Awaitable[None]], size: int) -> float:
    """How long it takes to move so many bytes."""
    began = time.monotonic()
    await move(size)
    return time.monotonic() - began


def _refused(frame: Frame, to: Destination) -> Problem:
    refusal = refusal_in(frame, to)
    return OLDER if refusal.code == codes.FRAME_UNKNOWN else refusal
