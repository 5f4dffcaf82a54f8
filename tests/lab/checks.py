"""What tests ask of a driver's lines: that every check ran against every node, and went well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ESSENTIAL = (
    "small_tasks",
    "large_results",
    "large_arguments",
    "actors",
    "borrowed_large",
    "borrowed_small",
    "nested_tasks",
    "worker_to_worker",
)
EVERYWHERE = (*ESSENTIAL, "placement_group", "log_lines", "runtime_env")
FROM_A_WORKER = ("dashboard_page", "dashboard_agents", "list_nodes", "job_submit", "ray_client")

AS_A_WHOLE = {
    "connect": "head",
    "placement_group": "all",
    "dashboard_page": "head",
    "list_nodes": "head",
    "job_submit": "head",
    "ray_client": "head",
}
"""Checks that have one line, and what its `node` is."""


def expected(check: str, nodes: Sequence[str]) -> set[str]:
    """What the lines of a check name as `node`, in a cluster of these addresses."""
    if check in AS_A_WHOLE:
        return {AS_A_WHOLE[check]}
    pairs = {f"{a}>{b}" for a in nodes for b in nodes if a != b}
    if check == "worker_to_worker":
        return pairs
    if check == "nested_tasks":
        return pairs | {f"{a}>{a}" for a in nodes}
    if check.startswith("borrowed_"):
        return pairs | {f"driver>{a}" for a in nodes}
    return set(nodes)


def verify(
    lines: Iterable[Mapping[str, Any]],
    driver: str,
    nodes: Sequence[str],
    checks: Sequence[str] = ESSENTIAL,
) -> None:
    """Every one of these checks ran from `driver` against every node and none failed."""
    of = [line for line in lines if line["check"] in checks]
    failed = [
        f"{line['check']}, driver on {driver}, node {line['node']}: {line['error']}"
        for line in of
        if not line["ok"]
    ]
    done = {(line["check"], line["node"]) for line in of}
    wanted = {(check, node) for check in checks for node in expected(check, nodes)}
    missing = [f"{c}, driver on {driver}, node {n}: no result" for c, n in wanted - done]
    assert not failed + missing, "\n".join(failed + sorted(missing))
    assert done == wanted, f"driver on {driver}: results that nobody expects: {done - wanted}"
