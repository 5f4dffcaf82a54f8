"""The direct way between two workers: whole daemons in one process, sockets in place of SSH."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.config import ConfigError, load, parse
from rayfwd.daemon import head as head_module
from rayfwd.direct import dialled as dialled_module
from rayfwd.direct.reserve import ThroughHub
from rayfwd.doctor import direct_checks
from rayfwd.hub.connection import HELLO_TIMEOUT
from rayfwd.session.frames import MAX_PAYLOAD, Frame, Kind, first_frame
from rayfwd.session.handshake import PROOF, Challenge, Hello, Refusal, Welcome
from rayfwd.session.lane import LaneClass
from rayfwd.session.preamble import MARKER
from rayfwd.session.proof import NodeKey
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening, Target
from rayfwd.status import Direct, Lane
from rayfwd.system.sockdiag import ListeningSocket
from rayfwd.transport import link as link_module
from rayfwd.transport.link_lane import LinkLane, LinkRefusedError
from rayfwd.watch import reach
from tests.unit.cluster import cluster, echo, goodbye, hello_of, serving
from tests.unit.daemons import Daemon, DirectCarrier, Site, exposed, site
from tests.unit.loops import log_events, of, run, until
from tests.unit.ports import free_port
from tests.unit.real_sshd import RealSshd

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redial fast; there is no Ray, so none is dialled."""
    for name, seconds in {"REDIAL_FIRST": 0.05, "REDIAL_PARKED": 0.1, "REDIAL_LAST": 0.2}.items():
        monkeypatch.setattr(link_module, name, seconds)
    monkeypatch.setattr(dialled_module, "AWAY_INTERVAL", 0.2)
    monkeypatch.setattr(reach, "servers", lambda _plan: [])


def way(daemon: Daemon) -> Direct | None:
    """The one that a worker has, by its status."""
    rows = daemon.runtime.health.now().direct
    return rows[0] if rows else None


def why(daemon: Daemon) -> str:
    """Why it does not stand."""
    row = way(daemon)
    return "" if row is None else row.why or ""


def goes(daemon: Daemon) -> bool:
    row = way(daemon)
    return row is not None and row.way == "direct"


def through_head(s: Site) -> int:
    """Bytes that came to the hub."""
    return sum(mux.stats().bytes_in for mux in s.head.head.muxes().values())


def carrier(s: Site) -> DirectCarrier:
    return s.workers["w1"].direct_carriers["w2"]


@asynccontextmanager
async def two(tmp_path: Path) -> AsyncIterator[tuple[Site, Target, Target]]:
    """w1 dials w2. Where streams lead from each to the other."""
    async with site(tmp_path, "w1", "w2") as s:
        s.workers["w1"].directs = ["w2"]
        there, back = s.path("w1", "w2"), s.path("w2", "w1")
        await s.start()
        await all_lanes(s)
        yield s, there, back


async def all_lanes(s: Site) -> None:
    """The way stands, and nothing is being dialled."""
    workers = [s.workers[name] for name in ("w1", "w2")]
    await until(lambda: all(goes(each) and len(lanes_of(each)) == 3 for each in workers), 30)


def lanes_of(daemon: Daemon) -> tuple[Lane, ...]:
    row = way(daemon)
    return () if row is None else row.lanes


async def asked(at: Target, said: bytes) -> bytes:
    """What an echo answers."""
    reader, writer = await asyncio.open_connection(*at)
    writer.write(said)
    got = await reader.readexactly(len(said))
    await goodbye(writer)
    return got


def test_streams_of_both_take_the_direct_way(tmp_path: Path) -> None:
    async def main() -> None:
        async with two(tmp_path) as (s, there, back):
            w1, w2 = s.workers["w1"], s.workers["w2"]
            before, data = through_head(s), os.urandom(4 * MEGABYTE)
            async with serving(echo, exposed(w1)), serving(echo, exposed(w2)):
                assert await asked(there, data) == data
                assert await asked(back, data) == data
            assert through_head(s) - before < MEGABYTE / 4
            row = way(w1)
            assert row is not None
            assert row.dialled
            assert row.why is None
            assert row.rtt_ms is not None
            assert {lane.lane_class for lane in row.lanes} == {"interactive", "bulk", "reserve"}
            assert row.bytes.sent > 8 * MEGABYTE
            other = way(w2)
            assert other is not None
            assert not other.dialled

    run(main)


def test_who_dials_is_seen_and_what_may_be_dialled_is_the_same(tmp_path: Path) -> None:
    """The far side connects as the node that dials; a port that it does not serve is refused with
    its words, and counted."""

    async def main() -> None:
        async with two(tmp_path) as (s, _, _):
            w1, w2 = s.workers["w1"], s.workers["w2"]
            own, far = w1.role.node.view.own, w2.role.node.view.own
            assert own is not None
            assert far is not None
            at = Target(far.address, free_port())
            peers = []

            async def who(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                peers.append(writer.get_extra_info("peername")[0])

            async with serving(who, at):
                w2.listening.append(ListeningSocket(*at, os.geteuid(), 1))
                listens = w1.listens_for(at)
                await until(lambda: w1.role.node.listeners.is_open(listens))
                reader, writer = await asyncio.open_connection(*listens)
                assert await reader.read() == b""
                await goodbye(writer)
            assert peers == [own.address]
            mux = w1.worker._direct.mux_to(far.address)
            assert mux is not None
            refused: list[tuple[ResetReason, str]] = []
            mux.open(Target(far.address, 22).encode(), Recorder(refused))
            await until(lambda: bool(refused))
            ((reason, text),) = refused
            assert reason is ResetReason.NOT_IN_PLAN
            assert "not a port that w2 offers" in text
            here = w2.runtime.health.now().network.refused_here
            assert [(row.node, row.port) for row in here] == [("w1", 22)]

    run(main)


class Recorder:
    """Owns a stream, and keeps why it was lost."""

    def __init__(self, lost: list[tuple[ResetReason, str]]) -> None:
        self._lost = lost

    def stream_data(self, chunks: object) -> None: ...

    def stream_ended(self) -> None: ...

    def stream_writable(self) -> None: ...

    def stream_lost(self, reason: ResetReason, text: str) -> None:
        self._lost.append((reason, text))

    def stream_finished(self) -> None: ...


@pytest.mark.parametrize("silent", [False, True])
def test_a_drop_costs_nothing_and_streams_come_back(tmp_path: Path, silent: bool) -> None:
    """A counted stream, cut in its middle: what follows goes by the hub, whole and in order, and
    directly again when that is back."""

    async def main() -> None:
        async with two(tmp_path) as (s, there, _):
            w1, w2 = s.workers["w1"], s.workers["w2"]
            piece = random.Random(7).randbytes(MEGABYTE)
            sums: list[bytes] = []

            async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                for _ in range(3 * 8):
                    sums.append(hashlib.sha256(await reader.readexactly(MEGABYTE)).digest())
                    writer.write(b".")

            async with serving(count, exposed(w2)):
                reader, writer = await asyncio.open_connection(*there)

                async def send(pieces: int) -> int:
                    """How much more passed the head."""
                    before = through_head(s)
                    for _ in range(pieces):
                        writer.write(piece)
                        assert await asyncio.wait_for(reader.readexactly(1), 20) == b"."
                    return through_head(s) - before

                assert await send(8) < MEGABYTE / 4
                (carrier(s).swallow if silent else carrier(s).cut)()
                assert await send(8) >= 7 * MEGABYTE
                await until(lambda: not goes(w1))
                row = way(w1)
                assert row is not None
                assert row.way == "hub"
                assert row.lost >= (0 if silent else 2)
                assert row.cuts == (0 if silent else 1)
                carrier(s).barred = False
                await all_lanes(s)
                assert await send(8) < MEGABYTE / 4
                await goodbye(writer)
            assert sums == [hashlib.sha256(piece).digest()] * 24
            assert not of_ended(s)

    run(main)


def of_ended(s: Site) -> list[str]:
    """Ways whose session was begun more than once."""
    found = []
    for daemon in s.workers.values():
        ways = daemon.worker._direct.seen()
        found += [each.node for each in ways if each.link_stats.sessions != 1]
    return found


def test_by_ssh(tmp_path: Path) -> None:
    """The system's sshd, which ends in the middle of a stream: nothing is lost of that."""

    async def main() -> None:
        sshd = RealSshd(tmp_path / "sshd")
        place = tmp_path / "w2/run/peers.sock"
        sshd.authorize(f"restrict,port-forwarding {sshd.public_key}")
        known = tmp_path / "known_hosts"
        known.write_text(sshd.known_hosts_line())
        await sshd.start()
        try:
            async with site(tmp_path, "w1", "w2") as s:
                w1, w2 = s.workers["w1"], s.workers["w2"]
                w1.directs = ["w2"]
                w1.direct_ssh = (
                    f'ssh = "{sshd.target}"\nidentity = "{sshd.identity}"\n'
                    f'socket = "{place}"\nvia = "socket"\n'
                    f'known_hosts = "{known}"\nssh_config = "/dev/null"\nextra_lanes = 0'
                )
                there = s.path("w1", "w2")
                await s.start()
                await all_lanes(s)
                before, piece = through_head(s), os.urandom(MEGABYTE)
                async with serving(echo, exposed(w2)):
                    reader, writer = await asyncio.open_connection(*there)
                    for number in range(16):
                        writer.write(piece)
                        if number == 8:
                            assert through_head(s) - before < MEGABYTE / 4
                            await sshd.stop()
                        assert await asyncio.wait_for(reader.readexactly(MEGABYTE), 20) == piece
                    assert through_head(s) - before >= 14 * MEGABYTE
                    await until(lambda: "nothing listens" in why(w1), 20)
                    await sshd.start()
                    await all_lanes(s)
                    writer.write(piece)
                    assert await asyncio.wait_for(reader.readexactly(MEGABYTE), 20) == piece
                    await goodbye(writer)
                assert not of_ended(s)
        finally:
            await sshd.stop()

    run(main, 90)


@asynccontextmanager
async def by_forced_command(tmp_path: Path, via: str) -> AsyncIterator[tuple[Site, RealSshd]]:
    """w1 dials w2, whose sshd lets its key run `rayfwd attach --peer` and nothing else."""
    sshd = RealSshd(tmp_path / "sshd")
    attach = f"{Path(sys.executable).with_name('rayfwd')} attach --peer"
    attach += f" --socket {tmp_path / 'w2/run/peers.sock'}"
    sshd.authorize(f'restrict,command="{attach}" {sshd.public_key}')
    known = tmp_path / "known_hosts"
    known.write_text(sshd.known_hosts_line())
    # What the user's own files would have the shell do is no matter here.
    await sshd.start(f"SetEnv HOME={tmp_path}")
    try:
        async with site(tmp_path, "w1", "w2") as s:
            w1 = s.workers["w1"]
            w1.directs = ["w2"]
            w1.direct_ssh = (
                f'ssh = "{sshd.target}"\nidentity = "{sshd.identity}"\nvia = "{via}"\n'
                f'known_hosts = "{known}"\nssh_config = "/dev/null"\nextra_lanes = 0'
            )
            await s.start()
            yield s, sshd
    finally:
        await sshd.stop()


def test_a_forced_command_takes_nothing_else_for_a_hello(tmp_path: Path) -> None:
    """By `via = "auto"` the socket is tried first, and why it is none is looked for."""

    async def main() -> None:
        with log_events() as events:
            async with by_forced_command(tmp_path, "auto") as (s, _):
                await all_lanes(s)
                await asyncio.sleep(HELLO_TIMEOUT + 1)  # from then on it would be refused
        assert not of(events, "direct_refused")

    run(main, 90)


def test_the_doctor_goes_it_hop_by_hop(tmp_path: Path) -> None:
    async def main() -> None:
        async with by_forced_command(tmp_path, "exec") as (s, sshd):
            await all_lanes(s)
            config = load(s.workers["w1"].file)
            good = await direct_checks.look(config, ())
            assert good.result == "pass"
            assert f"w2: logged in as {sshd.user}" in good.said
            assert good.seen["ways"]["w2"]["rtt_ms"] > 0
            other = config.model_copy(
                update={"direct": (config.direct[0].model_copy(update={"node": "w3"}),)}
            )
            wrong = await direct_checks.look(other, ())
            assert wrong.problem is not None
            assert wrong.problem.code is codes.DIRECT_WRONG
            assert f"{sshd.target} is w2, and not w3" in wrong.said
            sshd.authorize()
            refused = await direct_checks.look(config, ())
            assert refused.result == "warn", "streams go through the head"
            assert refused.problem is not None
            assert refused.problem.code is codes.SSH_AUTH_REFUSED
            assert refused.said.startswith(f"the direct way to w2: {sshd.target} refuses")
            assert "on w2, or set identity of the [[direct]] of w2" in refused.problem.remedy
            assert "head" not in refused.problem.remedy
            away = s.workers["w2"].runtime.health.now().direct
            row = await direct_checks.look(config.model_copy(update={"direct": ()}), away)
            assert row.said == "the way of w1, which dials, is up"
            assert set(s.workers["w2"].worker._direct.taken.peers) == {"w1"}

    run(main, 60)


def test_new_streams_go_by_the_hub_while_there_is_no_direct_way(tmp_path: Path) -> None:
    """And what keeps it away is said: in the status, and as a condition after a while."""

    async def main() -> None:
        async with two(tmp_path) as (s, there, _):
            w1, w2 = s.workers["w1"], s.workers["w2"]
            carrier(s).cut()
            await until(lambda: not goes(w1))
            async with serving(echo, exposed(w2)):
                assert await asked(there, b"hello") == b"hello"
            await until(lambda: why(w1) == "no answer")
            (found,) = w1.worker.links.findings()
            assert found.subject == "w1/w2"
            assert found.problem.code is codes.DIRECT_ABSENT
            assert (
                "no direct way to w2, and streams to it go through the head" in found.problem.cause
            )
            assert w1.runtime.health.state() == "ready"

    run(main)


def test_the_head_may_go_meanwhile(tmp_path: Path) -> None:
    """Streams of the direct way do not need it."""

    async def main() -> None:
        async with two(tmp_path) as (s, there, _), serving(echo, exposed(s.workers["w2"])):
            reader, writer = await asyncio.open_connection(*there)
            writer.write(b"before")
            assert await reader.readexactly(6) == b"before"
            await s.head.stop()
            writer.write(b"after")
            assert await asyncio.wait_for(reader.readexactly(5), 10) == b"after"
            assert await asked(there, b"and new ones") == b"and new ones"
            await goodbye(writer)

    run(main)


@pytest.mark.parametrize("who", ["w1", "w2", "head"])
def test_a_restart_of_anybody_costs_nothing(tmp_path: Path, who: str) -> None:
    async def main() -> None:
        async with two(tmp_path) as (s, there, _):
            w1, w2 = s.workers["w1"], s.workers["w2"]
            async with serving(echo, exposed(w2)):
                reader, writer = await asyncio.open_connection(*there)
                writer.write(b"before")
                assert await reader.readexactly(6) == b"before"
                await s.node(who).restart()
                writer.write(b"after")
                assert await asyncio.wait_for(reader.readexactly(5), 20) == b"after"
                await until(lambda: goes(w1) and goes(w2), 20)
                writer.write(b"and again")
                assert await asyncio.wait_for(reader.readexactly(9), 20) == b"and again"
                await goodbye(writer)

    run(main)


def test_a_worker_that_begins_anew_is_found_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with two(tmp_path) as (s, there, _):
            w1, w2 = s.workers["w1"], s.workers["w2"]
            await w2.stop()
            await until(lambda: not goes(w1))
            await w2.start()
            await s.ready()
            await until(lambda: goes(w1) and goes(w2), 20)
            async with serving(echo, exposed(w2)):
                assert await asked(there, b"hello") == b"hello"

    run(main)


def test_who_is_forgotten_has_no_way_any_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with two(tmp_path) as (s, _, _):
            w2 = s.workers["w2"]
            await s.workers["w1"].stop()
            await s.head.ask("forget", name="w1")
            await until(lambda: way(w2) is None)

    run(main)


# -- whoever else comes ---------------------------------------------------------------------------


async def answer(path: Path, hello: Hello, key: NodeKey) -> Refusal | Welcome:
    """What a worker's socket says to a hello whose key is proved."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    said = hello.encode()
    writer.write(said)
    buffer = bytearray()
    while True:
        data = await reader.read(1 << 16)
        assert data, "it was closed without a word"
        buffer += data
        frame = first_frame(buffer, MAX_PAYLOAD)
        if frame is None:
            continue
        if frame.kind is not Kind.CHALLENGE:
            await goodbye(writer)
            return Refusal.decode(frame) if frame.kind is Kind.REFUSE else Welcome.decode(frame)
        greeting = first_frame(bytearray(said), MAX_PAYLOAD)
        assert greeting is not None
        writer.write(key.prove(greeting, Challenge.decode(frame)).encode())


def peers_hello(key: NodeKey, **fields: object) -> Hello:
    hello = hello_of("w1", key=key.public, role="peer", worker_ports=0)
    return replace(hello, features=frozenset({PROOF}), **fields)  # type: ignore[arg-type]


def test_a_lane_by_ssh_begins_nothing_and_joins_nobody_elses_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with two(tmp_path) as (s, _, _):
            w2 = s.workers["w2"]
            path = w2.directory / "run/peers.sock"
            assert path.stat().st_mode & 0o777 == 0o600
            key, session = NodeKey.make(), w2.worker._direct.taken.peers["w1"].session
            told = {
                "another key": (peers_hello(key, session=session), codes.DIRECT_UNKNOWN),
                "resumes": (
                    peers_hello(key, session=session, resumes=True),
                    codes.DIRECT_UNKNOWN,
                ),
                "a session of its own": (peers_hello(key), codes.DIRECT_UNKNOWN),
                "the hub's lane": (
                    peers_hello(key, lane=LaneClass.RESERVE),
                    codes.HELLO_MALFORMED,
                ),
                "a worker": (
                    replace(peers_hello(key), role="worker", worker_ports=8),
                    codes.HELLO_MALFORMED,
                ),
            }
            for what, (hello, code) in told.items():
                refusal = await answer(path, hello, key)
                assert isinstance(refusal, Refusal), what
                assert refusal.problem.code is code, what
            theirs = w2.worker._direct.taken.peers["w1"].theirs
            stolen = replace(peers_hello(key, session=session), key=theirs)
            refusal = await answer(path, stolen, key)
            assert isinstance(refusal, Refusal)
            assert refusal.problem.code is codes.PROOF_WRONG
            assert goes(w2)

    run(main)


@pytest.mark.runs("rayfwd attach --peer")
def test_attach_leads_to_a_workers_socket(tmp_path: Path) -> None:
    """It passes its pipes on, and a lane that knows no session is told so by them."""

    async def main() -> None:
        async with two(tmp_path) as (s, _, _):
            place = s.workers["w2"].directory / "run/peers.sock"
            key = NodeKey.make()
            said = peers_hello(key).encode()
            attach = await asyncio.create_subprocess_exec(
                str(Path(sys.executable).with_name("rayfwd")),
                *("attach", "--peer", "--socket", str(place)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert attach.stdin is not None
            assert attach.stdout is not None
            attach.stdin.write(said)
            assert await attach.stdout.readexactly(len(MARKER)) == MARKER
            challenge = await frame_of(attach.stdout)
            greeting = first_frame(bytearray(said), MAX_PAYLOAD)
            assert greeting is not None
            proof = key.prove(greeting, Challenge.decode(challenge))
            attach.stdin.write(proof.encode())
            refusal = Refusal.decode(await frame_of(attach.stdout))
            assert refusal.problem.code is codes.DIRECT_UNKNOWN
            attach.stdin.close()
            await attach.wait()

    run(main)


async def frame_of(reader: asyncio.StreamReader) -> Frame:
    buffer = bytearray()
    while True:
        data = await reader.read(1)
        assert data, "it ended in the middle of a frame"
        buffer += data
        if (frame := first_frame(buffer, MAX_PAYLOAD)) is not None:
            return frame


def test_a_worker_cannot_pose_as_another(tmp_path: Path) -> None:
    """By the hub's word it is who it is, whatever its hello says; and a hub takes no such hello."""

    async def main() -> None:
        async with two(tmp_path) as (s, _, _):
            w1, w2 = s.workers["w1"], s.workers["w2"]
            w3 = s.worker("w3")
            await w3.start()
            await s.ready()
            await until(lambda: w2.role.node.view.node_named("w3") is not None)
            ways = w3.worker._direct
            through = ThroughHub("w2", ways._stream_to("w2"))
            key = NodeKey.make()
            lane = LinkLane()
            connection = await through.dial(asyncio.Event())
            pipe = await connection.open(lane)
            hello = peers_hello(key, lane=LaneClass.RESERVE)
            with pytest.raises(LinkRefusedError) as refused:
                await lane.greet(pipe, hello, key.prove)
            assert refused.value.problem.code is codes.HELLO_MALFORMED
            connection.abort()
            assert set(w2.worker._direct.taken.peers) == {"w1"}
            assert goes(w1)
            answered = await answer(s.head.directory / "run/hub.sock", peers_hello(key), key)
            assert isinstance(answered, Refusal)

    run(main)


def test_whoever_answers_in_the_others_place_is_no_lane(tmp_path: Path) -> None:
    """Its ssh leads elsewhere: there is no proof, and streams go by the hub."""

    async def main() -> None:
        async def pose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1 << 16)
            writer.write(Challenge("ab" * 32).encode())
            await reader.read(1 << 16)
            signature = NodeKey.make().prove(Frame(Kind.HELLO, 0, 1, b""), Challenge("ab" * 32))
            said = {"signature": signature.signature}
            writer.write(Welcome("0", said, (), "-", 60.0).encode())
            await reader.read()
            writer.close()

        async with site(tmp_path, "w1", "w2") as s:
            s.workers["w1"].directs = ["w2"]
            there = s.path("w1", "w2")
            w1, w2 = s.workers["w1"], s.workers["w2"]
            real = tmp_path / "w2/run/peers.sock"
            with log_events() as events:
                await s.start()
                await all_lanes(s)
                carrier(s).cut()
                await until(lambda: not goes(w1))
                real.unlink()
                async with await asyncio.start_unix_server(pose, str(real)):
                    carrier(s).barred = False
                    await until(lambda: bool(of(events, "direct_wrong")), 20)
                    async with serving(echo, exposed(w2)):
                        assert await asked(there, b"hello") == b"hello"
                    assert not goes(w1)
                carrier(s).cut()

    run(main)


# -- who knows nothing of it ----------------------------------------------------------------------


def test_a_peer_that_takes_none_is_reached_by_the_hub(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            w1, w2 = s.workers["w1"], s.workers["w2"]
            w1.directs, w2.direct = ["w2"], "off"
            there = s.path("w1", "w2")
            await s.start()
            async with serving(echo, exposed(w2)):
                assert await asked(there, b"hello") == b"hello"
            await until(lambda: "knows no direct way" in why(w1))
            assert not (w2.directory / "run/peers.sock").exists()
            assert not goes(w1)

    run(main)


def test_an_older_head_is_asked_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "DIRECT", "something else")

    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            w1, w2 = s.workers["w1"], s.workers["w2"]
            w1.directs = ["w2"]
            there = s.path("w1", "w2")
            await s.start()
            async with serving(echo, exposed(w2)):
                assert await asked(there, b"hello") == b"hello"
            assert not w1.worker._direct.dialled["w2"].link.may_begin.is_set()
            assert not w1.direct_carriers["w2"].connections

    run(main)


def test_a_hub_passes_lanes_on_to_who_knows_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "w1", "w2") as c:
            lost: list[tuple[ResetReason, str]] = []
            mux = c.workers["w1"].mux
            assert mux is not None
            lane = Opening(Target(c.address_of("w2"), 0), lane=True)
            mux.open(lane.encode(), Recorder(lost))
            await until(lambda: bool(lost))
            assert lost == [(ResetReason.NOT_IN_PLAN, "w2 knows no direct way")]

    run(main)


@pytest.mark.parametrize("source", [None, "127.77.0.2"])
@pytest.mark.parametrize(("lane", "asks"), [(False, False), (True, False), (False, True)])
def test_an_opening_says_what_it_is(source: str | None, lane: bool, asks: bool) -> None:
    opening = Opening(Target("127.77.0.3", 0), source, lane, asks)
    assert Opening.decode(opening.encode()) == opening
    if lane or asks:
        with pytest.raises(ValueError, match="an OPEN of"):
            Opening.decode(opening.encode()[:-1] + b"\3")


def test_the_file_says_who_dials_whom() -> None:
    worker = {"role": "worker", "name": "w1", "head": {"ssh": "head"}}
    config = parse({**worker, "direct": [{"node": "w2", "ssh": "ray@w2", "identity": "/k"}]})
    (direct,) = config.direct
    found = direct.way()
    assert (found.via, str(found.socket)) == ("exec", "/run/rayfwd/peers.sock")
    assert found.attach_command == "rayfwd attach --peer"
    for data, words in {
        "w1": "must be another worker",
        "head": "must be another worker",
    }.items():
        with pytest.raises(ConfigError, match=words):
            parse({**worker, "direct": [{"node": data, "ssh": "h"}]})
    twice = [{"node": "w2", "ssh": "h"}, {"node": "w2", "ssh": "i"}]
    with pytest.raises(ConfigError, match=r"direct\[1\].node = \"w2\": is there twice"):
        parse({**worker, "direct": twice})
    with pytest.raises(ConfigError, match=r"direct: belongs to a worker"):
        parse({"role": "head", "direct": [{"node": "w2", "ssh": "h"}]})
    with pytest.raises(ConfigError, match=r"each written \[\[direct\]\]"):
        parse({**worker, "direct": {"node": "w2", "ssh": "h"}})
