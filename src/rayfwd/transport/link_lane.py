"""One lane of the worker's side: the handshake over a pipe to the hub, then a session's bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from rayfwd import codes
from rayfwd.config import HEAD, Destination
from rayfwd.problems import Problem, ProblemError
from rayfwd.session.frames import (
    MAX_PAYLOAD,
    Chunk,
    Frame,
    Kind,
    ProtocolError,
    close_frame,
    first_frame,
)
from rayfwd.session.handshake import Challenge, Hello, Proof, Welcome
from rayfwd.session.lane import LaneClass
from rayfwd.transport.carrier import CLOSED, Pipe
from rayfwd.transport.hubanswer import not_the_hubs, refusal_in, why_no_answer
from rayfwd.transport.mux import Mux

CLOSE_TIMEOUT = 2.0
"""Seconds for the peer to confirm that a lane is closed."""

Prove = Callable[[Frame, Challenge], Proof]


class LinkRefusedError(Exception):
    """The hub refused the lane; `problem` is its reason, `session` what the lane was for."""

    def __init__(self, problem: Problem, session: str) -> None:
        super().__init__(problem.cause)
        self.problem = problem
        self.session = session


class LinkLane:
    """A pipe to the hub: first the handshake, then a lane of a session."""

    def __init__(self, to: Destination = HEAD) -> None:
        self._to = to
        self._pipe: Pipe | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._session = ""
        self._greeting: Frame | None = None
        self._prove: Prove | None = None
        self.challenge: Challenge | None = None
        self._mux: Mux | None = None
        self._number = 0
        self._stderr = bytearray()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    # -- as the pipe's owner -------------------------------------------------------------

    def pipe_data(self, data: bytes | memoryview) -> None:
        if self._mux is not None:
            self._mux.lane_data(self._number, data)
        else:
            self._buffer += data
            self._take_answer()

    def pipe_said(self, data: bytes) -> None:
        self._stderr += data[: 4096 - len(self._stderr)]

    def pipe_writable(self) -> None:
        if self._mux is not None:
            self._mux.flush()

    def pipe_lost(self, why: str) -> None:
        if not self._answer.done():
            said = self._stderr.decode(errors="replace").strip()
            self._answer.set_exception(ProblemError(why_no_answer(said, why, self._to)))
            self._answer.exception()  # seen, also where nobody waits for the answer any more
        if not self.lost.done():
            self.lost.set_result(why)

    # -- the handshake -------------------------------------------------------------------

    @property
    def challenged(self) -> bool:
        """The hub asked for a proof of the key: it does not go by the key alone."""
        return self.challenge is not None

    @property
    def said(self) -> Frame | None:
        """Its hello."""
        return self._greeting

    @property
    def greeting(self) -> bool:
        """It said hello, and is no lane of a session yet."""
        return bool(self._session) and self._mux is None

    def take_back(self, why: str) -> None:
        """End the session that the hub may begin with our hello."""
        self._prove = None
        self.write([close_frame(why)])
        self.close()

    async def greet(self, pipe: Pipe, hello: Hello, prove: Prove) -> Welcome:
        """Say hello, prove it if asked to, and await the answer. Raises LinkRefusedError or
        ProblemError."""
        self._pipe, self._session, self._prove = pipe, hello.session, prove
        said = hello.encode()
        self._greeting = first_frame(bytearray(said), MAX_PAYLOAD)
        with suppress(OSError):  # a command that has ended already: its end says why
            pipe.write([said])
        return await self._answer

    def _take_answer(self) -> None:
        if self._answer.done():
            return
        try:
            frame = first_frame(self._buffer, MAX_PAYLOAD)
            if frame is None:
                return
            if frame.kind is Kind.CHALLENGE:
                self._answer_challenge(Challenge.decode(frame))
                self._take_answer()
            elif frame.kind is Kind.REFUSE:
                refusal = refusal_in(frame, self._to)
                self._answer.set_exception(LinkRefusedError(refusal, self._session))
            else:
                self._answer.set_result(Welcome.decode(frame))
        except ProtocolError as exc:
            self._answer.set_exception(ProblemError(not_the_hubs(exc, self._to)))

    def _answer_challenge(self, challenge: Challenge) -> None:
        """Once: a hub has no use for a second signature. Raises ProtocolError."""
        if self.challenged:
            raise ProtocolError(codes.HANDSHAKE_EXPECTED, "a second CHALLENGE")
        self.challenge = challenge
        if self._prove is not None and self._greeting is not None and self._pipe is not None:
            with suppress(OSError):  # it has closed: its end says why
                self._pipe.write([self._prove(self._greeting, challenge).encode()])

    # -- a lane of a session -------------------------------------------------------------

    def join(self, mux: Mux, lane_class: LaneClass) -> int:
        """Become a lane; bytes that followed the welcome are the session's."""
        assert self._pipe is not None, "it was welcomed"
        self._mux = mux
        self._number = mux.add_lane(self, lane_class)
        if self._buffer:
            mux.lane_data(self._number, bytes(self._buffer))
            self._buffer.clear()
        self._pipe.carry(lambda came: mux.lane_data(self._number, *came), mux.flush)
        return self._number

    @property
    def paused(self) -> bool:
        return self.lost.done() or self._pipe is None or self._pipe.paused

    def write(self, chunks: Sequence[Chunk]) -> None:
        assert self._pipe is not None, "nothing is written before the hello"
        try:
            self._pipe.write(chunks)
        except OSError:
            # The head has closed it, and the word of it is still on its way. What was to go by
            # this lane goes by another when the lane is taken down.
            self.pipe_lost(CLOSED)

    def close(self) -> None:
        # It is over when the peer has confirmed it: until then what was written is on its way.
        if self._pipe is not None:
            self._pipe.close()
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self.abort, "closed")

    def abort(self, why: str) -> None:
        if not self.lost.done():
            if self._pipe is not None:
                self._pipe.abort()
            self.pipe_lost(why)
