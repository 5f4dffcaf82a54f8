"""What was seen of the whole cluster: made on the head, shown on every node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayfwd.ray.nodes import NodeSeen


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
        except (KeyError, TypeError, AttributeError) as exc:
            raise ValueError(f"not a cluster report: {exc!r}") from exc


def _optional_time(value: Any) -> float | None:
    """Older heads do not tell it."""
    return None if value is None else float(value)
