"""How a daemon is, from the list of its conditions alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from rayfwd import codes
from rayfwd.daemon.health import Health
from rayfwd.daemon.role import Role
from rayfwd.problems import Code
from rayfwd.watch.board import Board
from rayfwd.watch.conditions import Finding


def finding(code: Code, blocks_ready: bool, subject: str = "w1") -> Finding:
    return Finding(
        subject, code.problem(f"because of {code}", "mend it"), blocks_ready=blocks_ready
    )


def health_of(*found: Finding) -> Health:
    board = Board(lambda: None, "w1")
    board.put_all("a", found)
    node = SimpleNamespace(
        board=board, view=SimpleNamespace(nodes=(1, 2)), listeners=SimpleNamespace(open=46)
    )
    return Health(cast(Role, SimpleNamespace(node=node)))


STARTING = finding(codes.RAY_STARTING, True)
DISK = finding(codes.DISK_NEARLY_FULL, False)
FAILED = finding(codes.RAY_START_FAILED, True)
SLOW = finding(codes.LINK_SLOW, False)
PARKED = finding(codes.LINK_PARKED, False, "w2")


@pytest.mark.parametrize(
    ("found", "ready_said", "state", "summary"),
    [
        ([], False, "ready", "ready: 2 nodes in the plan, 46 listeners"),
        ([SLOW], False, "ready", "ready, but: because of link_slow"),
        (
            [PARKED],
            False,
            "ready",
            "ready: 2 nodes in the plan, 46 listeners; because of link_parked",
        ),
        ([STARTING], False, "starting", "waiting: because of ray_starting"),
        ([STARTING], True, "waiting", "waiting: because of ray_starting"),
        ([SLOW, FAILED], False, "waiting", "waiting: because of ray_start_failed"),
        # It is explained by the disk, and still is what the node waits for.
        ([DISK, FAILED], True, "waiting", "waiting: because of ray_start_failed"),
    ],
)
def test_all_follows_from_the_conditions(
    found: list[Finding], ready_said: bool, state: str, summary: str
) -> None:
    health = health_of(*found)
    health.ready_said = ready_said
    assert (health.state(), health.summary()) == (state, summary)
    assert bool(health.waiting_for()) == (state != "ready")


def test_a_daemon_that_ends_says_so_whatever_is_wrong() -> None:
    health = health_of(FAILED)
    health.stopping = True
    assert (health.state(), health.summary()) == ("stopping", "stopping")
