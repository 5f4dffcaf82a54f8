"""Joins streams that other nodes open to ports of this machine."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Target
from rayfwd.system import descriptors
from rayfwd.system.logs import get_logger
from rayfwd.transport.mux import MuxStream
from rayfwd.transport.relay import SocketRelay

log = get_logger(__name__)

DIAL_TIMEOUT = 10.0
"""Seconds for a connection on this machine: made or refused at once, unless a backlog is full."""


class LocalConnector:
    """Joins streams that other nodes open to ports of this machine. Owns its attempts."""

    def __init__(self) -> None:
        self.relays: set[SocketRelay] = set()
        """Those that have a connection."""
        self._tasks: dict[asyncio.Task[None], tuple[SocketRelay, Target]] = {}

    def accept(self, stream: MuxStream, target: Target) -> SocketRelay:
        """Dial `target` for a stream; a failure resets it with its reason."""
        relay = SocketRelay(self.relays)
        relay.attach(stream)
        self.dial(stream, relay, target)
        return relay

    def dial(self, stream: MuxStream, relay: SocketRelay, target: Target) -> None:
        """Find the relay of a stream its connection."""
        task = asyncio.create_task(self._dial(stream, relay, target), name=f"dial {target}")
        self._tasks[task] = relay, target
        task.add_done_callback(self._done)

    def target_of(self, relay: SocketRelay) -> Target | None:
        """What is being dialled for this relay."""
        return next((target for p, target in self._tasks.values() if p is relay), None)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (exc := task.exception()) is not None:
            raise exc

    async def _dial(self, stream: MuxStream, relay: SocketRelay, target: Target) -> None:
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                await _connect(relay, target)
        except ConnectionRefusedError:
            stream.reset(ResetReason.REFUSED, f"nothing listens on {target}")
        except TimeoutError:
            stream.reset(ResetReason.UNREACHABLE, f"{target} did not answer")
        except OSError as exc:
            scarce = exc.errno in {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS}
            if scarce:
                log.error("dial_failed", target=str(target), cause=str(exc))
            stream.reset(
                ResetReason.TOO_MANY if scarce else ResetReason.UNREACHABLE, f"{target}: {exc}"
            )

    def release(self) -> None:
        """Another process dials what is being dialled."""
        for task, (relay, _) in list(self._tasks.items()):
            relay.release()
            task.cancel()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _connect(relay: SocketRelay, target: Target) -> None:
    """Raises OSError; EMFILE also where only the reserve of descriptors is left."""
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sock.fileno() >= descriptors.reserve():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        sock.setblocking(False)
        await loop.sock_connect(sock, target)
        await loop.create_connection(lambda: relay, sock=sock)
    except BaseException:
        sock.close()
        raise
