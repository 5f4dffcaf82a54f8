"""What a worker tells the head: how its Ray is, which ports are open here, and what is wrong."""

from __future__ import annotations

from rayfwd.daemon.node import Node
from rayfwd.network.announced import change_of
from rayfwd.session import messages
from rayfwd.session.messages import Message
from rayfwd.transport.link import Link


class ToHead:
    """Knows what the head has heard in this session, so that nothing is told twice."""

    def __init__(self, node: Node, link: Link) -> None:
        self._node = node
        self._link = link
        self._sent_ray: messages.Ray | None = None
        self._sent_ports: frozenset[int] | None = None
        """Open ports of this node that the head knows of; None: it was told nothing."""

    def send(self, message: Message) -> bool:
        """Whether there is a session that takes it."""
        mux = self._link.mux
        if mux is None or mux.ended:
            return False
        mux.send_message(message)
        return True

    def begin_again(self) -> None:
        """The head knows nothing of this node's."""
        self._sent_ray = self._sent_ports = None
        self._node.exchange.begin_again()

    def conditions(self) -> None:
        """Tell what was found here, where that is new."""
        mux = self._link.mux
        if mux is not None and (message := self._node.exchange.message()) is not None:
            mux.send_message(message)

    def ray(self) -> None:
        """Tell how Ray is, where that is new."""
        mux, ray = self._link.mux, self._node.ray.now
        versions = ray.versions
        message = messages.Ray(
            ray.state,
            versions.ray if versions else None,
            versions.python if versions else None,
        )
        if mux is not None and message != self._sent_ray:
            self._sent_ray = message
            mux.send_message(message)

    def ports(self) -> None:
        """Tell what has opened and closed here since that was told last."""
        mux, ports = self._link.mux, self._node.open_ports
        if mux is None or mux.ended or ports is None or ports == self._sent_ports:
            return
        change = change_of(self._sent_ports, ports)
        assert change is not None, "it is known what is open"
        self._sent_ports = ports
        mux.send_message(change)
