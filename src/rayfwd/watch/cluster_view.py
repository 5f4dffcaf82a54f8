"""The cluster as a node knows it, in one place: who has the view replaces it whole (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayfwd.cluster.plan import NodePlan
from rayfwd.ray.commandline import given_up_after
from rayfwd.ray.install import Versions
from rayfwd.ray.token import RayAuth


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Of the head it is made from its file and its roster, of a worker from what the hub says;
    until then a worker's has what its own file says."""

    network: str
    ride_through: float
    """Seconds that streams are held while a link is down: on a worker as agreed with the hub."""
    own: NodePlan | None = None
    """This node's plan; None: not told yet."""
    nodes: tuple[NodePlan, ...] = ()
    """All of the plan, the head first; empty: not told yet."""
    auth: RayAuth | None = None
    """Ray's token as the head has decided; None: not known, or an older head's."""
    head_versions: Versions | None = None
    """Of the head's Ray; None: not told yet."""
    _at: Mapping[str, NodePlan] = field(init=False, repr=False, compare=False)
    _with_listeners: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_at", {node.address: node for node in reversed(self.nodes)})
        names = frozenset(node.name for node in self.nodes if node.level == "listeners")
        object.__setattr__(self, "_with_listeners", names)

    def node_at(self, address: str) -> NodePlan | None:
        """The node of the plan that has this address. Asked for with every connection."""
        return self._at.get(address)

    def node_named(self, name: str) -> NodePlan | None:
        """A node of the plan; `head` is the head, whatever it is called."""
        return next(
            (n for n in self.nodes if n.name == name or (name == "head" and n.role == "head")), None
        )

    @property
    def any_listens(self) -> bool:
        """A node, perhaps this one, has listeners in the place of other nodes' ports."""
        return self.own is not None and bool(self._with_listeners)

    @property
    def others_listen(self) -> bool:
        """Another node has listeners in the place of this one's ports."""
        return self.own is not None and bool(self._with_listeners - {self.own.name})

    @property
    def head(self) -> NodePlan | None:
        return self.node_named("head")

    @property
    def gives_up_after(self) -> float:
        """Seconds, at the most, until Ray gives up a node that it does not reach."""
        return given_up_after(self.ride_through)

    def to_wire(self) -> dict[str, Any]:
        """The plan as `rayfwd plan` reads it."""
        head = self.head
        return {
            "own": None if self.own is None else self.own.to_wire(),
            "head": None if head is None else head.to_wire(),
            "nodes": [node.to_wire() for node in self.nodes],
            "network": self.network,
            "ride_through": self.ride_through,
        }
