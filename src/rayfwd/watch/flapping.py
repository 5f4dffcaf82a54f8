"""Finds nodes that joined and were gone soon after, from the node table (pure: time is passed in).

The head's Ray gives up a node whose ports it cannot reach; the node starts again, joins again, and
is given up again. Nothing of it is in the node's own log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.problems import Problem
from rayfwd.ray.nodes import NodeSeen
from rayfwd.watch.interruptions import Interruptions

TRIAL_FACTOR = 1.5
"""A node must live for so many times as long as Ray takes, at the most, to give up one that it does
not reach; one that was given up sooner was never a part of the cluster. (A busy head is late.)"""

RECENT_SECONDS = 900.0
"""Seconds since it was given up in which that counts, at least; one that has stood its trial since
is well."""

GIVEN_UP = ("health check", "heartbeat", "unreachable")
"""What the GCS says of a node that it gave up, and not of one that ended by itself (the state
message of 2.40 and 2.60; 2.9 has none)."""


def flapping(
    nodes: Iterable[NodeSeen],
    plans: Mapping[str, NodePlan],
    wall_time: float,
    gives_up_after: float,
    interruptions: Interruptions | None = None,
) -> dict[str, Problem]:
    """By name, the nodes of these plans (by address) that joined and were gone.

    `gives_up_after`: seconds after which Ray has given up a node that it does not reach.
    """
    trial = TRIAL_FACTOR * gives_up_after
    recent = max(RECENT_SECONDS, 2 * trial)
    seen: dict[str, list[NodeSeen]] = {}
    for node in nodes:
        if node.address in plans and not node.is_head:
            seen.setdefault(node.address, []).append(node)
    found: dict[str, Problem] = {}
    for address, rows in seen.items():
        lives = [
            life
            for row in rows
            if (life := _short_life(row, wall_time, trial, recent)) is not None
            and not (interruptions and _went_by_itself(interruptions, plans[address].name, row))
        ]
        explained = any(row.message for row in rows)
        well = any(
            row.state == "ALIVE" and row.started and wall_time - row.started > trial for row in rows
        )
        if lives and not well and (explained or len(lives) > 1):
            found[plans[address].name] = _problem(plans[address], lives, rows, recent)
    return found


def _short_life(row: NodeSeen, wall_time: float, trial: float, recent: float) -> float | None:
    """How long a dead node lived, where that was short, recent and by the GCS's verdict."""
    if row.state != "DEAD" or not row.started or not row.ended:
        return None
    given_up = row.message is None or any(word in row.message.lower() for word in GIVEN_UP)
    life = row.ended - row.started
    return life if given_up and life < trial and wall_time - row.ended < recent else None


def _went_by_itself(interruptions: Interruptions, name: str, row: NodeSeen) -> bool:
    assert row.started is not None, "a short life has both ends"
    assert row.ended is not None, "a short life has both ends"
    return interruptions.between(name, row.started, row.ended)


def _problem(plan: NodePlan, lives: list[float], rows: list[NodeSeen], recent: float) -> Problem:
    times = "once" if len(lives) == 1 else f"{len(lives)} times"
    last = max(rows, key=lambda row: row.started or 0.0)
    now = "is up again" if last.state == "is up again" else "is gone now"
    reason = next((row.message for row in reversed(rows) if row.message), None)
    ports = f"{plan.base}-{plan.last_worker_port}"
    remedy = (
        (
            f"check that the head reaches {plan.address}, which {plan.name} advertises, on "
            f"ports {ports}"
        )
        + "; rayfwd checks this before Ray is started, unless ray.advertise_check is false there"
        if plan.advertised
        else (
            f"check `rayfwd status` on {plan.name}, and read gcs_server.out on the head for "
            "the reason"
        )
    )
    return codes.RAY_NODE_FLAPPING.problem(
        f"node {plan.name} ({plan.address}) joined and was given up by the head's Ray {times} in "
        f"the last {recent / 60:.0f} min, {min(lives):.0f} s after it had joined; it {now}"
        + (f". Ray says: {reason[:300]}" if reason else ""),
        remedy,
    )
