"""Decides from one look at the cluster what is wrong with it (pure: time is passed in).

How long a fault must last before it shows is in `conditions.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import combinations, pairwise
from math import comb

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.problems import Problem
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.status_text import RayStatus
from rayfwd.system import setting
from rayfwd.watch.conditions import Finding
from rayfwd.watch.interruptions import Interruptions

STALE_SECONDS = 20.0
"""Totals older than this are no longer renewed (Ray does it every 5 s)."""

AGEING_SECONDS = 10.0
"""Totals older than this are looked at again soon."""

TOLERANCE = 0.01
"""Part of an amount: memory is printed with two decimals."""

SETS_LIMIT = 5000
"""Sets of nodes of one size that are tried as the explanation of what is missing."""

_UNCOUNTED = ("memory", "object_store_memory")
_OF_RAY = ("node:", "accelerator_type:", "bundle")
"""Resources by which no node's owner counts: every node has them, or Ray makes them up."""


def ageing(status: RayStatus, wall_time: float) -> bool:
    """The totals are older than they are when all is well."""
    return status.as_of is not None and wall_time - status.as_of > AGEING_SECONDS


def stale_totals(status: RayStatus, head: str, wall_time: float) -> list[Finding]:
    """The head, where Ray's totals are not renewed any more."""
    if status.as_of is None or wall_time - status.as_of <= STALE_SECONDS:
        return []
    stamp = datetime.fromtimestamp(status.as_of).isoformat(" ", "seconds")
    problem = codes.RAY_TOTALS_STALE.problem(
        f"`ray status` on {head} shows the state of {stamp}, {wall_time - status.as_of:.0f} s "
        "ago: Ray's monitor process, which renews it every 5 s, has ended or hangs",
        "read monitor.log and monitor.err in Ray's session directory on the head, and restart Ray "
        "there; until then, new nodes do not show, and tasks run as before",
    )
    return [Finding(head, problem)]


def fewer_than_declared(
    nodes: Iterable[NodeSeen],
    plans: Mapping[str, NodePlan],
    declared: Mapping[str, Mapping[str, float]],
) -> list[Finding]:
    """Nodes that are ALIVE with less than their configuration declares, or with nothing.

    `plans` and `declared` are by address; a node without either is left out. What is not declared
    Ray finds by itself, a CPU at least.
    """
    found = []
    for node in nodes:
        plan, wanted = plans.get(node.address), declared.get(node.address)
        if node.state != "ALIVE" or plan is None or wanted is None:
            continue
        has = {r: a for r, a in node.resources_total.items() if _counts(r) and a > 0}
        short = {
            r: amount for r, amount in wanted.items() if has.get(r, 0.0) < amount * (1 - TOLERANCE)
        }
        none = not has and wanted.get("CPU", 1.0) > 0
        if not short and not none:
            continue
        missing = ", ".join(
            f"{r} {_number(has.get(r, 0.0))} of {_number(a)}" for r, a in short.items()
        )
        code = codes.RAY_RESOURCES_FEWER if has else codes.RAY_RESOURCES_NONE
        problem = code.problem(
            f"node {plan.name} ({plan.address}) joined "
            + ("with no resources" if not has else "with fewer resources than declared")
            + (f": {missing}" if missing else ""),
            f"check that {setting.theirs('ray.extra_args')} on {plan.name} does not contradict "
            "num_cpus, num_gpus and resources there; if Ray was started by hand, end it, and "
            "rayfwd starts its own (where rayfwd starts none, `rayfwd plan` prints the command)",
        )
        found.append(Finding(plan.name, problem))
    return found


def _counts(resource: str) -> bool:
    return resource not in _UNCOUNTED and not resource.startswith(_OF_RAY)


def one_address_twice(
    nodes: Iterable[NodeSeen],
    names: Mapping[str, str],
    interruptions: Interruptions,
    gives_up_after: float,
    wall_time: float,
) -> list[Finding]:
    """Addresses with which several nodes are ALIVE.

    One that went and has come back is there twice until Ray gives its old self up, which takes
    `gives_up_after` seconds at the most.
    """
    alive: dict[str, list[NodeSeen]] = {}
    for node in nodes:
        if node.state == "ALIVE":
            alive.setdefault(node.address, []).append(node)
    found = []
    for address, rows in alive.items():
        name = names.get(address, address)
        began = sorted(row.started or 0.0 for row in rows)
        came_back = all(interruptions.between(name, a, b) for a, b in pairwise(began))
        if len(rows) < 2 or (came_back and wall_time - began[-1] <= gives_up_after):
            continue
        problem = codes.RAY_ADDRESS_TWICE.problem(
            f"{len(rows)} nodes are ALIVE with the address {address}, so connections meant for "
            "one reach the other",
            "end the raylet that does not belong there: one address, one Ray (`rayfwd status` on "
            "the node shows the pid of rayfwd's own)",
        )
        found.append(Finding(name, problem))
    return found


def not_listed(nodes: Iterable[NodeSeen], up: Iterable[NodePlan]) -> list[Finding]:
    """Nodes (of `up`: their own rayfwd has Ray up) that the node table does not have ALIVE."""
    alive = {node.address for node in nodes if node.state == "ALIVE"}
    return [
        Finding(
            plan.name,
            codes.RAY_NOT_LISTED.problem(
                f"Ray is up on {plan.name} ({plan.address}), but the head's node table does not "
                "have it: it belongs to an earlier run of the head's Ray, or does not reach the "
                "GCS",
                f"nothing if it passes, as rayfwd on {plan.name} starts it again; otherwise read "
                f"raylet.out on {plan.name}",
            ),
        )
        for plan in up
        if plan.address not in alive
    ]


def nodes_without_resources(
    status: RayStatus,
    nodes: Iterable[NodeSeen],
    names: Mapping[str, str],
    declared: Mapping[str, Mapping[str, float]],
    wall_time: float,
) -> list[Finding]:
    """Nodes that are ALIVE in the node table while the totals lack what they bring.

    `names` gives a node's name for its address, `declared` what its configuration says it brings.
    Ray's totals do not say which node brought what. A node that has more of what it declares than
    the totals hold altogether is not in them. (What else it has may be a placement group's, which
    the totals leave out.) Of the others one is suspected where the totals fall
    short of the sum over them by at least what it has, in every resource it has. Where the status
    lists nodes one by one and lists some of the suspects, only the others are flagged; else the
    fewest whose resources make up exactly what is missing (of several that do equally, all).
    """
    alive = [n for n in nodes if n.state == "ALIVE"]
    brings = {n.node_id: _brings(n) for n in alive}
    expected = _sum(brings.values())
    totals = {resource: total for resource, (_, total) in status.totals.items()}
    certain = [
        n
        for n in alive
        if _short(
            {r: a for r, a in brings[n.node_id].items() if r in declared.get(n.address, ())}, totals
        )
    ]
    others = [n for n in alive if n not in certain]
    expected_of_others = _sum(brings[n.node_id] for n in others)
    short = _short(expected_of_others, totals)
    suspects = [
        n
        for n in others
        if brings[n.node_id]
        and all(
            short.get(resource, 0.0) >= amount - TOLERANCE * expected_of_others[resource]
            for resource, amount in brings[n.node_id].items()
        )
        and short.keys() & brings[n.node_id].keys()
    ]
    unlisted = [n for n in suspects if f"node_{n.node_id}" not in status.active]
    if suspects and (not unlisted or len(unlisted) == len(suspects)):
        suspects = _fewest_that_explain(short, suspects, brings, expected_of_others)
        unlisted = []
    return [
        Finding(name, _problem(name, n, brings[n.node_id], status, expected, wall_time))
        for n in [*certain, *(unlisted or suspects)]
        if (name := names.get(n.address, n.address))
    ]


def _sum(amounts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in amounts:
        for resource, amount in one.items():
            found[resource] = found.get(resource, 0.0) + amount
    return found


def _short(wanted: Mapping[str, float], totals: Mapping[str, float]) -> dict[str, float]:
    """What the totals hold too little of, and how much of it is missing."""
    return {
        resource: amount - totals.get(resource, 0.0)
        for resource, amount in wanted.items()
        if totals.get(resource, 0.0) < amount * (1 - TOLERANCE)
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


def _brings(node: NodeSeen) -> dict[str, float]:
    """What a node adds to the totals. `node:…` resources are Ray's own and not in the totals."""
    return {r: a for r, a in node.resources_total.items() if a > 0 and not r.startswith("node:")}


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
        "read monitor.log and monitor.err on the head, and restart Ray there if its monitor has "
        "ended: the totals are not renewed"
        if stale
        else f"read raylet.out on {name} and gcs_server.out on the head; a restart of Ray on "
        f"{name} registers it again"
    )
    return codes.RAY_NODE_WITHOUT_RESOURCES.problem(
        f"node {name} ({node.address}) is ALIVE with "
        f"{', '.join(f'{r} {_number(a)}' for r, a in shown.items())}, but the cluster's totals "
        f"({when}) have only {lack}",
        remedy,
    )


def _number(amount: float) -> str:
    return f"{amount:.10g}"
