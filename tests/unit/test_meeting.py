"""A meeting place: neither machine logs in to the other, and both to a third, with real sshd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.config import ConfigError, HeadConfig, MeetConfig, parse
from rayfwd.problems import ProblemError
from rayfwd.transport.meeting import Meeting, of_meeting
from rayfwd.transport.ssh import SshConnector
from tests.unit.loops import log_events, of, run, until
from tests.unit.real_sshd import RealSshd


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
async def site(directory: Path, *, head_sshd: bool = True) -> AsyncIterator[Site]:
    made = Site(directory)
    await made.third.start()
    if head_sshd:
        await made.at_head.start()
    task = asyncio.create_task(made.meeting.run())
    try:
        yield made
    finally:
        made.meeting.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await made.third.stop()
        await made.at_head.stop()
        await asyncio.sleep(0.1)


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
            assert f"leads to nobody at its socket {s.socket}" in said

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


def test_the_file(tmp_path: Path) -> None:
    del tmp_path
    (found,) = parse({"role": "head", "hub": {"meet": [{"ssh": "ray@meet"}]}}).hub.meet
    assert found.called == "meet"
    assert found.sshd_address() == ("127.0.0.1", 22)
    with pytest.raises(ConfigError, match=r"hub\.meet\[0\]\.sshd"):
        parse({"role": "head", "hub": {"meet": [{"ssh": "m", "sshd": "10.0.0.1:22"}]}})
    worker = {"role": "worker", "name": "w1"}
    head = {"ssh": "ray@head", "meet": "ray@meet", "transport": "openssh"}
    with pytest.raises(ConfigError, match=r"head\.meet: cannot be used with transport"):
        parse({**worker, "head": head})
    with pytest.raises(ConfigError, match=r"head\.ssh: must be given"):
        parse({**worker, "head": {"meet": "ray@meet"}})


def test_what_is_said_of_a_meeting_place_names_no_head() -> None:
    said = codes.SSH_AUTH_REFUSED.problem(
        "ray@meet refuses this machine's SSH keys",
        "add this machine's public key to authorized_keys of that user on the head, or set "
        "head.identity to a key that is already there",
    )
    told = of_meeting(said)
    assert "on the meeting place" in told.remedy
    assert "identity of its [[hub.meet]]" in told.remedy
