"""Joins streams that other nodes open to ports of this machine."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening
from rayfwd.system import descriptors
from rayfwd.system.logs import get_logger
from rayfwd.transport.mux import Mux, MuxStream
from rayfwd.transport.relay import SocketRelay

log = get_logger(__name__)

_IP_BIND_ADDRESS_NO_PORT = 24
"""`socket` has it from Python 3.12 on (linux/in.h)."""

DIAL_TIMEOUT = 10.0
"""Seconds for a connection on this machine: made or refused at once, unless a backlog is full."""


Taker = tuple[Mux, str | None]
"""Whose streams want connections: those of a session, from a node's address where that is told."""


class LocalConnector:
    """Joins streams that other nodes open to ports of this machine. Owns its attempts."""

    def __init__(self) -> None:
        self.relays: set[SocketRelay] = set()
        """Those that have a connection."""
        self._tasks: dict[asyncio.Task[None], tuple[SocketRelay, Opening]] = {}
        self._taken: dict[Taker, dict[SocketRelay, MuxStream]] = {}

    def accept(self, stream: MuxStream, opening: Opening) -> SocketRelay:
        """Dial a target for a stream; a failure resets it with its reason."""
        relay = SocketRelay(self.relays)
        relay.attach(stream)
        self.dial(stream, relay, opening)
        return relay

    def dial(self, stream: MuxStream, relay: SocketRelay, opening: Opening) -> None:
        """Find the relay of a stream its connection."""
        work = self._dial(stream, relay, opening)
        task = asyncio.create_task(work, name=f"dial {opening.target}")
        self._tasks[task] = relay, opening
        task.add_done_callback(self._done)

    def opening_of(self, relay: SocketRelay) -> Opening | None:
        """What is being dialled for this relay."""
        return next((opening for r, opening in self._tasks.values() if r is relay), None)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (exc := task.exception()) is not None:
            raise exc

    async def _dial(self, stream: MuxStream, relay: SocketRelay, opening: Opening) -> None:
        target, taker = opening.target, (stream.mux, opening.source)
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                try:
                    await _connect(relay, opening)
                except OSError as exc:
                    if exc.errno != errno.EMFILE or not self._make_room(taker):
                        raise
                    await asyncio.sleep(0)  # then the connection that was given up is closed
                    await _connect(relay, opening)
            self._note(taker, relay, stream)
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

    def _note(self, taker: Taker, relay: SocketRelay, stream: MuxStream) -> None:
        """Whose a connection is, until it is lost."""
        if relay not in self.relays:
            return
        mine = self._taken.setdefault(taker, {})
        mine[relay] = stream

        def lost() -> None:
            mine.pop(relay, None)
            if not mine:
                self._taken.pop(taker, None)

        relay.when_lost(lost)

    def _make_room(self, taker: Taker) -> bool:
        """Give up the newest connection of who has most, for who has less than half of that.

        False: nobody has so much more."""
        least = 2 * (len(self._taken.get(taker, ())) + 1)
        greediest = max(self._taken.values(), key=len, default={})
        if len(greediest) < least:
            return False
        relay, stream = greediest.popitem()
        if not relay.over:
            log.warning("connection_given_up", node=stream.mux.peer, held=len(greediest))
            stream.reset(
                ResetReason.TOO_MANY,
                "few descriptors are left, and this node has the most connections",
            )
            relay.refuse()
        return True

    def release(self) -> None:
        """Another process dials what is being dialled."""
        for task, (relay, _) in list(self._tasks.items()):
            relay.release()
            task.cancel()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _connect(relay: SocketRelay, opening: Opening) -> None:
    """As the node that dials, where its address can be had: some programs take a node's address
    from its connection (XGBoost's tracker). In 127/8 every address is this machine's own.

    Raises OSError; EMFILE also where only the reserve of descriptors is left.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sock.fileno() >= descriptors.reserve():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        sock.setblocking(False)
        if opening.source is not None:
            _bind(sock, opening.source)
        await loop.sock_connect(sock, opening.target)
        await loop.create_connection(lambda: relay, sock=sock)
    except BaseException:
        sock.close()
        raise


def _bind(sock: socket.socket, source: str) -> None:
    """Have this address, on a port that is chosen when the connection is made (ip(7))."""
    sock.setsockopt(socket.SOL_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
    try:
        sock.bind((source, 0))
    except OSError as exc:
        if exc.errno != errno.EADDRNOTAVAIL:
            raise
