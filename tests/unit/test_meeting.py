"""A meeting place: neither machine logs in to the other, and both to a third, with real sshd."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import asyncssh
import pytest

from rayfwd import codes
from rayfwd.config import ConfigError, HeadConfig, MeetConfig, parse
from rayfwd.problems import ProblemError
from rayfwd.ssh.meeting import Meeting
from rayfwd.ssh.own_sshd import (
    KEY_FILE,
    LOGINS_AT_ONCE,
    MOST_SESSIONS,
    MOST_TRIES,
    OwnSsh,
)
from rayfwd.ssh.ssh_connector import SshConnector
from tests.need import tool
from tests.unit.loops import closing, log_events, of, run, until
from tests.unit.real_sshd import RealSshd
from tests.unit.way_probe import SAID, answer, problem


class Site:
    """A third host, and a head with an sshd of its own."""

    def __init__(self, directory: Path) -> None:
        self.third = RealSshd(directory / "third", "127.0.0.2")
        self.at_head = RealSshd(directory / "at_head", "127.0.0.1")
        self.socket = directory / "third/meet.sock"
        self.known_hosts = directory / "known_hosts"
        self.know(self.third.known_hosts_line(), self.at_head.known_hosts_line("the-head"))
        (directory / "ssh_config").write_text("")
        self.third.authorize(self.third.public_key, self.at_head.public_key)
        common = {"known_hosts": self.known_hosts, "ssh_config": directory / "ssh_config"}
        self.meet = MeetConfig.model_validate(
            {
                "ssh": self.third.target,
                "socket": str(self.socket),
                "sshd": f"127.0.0.1:{self.at_head.port}",
                "identity": self.third.identity,
                **common,
            }
        )
        self.head = HeadConfig.model_validate(
            {
                "ssh": f"{self.at_head.user}@the-head",
                "meet": self.third.target,
                "meet_socket": str(self.socket),
                "identity": self.at_head.identity,
                **common,
            }
        )
        self.meeting = Meeting(self.meet, 60.0, lambda: None)

    def know(self, *lines: str) -> None:
        self.known_hosts.write_text("".join(lines))

    async def logs_in(self) -> None:
        """At the head, by way of the third host. Raises ProblemError."""
        connector = SshConnector(self.head)
        try:
            connection = await connector.connect()
            async with connection.start_sftp_client() as sftp:
                await sftp.stat(str(self.socket))
            connection.close()
            await connection.wait_closed()
        finally:
            connector.close()

    async def problem(self) -> str:
        with pytest.raises(ProblemError) as caught:
            await self.logs_in()
        return str(caught.value.problem.code.name) + ": " + caught.value.problem.cause

    def held(self) -> bool:
        return self.meeting.stands


@asynccontextmanager
async def meeting(made: Site) -> AsyncIterator[None]:
    """The head logs in there, and logs in again, until this is left."""
    task = asyncio.create_task(made.meeting.run())
    try:
        yield
    finally:
        made.meeting.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await made.third.stop()


@asynccontextmanager
async def site(directory: Path, *, head_sshd: bool = True) -> AsyncIterator[Site]:
    made = Site(directory)
    async with closing():
        await made.third.start()
        if head_sshd:
            # What the user's own files would have the shell do is no matter here.
            await made.at_head.start(f"SetEnv HOME={directory}")
        try:
            async with meeting(made):
                yield made
        finally:
            await made.at_head.stop()


def test_who_logs_in_is_at_the_head_and_the_host_between_sees_ssh_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await until(s.held, 20)
            assert s.socket.stat().st_mode & 0o777 == 0o600
            await s.logs_in()
            assert "Accepted publickey" in s.at_head.log
            reader, writer = await asyncio.open_unix_connection(str(s.socket))
            assert (await reader.readline()).startswith(b"SSH-2.0-OpenSSH")
            writer.close()

    run(main)


def hub_of(s: Site, directory: Path) -> HeadConfig:
    """The way to something that echoes at the head, by the system's `ssh`."""
    attach = directory / "attach"
    attach.write_text("#!/bin/sh\nprintf '\\000rayfwd attach\\000\\n'; exec cat\n")
    attach.chmod(0o755)
    by = {"transport": "openssh", "via": "exec", "attach_command": str(attach)}
    return s.head.model_copy(update=by)


@pytest.mark.parametrize("has", ["python3", "perl"])
def test_the_systems_ssh_goes_there_by_a_command(tmp_path: Path, has: str) -> None:
    """By Python, or by Perl where there is none."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sh").symlink_to(tool("sh"))
    (tools / has).symlink_to(Path(sys.executable).resolve() if has == "python3" else tool(has))

    async def main() -> None:
        async with site(tmp_path) as s:
            await s.third.stop()
            await s.third.start(f"SetEnv PATH={tools} HOME={tmp_path}")
            await until(s.held, 20)
            way = hub_of(s, tmp_path)
            assert await answer(way) == SAID
            s.meeting.close()
            s.third.cut()
            s.socket.unlink(missing_ok=True)
            said = await problem(way)
            assert said.code is codes.JUMP_REFUSED
            assert f"the meeting place {s.third.target} has no head" in said.cause
            assert "No such file" in said.cause
            s.know(s.at_head.known_hosts_line("the-head"))
            said = await problem(way)
            assert said.code is codes.HOST_KEY_UNKNOWN
            assert f"the meeting place {s.third.target}" in said.cause

    run(main, 60)


def test_the_systems_ssh_names_a_meeting_place_without_either(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").symlink_to(tool("sh"))

    async def main() -> None:
        async with site(tmp_path) as s:
            await s.third.stop()
            await s.third.start(f"SetEnv PATH={tmp_path}/bin HOME={tmp_path}")
            said = await problem(hub_of(s, tmp_path))
            assert said.code is codes.JUMP_REFUSED
            assert "neither python3 nor perl is there" in said.cause

    run(main)


def test_it_is_held_again_after_each_cut_and_over_what_is_left_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            with log_events() as events:
                await until(s.held, 20)
                s.third.cut()
                await until(lambda: len(of(events, "meeting_held")) == 2, 20)
                assert of(events, "meeting_lost")
                await s.logs_in()

    run(main)


def test_the_third_host_is_named_on_both_sides_when_it_is_down(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await until(s.held, 20)
            await s.third.stop()
            await until(lambda: s.meeting.problem is not None, 20)
            problem = s.meeting.problem
            assert problem is not None
            assert problem.code is codes.SSH_UNREACHABLE
            assert s.third.target in problem.cause
            assert "the meeting place" in problem.remedy
            said = await s.problem()
            assert said.startswith("ssh_unreachable: ")
            assert f"the meeting place {s.third.target}" in said
            await s.third.start()
            await until(s.held, 20)
            assert s.meeting.problem is None

    run(main)


def test_a_head_that_is_not_there_is_named_as_such(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await until(s.held, 20)
            s.meeting.close()
            s.third.cut()
            said = await s.problem()
            assert said.startswith("jump_refused: ")
            assert f"has no head at its socket {s.socket}" in said

    run(main)


def test_a_head_whose_own_sshd_is_away_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, head_sshd=False) as s:
            await until(s.held, 20)
            await s.problem()
            problem = s.meeting.problem
            assert problem is not None
            assert problem.code is codes.MEETING_REFUSED
            assert f"127.0.0.1 port {s.at_head.port}" in problem.cause
            await s.at_head.start()
            await s.logs_in()
            assert s.meeting.problem is None

    run(main)


@pytest.mark.parametrize("shuts", ["AllowStreamLocalForwarding no", "AllowTcpForwarding no"])
def test_a_third_host_that_forbids_it_is_told_what_to_allow(tmp_path: Path, shuts: str) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.third.stop()
            await s.third.start(shuts)
            await until(
                lambda: (
                    s.meeting.problem is not None
                    and s.meeting.problem.code is codes.MEETING_REFUSED
                ),
                30,
            )
            assert s.meeting.problem is not None
            assert "AllowStreamLocalForwarding" in s.meeting.problem.remedy

    run(main)


def test_a_third_host_without_sftp_is_told_so_on_both_sides(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.third.stop()
            await s.third.start("Subsystem other /bin/false", sftp=False)
            await until(lambda: "no SFTP" in str(s.meeting.problem and s.meeting.problem.cause), 30)
            assert s.meeting.problem is not None
            assert s.meeting.problem.code is codes.MEETING_REFUSED
            assert "sftp subsystem" in s.meeting.problem.remedy
            said = await problem(s.head.model_copy(update={"meet_socket": "meet.sock"}))
            assert said.code is codes.JUMP_REFUSED
            assert f"the meeting place {s.third.target} has no SFTP" in said.cause

    run(main, 60)


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "other").mkdir()
        async with site(tmp_path / "other") as s:
            await until(s.held, 20)
            s.socket.unlink()
            s.socket.write_text("precious")
            s.third.cut()
            await until(lambda: s.meeting.problem is not None, 20)
            assert s.meeting.problem is not None
            assert "is not a socket" in s.meeting.problem.cause
            assert s.socket.read_text() == "precious"

    run(main)


@pytest.mark.parametrize("whose", ["third", "head"])
def test_host_keys_are_checked_end_to_end(tmp_path: Path, whose: str) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await until(s.held, 20)
            known = s.third if whose == "head" else s.at_head
            s.know(known.known_hosts_line(None if known is s.third else "the-head"))
            said = await s.problem()
            assert said.startswith("host_key_unknown: ")
            assert ("the meeting place" if whose == "third" else "the-head") in said

    run(main)


class OwnSite(Site):
    """The head has no sshd, and answers itself. Its hub echoes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.hub = directory / "hub.sock"
        self.authorized = directory / "authorized_keys"
        self.own = OwnSsh(directory, self.hub, self.authorized)
        self.know(self.third.known_hosts_line(), f"the-head {self.own.public_key}\n")
        self.authorized.write_text(f"{self.at_head.public_key}\n")
        without = self.meet.model_copy(update={"sshd": "own"})
        self.meeting = Meeting(without, 60.0, lambda: None, lambda: self.own)
        self.head = self.head.model_copy(update={"socket": self.hub})

    def by(self, **keys: object) -> HeadConfig:
        return self.head.model_copy(update=keys)


@asynccontextmanager
async def own_site(directory: Path) -> AsyncIterator[OwnSite]:
    made = OwnSite(directory)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    async with closing():
        await made.third.start()
        server = await asyncio.start_unix_server(echo, made.hub)
        try:
            async with meeting(made):
                await until(made.held, 20)
                yield made
        finally:
            server.close()


async def run_there(head: HeadConfig, given: bytes | None = None) -> asyncssh.SSHCompletedProcess:
    """A command, as any SSH client asks for one; its login is over when this returns."""
    connector = SshConnector(head)
    connection = await connector.connect()
    ran = await connection.run("anything", input=given, encoding=None)
    connection.close()
    await connection.wait_closed()
    connector.close()
    return ran


class Noted(asyncio.Protocol):
    """Notes its connection."""

    def __init__(self, made: list[asyncio.Transport]) -> None:
        self._made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._made.append(cast(asyncio.Transport, transport))


class TestWithoutSshd:
    def test_it_leads_to_the_hub_and_nowhere_else(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with own_site(tmp_path) as s:
                assert await answer(s.head) == SAID
                other = tmp_path / "other.sock"
                server = await asyncio.start_unix_server(lambda _r, w: w.close(), other)
                said = await problem(s.by(socket=other))
                server.close()
                assert said.code is codes.CHANNEL_REFUSED
                assert 'set via = "exec"' in said.remedy

        run(main)

    def test_a_forced_command_is_what_is_run(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with own_site(tmp_path) as s:
                forced = tmp_path / "forced"
                forced.write_text("#!/bin/sh\nprintf '\\000rayfwd attach\\000\\n'; exec cat\n")
                forced.chmod(0o755)
                key = s.at_head.public_key
                s.authorized.write_text(f'restrict,command="{forced}" {key}\n')
                by_command = s.by(via="exec", attach_command="touch /tmp/never")
                assert await answer(by_command) == SAID
                assert (await problem(s.head)).code is codes.CHANNEL_REFUSED
                await until(lambda: not _children_called("cat"), 10)

        run(main)

    def test_what_ends_before_its_command_has_begun_ends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A command that reads to its end would never end."""
        start = asyncio.BaseEventLoop.subprocess_exec

        async def late(*argv: Any, **given: Any) -> Any:
            await asyncio.sleep(0.3)
            return await start(*argv, **given)

        monkeypatch.setattr(asyncio.BaseEventLoop, "subprocess_exec", late)

        async def main() -> None:
            async with own_site(tmp_path) as s:
                s.authorized.write_text(f'restrict,command="cat" {s.at_head.public_key}\n')
                ran = await run_there(s.head, b"all of it")
                assert ran.stdout == b"all of it"

        run(main)

    def test_why_a_command_fails_is_told(self, tmp_path: Path) -> None:
        """Also where it is said after the end of its output."""

        async def main() -> None:
            async with own_site(tmp_path) as s:
                words = "exec >&- <&-; sleep 0.2; echo for a reason >&2; exit 1"
                s.authorized.write_text(f'restrict,command="{words}" {s.at_head.public_key}\n')
                ran = await run_there(s.head)
                assert ran.stderr == b"for a reason\n"

        run(main)

    def test_a_command_whose_own_child_stays_leaves_nothing_open(self, tmp_path: Path) -> None:
        """The child keeps the pipe for complaints open, so that its end never comes."""
        told = tmp_path / "stays"

        async def main() -> None:
            async with own_site(tmp_path) as s:
                forced = tmp_path / "forced"
                forced.write_text(f"#!/bin/sh\nsleep 600 <&- >&- &\necho $! >{told}\nexec cat\n")
                forced.chmod(0o755)
                key = s.at_head.public_key
                s.authorized.write_text(f'restrict,command="{forced}" {key}\n')
                ran = await run_there(s.head, b"all of it")
                assert ran.stdout == b"all of it"

        try:
            run(main)
            gc.collect()  # an error where something is open still
        finally:
            os.kill(int(told.read_text()), signal.SIGKILL)

    def test_rayfwd_attach_is_all_that_another_key_may_run(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with own_site(tmp_path) as s:
                by_command = s.by(via="exec", attach_command=f"touch {tmp_path}/ran")
                assert SAID in await answer(by_command)
                assert not (tmp_path / "ran").exists()

        run(main)

    @pytest.mark.parametrize("before", ['expiry-time="20200101" ', 'from="192.0.2.7" ', "# "])
    def test_who_is_not_let_in(self, tmp_path: Path, before: str) -> None:
        async def main() -> None:
            async with own_site(tmp_path) as s:
                s.authorized.write_text(f"{before}{s.at_head.public_key}\n")
                said = await problem(s.head)
                assert said.code is codes.SSH_AUTH_REFUSED
                assert "the-head" in said.cause

        run(main)

    def test_nor_by_another_name_or_by_a_file_that_others_write(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with own_site(tmp_path) as s:
                assert (await problem(s.by(ssh="someone@the-head"))).code is codes.SSH_AUTH_REFUSED
                s.authorized.chmod(0o666)
                assert (await problem(s.head)).code is codes.SSH_AUTH_REFUSED

        run(main)

    def test_a_connection_from_before_is_of_no_use_without_its_key(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with own_site(tmp_path) as s:
                connector = SshConnector(s.head)
                connection = await connector.connect()
                _, writer = await connection.open_unix_connection(str(s.hub))
                writer.close()
                s.authorized.write_text("")
                with pytest.raises(asyncssh.ChannelOpenError):
                    await connection.open_unix_connection(str(s.hub))
                with pytest.raises(asyncssh.ChannelOpenError):
                    await connection.create_process("rayfwd attach")
                connection.close()
                await connection.wait_closed()
                connector.close()

        run(main)

    def test_who_tries_one_key_after_the_other_is_cut(self, tmp_path: Path) -> None:
        """Before a login nobody is to cost this process much."""

        async def main() -> None:
            looked = []

            class Counting(OwnSsh):
                def allowed(self, user: str, key: asyncssh.SSHKey) -> Mapping[str, object] | None:
                    looked.append(key)
                    return super().allowed(user, key)

            own = Counting(tmp_path, tmp_path / "hub.sock", tmp_path / "authorized_keys")
            keys = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(40)]

            async def come(place: tuple[str, int]) -> None:
                options = {"known_hosts": None, "config": None, "agent_path": None}
                await asyncssh.connect(*place, username="x", client_keys=keys, **options)

            with socket.create_server(("127.0.0.1", 0)) as listening:
                listening.setblocking(False)
                coming = asyncio.create_task(come(listening.getsockname()))
                sock, _ = await asyncio.get_running_loop().sock_accept(listening)
            serving = asyncio.create_task(own._serve(sock))
            with pytest.raises((asyncssh.Error, OSError)):
                await coming
            await serving
            assert len(looked) == MOST_TRIES

        run(main)

    def test_a_flood_of_connections_waits_for_its_turn(self, tmp_path: Path) -> None:
        async def main() -> None:
            own = OwnSsh(tmp_path, tmp_path / "hub.sock")
            refused = 0
            for _ in range(3 * LOGINS_AT_ONCE):
                made: list[asyncio.Transport] = []
                try:
                    await own.connect(lambda to=made: Noted(to))  # type: ignore[misc]
                except OSError:
                    refused += 1
                for transport in made:
                    transport.abort()
                await asyncio.sleep(0)
            assert refused > LOGINS_AT_ONCE
            own.close()

        run(main)

    @pytest.mark.parametrize("turns", range(6))
    def test_what_is_logging_in_at_the_end_is_closed(self, tmp_path: Path, turns: int) -> None:
        """However far it has come."""

        async def main() -> None:
            own = OwnSsh(tmp_path, tmp_path / "hub.sock")
            made: list[asyncio.Transport] = []
            for _ in range(4):
                await own.connect(lambda: Noted(made))
            for _ in range(turns):
                await asyncio.sleep(0)
            own.close()
            for transport in made:
                transport.abort()

        run(main)

    def test_a_connection_has_no_more_commands_than_with_sshd(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with own_site(tmp_path) as s:
                key = s.at_head.public_key
                s.authorized.write_text(f'restrict,command="exec cat" {key}\n')
                connector = SshConnector(s.head)
                connection = await connector.connect()
                held = [
                    await connection.create_process("x", encoding=None)
                    for _ in range(MOST_SESSIONS)
                ]
                with pytest.raises(asyncssh.ChannelOpenError):
                    await connection.create_process("rayfwd attach")
                held[0].close()
                await held[0].wait_closed()
                await connection.create_process("rayfwd attach", encoding=None)
                connection.close()
                await connection.wait_closed()
                connector.close()
                await until(lambda: not _children_called("cat"), 10)

        run(main)

    def test_its_key_stays_the_same(self, tmp_path: Path) -> None:
        first = OwnSsh(tmp_path, tmp_path / "hub.sock")
        assert OwnSsh(tmp_path, tmp_path / "hub.sock").public_key == first.public_key
        file = tmp_path / KEY_FILE
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.with_name(f"{KEY_FILE}.pub").read_text().startswith(first.public_key)
        file.write_text("none")
        with pytest.raises(ProblemError, match="remove it"):
            OwnSsh(tmp_path, tmp_path / "hub.sock")


def _children_called(name: str) -> list[str]:
    own = Path(f"/proc/{os.getpid()}/task")
    found = []
    for file in own.glob("*/children"):
        for pid in file.read_text().split():
            with suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_text())
    return [line for line in found if line == f"{name}\0"]


def test_the_file(tmp_path: Path) -> None:
    del tmp_path
    (found,) = parse({"role": "head", "hub": {"meet": [{"ssh": "ray@meet"}]}}).hub.meet
    assert found.called == "meet"
    assert found.sshd_address() == ("127.0.0.1", 22)
    six = MeetConfig(ssh="ray@[2001:db8::1]:22", sshd="[::1]:22")
    assert (six.called, six.sshd_address()) == ("2001:db8::1", ("::1", 22))
    with pytest.raises(ConfigError, match=r"hub\.meet\[0\]\.sshd"):
        parse({"role": "head", "hub": {"meet": [{"ssh": "m", "sshd": "10.0.0.1:22"}]}})
    worker = {"role": "worker", "name": "w1"}
    with pytest.raises(ConfigError, match=r"head\.ssh: must be given"):
        parse({**worker, "head": {"meet": "ray@meet"}})


def test_what_is_said_of_a_meeting_place_names_no_head(tmp_path: Path) -> None:
    async def main() -> None:
        made = Site(tmp_path)
        await made.third.start()
        try:
            made.third.authorize()
            with pytest.raises(ProblemError) as caught:
                await SshConnector(made.meet.way()).connect()
            problem = caught.value.problem
            assert problem.code is codes.SSH_AUTH_REFUSED
            assert "on the meeting place" in problem.remedy
            assert "identity of its [[hub.meet]]" in problem.remedy
            assert "head" not in problem.cause + problem.remedy
        finally:
            await made.third.stop()

    run(main)
