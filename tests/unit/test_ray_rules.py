"""Nodes whose resources are missing from the totals: what is flagged, and when it is told."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from rayfwd.problems import Problem
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.status import RayStatus
from rayfwd.watch import rules

GIB = 2.0**30
NAMES = {"127.77.0.1": "head", "127.77.0.2": "w1", "127.77.0.3": "w2", "127.77.0.4": "w3"}
ADDRESSES = {name: address for address, name in NAMES.items()}


def node(name: str, state: str = "ALIVE", **resources: float) -> NodeSeen:
    own = {f"node:{ADDRESSES[name]}": 1.0, **resources}
    return NodeSeen(f"id-{name}", ADDRESSES[name], name == "head", state, own)


def totals(listed: list[str], as_of: float | None = 1000.0, **amounts: float) -> RayStatus:
    active = tuple(f"node_id-{name}" for name in listed)
    return RayStatus(as_of, {r: (0.0, a) for r, a in amounts.items()}, active, 0, 0)


@dataclass
class Case:
    about: str
    status: RayStatus
    nodes: list[NodeSeen]
    flagged: list[str]
    declared: dict[str, dict[str, float]] = field(default_factory=dict)


HEAD = node("head", CPU=2, memory=4 * GIB)
W1 = node("w1", CPU=4, r1=1, memory=8 * GIB)
W2 = node("w2", CPU=4, memory=8 * GIB)
W3 = node("w3", CPU=4, memory=8 * GIB)
ALL = ["head", "w1", "w2", "w3"]

CASES = [
    Case("all there", totals(ALL[:2], CPU=6, r1=1, memory=12 * GIB), [HEAD, W1], []),
    Case("memory is rounded", totals(ALL[:2], CPU=6, r1=1, memory=11.99 * GIB), [HEAD, W1], []),
    Case("one missing", totals(["head"], CPU=2, memory=4 * GIB), [HEAD, W1], ["w1"]),
    Case("nothing reported yet", totals([], None), [HEAD, W1], ["head", "w1"]),
    Case(
        "listed, and its resources missing",
        totals(["head", "w1"], CPU=2, memory=4 * GIB),
        [HEAD, W1],
        ["w1"],
    ),
    Case(
        "of two alike the one that is not listed",
        totals(["head", "w2"], CPU=6, memory=12 * GIB),
        [HEAD, W2, W3],
        ["w3"],
    ),
    Case(
        "of two alike either, where no node is listed by itself",
        RayStatus(1.0, {"CPU": (0, 6.0), "memory": (0, 12 * GIB)}, ("cpu", "cpu"), 0, 0),
        [HEAD, W2, W3],
        ["w2", "w3"],
    ),
    Case(
        "one resource of several is there",
        totals(["head", "w1"], CPU=6, memory=12 * GIB),
        [HEAD, W1],
        [],
    ),
    Case("dead nodes bring nothing", totals(["head"], CPU=2, memory=4 * GIB),
         [HEAD, node("w1", "DEAD", CPU=4, memory=8 * GIB)], []),
    Case("totals still hold a node that died", totals(ALL, CPU=14, memory=28 * GIB), [HEAD], []),
    Case(
        "without CPUs, by its memory",
        totals(["head"], CPU=2, memory=4 * GIB),
        [HEAD, node("w1", memory=8 * GIB)],
        ["w1"],
    ),
    Case("no resources at all", totals(["head"], CPU=2, memory=4 * GIB), [HEAD, node("w1")], []),
    Case(
        "registered without what its configuration declares",
        totals(["head", "w1"], CPU=2, memory=4 * GIB),
        [HEAD, node("w1")],
        ["w1"],
        {ADDRESSES["w1"]: {"CPU": 4.0}},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[c.about for c in CASES])
def test_flagged(case: Case) -> None:
    found = rules.nodes_without_resources(case.status, case.nodes, NAMES, 1010.0, case.declared)
    assert sorted(found) == sorted(case.flagged)
    assert {p.code for p in found.values()} <= {"ray_node_without_resources"}


def test_the_problem_names_what_is_missing() -> None:
    status = totals(["head"], CPU=2, memory=4 * GIB)
    found = rules.nodes_without_resources(status, [HEAD, W1], NAMES, 1010.0)["w1"]
    assert "node w1 (127.77.0.2)" in found.cause
    assert "CPU 2 of 6, r1 0 of 1" in found.cause
    assert "raylet.out on w1" in found.remedy
    stale = rules.nodes_without_resources(status, [HEAD, W1], NAMES, 2000.0)["w1"]
    assert "1000 s old" in stale.cause
    assert "monitor.log" in stale.remedy


def test_a_node_outside_of_the_roster_goes_by_its_address() -> None:
    status = totals(["head"], CPU=2, memory=4 * GIB)
    assert list(rules.nodes_without_resources(status, [HEAD, W1], {}, 0.0)) == ["127.77.0.2"]


FAULT = Problem("ray_node_without_resources", "c", "r")


def follow(looks: list[tuple[float, bool]]) -> list[tuple[float, str]]:
    """What is told, and when, over looks that found the fault or not."""
    tracked: dict[str, rules.Tracked] = {}
    told: list[tuple[float, str]] = []
    for now, found in looks:
        tracked, changes = rules.step(tracked, {"w1": FAULT} if found else {}, now)
        told += [(now, change.kind) for change in changes]
    return told


@pytest.mark.parametrize(
    ("looks", "told"),
    [
        ([(0, True)], []),
        ([(0, True), (5, False), (10, True), (15, False)], []),
        ([(0, True), (5, True)], []),
        ([(0, True), (5, True), (10, True)], [(10, "raised")]),
        ([(0, True), (30, True)], [(30, "raised")]),
        ([(0, True), (30, True), (60, True), (90, False)], [(30, "raised"), (90, "cleared")]),
        (
            [(0, True), (30, True), (60, False), (90, True), (120, True)],
            [(30, "raised"), (60, "cleared"), (120, "raised")],
        ),
    ],
)
def test_told_once_it_has_lasted_and_once_when_it_ends(
    looks: list[tuple[float, bool]], told: list[tuple[float, str]]
) -> None:
    assert follow(looks) == told


def test_repeated_every_quarter_of_an_hour() -> None:
    looks = [(float(now), True) for now in range(0, 2000, 30)]
    assert follow(looks) == [(30, "raised"), (930, "repeated"), (1830, "repeated")]


def test_subjects_are_followed_apart() -> None:
    tracked, _ = rules.step({}, {"w1": FAULT}, 0)
    tracked, changes = rules.step(tracked, {"w1": FAULT, "w2": FAULT}, 30)
    assert [(c.kind, c.subject) for c in changes] == [("raised", "w1")]
    _, changes = rules.step(tracked, {"w2": FAULT}, 60)
    assert [(c.kind, c.subject) for c in changes] == [("raised", "w2"), ("cleared", "w1")]
