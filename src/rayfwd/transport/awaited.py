"""A worker that the head dials: it waits on a socket of its own for what sshd brings.

As a carrier, this gives out the connections that came. Where the worker can dial as well, it does,
and whichever stands first is taken. Nothing listens on the network: who connects to the socket is
this user or root, as sshd's own process of a login or as `rayfwd attach`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from rayfwd import codes
from rayfwd.problems import ProblemError
from rayfwd.system import ownership, unixsocket
from rayfwd.system.accepting import close_server
from rayfwd.system.logs import get_logger
from rayfwd.transport.carrier import CLOSED, Carrier, Connection, PipeOwner
from rayfwd.transport.socketpipe import SocketPipe

log = get_logger(__name__)

AWAITED_SECONDS = 20.0
"""Seconds after which a worker that has no connection says so, and waits on."""
MOST_WAITING = 20
"""Connections that nobody has taken yet; one more takes the place of the oldest."""


class Awaited:
    """Owns the listening socket and the connections that nobody has taken yet."""

    def __init__(self, path: Path, other: Carrier | None) -> None:
        """`other` dials as well."""
        self._path = path
        self._other = other
        self._server: asyncio.Server | None = None
        self._waiting: deque[AwaitedPipe] = deque()
        self._came = asyncio.Event()

    async def listen(self) -> None:
        """Raises ProblemError."""
        sock = unixsocket.bind(self._path)
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: AwaitedPipe(self), sock=sock
        )
        log.info("link_awaited_at", socket=str(self._path))

    def end(self) -> None:
        """Listen no more, and drop what nobody has taken."""
        server, self._server = self._server, None
        if server is not None:
            close_server(server)
            self._path.unlink(missing_ok=True)
        while self._waiting:
            self._waiting.popleft().abort()

    async def dial(self, urgent: asyncio.Event) -> Connection:
        """A connection that came, or was made. Raises ProblemError."""
        came = asyncio.create_task(self._next(), name="await the head")
        tasks: set[asyncio.Task[Connection]] = {came}
        if self._other is not None:
            tasks.add(asyncio.create_task(_dialled(self._other, urgent), name="dial the head"))
        try:
            return await self._first(tasks, came)
        finally:
            for task in tasks:
                task.cancel()
                task.add_done_callback(_abort_late)

    async def _first(
        self, tasks: set[asyncio.Task[Connection]], came: asyncio.Task[Connection]
    ) -> Connection:
        failed: ProblemError | None = None
        left = set(tasks)
        with suppress(TimeoutError):
            async with asyncio.timeout(None if self._other is not None else AWAITED_SECONDS) as end:
                while left:
                    done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(done, key=lambda one: one is not came):
                        error = task.exception()
                        if error is None:
                            tasks.discard(task)
                            return task.result()
                        if not isinstance(error, ProblemError):
                            raise error
                        failed = error
                        end.reschedule(asyncio.get_running_loop().time() + AWAITED_SECONDS / 4)
        if failed is not None:
            raise failed
        raise codes.LINK_AWAITED.error(
            f"the head has not dialled this worker, which waits at {self._path}",
            "check that the head has a [[hub.dial]] (`rayfwd head --dial USER@HOST`) for this "
            "machine (with a larger `bulk_lanes`, if only a further lane is missing), and what "
            "`rayfwd status` says on the head",
        )

    async def _next(self) -> Connection:
        while not self._waiting:
            self._came.clear()
            await self._came.wait()
        return AwaitedConnection(self._waiting.popleft())

    def close(self, parked: bool = False) -> None:
        """Of what was not taken it is not known whether it still stands."""
        while self._waiting:
            self._waiting.popleft().abort()
        if self._other is not None:
            self._other.close(parked)

    # -- as the owner of what waits ----------------------------------------------------------

    def arrived(self, pipe: AwaitedPipe) -> None:
        """The newest is the likeliest to stand: it is taken first."""
        if self._server is None:  # it listens no more
            pipe.abort()
            return
        self._waiting.appendleft(pipe)
        while len(self._waiting) > MOST_WAITING:
            self._waiting.pop().abort()
        self._came.set()

    def left(self, pipe: AwaitedPipe) -> None:
        with suppress(ValueError):
            self._waiting.remove(pipe)


async def _dialled(carrier: Carrier, urgent: asyncio.Event) -> Connection:
    return await carrier.dial(urgent)


def _abort_late(task: asyncio.Task[Connection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().abort()


class AwaitedConnection:
    """A connection that came; it is its own one pipe."""

    def __init__(self, pipe: AwaitedPipe) -> None:
        self._pipe = pipe

    @property
    def takes_another(self) -> bool:
        return False

    async def open(self, owner: PipeOwner) -> AwaitedPipe:
        self._pipe.take(owner)
        return self._pipe

    async def tune(self) -> None: ...

    def keep_alive(self) -> None: ...

    def close(self) -> None:
        self._pipe.close()

    def abort(self) -> None:
        self._pipe.abort()


class Home(Protocol):
    """Who has a pipe until somebody takes it."""

    def arrived(self, pipe: AwaitedPipe) -> None: ...

    def left(self, pipe: AwaitedPipe) -> None:
        """It is over."""


class AwaitedPipe(SocketPipe):
    """What connected to the socket. The head says nothing before our hello."""

    def __init__(self, home: Home) -> None:
        super().__init__()
        self._home = home
        self._lost = ""

    def take(self, owner: PipeOwner) -> None:
        """From now on it is this one's."""
        self._owner = owner
        if self._transport is None:
            owner.pipe_lost(self._lost)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock: socket.socket = transport.get_extra_info("socket")
        uid = ownership.peer_credentials(sock)[1]
        if uid not in {0, os.geteuid()}:
            log.warning("link_stranger", uid=uid)
            self.abort()
            return
        self._home.arrived(self)

    def data_received(self, data: bytes) -> None:
        if self._owner is None:
            self.abort()  # whoever speaks first is no hub
            return
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = str(exc or CLOSED)
        self._home.left(self)
        super().connection_lost(exc)
