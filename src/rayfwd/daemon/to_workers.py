"""What the head tells its workers: its versions, how its Ray is, what is wrong and what was seen of
the cluster. Which ports are open is told by `head_ports.py`, and the plan by the hub.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from rayfwd.daemon.cuts import Cuts
from rayfwd.daemon.head_ports import HeadPorts
from rayfwd.daemon.node import Node
from rayfwd.hub import Hub
from rayfwd.ray.cluster_report import Told
from rayfwd.session import messages
from rayfwd.session.messages import Message


class ToWorkers:
    """Knows what each worker has heard, so that nothing is told twice."""

    def __init__(self, node: Node, hub: Hub, ports: HeadPorts) -> None:
        self._node = node
        self._hub = hub
        self._ports = ports
        self._sent_in: dict[str, str] = {}
        """The session in which a worker was last told all that it is to know."""
        self._sent_versions: tuple[str | None, str | None] = (None, None)
        self._sent_ray: messages.HeadRay | None = None
        self._told: Told | None = None
        """What was seen of the cluster last, as it is told."""
        self._cuts = Cuts()

    @property
    def versions(self) -> tuple[str | None, str | None]:
        """Ray's and Python's; None: not known yet."""
        versions = self._node.ray.now.versions
        return (versions.ray, versions.python) if versions else (None, None)

    def changed(self) -> None:
        """Tell of versions and of Ray's state, where they are others."""
        if self.versions != self._sent_versions:
            self._sent_versions = ray, python = self.versions
            self._hub.tell_all(messages.HeadVersions(ray, python))
        if (message := self._ray()) != self._sent_ray:
            self._sent_ray = message
            self._hub.tell_all(message)

    def conditions(self) -> None:
        """Tell what was found of every node, where that is new."""
        if (message := self._node.exchange.message()) is not None:
            self._hub.tell_all(message)

    def reported(self, told: Told) -> None:
        """Tell what was seen of the cluster, in a turn of the loop of its own: with a thousand
        nodes that takes some milliseconds."""
        self._told = told
        asyncio.get_running_loop().call_soon(self._tell_report)

    def newcomers(self) -> None:
        """A worker with a new session has heard nothing yet."""
        conditions = self._node.exchange.last_sent
        for node in self._hub.nodes.values():
            if node.session != self._sent_in.get(node.plan.name, ""):
                self._sent_in[node.plan.name] = node.session
                if node.mux is not None:
                    node.mux.send_message(self._ray())
                    for ports in self._ports.whole():
                        node.mux.send_message(ports)
                    if conditions is not None:
                        node.mux.send_message(conditions)

    def again(self, _: messages.SayAgain, name: str) -> None:
        """A worker was restarted, and has kept its session. It asks in a few bytes for many: so
        seldom."""
        node = self._hub.nodes.get(name)
        if node is None or node.mux is None or not node.tellings.take():
            return
        self._sent_in.pop(name, None)
        self.newcomers()
        if (report := self._report()) is not None:
            node.mux.send_message(report)

    def keep(self, names: Collection[str]) -> None:
        """There are no other nodes any more."""
        for name in self._sent_in.keys() - set(names):
            del self._sent_in[name]

    def _tell_report(self) -> None:
        if (report := self._report()) is not None:
            self._hub.tell_all(report)

    def _report(self) -> Message | None:
        if self._told is None:
            return None
        message, left_out = self._told
        self._cuts.log(message, left_out)
        return message

    def _ray(self) -> messages.HeadRay:
        """How the head's Ray is: while it is not up, nobody is to wonder at its silence."""
        return messages.HeadRay(self._node.ray.now.state, self._node.ray.own_start)
