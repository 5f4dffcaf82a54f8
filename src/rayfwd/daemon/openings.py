"""What a node opens on its machine so that programs there reach other nodes, and whom it keeps from
its own ports: by its view of the cluster, its file, and what the others have announced (pure).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rayfwd.cluster.plan import NodePlan, ends_of, in_loopback
from rayfwd.config import Config, ForwardConfig
from rayfwd.network.announced import Announced
from rayfwd.network.apart import held_ports
from rayfwd.network.manager import Wanted
from rayfwd.network.ruleset import LOWEST_PORT, PortRange, port_ranges
from rayfwd.session.target import Target
from rayfwd.transport.listeners import REDIRECTED, listeners_for
from rayfwd.watch.cluster_view import ClusterView

EVERY_PORT: tuple[PortRange, ...] = ((LOWEST_PORT, 65535),)
MOST_OPEN_RANGES = 16_000
"""Ranges of open ports of all nodes, for the kernel: of nodes beyond that every port is."""


@dataclass(frozen=True, slots=True)
class Openings:
    """As things are now; made anew for each question."""

    view: ClusterView
    config: Config
    announced: Announced
    reaches: Callable[[str], bool]
    """Whether that node's word arrives here now."""

    def forwards(self) -> tuple[ForwardConfig, ...]:
        """The further listeners; by default a worker's leads to the head's dashboard."""
        head = self.view.head
        if self.config.role == "worker" and self.config.forward is None and head is not None:
            port = head.services["dashboard"]
            return (ForwardConfig(listen=f"127.0.0.1:{port}", to=f"head:{port}"),)
        return self.config.forwards

    def listeners(
        self, overlay_port: int | None
    ) -> tuple[dict[Target, Target], dict[Target, Target]]:
        """Where each listener leads; and, apart from these, the listeners of ports that programs of
        other nodes have open now. `overlay_port`: where the kernel redirects what is dialled, so
        that others need no listeners."""
        forwarded = self._forwarded()
        wanted = dict(forwarded)  # first, as there may be no descriptor for all
        passing: dict[Target, Target] = {}
        if overlay_port is not None:
            wanted[Target("127.0.0.1", overlay_port)] = REDIRECTED
        elif in_loopback(self.view.network):
            for node in self._others():
                wanted |= listeners_for(node.address, node.ports)
                passing |= listeners_for(node.address, self._passing_ports(node))
        return wanted | forwarded, passing

    def held(self) -> tuple[str, frozenset[int]] | None:
        """At which address other nodes' parts of `network.apart` are held, where any node has
        listeners: there programs on all addresses would be in the way of each other's. None: this
        node's own plan is not known."""
        view = self.view
        if view.own is None:
            return None
        ports = self.config.network.apart_ports() if view.any_listens else frozenset[int]()
        left = ports.difference(view.own.ports, self.config.expose)
        others = [node.address for node in view.nodes if not node.advertised]
        at = ends_of(view.network)[1]
        return at, held_ports(left, view.own.address, others, view.network)

    def overlay(self, of_user: frozenset[int]) -> Wanted | None:
        """What the overlay is to do; None: this node's own plan is not known. `of_user`: ports that
        programs of Ray's user have open here; of root's, which may be anybody's, none."""
        own, network = self.view.own, self.view.network
        if own is None:
            return None
        return Wanted(
            network=network,
            own=ends_of(network)[1] if own.advertised else own.address,
            open_ports=self._open_on_others(),
            guarded=port_ranges({*own.ports, *of_user}) if self.guards else (),
            friends=self.friends,
        )

    @property
    def guards(self) -> bool:
        """Other machines are kept from Ray's ports, and from those of its user's programs. Nodes
        dial one that advertises an address themselves, and from where only its file can say. What
        is exposed and another user's is that user's business: it may be a server for the machine's
        own network."""
        own, network = self.view.own, self.config.network
        if own is None or not network.guard:
            return False
        return not own.advertised or bool(network.guard_from)

    @property
    def friends(self) -> tuple[str, ...]:
        """Who is let in all the same: whom the file names; and, where the others dial this node
        themselves, those of them that have an address which the plan knows."""
        own, named = self.view.own, self.config.network.guard_from
        if own is None or not own.advertised or not named:
            return named
        others = (node.address for node in self.view.nodes if node.advertised)
        return tuple(dict.fromkeys((*named, *(f"{at}/32" for at in others if at != own.address))))

    def _others(self) -> list[NodePlan]:
        """Those that are not dialled directly."""
        own = self.view.own
        return [
            node
            for node in self.view.nodes
            if not node.advertised and (own is None or node.name != own.name)
        ]

    def _forwarded(self) -> dict[Target, Target]:
        """The listeners of [[forward]]."""
        wanted: dict[Target, Target] = {}
        for forward in self.forwards():
            name, port = forward.target()
            to = self.view.node_named(name)
            if to is not None:
                wanted[Target(*forward.listen_address())] = Target(to.address, port)
        return wanted

    def _passing_ports(self, node: NodePlan) -> frozenset[int]:
        """What programs of another node have opened, but for our own Ray's ports: that listens on
        the wildcard."""
        own = self.view.own
        return self.announced.last(node.name).difference(own.ports if own is not None else ())

    def _open_on_others(self) -> dict[str, tuple[PortRange, ...]]:
        """What may be dialled of each node, by address: the plan's ports, and what it has opened.
        Of a node that has not said so, or that is away, every port: its connections are held."""
        left = MOST_OPEN_RANGES
        found: dict[str, tuple[PortRange, ...]] = {}
        for node in self._others():
            ports = self.announced.ports(node.name) if self.reaches(node.name) else None
            ranges = EVERY_PORT if ports is None else port_ranges({*node.ports, *ports})
            if len(ranges) > left:
                ranges = EVERY_PORT
            left -= len(ranges)
            found[node.address] = ranges
        return found
