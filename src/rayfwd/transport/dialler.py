"""The head's side of a link that the head dials: connections to one worker that accepts SSH.

Each is joined to the hub's socket once the worker has said something, and is a lane like any other
from then on: the session knows nothing of who dialled. One finds out whether there is a way, the
others follow it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from rayfwd.config import DIALLED_WORKER, DialConfig
from rayfwd.problems import ProblemError
from rayfwd.session.frames import Chunk
from rayfwd.system.logs import get_logger
from rayfwd.transport.carrier import Carrier, Connection, Pipe
from rayfwd.transport.hubanswer import why_no_answer
from rayfwd.transport.kept import Kept
from rayfwd.transport.link import HANDSHAKE_TIMEOUT, URGENT_HANDSHAKE, within_time
from rayfwd.transport.link_lane import CLOSE_TIMEOUT
from rayfwd.transport.redialled import Redialled
from rayfwd.transport.urgency import AdaptiveTimeout
from rayfwd.transport.writev import write

log = get_logger(__name__)

SAID = 4096
"""Bytes of what comes beside the stream that are kept."""


class Dialler(Redialled):
    """Holds connections to one worker. `run` until it is cancelled."""

    def __init__(
        self,
        dial: DialConfig,
        carrier: Carrier,
        hub: Path,
        ride_through: float,
        on_change: Callable[[], None],
        vouch: bytes = b"",
    ) -> None:
        """`hub`: where the hub listens. `on_change`: `problem` is another. `vouch`: what the hub is
        told first, so that it knows whose the connection is."""
        super().__init__(dial.called, ride_through, on_change)
        self._lanes = 1 + dial.bulk_lanes
        self._carrier = carrier
        self._hub = hub
        self._vouch = vouch
        self._channel_timeout = AdaptiveTimeout(URGENT_HANDSHAKE, HANDSHAKE_TIMEOUT)
        self._joints: set[Joint] = set()
        self._connections: set[Connection] = set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._lanes):
                group.create_task(self._hold(number), name=f"dial {self.called} {number}")

    def end(self) -> None:
        """Dial no more; what stands is the hub's to end."""
        self._closing = True

    async def drained(self) -> None:
        """Once the connections that stood are over, which the hub has ended; soon at the latest."""
        if self._joints:
            await asyncio.wait([joint.lost for joint in self._joints], timeout=CLOSE_TIMEOUT)

    def close(self) -> None:
        """Dial no more, and give up what stands."""
        self._closing = True
        self._be_calm()
        for connection in list(self._connections):
            connection.abort()
        self._carrier.close()

    async def _hold(self, number: int) -> None:
        kept = Kept()
        await self._redial(
            lambda: self._one(number, kept),
            lambda problem: self._met(problem, worker=self.called),
            follows=number > 0,
        )

    async def _one(self, number: int, kept: Kept) -> None:
        """Dial, and stay until it is over. Raises ProblemError."""
        now = asyncio.get_running_loop().time
        connection = kept.take()
        if connection is None:
            connection = await self._carrier.dial(self._urgent)
            self._connections.add(connection)
            kept.made(now())
        joint, again = Joint(self._hub, self._stands, self._vouch), False
        try:
            joint.pipe = await within_time(
                connection.open(joint),
                self._urgent,
                self._channel_timeout,
                "the worker's sshd opened no channel",
                "nothing if it comes back; otherwise check the worker's load and its sshd log",
            )
            connection.keep_alive()  # until the worker has use for it, nobody says anything
            tuning = asyncio.create_task(connection.tune(), name="tune the connection")
            try:
                why = await joint.lost
            finally:
                tuning.cancel()
            if not joint.stood:
                said = joint.said.decode(errors="replace").strip()
                raise ProblemError(why_no_answer(said, why, DIALLED_WORKER))
        except ProblemError as exc:
            again = kept.offer(connection, exc.problem, now())
            raise
        finally:
            joint.end()
            if not again:
                self._connections.discard(connection)
                connection.abort()
            self._gone(joint)
        if not self._closing:
            log.warning("dial_lost", worker=self.called, connection=number, cause=why)

    def _stands(self, joint: Joint) -> None:
        """The worker has spoken."""
        self._joints.add(joint)
        if self._now_stands():
            log.info("worker_dialled", worker=self.called)

    def _gone(self, joint: Joint) -> None:
        self._joints.discard(joint)
        if joint.stood and not self._joints and self._now_gone():
            # A jump host may be what has gone, in silence.
            self._carrier.close(parked=True)


class Joint(asyncio.Protocol):
    """Joins a pipe from a worker to a connection to the hub's socket."""

    def __init__(self, hub: Path, on_stand: Callable[[Joint], None], vouch: bytes = b"") -> None:
        self.pipe: Pipe | None = None
        self.said = bytearray()
        self.stood = False
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._hub = hub
        self._vouch = vouch
        self._on_stand = on_stand
        self._transport: asyncio.Transport | None = None
        self._connecting: asyncio.Task[object] | None = None
        self._before = bytearray()
        """What came before the hub was there."""

    # -- as the pipe's owner -----------------------------------------------------------------

    def pipe_data(self, data: bytes | memoryview) -> None:
        if self._transport is not None:
            self._transport.write(data)
            return
        self._before += data
        if self._connecting is None and not self.lost.done():
            self.stood = True
            self._on_stand(self)
            connect = asyncio.get_running_loop().create_unix_connection(
                lambda: self, str(self._hub)
            )
            self._connecting = asyncio.create_task(connect, name="to the hub")
            self._connecting.add_done_callback(self._connected)

    def pipe_said(self, data: bytes) -> None:
        self.said += data[: SAID - len(self.said)]

    def pipe_writable(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def pipe_lost(self, why: str) -> None:
        if self._transport is not None:
            self._transport.close()
        self._over(why)

    # -- as the hub's other end ----------------------------------------------------------------

    def _connected(self, task: asyncio.Task[object]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._over(f"the hub cannot be reached: {error}")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.lost.done():
            self._transport.abort()
            return
        self._transport.write(self._vouch + self._before)
        self._before.clear()
        assert self.pipe is not None, "it has brought data"
        self.pipe.carry(self._deliver, self.pipe_writable)

    def _deliver(self, chunks: Sequence[Chunk]) -> None:
        if self._transport is not None:
            write(self._transport, chunks)

    def data_received(self, data: bytes) -> None:
        if self.pipe is None or self.lost.done():
            return
        try:
            self.pipe.write([data])
        except OSError:
            self._over("closed by the worker")
            return
        if self.pipe.paused and self._transport is not None:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        why = str(exc or "closed by the hub")
        if self.pipe is None or self.lost.done():
            self._over(why)
            return
        # Its last word is on its way: it is over when the worker has confirmed that.
        self.pipe.close()
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self._over, why)

    def _over(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_result(why)

    def end(self) -> None:
        """Both ends."""
        self._over("ended")
        if self._connecting is not None:
            self._connecting.cancel()
        if self._transport is not None:
            self._transport.close()
