"""What one look at a cluster says: which nodes are flagged, and with what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from rayfwd.cluster.plan import NodePlan
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.status_text import RayStatus
from rayfwd.watch import rules
from rayfwd.watch.interruptions import Interruptions

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
    """By address."""


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
    Case(
        "one that declares what is not there, in place of one that had gone",
        totals(["head", "w1"], CPU=6, memory=12 * GIB),
        [HEAD, node("w1", memory=8 * GIB), node("w2", CPU=4, tape=2, memory=8 * GIB)],
        ["w2"],
        {ADDRESSES["w2"]: {"tape": 2.0}},
    ),
    Case(
        "a placement group's resources are in no totals",
        totals(["head", "w1"], CPU=6, memory=12 * GIB),
        [HEAD, node("w1", CPU=4, CPU_group_a=2, bundle_group_a=1000, memory=8 * GIB)],
        [],
        {ADDRESSES["w1"]: {"CPU": 4.0}},
    ),
    Case("no resources at all", totals(["head"], CPU=2, memory=4 * GIB), [HEAD, node("w1")], []),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[c.about for c in CASES])
def test_flagged(case: Case) -> None:
    found = rules.nodes_without_resources(case.status, case.nodes, NAMES, case.declared, 1010.0)
    assert sorted(s.subject for s in found) == sorted(case.flagged)
    assert {s.problem.code.name for s in found} <= {"ray_node_without_resources"}


def test_the_problem_names_what_is_missing() -> None:
    status = totals(["head"], CPU=2, memory=4 * GIB)
    found = rules.nodes_without_resources(status, [HEAD, W1], NAMES, {}, 1010.0)[0].problem
    assert "node w1 (127.77.0.2)" in found.cause
    assert "CPU 2 of 6, r1 0 of 1" in found.cause
    assert "raylet.out on w1" in found.remedy
    stale = rules.nodes_without_resources(status, [HEAD, W1], NAMES, {}, 2000.0)[0].problem
    assert "1000 s old" in stale.cause
    assert "monitor.log" in stale.remedy


def test_a_node_outside_of_the_roster_goes_by_its_address() -> None:
    status = totals(["head"], CPU=2, memory=4 * GIB)
    (found,) = rules.nodes_without_resources(status, [HEAD, W1], {}, {}, 0.0)
    assert found.subject == "127.77.0.2"


@pytest.mark.parametrize(
    ("age", "ageing", "stale"), [(4, False, False), (12, True, False), (25, True, True)]
)
def test_totals_that_are_not_renewed(age: float, ageing: bool, stale: bool) -> None:
    status = totals(["head"], 1000.0, CPU=2)
    assert rules.ageing(status, 1000.0 + age) is ageing
    found = rules.stale_totals(status, "head", 1000.0 + age)
    assert [(s.subject, s.problem.code.name) for s in found] == [
        ("head", "ray_totals_stale")
    ] * stale
    assert not rules.stale_totals(totals([], None), "head", 5000.0), "there are none yet"


def of_w1(resources: dict[str, float]) -> NodeSeen:
    return replace(W1, resources_total={"node:127.77.0.2": 1.0, **resources})


PLANS = {address: NodePlan(name, "worker", address, 20000, 8) for address, name in NAMES.items()}


@pytest.mark.parametrize(
    ("has", "declared", "code", "said"),
    [
        ({"CPU": 4.0}, {"CPU": 4.0}, None, ""),
        ({"CPU": 4.0}, {}, None, ""),
        ({"CPU": 8.0, "disk": 2.0}, {"CPU": 4.0, "disk": 2.0}, None, ""),
        ({"CPU": 2.0}, {"CPU": 4.0}, "ray_resources_fewer", "CPU 2 of 4"),
        ({"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}, "ray_resources_fewer", "GPU 0 of 1"),
        ({"GPU": 1.0}, {"CPU": 0.0, "GPU": 1.0}, None, ""),
        ({}, {"CPU": 4.0}, "ray_resources_none", "with no resources: CPU 0 of 4"),
        ({}, {}, "ray_resources_none", "joined with no resources"),
        ({}, {"CPU": 0.0}, None, ""),
        ({"memory": GIB, "object_store_memory": GIB}, {}, "ray_resources_none", "no resources"),
        ({"accelerator_type:T4": 1.0}, {}, "ray_resources_none", "no resources"),
        ({"CPU": 2.0}, None, None, ""),  # nobody said what it declares
    ],
)
def test_fewer_than_declared(
    has: dict[str, float], declared: dict[str, float] | None, code: str | None, said: str
) -> None:
    told = {} if declared is None else {ADDRESSES["w1"]: declared}
    found = rules.fewer_than_declared([of_w1(has)], PLANS, told)
    assert [(s.subject, s.problem.code.name) for s in found] == ([("w1", code)] if code else [])
    assert not code or said in found[0].problem.cause
    assert not rules.fewer_than_declared([replace(of_w1(has), state="DEAD")], PLANS, told)
    assert not rules.fewer_than_declared([of_w1(has)], {}, told), "not one of ours"


@pytest.mark.parametrize(
    ("old", "went_at", "new", "now", "twice"),
    [
        (100.0, None, 200.0, 210.0, True),  # somebody else's raylet
        (100.0, 190.0, 200.0, 210.0, False),  # it died and is back: Ray gives its old self up soon
        (100.0, 190.0, 200.0, 381.0, True),  # or never
        (100.0, 205.0, 200.0, 210.0, True),  # what went afterwards is no excuse
        (40.0, None, 45.0, 60.0, False),  # before this daemon began: who knows
        (40.0, None, 45.0, 226.0, True),
        (None, None, None, 300.0, True),  # a Ray that does not tell
    ],
)
def test_one_address_twice(
    old: float | None, went_at: float | None, new: float | None, now: float, twice: bool
) -> None:
    interruptions = Interruptions(since=0.0 if old is None else 50.0)
    interruptions.sample(["w1", "w2"], 60.0)
    if went_at is not None:
        interruptions.sample(["w2"], went_at)
    rows = [HEAD, replace(W1, started=old), replace(W1, node_id="id-twin", started=new)]
    found = rules.one_address_twice(rows, NAMES, interruptions, 180.0, now)
    assert bool(found) is twice
    for one in found:
        assert (one.subject, one.problem.code.name) == ("w1", "ray_address_twice")
        assert "2 nodes" in one.problem.cause


def test_a_node_that_is_dead_is_not_there() -> None:
    rows = [HEAD, W1, replace(W1, node_id="id-twin", state="DEAD")]
    assert rules.one_address_twice(rows, NAMES, Interruptions(0.0), 180.0, 1.0) == []


def test_up_and_not_listed() -> None:
    up = [PLANS[ADDRESSES[name]] for name in ("w1", "w2")]
    found = rules.not_listed([HEAD, W1, node("w2", "DEAD")], up)
    assert [(s.subject, s.problem.code.name) for s in found] == [("w2", "ray_not_listed")]
