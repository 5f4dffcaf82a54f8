"""What was seen of the whole cluster: made on the head, shown on every node.

Ray's node table grows as it likes (dead nodes, resources of any number and name), and a message
does not: what matters least is left out of what is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from rayfwd.ray.nodes import NodeSeen
from rayfwd.session.frames import MAX_MESSAGE
from rayfwd.session.messages import Cluster, encode

MOST_DEAD: Final = 100
"""Dead nodes that other nodes are told of: those that went last."""


Told = tuple[Cluster, tuple[str, ...]]
"""A report as other nodes are told it, and what of it was left out."""


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """One look at the cluster."""

    as_of: float | None
    """Time stamp of the totals, seconds since the epoch; None: Ray has not reported any."""
    totals: Mapping[str, tuple[float, float]]
    """Resource to used and total; memory in bytes."""
    nodes: tuple[NodeSeen, ...] = ()
    """The node table, with nodes that are dead."""

    def to_wire(self) -> dict[str, Any]:
        """As a JSON object, for the link and for `rayfwd status --json`."""
        return {
            "as_of": self.as_of,
            "totals": {name: list(pair) for name, pair in self.totals.items()},
            "nodes": [
                {
                    "node_id": node.node_id,
                    "address": node.address,
                    "is_head": node.is_head,
                    "state": node.state,
                    "resources_total": dict(node.resources_total),
                    "started": node.started,
                    "ended": node.ended,
                    "message": node.message,
                }
                for node in self.nodes
            ],
        }

    def message(self) -> Told:
        """What the workers are told of it, and what of it was left out.

        What lives is told of before what is dead, and that a node lives before what it has. One
        that is too long in spite of all is left out as it is sent.
        """
        left_out: list[str] = []
        report = self
        if sum(not _alive(node) for node in self.nodes) > MOST_DEAD:
            left_out.append(f"dead nodes but the last {MOST_DEAD}")
            report = _last_dead(report)
        for what, without in _LESS.items():
            if not _too_long(report):
                break
            left_out.append(what)
            report = without(report)
        return Cluster(report.to_wire()), tuple(left_out)

    def _with(self, nodes: Iterable[NodeSeen]) -> ClusterReport:
        return replace(self, nodes=tuple(nodes))

    @classmethod
    def from_wire(cls, data: Any) -> ClusterReport:
        """The inverse of `to_wire`. Raises ValueError on anything else."""
        try:
            as_of = data["as_of"]
            return cls(
                as_of=None if as_of is None else float(as_of),
                totals={
                    str(name): (float(used), float(total))
                    for name, (used, total) in data["totals"].items()
                },
                nodes=tuple(
                    NodeSeen(
                        node_id=str(n["node_id"]),
                        address=str(n["address"]),
                        is_head=bool(n["is_head"]),
                        state=str(n["state"]),
                        resources_total={str(k): float(v) for k, v in n["resources_total"].items()},
                        started=_optional_time(n.get("started")),
                        ended=_optional_time(n.get("ended")),
                        message=None if n.get("message") is None else str(n["message"]),
                    )
                    for n in data["nodes"]
                ),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as exc:
            raise ValueError(f"not a cluster report: {exc!r}") from exc


def _optional_time(value: Any) -> float | None:
    """Older heads do not tell it."""
    return None if value is None else float(value)


def _alive(node: NodeSeen) -> bool:
    return node.state == "ALIVE"


def _too_long(report: ClusterReport) -> bool:
    return len(encode(Cluster(report.to_wire()))) > MAX_MESSAGE


def _last_dead(report: ClusterReport) -> ClusterReport:
    """In the order of the table; of those whose end is not told the later ones."""
    dead = [index for index, node in enumerate(report.nodes) if not _alive(node)]
    dead.sort(key=lambda index: (report.nodes[index].ended or 0.0, index))
    kept = set(dead[-MOST_DEAD:])
    return report._with(n for i, n in enumerate(report.nodes) if _alive(n) or i in kept)


def _dead_without_resources(report: ClusterReport) -> ClusterReport:
    return report._with(
        node if _alive(node) else replace(node, resources_total={}) for node in report.nodes
    )


def _without_dead(report: ClusterReport) -> ClusterReport:
    return report._with(filter(_alive, report.nodes))


def _without_resources(report: ClusterReport) -> ClusterReport:
    return report._with(replace(node, resources_total={}) for node in report.nodes)


def _without_totals(report: ClusterReport) -> ClusterReport:
    return replace(report, totals={})


_LESS: Final[Mapping[str, Callable[[ClusterReport], ClusterReport]]] = {
    "the resources of dead nodes": _dead_without_resources,
    "dead nodes": _without_dead,
    "the resources of nodes": _without_resources,
    "the totals of resources": _without_totals,
}
"""What is left out, one after the other, until the rest is short enough."""
