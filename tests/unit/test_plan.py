"""The plan: addresses and blocks that never overlap, and that stay where they are."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfwd.cluster.plan import (
    PORT_CEILING,
    RESERVED,
    Level,
    NodePlan,
    allocate,
    bound,
    check_name,
    default_worker_ports,
    fits,
    head_plan,
)
from rayfwd.problems import ProblemError

NETWORK = "127.77.0.0/16"
SERVICES = {"gcs": 6379, "dashboard": 8265, "client": 10001}


def head(base: int = 20000, workers: int = 70, services: dict[str, int] | None = None) -> NodePlan:
    return head_plan("h", NETWORK, base, workers, SERVICES if services is None else services)


joins = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "d", "e", "f"]),
        st.integers(8, 5000),
        st.sampled_from([None, None, "203.0.113.7", "203.0.113.8"]),
    ),
    max_size=25,
)
heads = st.builds(
    head,
    st.integers(1024, 30000),
    st.integers(8, 500),
    st.fixed_dictionaries({k: st.integers(1024, 40000) for k in SERVICES}),
)


@given(heads, joins)
def test_blocks_never_overlap_and_joining_again_changes_nothing(
    own: NodePlan, asked: list[tuple[str, int, str | None]]
) -> None:
    nodes = {own.name: own}
    for name, workers, advertise in asked:
        before = dict(nodes)
        try:
            plan = allocate(nodes.values(), name, NETWORK, own.base, workers, advertise)
        except ProblemError:
            continue
        nodes[name] = plan
        assert allocate(nodes.values(), name, NETWORK, own.base, workers, advertise) == plan
        assert {n: p for n, p in nodes.items() if n != name} == {
            n: p for n, p in before.items() if n != name
        }
        assert plan.worker_ports == workers
        old = before.get(name)
        if old is not None and old.worker_ports == workers:
            assert plan.base == old.base
        if old is not None and advertise is None and not old.advertised:
            assert plan.address == old.address
    plans = list(nodes.values())
    ports = [port for plan in plans for port in plan.ports]
    assert len(ports) == len(set(ports))
    assert len({plan.address for plan in plans}) == len(plans)
    for plan in plans:
        block = range(plan.base, plan.base + plan.size)
        assert max(block) < PORT_CEILING
        assert not set(block) & {port for p in plans for port in p.head_services.values()}
        assert plan.advertised or ipaddress.ip_address(plan.address) in ipaddress.ip_network(
            NETWORK
        )


@given(heads, joins)
def test_every_plan_made_fits_and_survives_the_wire(
    own: NodePlan, asked: list[tuple[str, int, str | None]]
) -> None:
    nodes = {own.name: own}
    for name, workers, advertise in asked:
        try:
            nodes[name] = allocate(nodes.values(), name, NETWORK, own.base, workers, advertise)
        except ProblemError:
            continue
    for plan in nodes.values():
        assert NodePlan.from_wire(plan.to_wire()) == plan
        others = [p for p in nodes.values() if p.name != plan.name]
        assert plan.role == "head" or fits(plan, others, NETWORK, own.base)


def test_the_head_has_the_first_address_and_the_first_block() -> None:
    own = head()
    assert (own.address, own.base, own.first_worker_port) == ("127.77.0.1", 20000, 20008)
    assert own.last_worker_port == 20077
    assert own.services["node_manager"] == 20000
    assert own.services["autoscaler_metrics"] == 20006
    assert {6379, 8265, 10001, 20000, 20077} <= set(own.ports)


def test_the_heads_block_goes_round_its_own_services() -> None:
    assert head(base=6300, workers=100).base == 6380


def test_a_head_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ProblemError, match=r"hub\.port_base = 32700: 78 ports do not fit"):
        head(base=32700)


def test_a_worker_goes_round_what_is_there() -> None:
    own = head()
    a = allocate([own], "a", NETWORK, 20000, 92, None)
    b = allocate([own, a], "b", NETWORK, 20000, 92, None)
    assert [(p.address, p.base) for p in (a, b)] == [("127.77.0.2", 20078), ("127.77.0.3", 20178)]
    c = allocate([own, b], "c", NETWORK, 20000, 92, None)
    assert (c.address, c.base) == ("127.77.0.2", 20078), "what is free again is given again"


def test_more_ports_move_the_block_and_keep_the_address() -> None:
    own = head()
    a = allocate([own], "a", NETWORK, 20000, 92, None)
    b = allocate([own, a], "b", NETWORK, 20000, 92, None)
    grown = allocate([own, a, b], "a", NETWORK, 20000, 93, None)
    assert (grown.address, grown.base) == (a.address, 20278)


def test_an_advertised_address_is_taken_once() -> None:
    own = head()
    a = allocate([own], "a", NETWORK, 20000, 92, "203.0.113.7")
    assert (a.address, a.advertised) == ("203.0.113.7", True)
    with pytest.raises(ProblemError, match=r"node a already has the address 203\.0\.113\.7"):
        allocate([own, a], "b", NETWORK, 20000, 92, "203.0.113.7")
    back = allocate([own, a], "a", NETWORK, 20000, 92, None)
    assert (back.address, back.base, back.advertised) == ("127.77.0.2", a.base, False)


def test_a_block_that_no_longer_fits_is_given_up() -> None:
    own = head()
    a = allocate([own], "a", NETWORK, 20000, 92, None)
    assert not fits(a, [own], NETWORK, a.base + 1)
    assert not fits(a, [own], "127.78.0.0/16", 20000)
    assert not fits(a, [replace(own, base=a.base - 10)], NETWORK, 20000)
    assert not fits(a, [replace(own, head_services={"gcs": a.base + 5})], NETWORK, 20000)
    assert not fits(a, [own, replace(a, name="twin")], NETWORK, 20000)
    moved = allocate(
        [replace(own, head_services={"gcs": a.base + 5}), a], "a", NETWORK, 20000, 92, None
    )
    assert (moved.address, moved.base) == (a.address, a.base + 6)


def test_a_network_that_is_full() -> None:
    own = head_plan("h", "127.77.0.0/29", 20000, 8, {})
    nodes = [own]
    for name in "abcde":
        nodes.append(allocate(nodes, name, "127.77.0.0/29", 20000, 8, None))
    assert nodes[-1].address == "127.77.0.6", "the last of six, before the broadcast address"
    with pytest.raises(ProblemError, match="every address is in use"):
        allocate(nodes, "f", "127.77.0.0/29", 20000, 8, None)


def test_ports_that_are_used_up() -> None:
    own = head(base=32000)
    with pytest.raises(
        ProblemError, match="no 708 consecutive ports are free between 32000 and 32768"
    ):
        allocate([own], "a", NETWORK, 32000, 700, None)


@pytest.mark.parametrize(
    "change",
    [
        {"address": "host"},
        {"base": 0},
        {"base": 32700},
        {"base": None},
        {"worker_ports": 0},
        {"worker_ports": float("inf")},
        {"head_services": {"gcs": 70000}},
        {"head_services": 5},
        {"head_services": {"gcs": "x"}},
    ],
)
def test_a_plan_that_is_none_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        NodePlan.from_wire({**head().to_wire(), **change})


@pytest.mark.parametrize("missing", [key for key in head().to_wire() if key != "level"])
def test_a_plan_with_a_part_missing_is_refused(missing: str) -> None:
    wire = {k: v for k, v in head().to_wire().items() if k != missing}
    with pytest.raises(ValueError, match="not a node's plan"):
        NodePlan.from_wire(wire)


def test_a_plan_of_an_older_version_has_no_level() -> None:
    wire = {k: v for k, v in head().to_wire().items() if k != "level"}
    assert NodePlan.from_wire(wire).level == "listeners"


@pytest.mark.parametrize("name", ["", "a b", "-a", "a-", "a\n", "ü", "a" * 64, "a/b"])
def test_names_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 63 letters"):
        check_name(name)


def test_worker_ports_are_more_than_the_cpus() -> None:
    assert [default_worker_ports(c) for c in (0, 1, 128)] == [64, 67, 448]
    assert RESERVED == 8


def joined(levels: Sequence[Level], cpus: int = 8) -> list[NodePlan]:
    """A head, and a worker of each of these levels."""
    plans = [head_plan("head", NETWORK, 20000, default_worker_ports(cpus), SERVICES)]
    for number, level in enumerate(levels):
        ports = default_worker_ports(cpus)
        name = f"w{number}"
        plans.append(allocate(plans, name, NETWORK, 20000, ports, None, level))
    return plans


def test_workers_with_the_overlay_may_have_the_same_ports() -> None:
    """300 nodes of 192 CPUs are 197,000 ports, and the range has 12,768."""
    plans = joined(["overlay"] * 300, cpus=192)
    assert len({plan.address for plan in plans}) == 301
    assert len({plan.base for plan in plans if plan.role == "worker"}) == 1
    assert set(plans[0].ports).isdisjoint(plans[1].ports), "the head's are its own"
    assert "not bounded by ports" in bound(plans, 20000)


def test_a_worker_with_listeners_has_ports_of_its_own() -> None:
    plans = joined(["overlay", "listeners", "overlay", "listeners"])
    own = {plan.name: set(plan.ports) for plan in plans}
    assert own["w0"] == own["w2"]
    for name in ("w1", "w3"):
        assert all(own[name].isdisjoint(ports) for other, ports in own.items() if other != name)
    assert bound(plans[:1], 20000) == "no worker has joined yet"
    said = bound(plans, 20000)
    assert "(w1, w3)" in said
    assert f"{4 * 96} of 12768" in said, "the two that share theirs count once"


def test_a_change_of_level_moves_that_node_at_most() -> None:
    plans = joined(["overlay", "overlay"])
    ports = default_worker_ports(8)
    fell = allocate(plans, "w1", NETWORK, 20000, ports, None, "listeners")
    assert fell.address == plans[2].address
    assert all(set(fell.ports).isdisjoint(plan.ports) for plan in plans[:2])
    rose = allocate([*plans[:2], fell], "w1", NETWORK, 20000, ports, None, "overlay")
    assert rose.base == fell.base, "it stays where it is"
