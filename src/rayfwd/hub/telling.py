"""Tells many peers the same: it is encoded once, and no turn of the loop is long for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator

from rayfwd.hub.peers import HubPeer
from rayfwd.session.messages import Message
from rayfwd.transport.mux import framed

TURN = 0.005
"""Seconds of one turn, after which whatever else waits has its own."""


class Teller:
    """Each message goes to all of its peers before the next one goes to any: everyone hears them in
    the order in which they were told."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Message, bytes, Iterator[HubPeer]]] = deque()
        self._at_work = False
        """Now, or as soon as the loop comes round."""
        self._next: asyncio.Handle | None = None

    def tell(self, message: Message, peers: Iterable[HubPeer]) -> None:
        """Those of them that have a session when their turn comes."""
        data = framed(message)
        if data is None:
            return
        self._queue.append((message, data, iter(list(peers))))
        if not self._at_work:
            self._at_work = True
            self._go_on()

    def finish(self) -> None:
        """Now, however long it takes: the process ends."""
        if self._next is not None:
            self._next.cancel()
        self._go_on(float("inf"))

    def _go_on(self, turn: float = TURN) -> None:
        loop = asyncio.get_running_loop()
        self._next, end = None, loop.time() + turn
        while self._queue:
            message, data, peers = self._queue[0]
            for peer in peers:
                if peer.mux is not None:
                    peer.mux.tell(message, data)
                if loop.time() > end:
                    self._next = loop.call_soon(self._go_on)
                    return
            self._queue.popleft()
        self._at_work = False
