"""Answers `rayfwd doctor` on a connection to the hub, which owns it: nothing joins, nothing stays.

What it may cost the head is bounded: its time, its bytes, its questions; the hub bounds how many
there are at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from rayfwd import codes
from rayfwd.cluster import probe
from rayfwd.cluster.plan import NodePlan
from rayfwd.problems import Problem
from rayfwd.session import checks
from rayfwd.session.checks import FILLER, FILLER_CHUNK, TOTAL_FILLER, TOTAL_QUESTIONS, CheckReply
from rayfwd.session.frames import Frame, FrameDecoder, Kind, ProtocolError

CHECKUP_TIMEOUT = 60.0
"""For all that is asked on one connection."""

_PIECE = checks.filler(bytes(FILLER_CHUNK))


class Checkup:
    """One connection: a question at a time."""

    def __init__(
        self,
        transport: asyncio.Transport,
        answer: CheckReply,
        plan: NodePlan | None,
        refuse: Callable[[Problem], None],
    ) -> None:
        """`answer` is the one to the first question; `plan` is the node's, if it has one.

        `refuse` says why not, and closes the connection.
        """
        self._transport = transport
        self._plan = plan
        self._refuse = refuse
        self._decoder = FrameDecoder()
        self._paused = False
        self._to_send = 0
        """Bytes of filler that the other side waits for."""
        self._to_take = 0
        self._taken = 0
        self._filler = 0
        self._questions = 0
        self._dialling: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(CHECKUP_TIMEOUT, self._too_long)
        transport.write(answer.encode())

    def received(self, data: bytes) -> None:
        """Bytes that came."""
        try:
            for frame in self._decoder.feed(data):
                if not self._transport.is_closing():
                    self._frame(frame)
        except (ProtocolError, ValueError) as exc:
            code = exc.code if isinstance(exc, ProtocolError) else codes.CHECK_MALFORMED
            self._refuse(code.problem(str(exc), "run the same version of rayfwd on both sides"))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._send()

    def gone(self) -> None:
        """The connection is over."""
        self._timer.cancel()
        self._to_send = 0
        if self._dialling is not None:
            self._dialling.cancel()

    def _too_long(self) -> None:
        self._refuse(
            codes.CHECK_LONG.problem(
                f"a run of `rayfwd doctor` may take {CHECKUP_TIMEOUT:.0f} s at most",
                "run `rayfwd doctor` again",
            )
        )

    def _frame(self, frame: Frame) -> None:
        if frame.kind is Kind.CHECK and frame.stream == FILLER:
            self._take(frame.size)
        else:
            self._question(checks.read(frame))

    def _question(self, body: dict[str, Any]) -> None:
        """Raises ProtocolError or ValueError for what is none."""
        self._questions += 1
        busy = self._to_send or self._to_take or self._dialling is not None
        if busy or self._questions > TOTAL_QUESTIONS:
            raise ProtocolError(codes.CHECK_MALFORMED, "CHECK: too many questions, or two at once")
        match body.get("ask"):
            case "time":
                self._say({"time": time.time()})
            case "send":
                self._to_send = self._allowed(checks.read_size(body))
                self._send()
            case "take":
                self._to_take, self._taken = self._allowed(checks.read_size(body)), 0
            case "dial_back" if self._plan is not None:
                ports, nonce = probe.read_request(self._plan, body)
                dialling = self._dial_back(self._plan, ports, nonce)
                self._dialling = asyncio.create_task(dialling, name="dial back for a check")
            case asked:
                raise ProtocolError(codes.CHECK_MALFORMED, f"CHECK: nothing to ask: {asked!r:.60}")

    def _allowed(self, size: int) -> int:
        self._filler += size
        if self._filler > TOTAL_FILLER:
            raise ProtocolError(codes.CHECK_MALFORMED, f"CHECK: over {TOTAL_FILLER} bytes in all")
        return size

    def _send(self) -> None:
        while self._to_send and not self._paused and not self._transport.is_closing():
            size = min(self._to_send, FILLER_CHUNK)
            self._to_send -= size
            self._transport.write(_PIECE if size == FILLER_CHUNK else checks.filler(bytes(size)))

    def _take(self, size: int) -> None:
        self._taken += size
        if not self._to_take or self._taken > self._to_take:
            raise ProtocolError(codes.CHECK_MALFORMED, "CHECK: filler that was not announced")
        if self._taken == self._to_take:
            self._to_take = 0
            self._say({"took": self._taken})

    async def _dial_back(self, plan: NodePlan, ports: list[int], nonce: str) -> None:
        results = await probe.dial_all(plan.address, ports, nonce)
        self._dialling = None
        self._say({"results": results})

    def _say(self, body: dict[str, Any]) -> None:
        if not self._transport.is_closing():
            self._transport.write(checks.talk(body))
