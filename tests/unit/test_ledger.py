"""What a hostile peer may cost the hub: memory, lanes, messages, plans, lines of the log. Beside it
an honest one goes on."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.daemon.views import ledger_of
from rayfwd.hub import Hub
from rayfwd.hub import ledger as ledger_module
from rayfwd.hub.ledger import AFTERWARDS
from rayfwd.hub.peers import PLAN_CHANGES, HubNode
from rayfwd.hub.room import MOMENT, SETTLED, who_yields
from rayfwd.session import messages
from rayfwd.session.events import Event
from rayfwd.session.frames import MAX_MESSAGE, Frame, Kind, encode
from rayfwd.session.handshake import Refusal, Vouch, Welcome
from rayfwd.session.lane import Lane
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening, Target
from rayfwd.system.paths import SECRET
from rayfwd.transport.mux import (
    CONTROL_BUFFER,
    MEMORY_GRAIN,
    MESSAGES_A_SECOND,
    MESSAGES_AT_ONCE,
    Mux,
)
from tests.unit.cluster import (
    BULK,
    INTERACTIVE,
    Cluster,
    Worker,
    answer_to,
    cluster,
    hello_of,
    knock,
)
from tests.unit.loops import log_events, of, until
from tests.unit.loops import run_on_fake_clock as run
from tests.unit.test_hub import works
from tests.unit.test_mux import Owner, pair

MIB = 1 << 20


def mux_of(c: Cluster, name: str) -> Mux:
    mux = c.hub.nodes[name].mux
    assert mux is not None
    return mux


def deaf(worker: Worker) -> None:
    """From now on it answers PINGs, and nothing else."""
    assert worker.mux is not None
    session = worker.mux.session
    take = session._frame

    def take_pings(lane: Lane, frame: Frame, now: float, events: list[Event]) -> bool:
        heard = frame.kind in {Kind.PING, Kind.PONG}
        return take(lane, frame, now, events) if heard else True

    session._frame = take_pings  # type: ignore[method-assign]


def flood(worker: Worker, to: Worker, streams: int, size: int = 1 << 18) -> list[Owner]:
    """Open streams to another worker and fill their credit."""
    assert worker.mux is not None
    owners = []
    target = Opening(Target(to.address, to.welcome.node["base"]), None)  # type: ignore[union-attr]
    for _ in range(streams):
        owners.append(owner := Owner())
        worker.mux.open(target.encode(), owner).send(bytes(size))
    return owners


def is_lost(owner: Owner) -> bool:
    return any(told.startswith("lost: TOO_MANY") for told in owner.told)


@pytest.mark.interpreted
class TestMemory:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger_module, "PEER_MEMORY", 16 * MIB)
        monkeypatch.setattr("rayfwd.daemon.views.PEER_MEMORY", 16 * MIB)

    def test_of_a_peer_is_bounded_and_others_go_on(self, tmp_path: Path) -> None:
        """Streams without number to a second name of one's own, which takes nothing."""

        async def main() -> None:
            with log_events() as log:
                async with cluster(tmp_path, "w1", "w2", "w3") as c:
                    deaf(c.workers["w2"])
                    owners = flood(c.workers["w1"], c.workers["w2"], 200)  # 50 MiB
                    w1 = mux_of(c, "w1")
                    await until(lambda: sum(is_lost(owner) for owner in owners) > 100)
                    for _ in range(50):
                        assert w1.session.memory <= 16 * MIB + MEMORY_GRAIN
                        assert mux_of(c, "w2").session.memory <= 16 * MIB + MEMORY_GRAIN
                        await asyncio.sleep(0.1)
                    assert await works(c, "w3")
                    assert await works(c, "w1"), "it goes on as well, with what it may have"
                    ledger = ledger_of(c.hub)
                    greedy = {row.name: row for row in ledger.peers}
                    assert greedy["w2"].memory > 8 * MIB
                    assert greedy["w3"].shed == 0
                    assert ledger.users[0].peers == 3
                    assert ledger.users[0].memory == sum(row.memory for row in ledger.peers)
            assert {e["node"] for e in of(log, "streams_shed")} <= {"w1", "w2"}
            assert len(of(log, "streams_shed")) <= 4

        run(main)

    def test_what_is_over_is_in_no_account(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1", "w2") as c:
                deaf(c.workers["w2"])
                flood(c.workers["w1"], c.workers["w2"], 20)
                await until(lambda: c.hub.ledger.memory > 4 * MIB)
                for name in ("w1", "w2"):
                    mux_of(c, name).close("enough")
                assert c.hub.ledger.memory == 0
                assert all(node.memory == 0 for node in c.hub.nodes.values())

        run(main)

    def test_of_all_together_is_bounded_and_the_greediest_is_shed(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1", "w2", "w3", "w4") as c:
                c.hub.ledger.most_memory = 12 * MIB
                deaf(c.workers["w2"])
                flood(c.workers["w3"], c.workers["w2"], 2)
                await until(lambda: mux_of(c, "w2").session.memory == 2 << 18)
                many = flood(c.workers["w1"], c.workers["w2"], 55)
                await until(lambda: any(map(is_lost, many)))
                await asyncio.sleep(5)
                assert c.hub.ledger.memory <= 12 * MIB + 4 * MEMORY_GRAIN
                assert c.hub.nodes["w2"].shed > 0
                assert c.hub.nodes["w3"].shed == c.hub.nodes["w4"].shed == 0
                assert await works(c, "w4")
                assert await works(c, "w3")

        run(main)

    def test_bytes_that_come_too_early_count_by_what_they_take(self) -> None:
        async def main() -> None:
            async with pair(INTERACTIVE) as p:
                owner = Owner()
                stream = p.worker.open(owner)
                await until(lambda: p.hub.accepted)
                session, lane = p.hub.mux.session, next(iter(p.hub.mux.lanes))
                for offset in range(1, 2000, 2):
                    p.hub.mux.lane_data(lane, encode(Kind.DATA, stream.number, offset, b"x"))
                assert session.memory > 1000 * 100
                session.check_invariants()
                stream.reset(ResetReason.ABORTED)
                await until(lambda: not session.memory)

        run(main)


class TestControlMessages:
    def test_to_who_takes_nothing_only_the_last_of_each_type_waits(self) -> None:
        async def main() -> None:
            async with pair(INTERACTIVE) as p:
                transport = p.hub.lanes[0].transport
                assert transport is not None
                transport.pause_reading()  # no ACK is heard
                for number in range(200):
                    p.hub.mux.send_message(messages.Cluster({"n": number, "x": "x" * 200_000}))
                    p.hub.mux.send_message(messages.HeadRay(f"{number}"))
                kept = p.hub.mux.session.memory
                assert kept <= CONTROL_BUFFER + MAX_MESSAGE
                transport.resume_reading()
                last = messages.HeadRay("199")
                await until(lambda: last in p.worker.messages)
                await until(lambda: not p.hub.mux.session.memory)
                told = [m.report["n"] for m in p.worker.messages if isinstance(m, messages.Cluster)]
                assert told == sorted(told)
                assert told[-1] == 199
                assert len(told) < 20

        run(main)

    def test_a_peer_is_heard_so_often_and_nothing_of_it_is_lost(self, tmp_path: Path) -> None:
        """What it may send meanwhile is its credit."""

        async def main() -> None:
            async with cluster(tmp_path, "w1", "w2") as c:
                w1, w2 = c.workers["w1"].mux, c.workers["w2"].mux
                assert w1 is not None
                assert w2 is not None
                loop = asyncio.get_running_loop()
                for number in range(400):
                    w1.session.send_message(messages.encode(messages.Ray(f"{number}", None, None)))
                w1.flush()
                began = loop.time()
                await until(lambda: len(c.messages) >= MESSAGES_AT_ONCE)
                w2.send_message(messages.Ray("honest", None, None))
                await until(lambda: ("w2", messages.Ray("honest", None, None)) in c.messages)
                of_w1 = [m for name, m in c.messages if name == "w1"]
                allowed = MESSAGES_AT_ONCE + MESSAGES_A_SECOND * (loop.time() - began) + 1
                assert len(of_w1) <= allowed
                await until(lambda: len(c.messages) == 401, 60)
                of_w1 = [m for name, m in c.messages if name == "w1"]
                assert of_w1 == [messages.Ray(f"{number}", None, None) for number in range(400)]
                assert {row.name: row.messages for row in c.hub.ledger.accounts()}["w1"] == 400

        run(main)

    def test_what_may_wait_to_be_heard_is_its_credit(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                w1 = c.workers["w1"].mux
                assert w1 is not None
                unit = messages.encode(messages.SayAgain())
                for _ in range(40_000):
                    w1.session.send_message(unit)
                w1.flush()
                await until(lambda: len(c.messages) >= MESSAGES_AT_ONCE)
                await asyncio.sleep(1.0)
                waiting = mux_of(c, "w1")._to_hear
                assert sum(len(event.data) for event in waiting) <= c.limits.window
                assert w1.session.memory > 100_000, "the rest is kept where it was made"
                c.workers["w1"].cut()

        run(main)


class TestPlans:
    def test_another_lane_brings_no_other_plan(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1", "w2") as c:
                before = (tmp_path / "roster.json").stat().st_mtime_ns
                await asyncio.sleep(1)  # both have heard of each other
                told = len(c.workers["w2"].messages)
                hello = c.workers["w1"].hello
                for ports in range(41, 61):
                    again = replace(hello, resumes=True, worker_ports=ports)
                    answer = await answer_to(c.hub.socket.path, again.encode())
                    assert isinstance(answer, Welcome)
                    assert answer.node["worker_ports"] == 40
                # A session that is not to be brings none either.
                other = replace(hello, session="1", worker_ports=70)
                assert isinstance(await answer_to(c.hub.socket.path, other.encode()), Refusal)
                assert (tmp_path / "roster.json").stat().st_mtime_ns == before
                await asyncio.sleep(1)
                assert len(c.workers["w2"].messages) == told

        run(main)

    def test_sessions_with_other_plans_bring_them_seldom(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w2") as c:
                answers = []
                for ports in range(41, 61):
                    answer = await answer_to(
                        c.hub.socket.path, hello_of("w1", worker_ports=ports).encode()
                    )
                    await until(lambda: c.hub.nodes["w1"].state != "up")
                    answers.append(answer)
                welcomed = [answer for answer in answers if isinstance(answer, Welcome)]
                refused = [answer for answer in answers if isinstance(answer, Refusal)]
                assert len(welcomed) == 1 + PLAN_CHANGES
                assert {r.problem.code for r in refused} == {codes.PLAN_CHANGES}
                assert c.hub.nodes["w1"].roster_writes == 1 + PLAN_CHANGES
                same = hello_of("w1", worker_ports=welcomed[-1].node["worker_ports"])
                assert isinstance(await answer_to(c.hub.socket.path, same.encode()), Welcome)

        run(main)


class TestChangesOfThePlan:
    def test_that_wait_are_told_as_one(self) -> None:
        """To who takes nothing: all of them, each node as it was last."""

        def plan(name: str, base: int) -> dict[str, Any]:
            return {"name": name, "base": base, "more": "x" * 500}

        async def main() -> None:
            async with pair(INTERACTIVE) as p:
                transport = p.hub.lanes[0].transport
                assert transport is not None
                transport.pause_reading()  # no ACK is heard
                for number in range(20_000):
                    name = f"n{number % 50}"
                    gone = (name,) if number % 7 == 0 else ()
                    nodes = () if gone else (plan(name, number),)
                    p.hub.mux.send_message(messages.NodesChanged(nodes, gone))
                assert p.hub.mux.session.memory <= CONTROL_BUFFER + MAX_MESSAGE
                transport.resume_reading()
                await until(lambda: not p.hub.mux.session.memory)
                await until(lambda: not p.hub.mux._to_tell)
                known: dict[str, int] = {}
                for message in p.worker.messages:
                    assert isinstance(message, messages.NodesChanged)
                    for node in message.nodes:
                        known[node["name"]] = node["base"]
                    for name in message.gone:
                        known.pop(name, None)
                wanted = {f"n{n % 50}": n for n in range(19_950, 20_000) if n % 7}
                assert known == wanted

        run(main)

    @given(
        st.lists(
            st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), unique_by=lambda x: x[0]),
            min_size=2,
            max_size=2,
        )
    )
    def test_two_of_them_say_as_one_what_they_say_one_behind_the_other(
        self, both: list[list[tuple[str, bool]]]
    ) -> None:
        earlier, later = (
            messages.NodesChanged(
                tuple({"name": name, "of": index} for name, stays in changes if stays),
                tuple(name for name, stays in changes if not stays),
            )
            for index, changes in enumerate(both)
        )

        def apply(known: dict[str, int], said: messages.NodesChanged) -> dict[str, int]:
            known = known | {node["name"]: node["of"] for node in said.nodes}
            return {name: of for name, of in known.items() if name not in said.gone}

        known = {"a": 9, "b": 9, "d": 9}
        assert apply(known, later.after(earlier)) == apply(apply(known, earlier), later)


class TestLanes:
    def test_of_all_together_have_a_number_and_the_greediest_loses_the_newest(
        self, tmp_path: Path
    ) -> None:
        async def main() -> None:
            with log_events() as log:
                async with cluster(tmp_path, "w1", "w2") as c:
                    c.hub.ledger.most_lanes = 6
                    lanes = [await c.workers["w1"].connect(BULK) for _ in range(8)]
                    assert [lane.closed.done() for lane in lanes[:2]] == [False, False]
                    await until(lambda: sum(lane.closed.done() for lane in lanes) == 6)
                    assert sum(len(mux_of(c, name).lanes) for name in ("w1", "w2")) == 6
                    assert len(mux_of(c, "w2").lanes) == 2
                    assert await works(c, "w1")
                    assert await works(c, "w2")
            (said,) = of(log, "hub_lanes_shed")
            assert said["node"] == "w1"

        run(main)


def test_the_status_says_what_the_bounds_are(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1") as c:
            for _ in range(5):
                assert await works(c, "w1")
            ledger = ledger_of(c.hub)
            assert ledger.bounds.peer_memory == ledger_module.PEER_MEMORY
            assert ledger.bounds.memory >= ledger_module.LEAST_MEMORY
            (row,) = ledger.peers
            assert (row.name, row.lanes, row.roster_writes, row.shed) == ("w1", 2, 1, 0)
            assert row.seconds > 0
            assert row.log_lines >= 0
            assert json.dumps(row.seconds)

    run(main)


def test_a_bound_leaves_room_below_it() -> None:
    assert 0.5 <= AFTERWARDS < 1


def many(uid: int, key: str, *names: str, base: int = 21_000, ports: int = 20) -> list[HubNode]:
    """Nodes that came by one key, and are up."""
    made: list[HubNode] = []
    for name in names:
        plan = NodePlan(name, "worker", f"127.77.1.{len(made) + 1}", base, ports)
        made.append(HubNode(name, uid=uid, key=key, plan=plan, joined=0.0))
    return made


class TestPlacesOfThePlan:
    """Ports, and descriptors for the listeners that stand for them."""

    def test_a_key_that_has_many_yields_to_one_that_has_few(self) -> None:
        stolen = many(7, "SHA256:stolen", "s1", "s2", "s3")
        honest = many(7, "SHA256:other", "h1")
        assert who_yields([*stolen, *honest], (7, "SHA256:new"), 28, 1e3) is stolen[-1]
        assert who_yields([*stolen, *honest], (7, "SHA256:stolen"), 28, 1e3) is None
        assert who_yields(stolen, (8, ""), 28, 1e3) is stolen[-1], "another user"
        assert who_yields(stolen[:1], (8, ""), 28, 1e3) is None, "who has no more keeps it"
        assert who_yields(stolen[:2], (8, ""), 100, 1e3) is None, "nor for one that wants more"
        assert who_yields(stolen, (8, ""), 28, SETTLED) is None, "nor who is no new one any more"

    def test_who_has_not_come_since_the_daemon_began_and_who_has_no_listeners_keep_theirs(
        self,
    ) -> None:
        away = [node for name in "abc" for node in many(-1, "", name)]
        direct = many(7, "", "d1", "d2", "d3")
        for node in direct:
            node.plan = replace(node.plan, advertised=True)
        assert who_yields([*away, *direct], (8, ""), 28, 1e3) is None

    def test_who_came_for_a_moment_yields_to_anybody(self) -> None:
        fleeting, steady, early = many(7, "", "fleeting", "steady", "early")
        fleeting.ended, steady.ended = 59.0, 61.0
        early.joined, early.ended = -math.inf, 5.0
        everybody = [steady, early, fleeting]
        assert who_yields(everybody, (7, ""), 28, 118.0) is None
        assert who_yields(everybody, (7, ""), 28, 119.0) is fleeting

    def test_of_one_key_are_bounded_and_others_have_theirs(self, tmp_path: Path) -> None:
        async def main() -> None:
            with log_events() as log:
                async with cluster(tmp_path, "honest") as c:
                    c.hub.ledger.most_listeners = 240  # five of these nodes
                    vouch = vouch_of(c.hub, "SHA256:stolen")
                    answers: list[Frame] = []
                    for number in range(8):
                        hello = hello_of(f"stolen-{number}").encode()
                        lane = await knock(c.hub.socket.path, vouch + hello)
                        frame = await lane.answer
                        assert frame is not None
                        answers.append(frame)
                    refused = [frame for frame in answers if frame.kind is Kind.REFUSE]
                    assert len(refused) == 4
                    assert {Refusal.decode(f).problem.code for f in refused} == {
                        codes.LISTENERS_FULL
                    }
                    other = vouch_of(c.hub, "SHA256:other") + hello_of("other").encode()
                    assert isinstance(await answer_to(c.hub.socket.path, other), Welcome)
                    assert set(c.hub.nodes) == {"honest", "other", *(f"stolen-{n}" for n in "012")}
                    rows = {row.name: row for row in ledger_of(c.hub).peers}
                    assert rows["stolen-0"].key == "SHA256:stolen"
                    assert rows["stolen-0"].listeners == 48
                    assert ledger_of(c.hub).users[0].listeners == 240
                    assert await works(c, "honest")
            (said,) = of(log, "node_yielded")
            assert (said["node"], said["key"]) == ("stolen-3", "SHA256:stolen")

        run(main)

    def test_what_the_overlay_stands_for_takes_no_descriptor(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c:
                c.hub.ledger.most_listeners = 10
                assert isinstance(
                    await answer_to(c.hub.socket.path, hello_of("w1").encode()), Refusal
                )
                assert c.roster.room(5) == (0, "files")
                c.offered = replace(c.offered, listens=False)
                assert isinstance(
                    await answer_to(c.hub.socket.path, hello_of("w1").encode()), Welcome
                )
                assert c.roster.room(5) == (5, "plan")

        run(main)

    def test_ports_that_are_used_up_by_names_that_came_for_a_moment_are_there_again(
        self, tmp_path: Path
    ) -> None:
        async def main() -> None:
            async with cluster(tmp_path, ride_through=5.0) as c:
                whole = hello_of("a", worker_ports=6000).encode()
                assert isinstance(await answer_to(c.hub.socket.path, whole), Welcome)
                other = hello_of("b", worker_ports=6001).encode()
                assert isinstance(await answer_to(c.hub.socket.path, other), Welcome)
                honest = hello_of("honest", worker_ports=900).encode()
                full = await answer_to(c.hub.socket.path, honest)
                assert isinstance(full, Refusal)
                assert full.problem.code == codes.PLAN_FULL
                await asyncio.sleep(5.0 + MOMENT + 1)
                assert isinstance(await answer_to(c.hub.socket.path, honest), Welcome)
                assert set(c.hub.nodes) == {"b", "honest"}

        run(main)


def vouch_of(hub: Hub, key: str) -> bytes:
    """What `rayfwd attach` says before a HELLO where sshd tells the key."""
    return Vouch(None, hub.socket.path.with_name(SECRET).read_text().strip(), key).encode()
