"""The link over a real SSH server in this process: cuts, refusals, and how it heals."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import asyncssh
import pytest

from rayfwd import codes
from rayfwd.cluster.identity import Identity
from rayfwd.config import HeadConfig
from rayfwd.hub.connection import HubConnection
from rayfwd.session.frames import Frame
from rayfwd.session.handshake import PROOF, Challenge, Hello, Proof, Welcome
from rayfwd.session.messages import HeadRay, Message
from rayfwd.session.session import Limits
from rayfwd.session.target import Opening, Target
from rayfwd.ssh import dial
from rayfwd.ssh import ssh_connector as ssh_module
from rayfwd.ssh.asyncssh_carrier import SshCarrier
from rayfwd.transport import link as link_module
from rayfwd.transport import saturation as demand_module
from rayfwd.transport.connector import LocalConnector
from rayfwd.transport.kept import KEPT_SECONDS
from rayfwd.transport.link import Link
from rayfwd.transport.link_lane import LinkRefusedError
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.mux import MuxStream, StreamOwner
from rayfwd.transport.pipes import PipeTransport
from rayfwd.transport.relay import SocketRelay
from rayfwd.transport.urgency import AdaptiveTimeout, time_limit
from tests.need import need
from tests.unit.cluster import Cluster, answer_to, echo, free_place, hello_of, serving
from tests.unit.loops import Log, log_events, of, until
from tests.unit.loops import run as run_in_real_time
from tests.unit.loops import run_on_fake_clock as run
from tests.unit.ssh_server import Sshd


class Site:
    """A head with hub and sshd, and one worker's link to it."""

    def __init__(self, directory: Path, ride_through: float, fields: dict[str, Any]) -> None:
        self.directory = directory
        self.ride_through = ride_through
        self.sshd = Sshd(directory)
        self.head = Cluster(directory, ride_through=ride_through)
        self.welcomes: list[Welcome] = []
        self.messages: list[Message] = []
        self.identity = Identity.make()
        self.connector = LocalConnector()
        self.listeners = Listeners(self._route)
        self._fields = fields
        self._tasks: list[asyncio.Task[None]] = []
        self._link: Link | None = None

    @property
    def link(self) -> Link:
        assert self._link is not None
        return self._link

    async def start(self, hub: bool = True) -> None:
        if hub:
            await self.head.start()
        await self.sshd.start()
        (self.directory / "ssh_config").write_text("")
        given: dict[str, Any] = {
            "ssh": f"ray@127.0.0.1:{self.sshd.port}",
            "identity": self.sshd.identity,
            "known_hosts": self.sshd.known_hosts,
            "ssh_config": self.directory / "ssh_config",
            "socket": self.head.hub.socket.path,
        }
        given.update(self._fields)
        head = HeadConfig(**given)
        self._link = Link(self, head, SshCarrier(head), Limits())
        self._tasks.append(asyncio.create_task(self.link.run()))
        self._tasks.append(asyncio.create_task(self.listeners.run()))

    async def up(self, lanes: int = 2, seconds: float = 2 * link_module.REDIAL_LAST) -> None:
        """Wait until all lanes stand."""

        def standing() -> bool:
            mux = self.link.mux
            return mux is not None and len(mux.lanes) == lanes

        await until(standing, seconds, lambda: f"{self.link.state}, {self.link.problem}")

    async def restart_hub(self) -> None:
        """The head's rayfwd is killed and started again: it knows no session."""
        old = self.head
        for node in old.hub.nodes.values():
            if node.mux is not None:
                for record in list(node.mux.lanes.values()):
                    record.transport.abort("killed")
                node.mux._on_change = lambda _event: None
                node.mux.close("killed")
        await old.close()
        self.head = Cluster(self.directory, ride_through=self.ride_through)
        await self.head.start()

    async def close(self) -> None:
        await self.link.close("the worker stops")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.connector.close()
        await self.head.close()
        await self.sshd.stop()

    @asynccontextmanager
    async def listener(self) -> AsyncIterator[Target]:
        """A listener of the worker to an echo server on the head."""
        place, listen = Target(self.head.address, free_place().port), free_place()
        self.listeners.set_wanted({**self.listeners._wanted, listen: place})
        await until(lambda: self.listeners.is_open(listen))
        async with serving(echo, place):
            yield listen

    def hello(self) -> Hello:
        return hello_of(
            "w1",
            key=self.identity.public,
            features=frozenset({PROOF}),
            ride_through=self.ride_through,
        )

    def prove(self, greeting: Frame, challenge: Challenge) -> Proof:
        return self.identity.prove(greeting, challenge)

    def accept_stream(self, stream: MuxStream, target: bytes) -> StreamOwner | None:
        return self.connector.accept(stream, Opening.decode(target))

    def welcomed(self, welcome: Welcome) -> None:
        self.welcomes.append(welcome)

    def message(self, message: Message) -> None:
        self.messages.append(message)

    def link_changed(self) -> None: ...

    def _route(self, target: Target, relay: SocketRelay) -> None:
        relay.open_stream(self.link.mux, target)


@asynccontextmanager
async def site(
    directory: Path, ride_through: float = 60.0, hub: bool = True, **fields: Any
) -> AsyncIterator[Site]:
    made = Site(directory, ride_through, fields)
    await made.start(hub)
    try:
        yield made
    finally:
        await made.close()


async def transfer(listen: Target, size: int, meanwhile: Callable[[int], Any]) -> None:
    """Send `size` MB there and back; `meanwhile` is called after each megabyte."""
    data = os.urandom(1 << 20)
    reader, writer = await asyncio.open_connection(*listen)
    digest = hashlib.sha256()

    async def send() -> None:
        for i in range(size):
            writer.write(data)
            await writer.drain()
            meanwhile(i)
        writer.write_eof()

    sending = asyncio.create_task(send())
    while chunk := await reader.read(1 << 18):
        digest.update(chunk)
    await sending
    assert digest.digest() == hashlib.sha256(data * size).digest()
    writer.close()
    await writer.wait_closed()


async def works(s: Site) -> bool:
    async with s.listener() as listen:
        await transfer(listen, 1, lambda _: None)
    return True


def test_a_link_stands_carries_and_ends_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            assert s.link.state == "up"
            assert s.link.problem is None
            assert {slot.name for slot in s.link.slots} == {"interactive", "bulk-1"}
            assert s.welcomes[0].node["name"] == "w1"
            s.head.hub.tell_all(HeadRay("up"))
            await until(lambda: HeadRay("up") in s.messages)
            assert await works(s)
            await s.link.close("bye")
            await until(lambda: s.head.hub.nodes["w1"].state == "down")

    with log_events() as log:
        run(main)
    assert [e["cause"] for e in of(log, "session_ended")] == ["bye"]
    assert not [e for e in log if e["log_level"] == "error"]


@pytest.mark.parametrize("lanes", [0, 3])
def test_there_are_as_many_bulk_lanes_as_wanted(tmp_path: Path, lanes: int) -> None:
    async def main() -> None:
        async with site(tmp_path, bulk_lanes=lanes) as s:
            await s.up(1 + lanes)
            assert await works(s)

    run(main)


def test_a_transfer_that_fills_its_lanes_gets_extra_ones_until_these_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand_module, "CHANNEL_BYTES", 1 << 10)

    async def main() -> None:
        async with site(tmp_path, extra_lanes=2) as s:
            await s.up()
            assert [slot.name for slot in s.link.slots] == ["interactive", "bulk-1"]
            async with s.listener() as listen:
                async with asyncio.timeout(20):
                    # It is looked at once a second: a transfer may be over before it is seen.
                    while len(s.sshd.connections) < 4:
                        await transfer(listen, 8, lambda _: None)
                await s.up(4)
                names = {"interactive", "bulk-1", "bulk-2", "bulk-3"}
                assert {slot.name for slot in s.link.slots} == names
                await transfer(listen, 6, lambda i: s.sshd.cut(3) if i == 2 else None)
            await until(lambda: len(s.link.slots) == 3)
            assert s.link.link_stats.cuts == 0
            s.sshd.cut()
            await until(lambda: s.link.link_stats.cuts == 1)
            await s.up(2)
            assert [slot.name for slot in s.link.slots] == ["interactive", "bulk-1"]

    run_in_real_time(main)


def test_an_extra_lane_that_cannot_be_made_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand_module, "CHANNEL_BYTES", 1 << 10)

    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            async with s.listener() as listen:
                s.sshd.prohibits = True
                while not of(log, "extra_lane_failed"):
                    await transfer(listen, 8, lambda _: None)
            await until(lambda: len(of(log, "extra_lane_failed")) == s.link.head.extra_lanes)
            assert s.link.state == "up"
            assert [slot.name for slot in s.link.slots] == ["interactive", "bulk-1"]
            assert all(slot.problem is None for slot in s.link.slots)

    with log_events() as log:
        run_in_real_time(main)
    assert {e["code"] for e in of(log, "extra_lane_failed")} == {"channel_refused"}


def test_a_lane_that_is_being_dialled_at_the_end_begins_no_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            s.sshd.login_takes, tries = 0.3, s.sshd.tries
            s.sshd.cut(1)
            await until(lambda: s.sshd.tries > tries)
            await s.link.close("the worker stops")
            await asyncio.sleep(10)
            assert s.head.hub.nodes["w1"].mux is None

    with log_events() as log:
        run(main)
    assert len(of(log, "session_started")) == 2  # one a side


def test_a_hello_under_way_at_the_end_begins_no_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            s.sshd.flowing.clear()
            await until(lambda: any(lane.greeting for lane in s.link._lanes))
            closing = asyncio.create_task(s.link.close("the worker stops"))
            await asyncio.sleep(0)  # it has begun to end
            s.sshd.flowing.set()
            await closing
            await until(lambda: not len(s.head.hub.gate.pending))
            assert not s.head.hub.nodes

    with log_events() as log:
        run(main)
    assert of(log, "session_started") == []
    assert of(log, "lane_refused") == []


def test_a_proof_under_way_at_the_end_leaves_no_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            prove = s.prove

            def held(greeting: Frame, challenge: Challenge) -> Proof:
                s.sshd.flowing.clear()
                return prove(greeting, challenge)

            s.prove = held  # type: ignore[method-assign]
            await until(lambda: any(lane.challenged for lane in s.link._lanes))
            closing = asyncio.create_task(s.link.close("the worker stops"))
            await asyncio.sleep(0)  # it has begun to end
            s.sshd.flowing.set()
            await closing
            await until(lambda: of(log, "session_ended"))
            assert s.head.hub.nodes["w1"].mux is None

    with log_events() as log:
        run(main)
    (ended,) = of(log, "session_ended")
    assert ended["cause"] == "the worker stops"


def test_cuts_in_the_middle_of_a_transfer_lose_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            async with s.listener() as listen:
                await transfer(listen, 12, lambda i: s.sshd.cut() if i in {3, 6, 9} else None)
            await s.up()
            assert s.link.link_stats.cuts >= 1
            assert s.link.link_stats.ridden_through == s.link.link_stats.cuts

    with log_events() as log:
        run(main)
    assert len(of(log, "session_started")) == 2  # one a side: it is still the first session


@pytest.mark.parametrize("which", [0, 1])
def test_one_lane_of_two_is_lost_and_comes_back(tmp_path: Path, which: int) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            async with s.listener() as listen:
                await transfer(listen, 6, lambda i: s.sshd.cut(which) if i == 2 else None)
            await s.up()
            assert s.link.link_stats.cuts == 0

    run(main)


def test_a_head_that_is_slow_to_let_in_is_waited_for_while_parked(tmp_path: Path) -> None:
    """Each login that took too long gives the next one more time."""

    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            s.sshd.login_takes = 2.5 * ssh_module.URGENT_LOGIN
            s.sshd.cut()
            await until(lambda: s.link.link_stats.cuts == 1)
            await s.up()
            assert s.link.link_stats.ridden_through == 1
            assert await works(s)

    run(main)


async def lose_the_other_lane(s: Site) -> None:
    """Logins are quick again; the link is back soon."""
    s.sshd.login_takes = 0.0
    s.sshd.cut(0)
    await until(lambda: s.link.link_stats.cuts == 1)
    began = asyncio.get_running_loop().time()
    await s.up(lanes=1)
    waited = asyncio.get_running_loop().time() - began
    assert waited < 2 * ssh_module.URGENT_LOGIN


def test_a_login_that_hangs_when_the_link_parks_gets_no_longer_than_a_new_one(
    tmp_path: Path,
) -> None:
    """It began while another lane stood, so nobody waited for it."""

    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            s.sshd.login_takes = 10 * ssh_module.URGENT_LOGIN
            s.sshd.cut(0)
            await until(lambda: s.sshd.tries == 3)
            await asyncio.sleep(1)  # the login has begun
            await lose_the_other_lane(s)

    run(main)


def test_a_rest_before_the_next_attempt_ends_when_the_link_parks(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            s.sshd.login_takes = 1e6
            s.sshd.cut(0)
            # Attempts fail until the rest between them is long; then one begins.
            await until(lambda: s.sshd.tries == 10, 1000)
            await until(lambda: len(s.sshd.connections) == 1, 100)
            await lose_the_other_lane(s)

    run(main)


def test_while_parked_a_hub_that_says_nothing_is_asked_again_soon(tmp_path: Path) -> None:
    """A cut in the midst of a handshake: TCP alone would repeat what was lost much later."""

    async def main() -> None:
        urgent, adaptive = asyncio.Event(), AdaptiveTimeout(3.0, 15.0)
        loop = asyncio.get_running_loop()
        began = loop.time()
        loop.call_later(5.0, urgent.set)
        with pytest.raises(TimeoutError):
            async with time_limit(urgent, 15.0, adaptive):
                await asyncio.sleep(100)
        assert loop.time() - began == pytest.approx(8.0, abs=0.5)
        assert adaptive.seconds == 6.0, "the next one gets longer"
        began = loop.time()
        async with time_limit(urgent, 15.0, adaptive):
            await asyncio.sleep(5)
        assert adaptive.seconds == pytest.approx(10.0, abs=0.5)

    run(main)


@pytest.mark.parametrize("at_first", [True, False])
def test_while_parked_an_attempt_that_hears_nothing_keeps_no_other_waiting(at_first: bool) -> None:
    """The head's backlog is full, so that nobody answers; then there is room."""

    async def main() -> None:
        with contextlib.ExitStack() as full:
            deaf = full.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            waiting = [full.enter_context(socket.socket()) for _ in range(3)]
            for sock in waiting:
                sock.setblocking(False)
                sock.connect_ex(deaf.getsockname())
            host, port = deaf.getsockname()
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
            urgent = asyncio.Event()
            if at_first:
                urgent.set()
            dialling = asyncio.create_task(dial.connect(found, urgent))
            # Of the attempts so far TCP repeats the first after one second and after three.
            await asyncio.sleep(2.5 * dial.BESIDE)
            urgent.set()
            assert not dialling.done()
            for sock in waiting:  # else one of these takes the place
                sock.close()
            deaf.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    deaf.accept()[0].close()
            async with asyncio.timeout(2 * dial.BESIDE + 0.5):
                (await dialling).close()

    run_in_real_time(main)


def test_attempts_beside_each_other_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the path is back, the kernel's repeats of all are answered at once: the first attempt
    stays, and of the others those of the last moments."""
    began: list[float] = []
    standing: set[int] = set()

    async def unanswered(*_: object) -> socket.socket:
        number = len(began)
        began.append(asyncio.get_running_loop().time())
        standing.add(number)
        try:
            await asyncio.Event().wait()
        finally:
            standing.remove(number)
        raise AssertionError("nobody answers")

    monkeypatch.setattr(dial, "side_by_side", unanswered)

    async def main() -> None:
        urgent = asyncio.Event()
        urgent.set()
        dialling = asyncio.create_task(dial.connect([], urgent))
        await asyncio.sleep(16.5 * dial.BESIDE)
        first, *others = (began[number] for number in sorted(standing))
        assert (first, len(began)) == (began[0], 17)
        now = asyncio.get_running_loop().time()
        assert [now - at < dial.BESIDE_FOR + dial.BESIDE for at in others] == [True] * 5
        dialling.cancel()
        await asyncio.gather(dialling, return_exceptions=True)
        assert not standing

    run(main)


def test_a_link_that_is_held_is_found_silent_and_dialled_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            async with s.listener() as listen:
                reader, writer = await asyncio.open_connection(*listen)
                s.sshd.flowing.clear()
                writer.write(b"held")
                await until(lambda: s.link.link_stats.cuts == 1)
                s.sshd.flowing.set()
                async with asyncio.timeout(10):
                    assert await reader.readexactly(4) == b"held"
                writer.close()
                await writer.wait_closed()
            await s.up()

    with log_events() as log:
        run(main)
    assert "no answer came in time" in {e["cause"] for e in of(log, "lane_lost")}


def test_a_restarted_hub_resets_streams_once_and_all_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            async with s.listener() as listen:
                reader, writer = await asyncio.open_connection(*listen)
                writer.write(b"x")
                assert await reader.read(1) == b"x"
                await s.restart_hub()
                with pytest.raises(ConnectionResetError):
                    await reader.read()
                writer.close()
                await s.up()
            assert await works(s)
            assert s.head.hub.nodes["w1"].state == "up"

    with log_events() as log:
        run(main)
    assert len(of(log, "session_unknown")) == 1
    worker = [e for e in of(log, "session_ended") if e["node"] == "head"]
    assert len(worker) == 1


def test_a_refusal_of_a_session_that_is_past_does_not_end_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.up()
            late = LinkRefusedError(codes.SESSION_UNKNOWN.problem("cause", "remedy"), "0abc")
            assert s.link._begins_anew(late)
            assert s.link.state == "up"
            assert await works(s)

    run(main)


def test_after_ride_through_streams_are_reset_and_it_heals_when_the_head_is_back(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with site(tmp_path, ride_through=60.0) as s:
            await s.up()
            async with s.listener() as listen:
                reader, writer = await asyncio.open_connection(*listen)
                writer.write(b"x")
                assert await reader.read(1) == b"x"
                await s.sshd.stop()
                await until(lambda: s.link.state == "parked")
                with pytest.raises(ConnectionResetError):
                    await reader.read()
                writer.close()
            problem = s.link.problem
            assert problem is not None
            assert problem.code == codes.SSH_UNREACHABLE
            await asyncio.sleep(60)
            await s.sshd.start()
            await s.up()
            assert await works(s)

    with log_events() as log:
        run(main)
    worker = [
        e for e in of(log, "session_ended") if e["node"] == "head" and "stops" not in e["cause"]
    ]
    assert len(worker) == 1
    assert len(of(log, "ssh_unreachable")) <= 2, "once for each lane at the most"


def test_a_worker_that_stops_while_nothing_answers_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.sshd.stop()
            await until(lambda: s.link.problem is not None)

    run(main)


# -- what is wrong, and what is said of it -------------------------------------------------------


async def tries(s: Site, log: Log, code: str, count: int = 4) -> None:
    """The link meets `code`, tries on, and says it once."""
    wanted = codes.ALL[code]
    await until(lambda: s.link.problem is not None and s.link.problem.code is wanted, 10, lambda: (
        f"{s.link.problem} instead of {code}"
    ))  # fmt: skip
    assert s.link.problem is not None
    assert s.link.problem.cause
    assert s.link.problem.remedy
    before = s.sshd.tries
    await until(
        lambda: s.sshd.tries >= before + count,
        2 * count * link_module.REDIAL_COUNTED[codes.SSH_AUTH_REFUSED],
    )
    assert s.link.state == "down"
    assert len(of(log, code)) == 1, "the same again is no news"
    assert of(log, code)[0]["cause"] == s.link.problem.cause


def wrong(
    tmp_path: Path, code: str, mend: Callable[[Site], object], before: Callable[[Site], object]
) -> None:
    """Something is wrong, is said once, is mended, and the link comes up by itself."""

    async def main() -> None:
        async with site(tmp_path) as s:
            before(s)
            await tries(s, log, code)
            mend(s)
            await s.up(seconds=2 * link_module.REDIAL_COUNTED[codes.SSH_AUTH_REFUSED])
            assert await works(s)

    with log_events() as log:
        run(main)


def test_an_unknown_host_key(tmp_path: Path) -> None:
    wrong(
        tmp_path,
        "host_key_unknown",
        before=lambda s: s.sshd.known_hosts.write_text(""),
        mend=lambda s: s.sshd.known_hosts.write_text(s.sshd.known_hosts_line()),
    )


def test_no_file_of_known_hosts(tmp_path: Path) -> None:
    """The one that is named: no other is asked, and nobody is dialled before it is there."""

    async def main() -> None:
        async with site(tmp_path) as s:
            s.sshd.known_hosts.unlink()
            await until(lambda: s.link.problem is not None)
            assert s.link.problem is not None
            assert s.link.problem.code is codes.SSH_FILE_UNREADABLE
            assert s.sshd.tries == 0
            s.sshd.known_hosts.write_text(s.sshd.known_hosts_line())
            await s.up()

    with log_events() as log:
        run(main)
    assert len(of(log, "ssh_file_unreadable")) == 1


def test_another_host_key(tmp_path: Path) -> None:
    other = asyncssh.generate_private_key("ssh-ed25519")
    wrong(
        tmp_path,
        "host_key_mismatch",
        before=lambda s: s.sshd.known_hosts.write_text(s.sshd.known_hosts_line(other)),
        mend=lambda s: s.sshd.known_hosts.write_text(s.sshd.known_hosts_line()),
    )


async def do(s: Site, program: str) -> None:
    """What the remedy says, as a shell does it."""
    assert s.link.problem is not None
    commands = re.findall(r"`([^`]+)`", s.link.problem.remedy)
    (command,) = [command for command in commands if command.startswith(f"{program} ")]
    ran = await asyncio.to_thread(
        subprocess.run, ["sh", "-c", command], capture_output=True, text=True, timeout=20
    )
    assert ran.returncode == 0, f"{command}: {ran.stderr}"


def test_what_to_do_about_a_host_key_helps(tmp_path: Path) -> None:
    """The file is not the usual one, and the port stands in the SSH configuration only."""
    for program in ("ssh-keygen", "ssh-keyscan"):
        absent = f"the remedies' test needs {program} (Debian package openssh-client)"
        need(None if shutil.which(program) else absent)
    other = asyncssh.generate_private_key("ssh-ed25519")

    async def main() -> None:
        async with site(tmp_path, ssh="the-head", identity=None) as s:
            s.sshd.known_hosts.write_text(s.sshd.known_hosts_line(other))
            (tmp_path / "ssh_config").write_text(
                f"Host the-head\n  HostName 127.0.0.1\n  Port {s.sshd.port}\n  User ray\n"
                f"  IdentityFile {s.sshd.identity}\n"
            )
            await tries(s, log, "host_key_mismatch")
            await do(s, "ssh-keygen")
            await tries(s, log, "host_key_unknown")
            await do(s, "ssh-keyscan")
            await s.up()

    with log_events() as log:
        run(main)


@pytest.mark.parametrize(
    "option",
    [
        "UserKnownHostsFile none",
        "UserKnownHostsFile /dev/null",
        "StrictHostKeyChecking no",
        "StrictHostKeyChecking no\n  UserKnownHostsFile none\n  GlobalKnownHostsFile none",
    ],
)
def test_no_option_of_ssh_config_switches_the_check_of_host_keys_off(
    tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    async def main() -> None:
        async with site(tmp_path, known_hosts=None) as s:
            (tmp_path / "ssh_config").write_text(f"Host *\n  {option}\n")
            await tries(s, log, "host_key_unknown")
            assert s.head.hub.nodes == {}

    with log_events() as log:
        run(main)


def test_the_known_hosts_of_ssh_config_are_used(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, known_hosts=None) as s:
            path = s.sshd.known_hosts
            (tmp_path / "ssh_config").write_text(f"Host *\n  UserKnownHostsFile {path}\n")
            await s.up()

    run(main)


def test_an_alias_of_ssh_config(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, ssh="the-head", identity=None) as s:
            (tmp_path / "ssh_config").write_text(
                f"Host the-head\n  HostName 127.0.0.1\n  Port {s.sshd.port}\n  User ray\n"
                f"  IdentityFile {s.sshd.identity}\n"
            )
            await s.up()

    run(main)


def test_an_alias_of_the_users_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its host, its user, its key and its known hosts; for the redial after a cut, too."""
    home = tmp_path / "home" / ".ssh"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home.parent))
    fields: dict[str, Any] = {
        "ssh": "the-head",
        "identity": None,
        "known_hosts": None,
        "ssh_config": None,
    }

    async def main() -> None:
        async with site(tmp_path, **fields) as s:
            (home / "known_hosts").write_text(s.sshd.known_hosts.read_text())
            (home / "config").write_text(
                f"Host the-head\n  HostName 127.0.0.1\n  Port {s.sshd.port}\n  User ray\n"
                f"  IdentityFile {s.sshd.identity}\n"
            )
            await s.up()
            async with s.listener() as listen:
                await transfer(listen, 6, lambda i: s.sshd.cut() if i == 2 else None)
            assert s.link.link_stats.cuts == 1
            connector = ssh_module.SshConnector(HeadConfig(ssh="the-head"))
            assert await connector.place() == ("127.0.0.1", s.sshd.port, True)
            shown = await connector.host_key()
            assert (shown.host, shown.port, shown.known) == ("127.0.0.1", s.sshd.port, True)

    run(main)


def test_a_key_that_the_head_does_not_take(tmp_path: Path) -> None:
    allows = Sshd.allows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sshd, "allows", lambda _self, _key: False)
        wrong(
            tmp_path,
            "ssh_auth_refused",
            before=lambda _: None,
            mend=lambda _: patch.setattr(Sshd, "allows", allows),
        )


@pytest.mark.parametrize("parked", [True, False])
def test_a_server_that_turns_away_is_asked_by_one_lane_and_seldom(
    tmp_path: Path, parked: bool
) -> None:
    """As with MaxStartups: each connection is one more to a server that has too many."""
    tries = 0

    async def turn_away(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        writer.write(b"Exceeded MaxStartups\r\n")
        writer.close()

    async def main() -> None:
        nonlocal tries
        async with site(tmp_path) as s:
            await s.up()
            if not parked:
                s.link.mux.close("begin anew")  # type: ignore[union-attr]
            await s.sshd.stop()
            full = await asyncio.start_server(turn_away, "127.0.0.1", s.sshd.port)
            await until(lambda: tries)
            await asyncio.sleep(20)
            assert 2 <= tries <= 6
            problem = s.link.problem
            assert problem is not None
            assert problem.code is codes.SSH_TURNED_AWAY
            assert "Exceeded MaxStartups" in problem.cause
            full.close()
            await full.wait_closed()
            await s.sshd.start()
            before = s.sshd.tries
            await s.up(seconds=15)
            assert s.sshd.tries - before == 2
            assert s.link.link_stats.ridden_through == (1 if parked else 0)

    run(main)


def test_a_port_where_nothing_listens(tmp_path: Path) -> None:
    async def main() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            async with site(tmp_path, ssh=f"ray@127.0.0.1:{port}") as s:
                await until(lambda: s.link.problem is not None)
                await asyncio.sleep(60)
                assert s.link.problem is not None
                assert s.link.problem.code == codes.SSH_UNREACHABLE
                assert str(port) in s.link.problem.cause

    with log_events() as log:
        run(main)
    assert len(of(log, "ssh_unreachable")) == 1


def test_a_name_that_cannot_be_resolved(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, ssh="ray@no-such-host.invalid") as s:
            await until(lambda: s.link.problem is not None, 25)
            assert s.link.problem is not None
            assert s.link.problem.code == codes.SSH_UNREACHABLE
            assert "no-such-host.invalid" in s.link.problem.cause

    run_in_real_time(main, 40)


def test_a_hub_that_is_not_there_and_then_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, hub=False) as s:
            await until(lambda: bool(of(log, "hub_absent")), 10)
            await asyncio.sleep(KEPT_SECONDS - 5)
            assert s.sshd.tries == 1, "an attempt needs no login of its own"
            await asyncio.sleep(2 * KEPT_SECONDS)
            assert 2 <= s.sshd.tries <= 3, "what only a new login brings is found as well"
            assert len(of(log, "hub_absent")) == 1, "the same again is no news"
            await s.head.start()
            await s.up()
            assert await works(s)

    with log_events() as log:
        run(main)


def test_an_sshd_that_refuses_such_channels(tmp_path: Path) -> None:
    wrong(
        tmp_path,
        "channel_refused",
        before=lambda s: setattr(s.sshd, "prohibits", True),
        mend=lambda s: setattr(s.sshd, "prohibits", False),
    )


def test_a_hub_that_knows_the_node_by_a_secret_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an earlier version, and upgraded after its worker: nothing secret is sent to it."""
    monkeypatch.setattr("rayfwd.hub.connection.PROOF", "a feature that it does not know")

    async def main() -> None:
        async with site(tmp_path, hub=False) as s:
            s.identity = replace(s.identity, older="the secret of w1".ljust(32))
            s.head.roster.join("w1", "the secret of w1".ljust(32), 40, None)
            await s.head.start()
            await tries(s, log, "name_taken")
            problem = s.link.problem
            assert problem is not None
            assert "older than this one" in problem.cause
            assert "the head first" in problem.remedy
            monkeypatch.undo()  # it is upgraded
            await s.restart_hub()
            await s.up()

    with log_events() as log:
        run(main)


def test_a_name_that_belongs_to_another_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, hub=False) as s:
            s.head.roster.join("w1", "somebody else's key".ljust(32), 40, None)
            await s.head.start()
            await tries(s, log, "name_taken")
            assert s.head.roster.forget("w1")
            await s.up()

    with log_events() as log:
        run(main)


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "ssh_file_unreadable"), ("no key", "ssh_key_unusable"), ("locked", "ssh_key_unusable")],
)
def test_an_identity_that_cannot_be_used(tmp_path: Path, content: str | None, code: str) -> None:
    path = tmp_path / "another_id"
    if content == "locked":
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(
            path, "pkcs8-pem", passphrase="x"
        )
    elif content is not None:
        path.write_text(content)

    async def main() -> None:
        async with site(tmp_path, identity=path) as s:
            await until(lambda: s.link.problem is not None)
            await asyncio.sleep(60)
            assert s.link.problem is not None
            assert s.link.problem.code.name == code
            assert s.sshd.tries == 0 or code != "ssh_file_unreadable"

    with log_events() as log:
        run(main)
    assert len(of(log, code)) == 1


def test_something_else_at_the_hubs_socket(tmp_path: Path) -> None:
    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-something that is no frame at all\r\n")
        # A worker that closes with our bytes unread resets us, as Unix sockets do.
        with suppress(ConnectionResetError):
            await reader.read()
        writer.close()

    async def main() -> None:
        path = tmp_path / "other.sock"
        server = await asyncio.start_unix_server(stranger, path)
        async with site(tmp_path, socket=path) as s:
            await tries(s, log, "frame_unknown")
            assert s.link.problem is not None
            assert "head.socket" in s.link.problem.remedy
        server.close()

    with log_events() as log:
        run(main)


def lanes_at_the_hub(s: Site) -> list[HubConnection]:
    mux = s.head.hub.muxes().get("w1")
    return [cast(HubConnection, lane.transport) for lane in mux.lanes.values()] if mux else []


class TestAuto:
    """`via = "auto"`, which `rayfwd join` has: the socket, else the command."""

    def test_the_socket_is_enough(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with site(tmp_path, via="auto") as s:
                await s.up(seconds=20)
                assert s.sshd.commands == []

        run_in_real_time(main, 60)

    def test_where_it_is_no_way_the_command_is_run(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with site(tmp_path, via="auto", socket=tmp_path / "absent.sock") as s:
                s.sshd.attach_to = s.head.hub.socket.path
                await s.up(seconds=20)
                assert len(s.sshd.commands) == 2
                assert await works(s)

        run_in_real_time(main, 60)

    def test_where_neither_is_a_way_both_are_named(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with site(tmp_path, via="auto", socket=tmp_path / "absent.sock") as s:
                s.sshd.attach_says = b"sh: rayfwd: not found\n"
                await until(lambda: s.link.problem is not None, 20)
                assert s.link.problem is not None
                assert "absent.sock" in s.link.problem.cause
                assert "rayfwd: not found" in s.link.problem.cause

        run_in_real_time(main, 60)


class TestExec:
    def test_carries_as_a_channel_does(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with site(tmp_path, via="exec") as s:
                s.sshd.attach_to = s.head.hub.socket.path
                await s.up(seconds=20)
                async with s.listener() as listen:
                    await transfer(listen, 4, lambda i: s.sshd.cut() if i == 1 else None)
                await s.up(seconds=20)

        run_in_real_time(main, 60)

    def test_the_hub_has_the_pipes_and_those_of_bulk_are_wide(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with site(tmp_path, via="exec") as s:
                s.sshd.attach_to = s.head.hub.socket.path
                await s.up(seconds=20)
                sizes = {}
                for lane in lanes_at_the_hub(s):
                    assert isinstance(lane._transport, PipeTransport)
                    ends = (lane._transport._in, lane._transport._out)
                    sizes[lane.lane_class] = [fcntl.fcntl(end, fcntl.F_GETPIPE_SZ) for end in ends]
                assert sizes == {"interactive": [65536] * 2, "bulk": [262144] * 2}

                def held(process: asyncio.subprocess.Process) -> list[str]:
                    return [os.readlink(f"/proc/{process.pid}/fd/{end}") for end in range(2)]

                for command in s.sshd.commands:  # the hub's are the only ones
                    await until(lambda c=command: held(c) == ["/dev/null"] * 2)  # type: ignore[misc]

        run_in_real_time(main, 60)

    def test_a_lane_goes_with_its_command_and_the_command_with_the_lane(
        self, tmp_path: Path
    ) -> None:
        async def main() -> None:
            async with site(tmp_path, via="exec") as s:
                s.sshd.attach_to = s.head.hub.socket.path
                await s.up(seconds=20)
                killed, other = s.sshd.commands
                killed.kill()
                await until(lambda: len(lanes_at_the_hub(s)) == 1, 10)
                await s.up(seconds=20)
                assert await works(s)
                for lane in lanes_at_the_hub(s):
                    lane.abort("cut")
                await until(lambda: other not in s.sshd.commands, 10)
                assert other.returncode == 0
                await s.up(seconds=20)
                await s.restart_hub()
                await until(lambda: len(lanes_at_the_hub(s)) == 2, 20)
                assert await works(s)
                assert len(s.sshd.commands) == 2

        run_in_real_time(main, 90)

    def test_a_refusal_is_heard(self, tmp_path: Path) -> None:
        """It is said by the pipes, and the command ends."""

        async def main() -> None:
            async with site(tmp_path, via="exec") as s:
                taken = hello_of("w1", key="another key, long enough")
                assert await answer_to(s.head.hub.socket.path, taken.encode())
                s.sshd.attach_to = s.head.hub.socket.path
                await until(lambda: s.link.problem is not None and s.link.problem.code is
                            codes.NAME_TAKEN, 20, lambda: str(s.link.problem))  # fmt: skip
                await until(lambda: not s.sshd.commands, 10)

        run_in_real_time(main, 60)

    @pytest.mark.parametrize("noise", [b"Welcome to gpu cluster\r\n", b"\x02 menu \x1b[2J" * 7000])
    def test_a_shell_may_print_before(self, tmp_path: Path, noise: bytes) -> None:
        """65 KB at most, with anything in it."""

        async def main() -> None:
            async with site(tmp_path, via="exec") as s:
                s.sshd.attach_to, s.sshd.shell_prints = s.head.hub.socket.path, noise[:65_000]
                await s.up(seconds=20)
                assert await works(s)

        run_in_real_time(main, 60)

    @pytest.mark.parametrize("size", [1, 4000])
    def test_a_shell_that_does_nothing_but_print_is_quoted(self, tmp_path: Path, size: int) -> None:
        """As nologin does; and one that never stops."""

        async def main() -> None:
            async with site(tmp_path, via="exec") as s:
                s.sshd.shell_prints = b"This account is currently \x1b[1mnot\n available.\n" * size
                await until(
                    lambda: "printed" in str(s.link.problem), 5, lambda: str(s.link.problem)
                )
                problem = s.link.problem
                assert problem is not None
                assert problem.code is codes.HUB_CLOSED
                assert "its shell printed 'This account is currently" in problem.cause
                assert problem.cause.isprintable()

        run_in_real_time(main, 60)

    def test_an_absent_hub_is_named(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with site(tmp_path, via="exec") as s:
                s.sshd.attach_to = tmp_path / "nothing.sock"
                await until(lambda: s.link.problem is not None and s.link.problem.code is
                            codes.HUB_ABSENT, 20, lambda: str(s.link.problem))  # fmt: skip
                s.sshd.attach_to = s.head.hub.socket.path
                await s.up(seconds=20)

        with log_events() as log:
            run_in_real_time(main, 60)
        assert len(of(log, "hub_absent")) == 1
        assert "nothing.sock" in of(log, "hub_absent")[0]["cause"]


def test_what_cannot_be_had_beside_a_lane_that_stands_is_a_limit() -> None:
    link = Link(cast(Any, None), HeadConfig(ssh="h"), cast(Any, None), Limits())
    away = codes.SSH_UNREACHABLE.problem("h did not answer in time", "see that it is up")
    refused = codes.SSH_AUTH_REFUSED.problem("h refuses", "add the key")
    link.mux = cast(Any, SimpleNamespace(ended=False, lanes={}))
    assert link.understood(away, 9, 10.0) is away, "parked: it may as well be away"
    link.mux.lanes[1] = cast(Any, None)
    assert link.understood(away, 1, 0.1) is away, "sshd is restarted, perhaps"
    for failures, seconds in ((3, 0.1), (1, 10.0)):
        told = link.understood(away, failures, seconds)
        assert told.code == codes.SSH_LIMITED
        assert "h did not answer in time" in told.cause
        assert "ufw limit" in told.remedy
    assert link.understood(refused, 9, 10.0) is refused
