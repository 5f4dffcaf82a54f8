"""Ways to a head over real sshd on loopback, where AsyncSSH's own server would be too kind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.ssh.ssh_connector import SshConnector
from tests.need import tool
from tests.unit.loops import run
from tests.unit.real_sshd import RealSshd

OTHERS = 7
"""Keys of an agent; sshd ends a login after six that it does not take (MaxAuthTries)."""


@contextmanager
def agent_with_other_keys(directory: Path) -> Iterator[Path]:
    """The socket of an agent that offers them before any."""
    path = directory / "agent"
    said = subprocess.run(
        [tool("ssh-agent"), "-s", "-a", str(path)], capture_output=True, text=True, check=True
    ).stdout
    pid = int(said.partition("SSH_AGENT_PID=")[2].partition(";")[0])
    try:
        for number in range(OTHERS):
            key = str(directory / f"other{number}")
            words = [tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key]
            subprocess.run(words, check=True)
            env = {**os.environ, "SSH_AUTH_SOCK": str(path)}
            subprocess.run([tool("ssh-add"), "-q", key], env=env, check=True)
        yield path
    finally:
        os.kill(pid, signal.SIGTERM)


async def logs_in(head: HeadConfig) -> None:
    """Raises ProblemError."""
    connector = SshConnector(head)
    try:
        connection = await connector.connect()
        connection.close()
        await connection.wait_closed()
    finally:
        connector.close()


@pytest.mark.parametrize("named", ["head.identity", "IdentityFile", "nowhere"])
def test_an_agent_full_of_other_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    async def main() -> None:
        sshd = RealSshd(tmp_path / "sshd")
        await sshd.start()
        (tmp_path / "known_hosts").write_text(sshd.known_hosts_line())
        config = f"IdentityFile {sshd.identity}\n" if named == "IdentityFile" else ""
        (tmp_path / "ssh_config").write_text(config)
        head = HeadConfig(
            ssh=sshd.target,
            known_hosts=tmp_path / "known_hosts",
            ssh_config=tmp_path / "ssh_config",
            identity=sshd.identity if named == "head.identity" else None,
        )
        try:
            if named != "nowhere":
                await logs_in(head)
                return
            with pytest.raises(ProblemError) as caught:
                await logs_in(head)
            problem: Problem = caught.value.problem
            assert problem.code is codes.SSH_AUTH_REFUSED
            assert "ended the connection before all were tried" in problem.cause
        finally:
            await sshd.stop()

    with agent_with_other_keys(tmp_path) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        run(main)


@pytest.mark.parametrize("word", ["yes", "AGENT"])
def test_no_agent_is_lent_to_the_machine_that_is_dialled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """Whatever the configuration says: whoever is root there could log in elsewhere with it."""

    async def main(agent: Path, key: str) -> None:
        sshd = RealSshd(tmp_path / "sshd")
        sshd.authorize(key)
        # The shell may do much in its own home.
        await sshd.start("MaxAuthTries 20", f"SetEnv HOME={tmp_path}")
        (tmp_path / "known_hosts").write_text(sshd.known_hosts_line())
        lent = f"ForwardAgent {word.replace('AGENT', str(agent))}\n"
        named = "" if word == "yes" else f"IdentityFile {tmp_path}/other3\n"
        (tmp_path / "ssh_config").write_text(lent + named)
        known, config = tmp_path / "known_hosts", tmp_path / "ssh_config"
        connector = SshConnector(HeadConfig(ssh=sshd.target, known_hosts=known, ssh_config=config))
        try:
            connection = await connector.connect()
            said = await connection.run("echo at=$SSH_AUTH_SOCK", check=True)
            connection.close()
            await connection.wait_closed()
        finally:
            connector.close()
            await sshd.stop()
        assert said.stdout == "at=\n"

    with agent_with_other_keys(tmp_path) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        run(lambda: main(agent, (tmp_path / "other3.pub").read_text().strip()))


def test_the_agents_keys_come_after_one_that_is_named_and_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(agent_key: str) -> None:
        sshd = RealSshd(tmp_path / "sshd")
        sshd.authorize(agent_key)
        await sshd.start()
        (tmp_path / "known_hosts").write_text(sshd.known_hosts_line())
        (tmp_path / "ssh_config").write_text(f"IdentityFile {sshd.identity}\n")
        try:
            await logs_in(
                HeadConfig(
                    ssh=sshd.target,
                    known_hosts=tmp_path / "known_hosts",
                    ssh_config=tmp_path / "ssh_config",
                )
            )
        finally:
            await sshd.stop()

    with agent_with_other_keys(tmp_path) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        run(lambda: main((tmp_path / "other3.pub").read_text().strip()))


def test_of_two_jump_hosts_the_one_that_cannot_go_on_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        first = RealSshd(tmp_path / "first", "127.0.0.2")
        second = RealSshd(tmp_path / "second", "127.0.0.3")
        nobodys = RealSshd(tmp_path / "nobody").port  # it is not started
        await first.start()
        first.authorize(second.public_key)
        lines = [first.known_hosts_line(), second.known_hosts_line()]
        (tmp_path / "known_hosts").write_text("".join(lines))
        config = "".join(
            f"Host {name}\n  HostName {sshd.address}\n  Port {sshd.port}\n  User {sshd.user}\n"
            for name, sshd in (("first", first), ("second", second))
        )
        (tmp_path / "ssh_config").write_text(
            f"{config}Host head\n  HostName 127.0.0.1\n  Port {nobodys}\n  ProxyJump first,second\n"
        )
        head = HeadConfig(
            ssh="head",
            identity=second.identity,
            known_hosts=tmp_path / "known_hosts",
            ssh_config=tmp_path / "ssh_config",
        )
        try:
            with pytest.raises(ProblemError) as caught:
                await logs_in(head)
            cause = caught.value.problem.cause
            assert cause.startswith("the jump host first cannot connect to 127.0.0.3 port")
            assert "for the jump host second" in cause
            await second.start()
            with pytest.raises(ProblemError) as caught:
                await logs_in(head)
            assert "the jump host second" in caught.value.problem.cause
        finally:
            await second.stop()
            await first.stop()

    run(main)
