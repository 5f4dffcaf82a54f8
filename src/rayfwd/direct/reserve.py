"""The lane through the hub: a stream to the other worker, as a carrier makes it and as one takes
it. Each end joins its stream to one end of a socket pair, whose other end is a lane like any."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from typing import cast

from rayfwd import codes
from rayfwd.problems import Problem
from rayfwd.session.stream import ResetReason
from rayfwd.transport.awaited import AwaitedConnection, AwaitedPipe
from rayfwd.transport.carrier import Connection
from rayfwd.transport.mux import MuxStream
from rayfwd.transport.relay import SocketRelay

LANE_PORT = 0
"""Of a target whose stream is to be a lane: there is no such port."""


class ThroughHub:
    """A carrier whose connections are streams through the hub to one node."""

    def __init__(self, node: str, open_stream: Callable[[SocketRelay], bool]) -> None:
        """`open_stream` gives a relay such a stream; False: there is no way to the hub now."""
        self._node = node
        self._open_stream = open_stream
        self._last: SocketRelay | None = None
        self._relays: set[SocketRelay] = set()
        """Nobody hands them over: the session makes another lane."""

    async def dial(self, urgent: asyncio.Event) -> Connection:
        """Raises ProblemError."""
        del urgent
        relay = SocketRelay(self._relays)
        if not self._open_stream(relay):
            raise codes.DIRECT_AWAY.error(
                "the link to the head is not up",
                "nothing if it comes back; `rayfwd status` says why",
            )
        self._last = relay
        near, far = _pair()
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: relay, far)
        _, pipe = await loop.connect_accepted_socket(lambda: AwaitedPipe(_Nobody()), near)
        return AwaitedConnection(pipe)

    def close(self, parked: bool = False) -> None:
        """Its connections share nothing."""

    def release(self) -> None:
        """Another process goes on with what they carried."""
        release(self._relays)

    def problem(self, otherwise: Problem) -> Problem:
        """Why the last one led nowhere, where the hub or the node has said so."""
        if self._last is None or self._last.refused is None:
            return otherwise
        reason, text = self._last.refused
        if reason is ResetReason.NODE_AWAY:
            return codes.DIRECT_AWAY.problem(
                f"{self._node} is away", "run `rayfwd status` on the head, which says why"
            )
        return codes.DIRECT_ABSENT.problem(
            f"{self._node} has no session for a direct way: {text or reason.name.lower()}",
            f"run the same rayfwd on the head and on {self._node}, with no network.direct = "
            '"off" there',
        )


def release(relays: Iterable[SocketRelay]) -> None:
    """Close their sockets here, without a word by their streams."""
    for relay in list(relays):
        relay.release()


def joined(
    stream: MuxStream, make: Callable[[], asyncio.Protocol], among: set[SocketRelay]
) -> SocketRelay:
    """Who owns a stream that is to be a lane; `make` makes what the lane's bytes go to. It is
    `among` these while it has a socket."""
    relay = SocketRelay(among)
    relay.attach(stream)
    near, far = _pair()
    loop = asyncio.get_running_loop()
    for sock, protocol in ((far, lambda: cast(asyncio.Protocol, relay)), (near, make)):
        task = loop.create_task(_connected(sock, protocol), name="a lane through the hub")
        _BEGINNING.add(task)
        task.add_done_callback(_BEGINNING.discard)
    return relay


_BEGINNING: set[asyncio.Task[None]] = set()
"""The loop itself holds its tasks weakly."""


async def _connected(sock: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
    await asyncio.get_running_loop().connect_accepted_socket(protocol, sock)


def _pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    for sock in pair:
        sock.setblocking(False)
    return pair


class _Nobody:
    """Has no use for a pipe before its owner takes it."""

    def arrived(self, pipe: AwaitedPipe) -> None: ...

    def left(self, pipe: AwaitedPipe) -> None: ...
