"""Decides from what was observed what is wrong, and when to say so (pure: time is passed in).

`nodes_without_resources` judges one observation. `step` carries a judgement over time: a fault
must last before it shows, is told once and again seldom, and its end is told once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import combinations
from math import comb
from typing import Literal

from rayfwd.problems import Problem
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.status import RayStatus

CONFIRM_LOOKS = 2
"""Looks in a row that must show a fault: a node that has just joined is in the node table some
seconds before it is in the totals, which are renewed every 5 s."""

CONFIRM_SECONDS = 10.0
"""And for so long at least, however close the looks are."""

REPEAT_SECONDS = 900.0
STALE_SECONDS = 60.0
"""Totals older than this are no longer renewed (Ray does it every 5 s)."""

TOLERANCE = 0.01
"""Part of an amount: memory is printed with two decimals."""

SETS_LIMIT = 5000
"""Sets of nodes of one size that are tried as the explanation of what is missing."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """A fault as it is followed."""

    problem: Problem
    first: float
    """Seconds, on the clock given to `step`, of the first look that showed it."""
    looks: int
    told: float | None = None
    """When it was last told; None: not confirmed yet."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something to tell."""

    kind: Literal["raised", "repeated", "cleared"]
    subject: str
    tracked: Tracked


def step(
    before: Mapping[str, Tracked], found: Mapping[str, Problem], now: float
) -> tuple[dict[str, Tracked], list[Change]]:
    """Follow the faults of one rule, by subject, through one more look."""
    after: dict[str, Tracked] = {}
    changes: list[Change] = []
    for subject, problem in found.items():
        old = before.get(subject)
        new = (
            replace(old, problem=problem, looks=old.looks + 1) if old else Tracked(problem, now, 1)
        )
        if new.told is None:
            if new.looks >= CONFIRM_LOOKS and now - new.first >= CONFIRM_SECONDS:
                new = replace(new, told=now)
                changes.append(Change("raised", subject, new))
        elif now - new.told >= REPEAT_SECONDS:
            new = replace(new, told=now)
            changes.append(Change("repeated", subject, new))
        after[subject] = new
    for subject, old in before.items():
        if subject not in found and old.told is not None:
            changes.append(Change("cleared", subject, old))
    return after, changes


def nodes_without_resources(
    status: RayStatus,
    nodes: Iterable[NodeSeen],
    names: Mapping[str, str],
    wall_time: float,
    declared: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Problem]:
    """Nodes that are ALIVE in the node table while the totals lack what they bring.

    `names` gives a node's name for its address, `declared` what its configuration says it has.
    Ray's totals do not say which node brought what, so a node is suspected where they fall short
    of the sum over all nodes by at least what it has, in every resource it has. Where the status
    lists nodes one by one and lists some of the suspects, only the others are flagged; else the
    fewest whose resources make up exactly what is missing (of several that do equally, all).
    """
    alive = [n for n in nodes if n.state == "ALIVE"]
    brings = {n.node_id: _brings(n, (declared or {}).get(n.address, {})) for n in alive}
    expected: dict[str, float] = {}
    for amounts in brings.values():
        for resource, amount in amounts.items():
            expected[resource] = expected.get(resource, 0.0) + amount
    totals = {resource: total for resource, (_, total) in status.totals.items()}
    short = {
        resource: amount - totals.get(resource, 0.0)
        for resource, amount in expected.items()
        if totals.get(resource, 0.0) < amount * (1 - TOLERANCE)
    }
    suspects = [
        n
        for n in alive
        if brings[n.node_id]
        and all(
            short.get(resource, 0.0) >= amount - TOLERANCE * expected[resource]
            for resource, amount in brings[n.node_id].items()
        )
        and short.keys() & brings[n.node_id].keys()
    ]
    unlisted = [n for n in suspects if f"node_{n.node_id}" not in status.active]
    if suspects and (not unlisted or len(unlisted) == len(suspects)):
        suspects = _fewest_that_explain(short, suspects, brings, expected)
        unlisted = []
    return {
        names.get(n.address, n.address): _problem(
            names.get(n.address, n.address), n, brings[n.node_id], status, expected, wall_time
        )
        for n in unlisted or suspects
    }


def _fewest_that_explain(
    short: Mapping[str, float],
    suspects: list[NodeSeen],
    brings: Mapping[str, Mapping[str, float]],
    expected: Mapping[str, float],
) -> list[NodeSeen]:
    """All suspects where no small set of them makes up what is missing."""

    def explains(nodes: tuple[NodeSeen, ...]) -> bool:
        return all(
            abs(missing - sum(brings[n.node_id].get(resource, 0.0) for n in nodes))
            <= TOLERANCE * expected[resource]
            for resource, missing in short.items()
        )

    for size in range(1, len(suspects)):
        if comb(len(suspects), size) > SETS_LIMIT:
            break
        fitting = {n.node_id for s in combinations(suspects, size) if explains(s) for n in s}
        if fitting:
            return [n for n in suspects if n.node_id in fitting]
    return suspects


def _brings(node: NodeSeen, declared: Mapping[str, float]) -> dict[str, float]:
    """What a node adds to the totals. `node:…` resources are Ray's own and not in the totals."""
    amounts = {
        resource: max(node.resources_total.get(resource, 0.0), declared.get(resource, 0.0))
        for resource in {*node.resources_total, *declared}
    }
    return {r: a for r, a in amounts.items() if a > 0 and not r.startswith("node:")}


def _problem(
    name: str,
    node: NodeSeen,
    brings: Mapping[str, float],
    status: RayStatus,
    expected: Mapping[str, float],
    wall_time: float,
) -> Problem:
    shown = {r: a for r, a in sorted(brings.items()) if r not in ("memory", "object_store_memory")}
    shown = shown or dict(brings)
    lack = ", ".join(
        f"{r} {_number(status.totals.get(r, (0.0, 0.0))[1])} of {_number(expected[r])}"
        for r in shown
    )
    if status.as_of is None:
        when, stale = "which Ray has not reported yet", True
    else:
        age = wall_time - status.as_of
        stale = age > STALE_SECONDS
        stamp = datetime.fromtimestamp(status.as_of).isoformat(" ", "seconds")
        when = f"of {stamp}" + (f", {age:.0f} s old" if stale else "")
    remedy = (
        "the totals are not renewed: look at monitor.log and monitor.err on the head, and restart "
        "Ray there if its monitor has ended"
        if stale
        else f"look at raylet.out on {name} and at gcs_server.out on the head; restarting Ray on "
        f"{name} registers it again"
    )
    return Problem(
        "ray_node_without_resources",
        f"node {name} ({node.address}) is ALIVE with "
        f"{', '.join(f'{r} {_number(a)}' for r, a in shown.items())}, but the cluster's totals "
        f"({when}) hold only {lack}",
        remedy,
    )


def _number(amount: float) -> str:
    return f"{amount:.10g}"
