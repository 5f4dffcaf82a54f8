"""Many nodes: what one more of them costs the others does not grow with their number."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.daemon.worker_plan import changed
from rayfwd.hub import roster as roster_module
from rayfwd.hub.peers import HubNode
from rayfwd.hub.plan_news import MOST_SHOWN
from rayfwd.hub.plan_news import shown as some_of
from rayfwd.hub.roster import Roster
from rayfwd.hub.telling import Teller
from rayfwd.session import messages
from rayfwd.session.frames import MAX_PAYLOAD, Kind, close_frame
from rayfwd.session.handshake import CHANGES, OVERLAY, Refusal, Welcome
from rayfwd.session.messages import Message
from rayfwd.session.target import Target
from rayfwd.system.files import replace_file
from tests.unit.cluster import NETWORK, Cluster, Worker, answer_to, cluster, hello_of, knock
from tests.unit.loops import run as run_in_real_time
from tests.unit.loops import run_on_fake_clock as run
from tests.unit.loops import until

FEATURES = frozenset({CHANGES})


def size(heard: list[Message]) -> int:
    return sum(len(messages.encode(message)) for message in heard)


def plans_heard(worker: Worker) -> list[Message]:
    return [m for m in worker.messages if isinstance(m, messages.Nodes | messages.NodesChanged)]


async def join(c: Cluster, *names: str) -> None:
    for name in names:
        await c.worker(name, worker_ports=8, features=FEATURES)


async def settled(c: Cluster) -> None:
    """All have heard of all."""
    await asyncio.sleep(1)
    for worker in c.workers.values():
        worker.messages.clear()


def test_a_session_may_end_with_the_bytes_behind_its_hello(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as c:
            hello = hello_of("w1", features=FEATURES)
            assert isinstance(await answer_to(c.hub.socket.path, hello.encode()), Welcome)
            second = hello.encode() + close_frame("no, thanks")
            assert isinstance(await answer_to(c.hub.socket.path, second), Welcome)
            assert c.hub.nodes["w1"].mux is None

    run(main)


def test_a_join_costs_each_of_the_others_some_hundred_bytes(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as c:
            told, welcomed = {}, {}
            for count in (10, 60):
                await join(c, *(f"node-{i}" for i in range(len(c.workers), count)))
                await settled(c)
                newcomer = f"new-{count}"
                await join(c, newcomer)
                await asyncio.sleep(1)
                others = [w for name, w in c.workers.items() if name != newcomer]
                told[count] = max(size(worker.messages) for worker in others)
                welcome = c.workers[newcomer].welcome
                assert welcome is not None
                welcomed[count] = len(welcome.encode())
                (whole, own) = plans_heard(c.workers[newcomer])
                assert isinstance(whole, messages.Nodes)
                assert [n["name"] for n in whole.nodes] == ["head", *c.workers]
                assert isinstance(own, messages.NodesChanged)
            assert 100 < told[60] < 400
            assert abs(told[60] - told[10]) < 10
            assert abs(welcomed[60] - welcomed[10]) < 10

    run(main)


def test_joins_at_once_are_told_of_together(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as c:
            await join(c, "first")
            await settled(c)
            names = [f"n{i}" for i in range(30)]
            await join(c, *names)  # time stands meanwhile
            await asyncio.sleep(1)
            (told,) = c.workers["first"].messages
            assert isinstance(told, messages.NodesChanged)
            assert [n["name"] for n in told.nodes] == names
            assert told.gone == ()

    run(main)


def test_workers_that_say_they_have_the_overlay_are_given_the_same_ports(tmp_path: Path) -> None:
    """Together or one after the other; one at the level `listeners` is given ports of its own."""

    async def main() -> None:
        async with cluster(tmp_path) as c:
            overlay = FEATURES | {OVERLAY}
            together = [c.worker(name, worker_ports=8, features=overlay) for name in ("w1", "w2")]
            await asyncio.gather(*together)
            await c.worker("w3", worker_ports=8, features=overlay)
            await join(c, "w4")
            plans = [c.hub.nodes[name].plan for name in ("w1", "w2", "w3", "w4")]
            assert [plan.level for plan in plans] == ["overlay"] * 3 + ["listeners"]
            assert len({plan.base for plan in plans[:3]}) == 1
            assert set(plans[3].ports).isdisjoint(plans[0].ports)
            assert len({plan.address for plan in plans}) == 4

    run(main)


def test_a_node_that_goes_and_one_that_moves(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as c:
            await join(c, "w1", "w2", "w3")
            await settled(c)
            assert c.hub.forget("w2")
            await until(lambda: c.workers["w1"].messages)
            (told,) = c.workers["w1"].messages
            assert told == messages.NodesChanged((), ("w2",))
            await settled(c)
            await c.workers["w3"].close()
            await c.worker("w3", worker_ports=50, features=FEATURES)
            await asyncio.sleep(1)
            (told,) = c.workers["w1"].messages
            assert isinstance(told, messages.NodesChanged)
            assert [(n["name"], n["worker_ports"]) for n in told.nodes] == [("w3", 50)]
            assert {n["address"] for n in told.nodes} == {c.workers["w3"].address}

    run(main)


def test_nodes_of_an_earlier_version_are_told_of_all(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "old") as c:
            await join(c, "w1")
            await asyncio.sleep(1)
            old = c.workers["old"]
            assert old.welcome is not None
            assert CHANGES not in old.welcome.features
            (last,) = plans_heard(old)
            assert isinstance(last, messages.Nodes)
            assert [n["name"] for n in last.nodes] == ["head", "old", "w1"]

    run(main)


def test_a_further_lane_is_told_nothing_and_a_new_session_of_all(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as c:
            await join(c, "w1")
            await settled(c)
            worker = c.workers["w1"]
            worker.cut()
            await worker.connect()
            await asyncio.sleep(1)
            assert worker.messages == []
            await worker.close()
            await join(c, "w1")
            await asyncio.sleep(1)
            assert [type(m) for m in plans_heard(c.workers["w1"])] == [messages.Nodes]

    run(main)


class Unread(dict[str, HubNode]):
    """Nodes of which only one that is named may be looked at."""

    def _all(self) -> Any:
        raise AssertionError("every node is looked at")

    __iter__ = keys = values = items = _all


def test_the_way_of_a_stream_is_found_without_a_look_at_every_node(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1", "w2") as c:
            to_worker = await c.listener("w1", Target(c.address_of("w2"), 9))
            to_head = await c.listener("w1", Target(c.address, 9))
            from_head = await c.listener("head", Target(c.address_of("w1"), 9))
            nodes, c.hub.nodes = c.hub.nodes, Unread(c.hub.nodes)
            try:
                for listen in (to_worker, to_head, from_head):
                    reader, writer = await asyncio.open_connection(*listen)
                    with suppress(ConnectionError):  # nobody listens on port 9
                        assert await reader.read() == b""
                    writer.close()
            finally:
                c.hub.nodes = nodes

    run(main)


def plan(name: str, number: int, role: Any = "worker") -> NodePlan:
    address = f"127.77.{number // 256}.{number % 256}"
    return NodePlan(name, role, address, 20000, 8, False, {"gcs": 6379} if role == "head" else {})


def test_what_a_worker_makes_of_changes() -> None:
    head, a, b = plan("head", 1, "head"), plan("a", 2), plan("b", 3)
    assert changed((), (a, head), ()) == (head, a)
    assert changed((head, a), (b,), ()) == (head, a, b)
    assert changed((head, a, b), (plan("a", 9),), ("b", "unknown")) == (head, plan("a", 9))
    assert changed((head, a), (plan("renamed", 1, "head"),), ()) == (plan("renamed", 1, "head"), a)


@pytest.mark.parametrize("own", [None, 1500, 3])
def test_no_welcome_is_longer_than_a_frame(own: int | None) -> None:
    plans = (plan("head", 1, "head"), *(plan(f"{i}".rjust(63, "n"), i) for i in range(2, 2000)))
    mine = None if own is None else plans[own]
    shown = some_of(plans, mine)
    assert len(shown) in {MOST_SHOWN - 1, MOST_SHOWN}
    assert mine is None or shown.count(mine) == 1
    wire = tuple(node.to_wire() for node in shown)
    assert len(Welcome("0.2.0", {}, wire, "127.64.0.0/10", 120.0).encode()) < MAX_PAYLOAD
    assert some_of(plans[:MOST_SHOWN], mine) == plans[:MOST_SHOWN]


class Slow:
    """A session that takes a millisecond to be told."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def tell(self, _: Message, data: bytes) -> None:
        self.heard.append(data)
        time.sleep(0.001)


def test_a_report_to_many_is_encoded_once_and_lets_others_have_their_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded: list[Message] = []
    real = messages.encode

    def noted(message: Message) -> bytes:
        encoded.append(message)
        return real(message)

    monkeypatch.setattr(messages, "encode", noted)

    async def main() -> None:
        peers = [HubNode(f"n{i}", cast(Any, Slow()), plan=plan(f"n{i}", i)) for i in range(300)]
        heard = [cast(Slow, peer.mux).heard for peer in peers]
        teller = Teller()
        for text in ("first", "second"):
            teller.tell(messages.Cluster({"text": text}), peers)
        assert sum(map(len, heard)) < 20, "the first turn"
        turns = []
        while (before := sum(map(len, heard))) < 600:
            assert set(map(len, heard)) in ({0}, {1}, {2}, {0, 1}, {1, 2})
            await asyncio.sleep(0)
            turns.append(sum(map(len, heard)) - before)
        assert max(turns) < 20
        assert [data[0] < data[1] for data in heard] == [True] * 300
        assert len({id(data) for each in heard for data in each}) == 2, "they share the bytes"
        teller.tell(messages.Cluster({"text": "third"}), peers)
        teller.finish()
        assert set(map(len, heard)) == {3}
        await asyncio.sleep(0)
        assert set(map(len, heard)) == {3}

    run_in_real_time(main)
    assert len(encoded) == 3


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How long the roster's file was, each time that it was written."""
    sizes: list[int] = []

    def noted(path: Path, data: bytes) -> None:
        sizes.append(len(data))
        replace_file(path, data)

    monkeypatch.setattr(roster_module, "replace_file", noted)
    return sizes


def test_nodes_that_come_together_wait_for_the_disk_once(tmp_path: Path, writes: list[int]) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as c:
            hellos = [hello_of(f"n{i}", worker_ports=8) for i in range(20)]
            lanes = [await knock(c.hub.socket.path) for _ in hellos]
            await until(lambda: len(c.hub.gate.pending._ungreeted) == 20)
            for lane, hello in zip(lanes, hellos, strict=True):
                lane.write([hello.encode()])
            frames = [await lane.answer for lane in lanes]
            assert all(frame is not None and frame.kind is Kind.WELCOME for frame in frames)
            assert len({Welcome.decode(f).node["address"] for f in frames if f}) == 20
            assert len(writes) <= 3, "in as many turns of the loop as they came in"
            kept = Roster(tmp_path / "roster.json", c.roster.own, NETWORK, 20000)
            assert kept.plans() == c.roster.plans()
            for lane in lanes:
                lane.close()
                await lane.closed

    run(main)


def test_a_disk_that_takes_nothing_lets_none_of_them_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def main() -> None:
        async with cluster(tmp_path) as c:
            monkeypatch.setattr(roster_module, "replace_file", full)
            hellos = [hello_of(f"n{i}", worker_ports=8).encode() for i in range(3)]
            answers = [await answer_to(c.hub.socket.path, hello) for hello in hellos]
            for answer in answers:
                assert isinstance(answer, Refusal)
                assert answer.problem.code == codes.ROSTER_UNWRITABLE
            assert len(c.roster.plans()) == 1
            assert not c.hub.nodes

    run(main)
