"""What the watchers make of what they saw: dead ports, canaries, nodes that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest

from rayfwd import codes
from rayfwd.cluster import probe
from rayfwd.cluster.plan import NodePlan
from rayfwd.ray.canary.sender import CanaryRun
from rayfwd.ray.commandline import given_up_after
from rayfwd.ray.nodes import NodeSeen
from rayfwd.session.target import Target
from rayfwd.transport.endpoints import Endpoint
from rayfwd.watch import canary_watch, reach
from rayfwd.watch.board import Board
from rayfwd.watch.flapping import flapping
from rayfwd.watch.interruptions import Interruptions
from rayfwd.watch.reach import Peer, Reach
from tests.unit.cluster import free_place
from tests.unit.loops import run_on_fake_clock as run
from tests.unit.loops import until

PLAN = NodePlan("gpu-1", "worker", "127.77.0.2", 20046, 40)
DIRECT = replace(PLAN, address="203.0.113.7", advertised=True)
RAYLET, OBJECTS = 20046, 20047
WORKERS = range(20054, 20094)


def anywhere(plan: NodePlan, port: int) -> Endpoint:
    return Endpoint(Target(plan.address, port))


# -- dead ports


@pytest.mark.parametrize(
    ("plan", "bad", "said", "remedy"),
    [
        (PLAN, {RAYLET: "dropped"}, "something on head itself drops packets", "head's firewall"),
        (PLAN, {RAYLET: "refused"}, "something on head itself refuses", "head's firewall"),
        (PLAN, {OBJECTS: "reset"}, "nothing listens on that port on gpu-1", "raylet.out on gpu-1"),
        (PLAN, {OBJECTS: "silent"}, "connections reach gpu-1's side", "gpu-1's firewall"),
        (DIRECT, {RAYLET: "dropped"}, "packets are dropped", "inbound TCP to ports 20046-20093"),
        (DIRECT, {RAYLET: "refused"}, "connections are refused", "inbound TCP"),
        (DIRECT, {RAYLET: "unroutable"}, "there is no route", "inbound TCP"),
    ],
)
def test_where_a_port_is_dead(plan: NodePlan, bad: dict[int, str], said: str, remedy: str) -> None:
    problem = reach.explain(plan, bad, "head")
    assert problem.code == codes.RAY_PORT_UNREACHABLE
    assert said in problem.cause
    assert remedy in problem.remedy
    assert ("the listener at 127.77.0.2" in problem.cause) is not plan.advertised


def test_what_a_port_is_for() -> None:
    cause = reach.explain(PLAN, dict.fromkeys(WORKERS, "dropped"), "head").cause
    assert "port 20054-20093 (workers) of gpu-1" in cause
    assert cause.endswith("Without them, no task runs there, and no result comes back")
    cause = reach.explain(PLAN, {RAYLET: "dropped", OBJECTS: "dropped"}, "head").cause
    assert "20046 (the raylet), 20047 (the object manager)" in cause
    assert "Without it, no task is placed there, and Ray gives the node up. Without" in cause
    assert "no object over 100 KB is passed to or from the node" in cause


async def greeter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Speaks first, as a gRPC server does, and waits for the other side."""
    writer.write(b"\0\0\0\4\0\0\0\0\0")
    try:
        await reader.read()
    except ConnectionError:
        pass
    writer.close()


def test_a_newcomer_is_looked_at_at_once() -> None:
    """Ray gives up a node that it does not reach soon: it cannot wait for the next look."""

    async def body() -> None:
        place = free_place()
        plan = NodePlan("w", "worker", place.address, place.port, 8)
        peers: dict[str, Peer] = {}
        board = Board(lambda: None)
        task = asyncio.create_task(Reach("head", lambda: dict(peers), board, anywhere, 3600).run())
        await asyncio.sleep(60)  # its first look finds nobody
        assert not board.conditions
        peers["w"] = Peer(plan, 1)
        await until(lambda: board.conditions, reach.NEWCOMER_INTERVAL + reach.CONFIRM_DELAY + 0.5)
        assert board.conditions[0].code == codes.RAY_PORT_UNREACHABLE
        task.cancel()

    run(body)


def test_a_dead_server_is_found_and_confirmed() -> None:
    async def body() -> None:
        place = free_place()
        plan = NodePlan("w", "worker", place.address, place.port, 8)
        peers: dict[str, Peer] = {"w": Peer(plan, 1)}
        looks = Reach("head", lambda: dict(peers), Board(lambda: None), anywhere)
        servers = [
            await asyncio.start_server(greeter, place.address, plan.services[name])
            for name in ("node_manager", "object_manager")
        ]
        assert await looks.probe() == {}
        servers[1].close()
        (problem,) = (await looks.probe()).values()
        assert f"{place.port + 1} (the object manager)" in problem.cause
        assert "(the raylet)" not in problem.cause

        # The way was interrupted meanwhile: what was seen counts for nothing.
        count = 0

        def interrupted() -> Mapping[str, Peer]:
            nonlocal count
            count += 1
            return {"w": Peer(plan, count)}

        assert await Reach("head", interrupted, Board(lambda: None), anywhere).probe() == {}
        servers[0].close()

    run(body)


def test_worker_ports_one_of_which_answers_are_not_dead() -> None:
    async def body() -> None:
        place = free_place()
        plan = NodePlan("w", "worker", place.address, place.port, 8)
        # No worker at all: each port is refused (here by the listener), and none is called dead.
        direct = replace(plan, advertised=True)
        assert await reach.dead_worker_ports(direct, anywhere) == {}
        assert set((await reach.dead_worker_ports(plan, anywhere)).values()) == {"refused"}
        server = await asyncio.start_server(greeter, place.address, plan.first_worker_port + 3)
        assert await reach.dead_worker_ports(plan, anywhere) == {}
        server.close()

    run(body)


# -- the canary

SEEN = [
    NodeSeen("a" * 8, "127.77.0.1", True, "ALIVE", {}),
    NodeSeen("b" * 8, "127.77.0.2", False, "ALIVE", {}),
]
PLANS = {"127.77.0.2": PLAN}


def found(*lines: str) -> CanaryRun:
    run_ = CanaryRun()
    for line in lines:
        run_.read(line.encode())
    return run_


def stage(node: str, name: str, ok: bool = True, error: str = "not done in 30 s") -> str:
    said = "null" if ok else f'"{error}"'
    return (
        f'{{"canary": "stage", "node": "{node * 8}", "stage": "{name}", "ok": {str(ok).lower()}, '
        f'"seconds": 0.1, "error": {said}}}'
    )


WELL = [stage("a", s) for s in ("task", "to", "from")]


@pytest.mark.parametrize(
    ("lines", "ports", "code", "said"),
    [
        ([stage("b", s) for s in ("task", "to", "from")], {}, None, ""),
        ([stage("b", "task", False)], {RAYLET: "dropped"}, "canary_no_task", "20046 (the raylet)"),
        ([stage("b", "task", False)], {}, "canary_no_task", "its ports answer"),
        ([stage("b", "task", False, "No available ports")], {}, "canary_no_task", "No available"),
        ([], {}, "canary_no_task", "did not get to it"),
        (
            [stage("b", "task"), stage("b", "to", False), stage("b", "from")],
            {},
            "canary_no_objects",
            "does not arrive from head to gpu-1 (not done in 30 s), although the ports of both",
        ),
        (
            [stage("b", "task"), stage("b", "to"), stage("b", "from", False)],
            {OBJECTS: "silent"},
            "canary_no_objects",
            "does not arrive from gpu-1 to head (not done in 30 s): head does not reach port 20047",
        ),
        (
            [stage("b", "task"), stage("b", "to", False), stage("b", "from", False)],
            {},
            "canary_no_objects",
            "from head to gpu-1 (not done in 30 s) nor from gpu-1 to head (not done in 30 s)",
        ),
    ],
)
def test_what_a_canary_says(
    lines: list[str], ports: dict[int, str], code: str | None, said: str
) -> None:
    result = found('{"canary": "connected", "seconds": 1}', *WELL, *lines)
    problems = canary_watch.judge(result, SEEN, PLANS, {"127.77.0.2": ports}, "head")
    if code is None:
        assert problems == {}
        return
    assert problems.keys() == {"gpu-1"}
    assert problems["gpu-1"].code.name == code
    assert said in problems["gpu-1"].cause


@pytest.mark.parametrize(
    "line",
    [
        *("", "x", "{}", '{"canary": ', '{"canary": 5}', '{"canary": "stage"}'),
        '{"canary": ["stage"]}',
        '{"canary": "stage", "node": 1, "stage": 2, "ok": 3, "seconds": [], "error": null}',
    ],
)
def test_lines_that_are_none_of_the_scripts(line: str) -> None:
    result = found(line)
    assert not result.connected
    assert not result.stages
    assert not result.complete


def test_a_node_whose_way_was_cut_is_not_judged() -> None:
    problems = {
        name: codes.CANARY_NO_TASK.problem("x", "y") for name in ("head", "gpu-1", "10.0.0.9")
    }
    plans = {"127.77.0.2": PLAN, "127.77.0.1": replace(PLAN, name="head", address="127.77.0.1")}

    def judged(before: Mapping[str, Peer], after: Mapping[str, Peer]) -> set[str]:
        return set(canary_watch.only_theirs(problems, plans, before, after, "head"))

    up, later = {"gpu-1": Peer(PLAN, 1)}, {"gpu-1": Peer(PLAN, 2)}
    assert judged(up, up) == {"head", "gpu-1", "10.0.0.9"}
    for before, after in ((up, later), (up, {}), ({}, up), ({}, {})):
        assert judged(before, after) == {"head", "10.0.0.9"}


# -- nodes that come and go

NOW = 10_000.0
PATIENCE = given_up_after(120)


def row(
    state: str, began: float, ended: float | None, said: str | None, number: int = 1
) -> NodeSeen:
    return NodeSeen(f"{number:08x}", PLAN.address, False, state, {}, began, ended, said)


MISSED = "health check failed due to missing too many heartbeats"


@pytest.mark.parametrize(
    ("rows", "flaps"),
    [
        ([row("ALIVE", NOW - 20, None, None)], False),
        ([row("DEAD", NOW - 90, NOW - 20, MISSED)], True),
        ([row("DEAD", NOW - 90, NOW - 20, MISSED), row("ALIVE", NOW - 10, None, None)], True),
        # Up again for long; long ago; after a long life; ended by itself.
        ([row("DEAD", NOW - 590, NOW - 520, MISSED), row("ALIVE", NOW - 500, None, None)], False),
        ([row("DEAD", NOW - 2000, NOW - 1930, MISSED)], False),
        ([row("DEAD", NOW - 5000, NOW - 20, MISSED)], False),
        ([row("DEAD", NOW - 90, NOW - 20, "Expected termination: received SIGTERM")], False),
        # 2.9 does not say why: once may be a restart.
        ([row("DEAD", NOW - 90, NOW - 20, None)], False),
        ([row("DEAD", NOW - 90, NOW - 20, None), row("DEAD", NOW - 190, NOW - 120, None)], True),
        ([row("DEAD", 0.0, None, MISSED)], False),
    ],
)
def test_joined_and_gone(rows: list[NodeSeen], flaps: bool) -> None:
    problems = flapping(rows, {PLAN.address: PLAN}, NOW, PATIENCE)
    assert bool(problems) is flaps
    if flaps:
        assert problems["gpu-1"].code == codes.RAY_NODE_FLAPPING
        assert "70 s after it had joined" in problems["gpu-1"].cause
    assert flapping(rows, {}, NOW, PATIENCE) == {}


@pytest.mark.parametrize("ride_through", [20.0, 120.0, 600.0, 3600.0])
def test_how_long_a_node_is_on_trial_follows_from_how_long_ray_waits(ride_through: float) -> None:
    """A link that may be down for long is one whose node is given up late."""
    patience = given_up_after(ride_through)
    lived = row("DEAD", NOW - patience - 40, NOW - 30, MISSED, 1)
    for again, flaps in ((patience, True), (2 * patience, False)):
        now = NOW + again
        rows = [lived, row("ALIVE", NOW, None, None, 2)]
        assert bool(flapping(rows, {PLAN.address: PLAN}, now, patience)) is flaps


@pytest.mark.parametrize(
    ("went_at", "flaps"),
    [
        (None, True),
        (NOW - 50, False),  # its raylet was killed, or its link cut, and Ray noticed later
        (NOW - 19, True),  # Ray gave it up, and the raylet ended of that
        (NOW - 95, True),  # before it had joined
    ],
)
def test_a_node_that_went_by_itself_does_not_flap(went_at: float | None, flaps: bool) -> None:
    went = Interruptions(since=NOW - 1000)
    went.sample(["gpu-1", "gpu-2"], NOW - 99)
    if went_at is not None:
        went.sample(["gpu-2"], went_at)
    went.sample(["gpu-1"], NOW - 1)
    rows = [row("DEAD", NOW - 90, NOW - 20, MISSED)]
    assert bool(flapping(rows, {PLAN.address: PLAN}, NOW, PATIENCE, went)) is flaps


def test_what_was_before_the_daemon_is_not_judged() -> None:
    rows = [row("DEAD", NOW - 90, NOW - 20, MISSED)]
    went = Interruptions(since=NOW - 10)
    assert flapping(rows, {PLAN.address: PLAN}, NOW, PATIENCE, went) == {}


def test_outcomes_are_words_of_the_protocol() -> None:
    assert {"answered", "refused", "dropped", "unroutable", "stranger"} == probe.OUTCOMES
