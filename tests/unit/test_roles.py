"""The head's and a worker's role, run by the runtime in one process: how they live together."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.config import LogConfig, load
from rayfwd.daemon import watching
from rayfwd.daemon.head import HeadRole
from rayfwd.daemon.watches import LINKS_LATE, MachineWatch
from rayfwd.daemon.worker import WorkerRole
from rayfwd.hub.offer import HubOffer
from rayfwd.hub.peers import TELLINGS
from rayfwd.network.manager import Overlay
from rayfwd.problems import Code, ProblemError
from rayfwd.ray import token
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.token import RayAuth
from rayfwd.session import messages
from rayfwd.session.frames import MAX_MESSAGE, Chunk, Kind
from rayfwd.session.handshake import ASKED, CHANGES, OVERLAY, Hello, Refusal, Welcome
from rayfwd.session.messages import Message
from rayfwd.session.target import Target
from rayfwd.system import logs
from rayfwd.system.gathering import Gathering
from rayfwd.system.sockdiag import ListeningSocket
from rayfwd.transport import link as link_module
from rayfwd.transport import listeners
from rayfwd.watch import reach
from rayfwd.watch.conditions import Condition
from tests.hostile.speaker import Speaker
from tests.unit import daemons
from tests.unit.cluster import NETWORK, answer_to, echo, goodbye, hello_of, serving
from tests.unit.daemons import (
    VERSIONS,
    Daemon,
    FakeRay,
    Site,
    SocketCarrier,
    SocketConnection,
    SocketPipe,
    exposed,
    site,
    started,
)
from tests.unit.loops import log_events, of, run, run_on_fake_clock, until
from tests.unit.ports import free_port


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Redial fast; there is no Ray, so none is dialled."""
    for name, seconds in {"REDIAL_FIRST": 0.05, "REDIAL_PARKED": 0.1, "REDIAL_LAST": 0.2}.items():
        monkeypatch.setattr(link_module, name, seconds)
    monkeypatch.setattr(reach, "servers", lambda _plan: [])
    yield
    logs.setup(LogConfig(), io.StringIO())  # a reload has set it up


async def talk(at: Target, said: bytes = b"hello") -> bytes:
    """What an echo behind a listener answers."""
    reader, writer = await asyncio.open_connection(*at)
    writer.write(said)
    writer.write_eof()
    got = await reader.read()
    await goodbye(writer)
    return got


@asynccontextmanager
async def asking(at: Target) -> AsyncIterator[Callable[[bytes], Awaitable[bytes]]]:
    """A connection to an echo behind a listener: what comes back for each thing that is said."""
    reader, writer = await asyncio.open_connection(*at)

    async def ask(said: bytes) -> bytes:
        writer.write(said)
        return await reader.readexactly(len(said))

    yield ask
    await goodbye(writer)


def test_a_worker_joins_and_both_are_ready(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            there, back = s.path("w1", "head"), s.path("head", "w1")
            await s.start()
            w1, head = s.workers["w1"], s.head
            seen, has = w1.role.node.view, head.role.node.view
            assert seen.nodes == has.nodes
            assert (seen.network, seen.ride_through) == (has.network, has.ride_through)
            assert [node.name for node in seen.nodes] == ["head", "w1"]
            assert seen.own == seen.node_named("w1")
            assert seen.auth == has.auth is not None
            await until(lambda: w1.role.node.view.head_versions == VERSIONS)
            async with serving(echo, exposed(head)), serving(echo, exposed(w1)):
                assert await talk(there) == await talk(back) == b"hello"
            await until(lambda: head.ray_of("w1") == "up")
            plan = await w1.ask("plan")
            assert plan == json.loads((w1.directory / "state/plan.json").read_text())
            assert plan["own"]["name"] == "w1"
            status = await head.ask("status")
            assert (status["state"], status["workers"][0]["state"]) == ("ready", "up")
            with pytest.raises(ProblemError, match="is a worker"):
                await w1.ask("forget", name="head")

    run(main)


def test_a_worker_that_sent_its_secret_is_upgraded_and_sends_it_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its name, its address and its ports, over a restart of either, and what it had sent
    before is worth nothing any more."""
    secret = "73" * 32
    sent = bytearray()
    write = SocketPipe.write

    def recorded(pipe: SocketPipe, chunks: Sequence[Chunk]) -> None:
        sent.extend(b"".join(chunks))
        write(pipe, chunks)

    monkeypatch.setattr(SocketPipe, "write", recorded)

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            head, w1 = s.head, s.workers["w1"]
            await head.start()
            hub, older = (
                head.directory / "run/hub.sock",
                hello_of("w1", key=secret, worker_ports=8).encode(),
            )
            await until(head.head.links.stand)
            assert isinstance(await answer_to(hub, older), Welcome)
            await until(lambda: head.role.node.view.node_named("w1"))
            before = head.role.node.view.node_named("w1")
            path = w1.directory / "state/node.key"
            path.parent.mkdir(parents=True)
            path.write_text(secret + "\n")
            await w1.start()
            await w1.ready()
            assert w1.role.node.view.own == before
            assert secret not in path.read_text(), "it is of no use any more"
            for never in (secret, path.read_text().strip().removeprefix("ed25519:")):
                assert never not in sent.decode(errors="replace")
            refused = await answer_to(hub, older)
            assert isinstance(refused, Refusal)
            assert refused.problem.code == codes.NAME_TAKEN
            await w1.stop()
            await w1.start()
            await w1.ready()
            assert w1.role.node.view.own == before


def test_ports_that_open_on_a_node_are_reached_on_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a program listens there, and no longer; one that is taken here is named, and reached
    when it is free."""
    for name in ("RETRY_FIRST", "RETRY_LAST"):
        monkeypatch.setattr(listeners, name, 3600.0)

    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            await s.start()
            w1, head, w2 = s.workers["w1"], s.head, s.workers["w2"]
            own = w1.role.node.view.own
            assert own is not None
            at = Target(own.address, free_port())
            opened = ListeningSocket(*at, os.geteuid(), 1)

            def reached() -> list[bool]:
                return [
                    daemon.role.node.listeners.is_open(daemon.listens_for(at))
                    for daemon in (head, w2)
                ]

            async with serving(echo, at):
                w1.listening.append(opened)
                await until(lambda: all(reached()))
                for daemon in (head, w2):
                    assert await talk(daemon.listens_for(at)) == b"hello"
                w1.listening.clear()
                await until(lambda: not any(reached()))
                with socket.socket() as squatter:
                    squatter.bind(head.listens_for(at))
                    squatter.listen()
                    w1.listening.append(opened)
                    board = head.role.node.board

                    def named() -> list[Condition]:
                        return [c for c in board.conditions if c.code is codes.OPEN_PORT_TAKEN]

                    await until(named)
                    (taken,) = named()
                    assert str(at.port) in taken.problem.cause
                    assert head.runtime.health.state() == "ready"
                    # The end of a program of Ray's user is seen.
                    head.listening.append(ListeningSocket("0.0.0.0", at.port, os.geteuid(), 2))
                    await until(lambda: at.port in (head.role.node.open_ports or ()))
                head.listening.clear()
                await until(lambda: all(reached()))

    run(main)


def test_users_whom_rayfwd_net_leaves_out_are_a_condition(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            await s.start()
            node = s.workers["w1"].role.node
            node.overlay._set_left_out({"users": ["ann"], "cause": "nobody names them"})
            (found,) = (await s.workers["w1"].ask("status"))["conditions"]
            assert (found["code"], found["subject"]) == ("users_left_out", "w1")
            assert "programs of ann" in found["cause"]
            node.overlay._set_left_out(None)
            assert (await s.workers["w1"].ask("status"))["conditions"] == []

    run(main)


async def answer_of(asker: Daemon, at: Target) -> bool | None:
    """What the node at that address says of a port, when a program of `asker` dials it."""
    await until(lambda: asker.role.node.view.node_at(at.address) is not None)  # plans are gathered
    told: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()
    asker.role.node._ask(*at, told.set_result)
    return await told


def test_a_node_says_at_once_whether_a_port_is_open(tmp_path: Path) -> None:
    """The kernel of the node that is dialled knows, and all are told of an open one first."""

    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            await s.start()
            w1, head, w2 = s.workers["w1"], s.head, s.workers["w2"]
            for asked, askers in ((w1, (head, w2)), (head, (w1,))):
                own = asked.role.node.view.own
                assert own is not None
                with socket.socket() as program:
                    program.bind((own.address, 0))  # nobody else has that port
                    at = Target(*program.getsockname())
                    for asker in askers:
                        assert await answer_of(asker, at) is False
                    program.listen()
                    asked.listening.append(ListeningSocket(*at, os.geteuid(), 1))
                    for asker in askers:
                        assert await answer_of(asker, at) is True
                        known = asker.role.node.announced.ports(asked.name)
                        assert known is not None
                        assert at.port in known, "the news came before the answer"
                asked.listening.clear()
                assert not asked.role.node.dials.refused["here"], "a question is no dial"
            await w1.stop()
            own = w2.role.node.view.node_named("w1")
            assert own is not None
            head_role = head.role
            assert isinstance(head_role, HeadRole)
            await until(lambda: not head_role.reaches("w1"))
            gone = Target(own.address, free_port())
            assert await answer_of(head, gone) is True, "what dials it is held"

    run(main)


@pytest.mark.parametrize("who", ["head", "w1"])
def test_an_earlier_version_is_asked_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """It would take a question for a connection that it does not understand."""
    if who == "head":
        offer = HeadRole.offer

        def without(role: HeadRole) -> HubOffer:
            return replace(offer(role), features=offer(role).features - {ASKED})

        monkeypatch.setattr(HeadRole, "offer", without)
    else:
        hello = WorkerRole.hello

        def older(role: WorkerRole) -> Hello:
            of = hello(role)
            return of if of.node != "w1" else replace(of, features=of.features - {ASKED})

        monkeypatch.setattr(WorkerRole, "hello", older)

    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            await s.start()
            asked = s.head if who == "head" else s.workers["w1"]
            own = asked.role.node.view.own
            assert own is not None
            askers = [s.workers["w2"]] if who == "head" else [s.head, s.workers["w2"]]
            for asker in askers:
                assert await answer_of(asker, Target(own.address, free_port())) is None
            role = s.head.role
            assert isinstance(role, HeadRole)
            assert not role._hub.router.refused.last()

    run(main)


def test_what_is_open_on_a_node_is_known_after_a_restart(tmp_path: Path) -> None:
    """Of either side: each says again what the other has forgotten. Of a node that is away nobody
    knows."""

    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            w1, head, w2 = s.workers["w1"], s.head, s.workers["w2"]
            await s.start()
            own = w1.role.node.view.own
            assert own is not None
            port = free_port()
            w1.listening.append(ListeningSocket(own.address, port, os.geteuid(), 1))

            def known(daemon: Daemon) -> bool:
                return daemon.role.node.announced.ports("w1") == frozenset({port})

            await until(lambda: known(head) and known(w2))
            for daemon in (w1, head, w2):
                await daemon.restart()
                await s.ready()
                await until(lambda: known(head) and known(w2))
            await w1.stop()
            await until(lambda: w2.role.node.announced.ports("w1") is None)

    run(main)


def test_what_a_new_session_says_first_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the head sees to the session itself later: such news are gathered."""

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            w1, head = s.workers["w1"], s.head
            await s.start()
            own = w1.role.node.view.own
            assert own is not None
            port = free_port()
            w1.listening.append(ListeningSocket(own.address, port, os.geteuid(), 1))
            announced = head.role.node.announced
            await until(lambda: announced.ports("w1") == frozenset({port}))
            await w1.stop()
            await until(lambda: announced.ports("w1") is None)
            gathering = head.head._gathering
            monkeypatch.setattr(gathering, "_seconds", 3600.0)
            head.head.hub_changed()
            await until(lambda: left(gathering) > 60)
            await w1.start()
            await until(lambda: announced.ports("w1") == frozenset({port}))
            monkeypatch.undo()
            gathering.settle()  # what would come in an hour
            assert announced.ports("w1") == frozenset({port})

    run(main)


def left(gathering: Gathering) -> float:
    """Seconds of its pause; 0: it has none."""
    timer = gathering._pause
    return 0.0 if timer is None else timer.when() - asyncio.get_running_loop().time()


def test_ray_waits_for_the_heads(tmp_path: Path) -> None:
    """A worker's Ray is started once the head's is up; one that runs is left alone."""

    async def main() -> None:
        async with started(tmp_path, "w1") as s:
            w1, head = s.workers["w1"], s.head
            head.ray.become("failed")
            await until(lambda: not w1.ray.may_start)
            assert w1.ray.now.state == "up"
            w1.ray.become("waiting")
            waits = "Ray on this node waits for the head's Ray, whose state is: failed"
            assert [c.problem.cause for c in w1.runtime.health.waiting_for()] == [waits]
            head.ray.become("up")
            await w1.ready()

    run(main)


@pytest.mark.parametrize("service", ["gcs", "dashboard", "client"])
def test_ray_is_not_started_towards_who_has_a_port_of_the_heads(
    tmp_path: Path, service: str
) -> None:
    """Nor is anything else done there, and the node is not ready before it is gone."""

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            await s.head.start()
            await s.head.ready()
            head, w1 = s.head.role.node.view.own, s.workers["w1"]
            assert head is not None
            with socket.socket() as squatter:
                squatter.bind(w1.listens_for(Target(head.address, head.services[service])))
                squatter.listen()
                squatter.setblocking(False)
                await w1.start()
                await until(lambda: w1.role.node.listeners.blocked)
                await until(lambda: w1.role.node.view.own is not None)
                assert not w1.ray.may_start
                waits = {c.problem.code: c.problem.cause for c in w1.runtime.health.waiting_for()}
                assert "in use on this machine by user" in waits[codes.LISTENER_BLOCKED]
                assert w1.role.node.situation() is None or service != "gcs"
                with pytest.raises(BlockingIOError):
                    squatter.accept()
            await until(lambda: w1.ray.may_start)
            await w1.ready()

    run(main)


@pytest.mark.parametrize("service", ["node_manager"])
def test_a_node_is_not_ready_while_a_listener_is_blocked(tmp_path: Path, service: str) -> None:
    """Another node's, that is: Ray is started, and what goes there is missing."""

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            await s.head.start()
            await s.head.ready()
            head, w1 = s.head.role.node.view.own, s.workers["w1"]
            assert head is not None
            with socket.socket() as squatter:
                squatter.bind(w1.listens_for(Target(head.address, head.services[service])))
                squatter.listen()
                await w1.start()
                await until(lambda: w1.ray.may_start)

                def waits_for() -> list[Code]:
                    return [why.problem.code for why in w1.runtime.health.waiting_for()]

                # Ray comes up meanwhile.
                await until(
                    lambda: waits_for() == [codes.LISTENER_BLOCKED], what=lambda: str(waits_for())
                )
                assert (await w1.ask("status"))["state"] == "waiting"
            await w1.ready()

    run(main)


@pytest.mark.parametrize("who", ["head", "w1"])
def test_a_restart_hands_over(tmp_path: Path, who: str) -> None:
    """Sessions, streams and listeners live on, and what had been told is told again."""

    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            at = s.path("w1", "w2")
            await s.start()
            w1 = s.workers["w1"]
            async with serving(echo, exposed(s.workers["w2"])), asking(at) as ask:
                assert await ask(b"before") == b"before"
                session, before = s.head.head.muxes()["w1"], s.node(who).role
                ray = s.node(who).ray
                await s.node(who).restart()
                assert s.node(who).role is not before
                assert ray.ended == "left running"
                assert await ask(b"after") == b"after"
                assert await talk(at) == b"hello"
            assert (s.head.head.muxes()["w1"] is session) is (who == "w1")
            await w1.ready()
            await until(lambda: s.head.ray_of("w1") == "up")
            assert s.head.peer("w1").ridden_through == 1
            assert w1.role.node.view.head_versions == VERSIONS

    run(main)


def test_a_restart_that_asks_for_another_plan_has_it_at_once(tmp_path: Path) -> None:
    """A session keeps the plan that it began with: `ray.worker_ports` was raised, and the node
    restarted, as its problem says, and nothing came of it until the next cut that was too long."""

    async def main() -> None:
        async with started(tmp_path, "w1", "w2") as s:
            w1 = s.workers["w1"]
            sessions = dict(s.head.head.muxes())
            w1.worker_ports += 4
            await w1.restart()
            await w1.ready()

            def known() -> list[int]:
                views = [node.role.node.view for node in (s.head, w1, s.workers["w2"])]
                return [n.worker_ports for view in views for n in view.nodes if n.name == "w1"]

            await until(lambda: known() == [w1.worker_ports] * 3, what=lambda: str(known()))
            assert s.head.head.muxes()["w1"] is not sessions["w1"]
            assert s.head.head.muxes()["w2"] is sessions["w2"]
            session = s.head.head.muxes()["w1"]
            await w1.restart()
            await w1.ready()
            assert s.head.head.muxes()["w1"] is session, "it asks for what it has"

    run(main)


def test_a_head_that_knows_no_levels_is_not_asked_for_one_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of 0.1.0: a worker with the overlay keeps its session through each restart. When the
    head is upgraded, the next restart brings the level into the plan."""
    offer = HeadRole.offer

    def older(role: HeadRole) -> HubOffer:
        return replace(offer(role), features=frozenset({"dial_back"}))

    async def allowed(overlay: Overlay) -> None:
        overlay.level, overlay.settled = "overlay", True

    monkeypatch.setattr(HeadRole, "offer", older)

    async def main() -> None:
        async with started(tmp_path, "w1") as s:
            w1, session = s.workers["w1"], s.head.head.muxes()["w1"]

            async def restart() -> None:
                cuts = s.head.peer("w1").cuts
                await w1.restart()
                await until(lambda: s.head.peer("w1").cuts > cuts)
                await until(w1.worker.links.stand)

            with monkeypatch.context() as patched:
                patched.setattr(Overlay, "settle", allowed)
                for _ in range(2):
                    await restart()
                    assert s.head.head.muxes()["w1"] is session
                monkeypatch.setattr(HeadRole, "offer", offer)
                w1.cut()
                await until(lambda: OVERLAY in w1.worker._plan.hub_features)
                await restart()
            assert s.head.head.muxes()["w1"] is not session
            nodes = s.head.role.node
            await until(lambda: {n.name: n.level for n in nodes.view.nodes}.get("w1") == "overlay")

    run(main)


def test_the_heads_ray_is_started_anew(tmp_path: Path) -> None:
    """Workers hear which start of it is up; a restart of the daemon is none."""

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            await s.start()
            w1 = s.workers["w1"]
            await until(lambda: w1.ray.head_start == "1")
            s.head.ray.become("failed")
            s.head.ray.starts = 2
            s.head.ray.become("starting")
            await until(lambda: not w1.ray.may_start)
            assert w1.ray.head_start == "1", "that one is not up"
            s.head.ray.become("up")
            await until(lambda: w1.ray.head_start == "2")
            await w1.restart()
            await until(lambda: w1.ray.head_start == "2")

    run(main)


def test_a_reload_opens_what_the_file_now_has(tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, "w1") as s:
            w1, head = s.workers["w1"], s.head
            at = s.path("w1", "head")
            w1.more = 'log = {level = "warning"}'
            w1.write()
            assert await w1.ask("reload") == {"changed": ["log.level", "forward"], "kept": []}
            async with serving(echo, exposed(head)):
                await until(lambda: w1.role.node.listeners.is_open(at))
                assert await talk(at) == b"hello"
            w1.forwards.clear()
            w1.more = "ride_through = 5"
            w1.file.write_text(w1.file.read_text().replace("expose", "exposed"))
            (mistake,) = (await w1.ask("reload"))["mistakes"]
            assert "exposed" in mistake
            assert w1.role.node.config.ride_through == s.ride_through

    run(main)


def test_what_a_head_exposes_after_a_reload_is_for_clients(tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path) as s:
            assert s.head.expose in s.head.head.offer().client_ports
            s.head.expose += 1
            s.head.write()
            assert await s.head.ask("reload") == {"changed": ["expose"], "kept": []}
            assert s.head.expose in s.head.head.offer().client_ports
            assert s.head.expose - 1 not in s.head.head.offer().client_ports

    run(main)


def test_a_refused_hello_is_said_on_both_sides(tmp_path: Path) -> None:
    """Another machine with a name that is taken."""

    async def main() -> None:
        async with started(tmp_path, "w1") as s:
            twin = s.worker("twin")
            twin.name = "w1"
            twin.directory_name = "twin"
            await twin.start()
            health = twin.runtime.health
            await until(lambda: [c.code for c in health.waiting_for()] == [codes.NAME_TAKEN])
            assert health.state() == "waiting"
            board = s.head.role.node.board
            await until(lambda: codes.NAME_TAKEN in [c.code for c in board.conditions])
            assert s.head.runtime.health.state() == "ready"
            await s.workers["w1"].ready()

    run(main)


def test_a_thousand_dead_nodes_end_no_daemon(tmp_path: Path) -> None:
    """Their table is longer than a message may be; who lives is told of, and that is said once."""
    names = {f"custom_resource_{number:02d}": 1.0 for number in range(24)}
    names |= {"CPU": 8.0, "GPU": 1.0, "memory": 22174260992.0, "accelerator_type:A100": 1.0}
    lost = "Unexpected termination: health check failed due to missing too many heartbeats"
    rows = [NodeSeen("0" * 56, "127.77.0.1", True, "ALIVE", names)]
    rows += [
        NodeSeen(f"{number:056x}", "127.77.0.2", False, "DEAD", names, 5.0, 5.0 + number, lost * 2)
        for number in range(1, 1001)
    ]
    report = ClusterReport(5.0, {"CPU": (0.0, 8.0)}, tuple(rows))
    assert len(json.dumps(report.to_wire())) > MAX_MESSAGE

    async def main() -> None:
        async with started(tmp_path, "w1") as s:
            w1, head = s.workers["w1"], s.head
            with log_events() as log:
                for _ in range(3):
                    head.head.reported(report, report.message())
                await until(lambda: w1.worker.cluster)
            heard = w1.worker.cluster
            assert heard is not None
            assert heard.nodes == (rows[0], *rows[-100:])
            assert head.head.cluster == report, "the head's own status has all"
            (said,) = of(log, "message_cut")
            assert said["left_out"] == "dead nodes but the last 100"
            assert of(log, "message_too_long") == []

    run(main)


def test_conditions_in_any_script_end_no_daemon(tmp_path: Path) -> None:
    """A worker says what is no longer than a message may be, and would be longer as the head
    passes it on; the others hear of all of it."""
    text = "\U0001f600" * 2000
    rows = [
        {
            "code": "ray_died",
            "severity": "error",
            "subject": f"w1/{number}",
            "cause": text,
            "remedy": text,
            "seen_by": "w1",
        }
        for number in range(30)
    ]
    said = json.dumps({"type": "conditions", "conditions": rows}, ensure_ascii=False).encode()
    assert len(said) < MAX_MESSAGE < len(json.dumps(rows))

    def of_w1(daemon: Daemon) -> set[str]:
        return {c.subject for c in daemon.role.node.board.conditions if c.code == codes.RAY_DIED}

    async def main() -> None:
        async with started(tmp_path, "w1", "w2") as s:
            mux = s.workers["w1"].role.muxes()["head"]
            with log_events() as log:
                mux.session.send_message(said)
                mux.flush()
                wanted = {row["subject"] for row in rows}
                await until(lambda: of_w1(s.head) == of_w1(s.workers["w2"]) == wanted)
            assert not s.head.over
            assert "the ends of long texts" in [e["left_out"] for e in of(log, "message_cut")]
            assert of(log, "message_too_long") == []

    run(main)


def test_a_worker_that_asks_for_all_again_and_again_is_told_seldom(tmp_path: Path) -> None:
    """Itself alone: what it asks for in 24 bytes is not told to all others."""

    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            await s.start()
            head = s.head.head
            report = ClusterReport(as_of=None, totals={})
            head.reported(report, report.message())
            await until(lambda: s.workers["w2"].worker.cluster is not None)
            told: dict[str, int] = {"w1": 0, "w2": 0}
            for name in told:
                mux = head._hub.nodes[name].mux
                assert mux is not None
                send = mux.send_message

                def counted(
                    message: Message, name: str = name, send: Callable[[Message], None] = send
                ) -> None:
                    told[name] += isinstance(message, messages.Cluster)
                    send(message)

                mux.send_message = counted  # type: ignore[method-assign]
            for _ in range(50):
                head.message("w1", messages.SayAgain())
            assert told == {"w1": TELLINGS, "w2": 0}

    run(main)


def test_a_worker_does_not_name_the_heads_events(tmp_path: Path) -> None:
    """Codes that are made up are a field, and so many lines are written, whatever they say."""
    out = io.StringIO()

    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            await s.start()
            logs.setup(LogConfig(format="json"), out)
            for turn in range(40):
                told = [
                    messages.ConditionTold(f"made_{turn}_{n}", "error", f"w1/{n}", "c", "r", "w1")
                    for n in range(50)
                ]
                s.head.head.message("w1", messages.Conditions(tuple(told)))
            s.head.head.message("w2", messages.Conditions((replace(told[0], subject="w2"),)))

    run(main)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["event"] for e in events if e["event"].startswith("made_")] == []
    of_w1 = [e for e in events if e.get("seen_by") == "w1"]
    assert of_w1[0]["code"] == "made_0_0"
    assert len(of_w1) <= logs.ABOUT_LIMIT + 10
    assert [e["code"] for e in events if e.get("seen_by") == "w2" and e["event"] == "condition"]


def test_a_message_that_says_what_cannot_be_is_left_out_and_said(tmp_path: Path) -> None:
    """A plan that is none, a report that is none, a token that is none, and ports of others."""

    async def main() -> None:
        async with started(tmp_path, "w1") as s:
            w1, head = s.workers["w1"], s.head
            (down,), up = head.role.muxes().values(), w1.role.muxes()["head"]
            view = w1.role.node.view
            with log_events() as log:
                down.send_message(messages.Nodes(({"name": "w9"},)))
                down.send_message(messages.Cluster({"nodes": 5}))
                down.send_message(messages.Auth("perhaps", None))
                down.send_message(messages.Nodes(()))
                up.send_message(messages.DialBack(1, (22,), "0" * 32))
                up.send_message(messages.Nodes(()))  # not for a head
                await until(lambda: len(of(log, "message_malformed")) >= 5)
            causes = {
                (e["node"], e["cause"].partition(":")[0]) for e in of(log, "message_malformed")
            }
            assert causes == {
                ("head", "not a node's plan"),
                ("head", "not a cluster report"),
                ("head", "ray_auth"),
                ("head", "the first node is not the head"),
                ("w1", "not ports that w1 advertises"),
            }
            assert w1.role.node.view == view
            assert w1.worker.cluster is None
            await w1.ready()

    run(main)


def test_a_fault_in_a_watcher_ends_no_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged, and the watcher looks again; what a part meets ends the daemon."""
    monkeypatch.setattr(watching, "AGAIN_FIRST", 0.05)
    began: list[str] = []

    async def look(watch: MachineWatch) -> None:
        began.append(watch._name)
        raise ValueError("a message that is too long, say")

    monkeypatch.setattr(MachineWatch, "run", look)

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            at = s.path("w1", "head")
            with log_events() as log:
                await s.start()
                async with serving(echo, exposed(s.head)), asking(at) as ask:
                    await until(lambda: began.count("head") > 2 and began.count("w1") > 2)
                    assert await ask(b"still there") == b"still there"
            faults = of(log, "watcher_fault")
            assert {entry["watcher"] for entry in faults} == {"machine"}
            assert not s.head.over
            s.head.ray.broken = True
            s.head.ray._wake.set()
            with pytest.raises(ValueError, match="a fault of Ray"):
                await s.head.ended()

    run(main)


def test_a_watcher_that_fails_again_and_again_waits_longer() -> None:
    """Never longer than the watchdog waits for its heartbeat."""
    began: list[float] = []

    async def look() -> None:
        now = asyncio.get_running_loop().time()
        began.append(now)
        await asyncio.sleep(watching.STEADY if len(began) == 8 else 0)
        if len(began) != 2:  # to end is a fault as well
            raise KeyError("of ours")

    async def main() -> None:
        task = asyncio.create_task(watching.watch("it", look))
        await until(lambda: len(began) == 10, 1000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with log_events() as log:
        run_on_fake_clock(main)
    waits = [entry["again_in"] for entry in of(log, "watcher_fault")]
    assert waits == [2, 4, 8, 16, 30, 30, 30, 2, 4, 8]
    assert watching.AGAIN_LAST < LINKS_LATE


def test_a_cut_is_ridden_through_and_seen(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            at = s.path("w1", "head")
            await s.start()
            w1, head = s.workers["w1"], s.head
            async with serving(echo, exposed(head)), asking(at) as ask:
                assert await ask(b"before") == b"before"
                w1.cut()
                await until(w1.runtime.health.waiting_for)
                assert await ask(b"after") == b"after"
            await w1.ready()
            link = w1.runtime.health.now().link
            assert link is not None
            assert link.ridden_through == 1

    run(main)


def test_an_end_stops_ray_first_and_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, "w1") as s:
            w1, head = s.workers["w1"], s.head
            ray, control = w1.ray, w1.role.node.config.control_socket
            await w1.stop()
            assert ray.ended == "stopped"
            assert not control.exists()
            await until(lambda: head.peer("w1").state == "down")
            # It went in order: nobody is told of a link that is down.
            assert [c for c in head.role.node.board.conditions if c.code == codes.LINK_DOWN] == []
            hub = head.role.node.config.hub_socket
            await head.stop()
            assert not hub.exists()

    run(main)


def test_a_node_that_is_forgotten_comes_back_as_a_new_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, "w1", "w2") as s:
            await s.workers["w1"].stop()
            told = (await s.head.ask("forget", name="w1"))["forgotten"]
            assert (told["node"], told["token"], told["restarted"]) == ("w1", "off", [])
            assert await s.head.ask("forget", name="w1") == {"forgotten": None}
            w2 = s.workers["w2"]
            await until(lambda: w2.role.node.view.node_named("w1") is None)
            await s.workers["w1"].start()
            await until(lambda: w2.role.node.view.node_named("w1") is not None)

    run(main)


def test_a_node_that_says_that_it_leaves_is_not_lost(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            await s.start()
            await s.workers["w1"].stop()
            await until(lambda: s.head.peer("w1").state == "down")
            (row,) = (await s.head.ask("status"))["workers"]
            assert (row["state"], row["left"]) == ("down", True)
            assert not [c for c in s.head.role.node.board.conditions if c.subject == "w1"]
            await s.workers["w1"].start()
            await until(lambda: s.head.peer("w1").state == "up")
            assert not s.head.peer("w1").left

    run(main)


def test_a_node_for_a_while_gives_its_name_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            s.workers["w1"].more = "ephemeral = true"
            s.workers["w1"].write()
            await s.start()
            head, w2 = s.head, s.workers["w2"]
            await s.workers["w1"].stop()
            await until(lambda: w2.role.node.view.node_named("w1") is None)
            assert [r["name"] for r in (await head.ask("status"))["roster"]] == ["head", "w2"]
            await w2.stop()
            assert [r["name"] for r in (await head.ask("status"))["roster"]] == ["head", "w2"]

    run(main)


def come_and_go(hub: Path, name: str, ports: Sequence[int]) -> None:
    """A node that says all that it may, and gives its name back."""
    with Speaker(hub) as speaker:
        speaker.join(name, ephemeral=True, features=frozenset({CHANGES, OVERLAY}))
        speaker.tell({"type": "ray", "phase": "up", "version": None, "python": None})
        speaker.tell({"type": "open_ports", "anew": True, "opened": ports, "closed": []})
        told = {"code": "ray_died", "severity": "error", "subject": name, "cause": "", "remedy": ""}
        speaker.tell({"type": "conditions", "conditions": [{**told, "seen_by": name}]})
        speaker.send(Kind.CLOSE)
        assert speaker.is_cut()


def knowing(word: str, most: int) -> list[type]:
    """What dictionaries and sets of this process have more than so many texts with that word."""
    gc.collect()

    def has(item: object) -> bool:
        parts = item if isinstance(item, tuple) else (item,)
        return any(isinstance(part, str) and word in part for part in parts)

    found = [it for it in gc.get_objects() if isinstance(it, dict | set | frozenset)]
    return [type(it) for it in found if sum(map(has, list(it))) > most]


def test_names_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    """Neither on the head nor on another worker: one key may come under any number of them."""

    async def main() -> None:
        async with started(tmp_path, "w1") as s:
            hub = s.head.directory / "run/hub.sock"
            for number in range(30):
                ports = range(40_000 + number, 40_020 + number)
                await asyncio.to_thread(come_and_go, hub, f"gone-{number}", list(ports))
            for daemon in (s.head, s.workers["w1"]):
                node = daemon.role.node
                await until(lambda n=node: len(n.view.nodes) == 2)  # type: ignore[misc]
            await until(lambda: not knowing("gone-", 10), what=lambda: str(knowing("gone-", 10)))
            # What is said of the last one is over soon.
            board = s.head.role.node.board
            await until(lambda: not [c for c in board.conditions if "gone-" in c.subject])
            assert "gone-" not in json.dumps(await s.head.ask("status"))

    run(main, 60)


OLD = RayAuth("token", "old")


def has_token(site: Site, *names: str) -> list[RayAuth | None]:
    """What Ray of these nodes is to be started with."""
    return [site.node(name).ray.auth for name in names]


@pytest.mark.parametrize("away", ["parked", "down"])
def test_a_node_that_is_forgotten_leaves_with_an_old_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    """The others have the new one, also who was away meanwhile; whoever is gone never hears it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    token.keep(OLD, tmp_path / "head" / "state")

    async def main() -> None:
        async with started(tmp_path, "w1", "w2", "gone") as s:
            head, w1, w2, gone = (s.node(name) for name in ("head", "w1", "w2", "gone"))
            assert has_token(s, "head", "w1", "w2", "gone") == [OLD] * 4
            if away == "down":
                await w2.stop()
            else:
                monkeypatch.setattr(SocketCarrier, "dial", no_way)
                w2.cut()
            await until(lambda: head.peer("w2").state == away)
            told = (await head.ask("forget", name="gone"))["forgotten"]
            assert told["token"] == "turned"
            assert (told["restarted"], told["away"]) == (["head", "w1"], ["w2"])
            await until(lambda: w1.ray.auth != OLD)
            (new, same) = has_token(s, "head", "w1")
            assert new == same != OLD
            assert token.kept_auth(tmp_path / "w1" / "state") == new
            assert token.kept_auth(tmp_path / "w2" / "state") == OLD
            monkeypatch.undo()
            monkeypatch.setenv("HOME", str(tmp_path))
            if away == "down":
                await w2.start()
            await until(lambda: w2.ray.auth == new)
            assert token.kept_auth(tmp_path / "w2" / "state") == new
            # It can come as a new node, as nothing keeps it here from the hub's socket.
            assert token.kept_auth(tmp_path / "gone" / "state") in (OLD, new)
            assert gone.role.node.view.auth is not None

    run(main)


async def no_way(self: SocketCarrier, hasty: bool) -> SocketConnection:
    raise codes.HUB_ABSENT.error("the network is gone", "wait")


def test_forget_leaves_the_token_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    token.keep(OLD, tmp_path / "head" / "state")

    async def main() -> None:
        async with started(tmp_path, "w1", "w2") as s:
            kept = (await s.head.ask("forget", name="w1", keep_token=True))["forgotten"]
            assert (kept["token"], kept["restarted"]) == ("kept", [])
            monkeypatch.setenv("RAY_AUTH_TOKEN", "the operator's")
            named = (await s.head.ask("forget", name="w2"))["forgotten"]
            assert (named["token"], named["variable"]) == ("named", "RAY_AUTH_TOKEN")
            assert has_token(s, "head", "w1", "w2") == [OLD] * 3

    run(main)


def test_ray_by_hand_is_named_when_the_token_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    token.keep(OLD, tmp_path / "head" / "state")

    async def main() -> None:
        async with started(tmp_path, "w1", "w2", "w3") as s:
            s.workers["w1"].ray.become("by_hand")
            await until(lambda: s.head.ray_of("w1") == "by_hand")
            monkeypatch.setattr(FakeRay, "by_hand", True)
            told = (await s.head.ask("forget", name="w2"))["forgotten"]
            assert (told["restarted"], told["by_hand"]) == (["w3"], ["head", "w1"])

    run(main)


def test_two_daemons_do_not_share_a_state_directory(tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path) as s:
            other = Daemon(s, "head", 0)
            s.head, was = other, s.head
            with pytest.raises(ProblemError) as caught:
                await other.start()
            assert caught.value.problem.code == codes.ALREADY_RUNNING
            s.head = was

    run(main)


def test_what_is_told_before_the_first_welcome_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is not known until then: beside another cluster the usual one is that one's."""
    asked: list[str] = []

    class Claim(daemons.NoClaim):
        def take(self, network: str) -> bool:
            asked.append(network)
            return network != "127.77.0.0/16"

    monkeypatch.setattr(daemons, "NoClaim", Claim)

    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            await s.start()
            await s.ready()
            await until(lambda: len(s.head.role.node.view.nodes) == 3)
            plans = {plan.name: plan.to_wire() for plan in s.head.role.node.view.nodes}
            w1 = s.workers["w1"]
            await w1.stop()
            shutil.rmtree(w1.directory / "state")
            asked.clear()
            config = load(w1.file)
            config.state_dir.mkdir(parents=True)
            role = WorkerRole(config, w1._makers())
            role._plan.hear_changes(messages.NodesChanged((plans["w2"],), ()))
            assert asked == []
            assert [node.name for node in role.node.view.nodes] == []
            known = (plans["head"], plans["w1"])
            welcome = Welcome("0", plans["w1"], known, NETWORK, 9.0, features=frozenset({CHANGES}))
            role.welcomed(welcome)
            assert asked == [NETWORK]
            assert {node.name for node in role.node.view.nodes} == {"head", "w1", "w2"}

    run(main)
