"""Workers that the head dials: the same links, with the other end dialling; without SSH."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.config import ConfigError, DialConfig, parse
from rayfwd.ssh.channel_problems import socket_unreachable
from rayfwd.transport import awaited as awaited_module
from rayfwd.transport import link as link_module
from rayfwd.transport import redialled as redialled_module
from rayfwd.transport.carrier import PipeOwner
from rayfwd.transport.dialler import Dialler
from rayfwd.transport.hubanswer import why_no_answer
from rayfwd.transport.kept import KEPT_SECONDS
from rayfwd.watch import reach
from tests.unit.cluster import echo, goodbye, serving
from tests.unit.daemons import exposed, site
from tests.unit.loops import log_events, of, run, run_on_fake_clock, until


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redial fast; there is no Ray, so none is dialled."""
    for name, seconds in {"REDIAL_FIRST": 0.05, "REDIAL_PARKED": 0.1, "REDIAL_LAST": 0.2}.items():
        monkeypatch.setattr(link_module, name, seconds)
        monkeypatch.setattr(redialled_module, name, seconds)
    monkeypatch.setattr(reach, "servers", lambda _plan: [])


def test_both_directions_in_one_cluster(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            s.workers["w1"].dialled = True
            there, back = s.path("w1", "head"), s.path("head", "w1")
            across = s.path("w2", "w1")
            await s.start()
            w1, head = s.workers["w1"], s.head
            await until(lambda: len(w1.worker._link.mux.lanes) == 2)  # type: ignore[union-attr]
            async with serving(echo, exposed(head)), serving(echo, exposed(w1)):
                for at in (there, back, across):
                    reader, writer = await asyncio.open_connection(*at)
                    writer.write(b"hello")
                    assert await reader.readexactly(5) == b"hello"
                    await goodbye(writer)

    run(main)


@pytest.mark.parametrize("restarted", ["head", "w1", "nobody"])
def test_a_stream_outlives_a_cut_and_a_restart_of_either_end(
    tmp_path: Path, restarted: str
) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            s.workers["w1"].dialled = True
            there = s.path("w1", "head")
            await s.start()
            async with serving(echo, exposed(s.head)):
                reader, writer = await asyncio.open_connection(*there)
                writer.write(b"before")
                assert await reader.readexactly(6) == b"before"
                if restarted == "nobody":
                    s.head.cut()
                else:
                    await s.node(restarted).restart()
                writer.write(b"after")
                assert await asyncio.wait_for(reader.readexactly(5), 20) == b"after"
                await goodbye(writer)

    run(main)


def test_a_machine_made_anew_that_the_head_dials_is_who_it_was(tmp_path: Path) -> None:
    """Its host key was checked, and the head knows whom it has dialled. One that comes by itself
    under that name is a stranger."""

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            w1 = s.workers["w1"]
            w1.dialled = True
            await s.start()
            head = s.head.role.node
            await until(lambda: head.view.node_named("w1") is not None)
            before = head.view.node_named("w1")
            await w1.stop()
            (w1.directory / "state/node.key").unlink()
            with log_events() as events:
                w1.dialled = False
                await w1.start()
                await until(lambda: bool(of(events, "name_taken")))
                await w1.stop()
                w1.dialled = True
                await w1.start()
                await w1.ready()
                assert of(events, "node_key_renewed")
            assert head.view.node_named("w1") == before

    run(main)


def test_a_worker_that_cannot_be_dialled_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awaited_module, "AWAITED_SECONDS", 0.3)

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            s.workers["w1"].dialled = True
            with log_events() as events:
                await s.head.start()
                await until(lambda: bool(of(events, "hub_absent")))
                assert of(events, "hub_absent")[0]["worker"] == "w1"
                board = s.head.role.node.board
                await until(lambda: any(c.subject == "w1" for c in board.conditions))
                await s.workers["w1"].start()
                await s.ready()
                await until(lambda: not any(c.subject == "w1" for c in board.conditions))
                await s.head.stop()
                await until(lambda: bool(of(events, "link_awaited")), 20)

    run(main)


def test_others_may_not_speak_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            s.workers["w1"].dialled = True
            await s.start()
            path = s.workers["w1"].directory / "run/link.sock"
            assert path.stat().st_mode & 0o777 == 0o600
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            await goodbye(writer)
            await s.ready()

    run(main)


def test_the_file_says_who_dials() -> None:
    worker = {"role": "worker", "name": "w1"}
    assert parse({**worker, "head": {"dialled": True}}).head is not None
    with pytest.raises(ConfigError, match=r"head\.ssh: must be given"):
        parse({**worker, "head": {}})
    with pytest.raises(ConfigError, match=r"head\.dialled: a client"):
        parse({"role": "client", "head": {"ssh": "h", "dialled": True}})
    dial = {"ssh": "ray@gpu-1", "identity": "/k", "via": "exec"}
    head = parse({"role": "head", "hub": {"dial": [dial]}})
    (found,) = head.hub.dial
    assert found.called == "gpu-1"
    assert found.way().via == "exec"
    assert str(found.way().socket) == "/run/rayfwd/link.sock"
    with pytest.raises(ConfigError, match=r"hub\.dial\[0\]\.sssh: unknown key; did you mean ssh"):
        parse({"role": "head", "hub": {"dial": [{"ssh": "h", "sssh": "x"}]}})


@pytest.mark.parametrize("said", ["", "rayfwd attach: hub_absent: no hub answers; start it"])
def test_what_is_said_of_a_worker_names_no_head(said: str) -> None:
    way = DialConfig(ssh="ray@gpu-1").way()
    told = [
        why_no_answer(said, "closed", way.destination),
        socket_unreachable(way.socket, "open failed", way.destination),
    ]
    for problem in told:
        assert "head" not in problem.cause + problem.remedy
        assert "the worker" in problem.cause + problem.remedy
    assert 'via = "exec" in its [[hub.dial]]' in told[1].remedy
    assert DialConfig(ssh="ray@[::1]:22").called == "::1"


def test_two_ways_take_what_stands_first(tmp_path: Path) -> None:
    """The worker's own dialling fails for ever: the head's is taken."""

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            w1 = s.workers["w1"]
            w1.dialled = w1.dials_in_vain = True
            with log_events() as events:
                await s.start()
                await until(lambda: len(of(events, "worker_dialled")) == 1)

    run(main)


class Way:
    """A carrier and its connections in one; what is dialled stands at once, or fails."""

    def __init__(self) -> None:
        self.paused = False
        self.fails = False
        self.absent = False
        """Nobody waits behind it."""
        self.tries = 0
        self.opened = 0
        self.owners: list[PipeOwner] = []

    async def dial(self, urgent: asyncio.Event) -> Way:
        del urgent
        self.tries += 1
        if self.fails:
            raise codes.SSH_UNREACHABLE.error("no answer", "see that it is up")
        return self

    async def open(self, owner: PipeOwner) -> Way:
        self.opened += 1
        if self.absent:
            raise codes.HUB_ABSENT.error("nothing answers", "start it")
        self.owners.append(owner)
        asyncio.get_running_loop().call_soon(owner.pipe_data, b"hello")
        return self

    async def tune(self) -> None: ...

    def keep_alive(self) -> None: ...

    @property
    def takes_another(self) -> bool:
        return True

    def write(self, chunks: object) -> None: ...

    def carry(self, deliver: object, resume: object) -> None: ...

    def close(self, parked: bool = False) -> None: ...

    def abort(self) -> None: ...


def test_a_connection_is_kept_for_a_worker_that_does_not_run(tmp_path: Path) -> None:
    async def main() -> None:
        way = Way()
        way.absent = True
        hub = await asyncio.start_unix_server(swallow, tmp_path / "hub.sock")
        dial = DialConfig(ssh="ray@w1", bulk_lanes=0)
        dialler = Dialler(dial, way, tmp_path / "hub.sock", 120.0, lambda: None)
        task = asyncio.create_task(dialler.run())
        await until(lambda: way.opened == 20)
        assert way.tries == 1
        await until(lambda: way.tries == 2, 2 * KEPT_SECONDS)
        way.absent = False
        await until(lambda: len(way.owners) == 1)
        assert way.tries == 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        dialler.close()
        hub.close()

    run_on_fake_clock(main)


async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


def test_a_rest_ends_when_the_last_connection_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one was lost a while ago, and is dialled in vain: nobody waited for it."""
    monkeypatch.setattr(redialled_module, "REDIAL_LAST", 15.0)

    async def main() -> None:
        way, loop = Way(), asyncio.get_running_loop()
        hub = await asyncio.start_unix_server(swallow, tmp_path / "hub.sock")
        dial = DialConfig(ssh="ray@w1", bulk_lanes=1)
        dialler = Dialler(dial, way, tmp_path / "hub.sock", 120.0, lambda: None)
        task = asyncio.create_task(dialler.run())
        await until(lambda: len(way.owners) == 2)
        way.fails = True
        way.owners[0].pipe_lost("cut")
        await until(lambda: way.tries == 12, 200)
        way.fails = False
        began = loop.time()
        way.owners[1].pipe_lost("cut")
        await until(lambda: len(way.owners) == 3, 60)
        assert loop.time() - began < 5.0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        dialler.close()
        hub.close()

    run_on_fake_clock(main)
