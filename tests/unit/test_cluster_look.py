"""Looks at a cluster of a thousand nodes keep the head's loop for no long turn."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rayfwd.cluster.plan import NodePlan
from rayfwd.config import RayConfig
from rayfwd.daemon.watches import LINKS_BESIDE, LinkWatch
from rayfwd.ray import dashboard, nodes, status_text
from rayfwd.ray.cluster_report import ClusterReport, Told
from rayfwd.ray.status_text import RayStatus
from rayfwd.session.messages import Cluster
from rayfwd.session.target import Target
from rayfwd.watch import cluster_watch, rules
from rayfwd.watch.cluster_watch import FEW_NODES, SETTLE_SECONDS, TABLE_INTERVAL, ClusterWatch
from rayfwd.watch.interruptions import Interruptions
from rayfwd.watch.links import LinkRules, LinkSeen
from tests.unit.loops import run, run_on_fake_clock, until

COUNT = 1001


def plan(number: int) -> NodePlan:
    role: Any = "worker" if number else "head"
    address = f"127.77.{number // 250}.{number % 250 + 1}"
    services = {} if number else {"gcs": 6379, "dashboard": 8265}
    return NodePlan(f"n{number}", role, address, 20000, 8, False, services)


PLANS = [plan(number) for number in range(COUNT)]
ROWS = [
    {
        "node_id": f"{number:056x}",
        "node_ip": plan.address,
        "is_head_node": not number,
        "state": "ALIVE",
        "resources_total": {"CPU": 8.0, "memory": 1e10, f"node:{plan.address}": 1.0},
    }
    for number, plan in enumerate(PLANS)
]
TABLE = json.dumps({"result": True, "data": {"result": {"result": ROWS}}}).encode()


class Owner:
    """The head, as far as the watch asks it."""

    view = SimpleNamespace(nodes=tuple(PLANS), gives_up_after=30.0)

    def __init__(self) -> None:
        self.told: list[tuple[ClusterReport, Told, threading.Thread]] = []

    def up(self) -> list[NodePlan]:
        return PLANS

    def declared(self) -> dict[str, dict[str, float]]:
        return {plan.address: {"CPU": 8.0} for plan in PLANS}

    def reported(self, report: ClusterReport, told: Told) -> None:
        self.told.append((report, told, threading.current_thread()))


class Look:
    """A watch, and what it has put on the board."""

    def __init__(self) -> None:
        self.owner = Owner()
        self.found: dict[str, Any] = {}
        self.watch = ClusterWatch(
            RayConfig(),
            PLANS[0],
            cast(Any, SimpleNamespace(environment={})),
            cast(Any, SimpleNamespace(put_all=self.found.__setitem__, pending=lambda _: False)),
            Interruptions(0.0),
            cast(Any, self.owner),
            lambda node, port: cast(Any, Target(node.address, port)),
        )


async def ask(*_: object) -> RayStatus:
    return RayStatus(time.time(), {"CPU": (0.0, 8.0 * COUNT), "memory": (0.0, 1e14)}, (), 0, 0)


def test_what_grows_with_the_nodes_is_done_beside_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by: dict[str, threading.Thread] = {}

    def noted(holder: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(holder, name)

        def note(*args: Any) -> Any:
            by[name] = threading.current_thread()
            return real(*args)

        monkeypatch.setattr(holder, name, note)

    monkeypatch.setattr(status_text, "fetch", ask)
    monkeypatch.setattr(dashboard, "get", lambda *_: TABLE)
    noted(nodes, "parse")
    for rule in ("fewer_than_declared", "not_listed", "nodes_without_resources"):
        noted(rules, rule)
    noted(ClusterReport, "message")
    look = Look()

    async def main() -> None:
        assert not await look.watch._scan()

    run(main)
    assert len(by) == 5
    assert threading.main_thread() not in by.values()
    ((report, (message, left_out), thread),) = look.owner.told
    assert thread is threading.main_thread()
    assert len(report.nodes) == COUNT
    assert isinstance(message, Cluster)
    assert left_out == ()
    assert look.found["cluster"] == []


def test_what_the_dashboard_does_not_say_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    async def fetch(*_: object) -> None:
        return None

    async def find(*_: object) -> Any:
        return SimpleNamespace(command="/x/ray")

    async def by_command(command: str, gcs: str, _: object) -> RayStatus:
        asked.append((command, gcs))
        return await ask()

    monkeypatch.setattr(status_text, "fetch", fetch)
    monkeypatch.setattr(cluster_watch, "find", find)
    monkeypatch.setattr(status_text, "ask", by_command)
    monkeypatch.setattr(dashboard, "get", lambda *_: TABLE)
    look = Look()

    async def main() -> None:
        assert not await look.watch._scan()

    run(main)
    assert asked == [("/x/ray", "127.77.0.1:6379")]
    ((report, _, _),) = look.owner.told
    assert report.totals["CPU"] == (0.0, 8.0 * COUNT)


@pytest.mark.parametrize("nodes_of_plan", [3, FEW_NODES + 1])
def test_a_node_that_comes_is_told_of_at_once(
    monkeypatch: pytest.MonkeyPatch, nodes_of_plan: int
) -> None:
    """Its totals, which Ray renews every 5 s, follow. Of many nodes all is told together."""
    rows, asked = ROWS[:1], []

    async def noted(*args: object) -> RayStatus:
        asked.append(asyncio.get_running_loop().time())
        return await ask(*args)

    def table(*_: object) -> bytes:
        return json.dumps({"result": True, "data": {"result": {"result": rows}}}).encode()

    monkeypatch.setattr(status_text, "fetch", noted)
    monkeypatch.setattr(dashboard, "get", table)
    owner = Owner()
    owner.view = SimpleNamespace(nodes=tuple(PLANS[:nodes_of_plan]), gives_up_after=30.0)
    board = SimpleNamespace(put=lambda *_: None, put_all=lambda *_: None, pending=lambda _: False)
    up = SimpleNamespace(environment={}, now=SimpleNamespace(state="up"))

    async def main() -> None:
        now = asyncio.get_running_loop().time
        watch = ClusterWatch(
            RayConfig(),
            PLANS[0],
            cast(Any, up),
            cast(Any, board),
            Interruptions(0.0),
            cast(Any, owner),
            lambda node, port: cast(Any, Target(node.address, port)),
        )
        task = asyncio.create_task(watch.run())
        await until(lambda: owner.told)
        await asyncio.sleep(2)
        took = []
        for count in (2, 3):
            rows.append(ROWS[count - 1])
            began = now()
            watch.scan_soon()
            await until(lambda count=count: len(owner.told[-1][0].nodes) == count)  # type: ignore[misc]
            took.append(now() - began)
        if nodes_of_plan > FEW_NODES:
            assert SETTLE_SECONDS <= took[0] < SETTLE_SECONDS + 2
        else:
            assert took[0] < 0.1
            assert took[1] <= TABLE_INTERVAL
            assert len(asked) == 1, "the totals are not renewed yet"
            await until(lambda: len(asked) == 2)
            assert now() - began <= SETTLE_SECONDS
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    run_on_fake_clock(main)


@pytest.mark.parametrize("count", [LINKS_BESIDE - 1, LINKS_BESIDE])
def test_many_links_are_judged_beside_the_loop(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    by: list[threading.Thread] = []
    sample = LinkRules.sample

    def noted(*args: Any) -> Any:
        by.append(threading.current_thread())
        return sample(*args)

    monkeypatch.setattr(LinkRules, "sample", noted)
    put: dict[str, Any] = {}
    board = cast(Any, SimpleNamespace(put_all=put.__setitem__))
    seen = {f"n{number}": LinkSeen({}, 0.001) for number in range(count)}

    async def main() -> None:
        task = asyncio.create_task(LinkWatch(board, lambda: iter(seen.items())).run())
        await until(lambda: put)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    run(main)
    assert put == {"links": []}
    assert (by[0] is threading.main_thread()) is (count < LINKS_BESIDE)
