"""Which ports are open on which node, of which the head knows all: each worker hears of the others'
from it, and of what was dialled there in vain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import replace

from rayfwd.daemon.node import Node
from rayfwd.hub import Hub
from rayfwd.network.announced import PortNews
from rayfwd.session import messages
from rayfwd.session.messages import Message

FEW_NODES = 32
"""Nodes up to which news of open ports are told at once, before the bytes that come behind them are
passed on."""
PORTS_GATHERED = 0.005
"""Seconds in which they are gathered into one message where there are more."""


class HeadPorts:
    """The head's; what it knows is the node's `announced`, and what it tells the workers' own."""

    def __init__(self, node: Node, hub: Hub) -> None:
        self._node = node
        self._hub = hub
        self._own = node.config.name
        self._news = PortNews()
        self._said_in: dict[str, str] = {}
        """The session in which a worker has said which ports are open."""
        self._reached: set[str] = set()
        """The nodes whose links were up when that was looked at last."""
        self._due: asyncio.TimerHandle | None = None
        """When the workers are told of ports that have opened and closed."""

    def close(self) -> None:
        """Nobody is told any more."""
        if self._due is not None:
            self._due.cancel()

    def whole(self) -> Iterable[Message]:
        """All that is known, for a worker that has heard nothing yet."""
        return self._news.whole()

    def hear(self, message: messages.OpenPorts, node: str) -> None:
        """Ports have opened and closed on a worker."""
        self._begin(node)
        if self._node.announced.hear(node, message):
            self.settle()
            self._node.ports_changed_elsewhere()

    def settle(self) -> None:
        """What is known of each node, for the workers. Of one whose link is not up nothing is: its
        ports may open unseen."""
        there = {self._own}
        due = self._news.put(self._own, self._node.open_ports)
        for name, node in self._hub.nodes.items():
            self._begin(name)
            if node.state == "up":
                there.add(name)
                due |= self._news.put(name, self._node.announced.ports(name))
        if self._news.keep(there) or due:
            self._tell_soon()
        if there != self._reached:
            self._reached = there
            self._node.reach_others()

    def keep(self, names: Collection[str]) -> None:
        """There are no other nodes any more."""
        self._node.announced.keep(names)
        for name in self._said_in.keys() - set(names):
            del self._said_in[name]

    def _begin(self, name: str) -> None:
        """Nothing is known of a new session before it says something: its first words may come
        sooner than word of itself, which is gathered."""
        node = self._hub.nodes.get(name)
        if node is not None and node.session != self._said_in.get(name, ""):
            self._said_in[name] = node.session
            self._node.announced.hear(name, None)

    def _tell_soon(self) -> None:
        if len(self._hub.nodes) <= FEW_NODES:
            self._tell()
        elif self._due is None:
            self._due = asyncio.get_running_loop().call_later(PORTS_GATHERED, self._tell)

    def _tell(self) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due = None
        for message in self._news.news():
            self._hub.tell_all(message)

    def dial_refused(self, node: str, port: int, count: int) -> None:
        """The head has refused to its own programs what they dialled of a worker."""
        self._tell_refused(node, messages.DialRefused(self._own, port, count))

    def hear_refused(self, message: messages.DialRefused, node: str) -> None:
        """A worker has refused to its programs what they dialled of another node."""
        if message.node == self._own:
            self._node.hear_refused(node, message.port, message.count)
        else:
            self._tell_refused(message.node, replace(message, node=node))

    def _tell_refused(self, name: str, message: messages.DialRefused) -> None:
        node = self._hub.nodes.get(name)
        if node is not None and node.mux is not None:
            node.mux.send_message(message)
