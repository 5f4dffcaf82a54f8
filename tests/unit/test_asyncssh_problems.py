"""What AsyncSSH raises, as the problem of a hop. Over connections: test_ssh.py, test_link.py."""

from __future__ import annotations

import asyncio
import errno
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Code
from rayfwd.ssh import asyncssh_problems, dial, hops
from rayfwd.ssh.meeting_socket import NoSftpError
from rayfwd.ssh.witness import Witness
from rayfwd.transport.urgency import AdaptiveTimeout

HEAD = HeadConfig(ssh="ray@the-head")
PROHIBITED = asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED
FAILED = asyncssh.OPEN_CONNECT_FAILED


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without keys, an agent, or a configuration."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setattr(hops, "SYSTEM_CONFIG", tmp_path / "absent")


class Attempt(dial.Attempt):
    """One that has got as far as a case says."""

    reached_ssh = reached_keys = False

    @property
    def is_ssh(self) -> bool:
        return self.reached_ssh

    @property
    def has_keys(self) -> bool:
        return self.reached_keys


def connection(words: bytes = b"") -> dict[str, Any]:
    """TCP, and no word of SSH."""
    return {"connected": True, "words": words}


SSH = {"connected": True, "reached_ssh": True}
LOGIN = {**SSH, "reached_keys": True}


@pytest.mark.parametrize(
    ("exc", "reached", "code", "said"),
    [
        (
            asyncssh.DisconnectError(2, "Too many authentication failures"),
            LOGIN,
            codes.SSH_AUTH_REFUSED,
            "ended the connection before all were tried: Too many authentication failures",
        ),
        (
            asyncssh.PermissionDenied("no more methods"),
            LOGIN,
            codes.SSH_AUTH_REFUSED,
            "wants an SSH key (dialled 192.0.2.1 port 22), and this machine has none to offer",
        ),
        (
            asyncssh.PermissionDenied("no more methods"),
            {**LOGIN, "wants_more": True},
            codes.SSH_SECOND_FACTOR,
            "wants a second factor",
        ),
        (
            asyncssh.PermissionDenied("no more methods"),
            {**LOGIN, "not_signed": ("key on a token", "no PIN")},
            codes.SSH_SIGNING_FAILED,
            "key on a token",
        ),
        (
            asyncssh.PermissionDenied("no more methods"),
            {**LOGIN, "accepted": {"gssapi-with-mic"}},
            codes.SSH_TICKET_UNUSABLE,
            "ray@the-head accepts Kerberos tickets",
        ),
        (
            asyncssh.HostKeyNotVerifiable("Host key is not trusted for host the-head"),
            SSH,
            codes.HOST_KEY_UNKNOWN,
            "the host key of the-head",
        ),
        (
            asyncssh.HostKeyNotVerifiable("Host key is revoked"),
            SSH,
            codes.HOST_KEY_REVOKED,
            "shows a host key that is revoked",
        ),
        (
            asyncssh.HostKeyNotVerifiable("Certificate expired for host the-head"),
            SSH,
            codes.HOST_CERTIFICATE_INVALID,
            "is not valid: Certificate expired",
        ),
        (asyncssh.ConnectionLost("gone"), LOGIN, codes.SSH_LOST, "in the middle of the login"),
        (asyncssh.ConnectionLost("gone"), SSH, codes.SSH_LOST, "(dialled 192.0.2.1 port 22) ended"),
        (
            asyncssh.ConnectionLost("gone"),
            connection(b"Exceeded MaxStartups\r\n"),
            codes.SSH_TURNED_AWAY,
            "closes connections at once (dialled 192.0.2.1 port 22): Exceeded MaxStartups",
        ),
        (
            ConnectionResetError(104, "reset"),
            connection(b"HTTP/1.1 400 Bad Request\r\n"),
            codes.SSH_UNREACHABLE,
            "is not an SSH server: it says 'HTTP/1.1 400 Bad Request'",
        ),
        (
            socket.gaierror(-2, "Name or service not known"),
            {},
            codes.SSH_UNREACHABLE,
            "the name the-head of ray@the-head cannot be resolved: Name or service not known",
        ),
        (TimeoutError(), {"resolving": True}, codes.SSH_UNREACHABLE, "resolver has no answer"),
        (TimeoutError(), {}, codes.SSH_UNREACHABLE, "did not answer in time"),
        (TimeoutError(), connection(), codes.SSH_UNREACHABLE, "but says nothing"),
        (TimeoutError(), connection(b"220 mail"), codes.SSH_UNREACHABLE, "it says '220 mail'"),
        (TimeoutError(), SSH, codes.SSH_UNREACHABLE, "no key exchange follows within 60 s"),
        (TimeoutError(), LOGIN, codes.SSH_LOGIN_TIMEOUT, "the login does not finish within 60 s"),
        (
            TimeoutError(),
            {**LOGIN, "signing": "key on a token"},
            codes.SSH_SIGNING_FAILED,
            "key on a token",
        ),
        (ConnectionRefusedError(111, "refused"), {}, codes.SSH_UNREACHABLE, "nothing listens on"),
        (dial.BarredError("old ones are answered"), {}, codes.SSH_LIMITED, "no new connection"),
        (
            OSError(101, "Network is unreachable"),
            {},
            codes.SSH_UNREACHABLE,
            "ray@the-head: Network",
        ),
        (ValueError("something new"), LOGIN, codes.SSH_FAILED, "ray@the-head: something new"),
    ],
)
def test_what_it_raises_is_a_problem_of_a_hop(
    exc: Exception, reached: dict[str, Any], code: Code, said: str
) -> None:
    (hop,) = hops.find_way(HEAD)
    attempt = attempt_at(hop, dialled=["192.0.2.1 port 22"], **reached)
    problem = asyncssh_problems.explain(exc, HEAD, hop, attempt)
    assert problem.code is code
    assert said in problem.cause


@pytest.mark.parametrize(
    ("exc", "code", "said"),
    [
        (
            asyncssh.ChannelOpenError(PROHIBITED, "open failed"),
            codes.JUMP_REFUSED,
            "the jump host bastion may not connect to the-head port 22 for ray@the-head",
        ),
        (
            asyncssh.ChannelOpenError(FAILED, "Connection refused"),
            codes.SSH_UNREACHABLE,
            "the jump host bastion cannot connect to the-head port 22 for ray@the-head",
        ),
        (
            TimeoutError(),
            codes.SSH_UNREACHABLE,
            "the jump host bastion was asked to connect to the-head port 22 for ray@the-head",
        ),
    ],
)
def test_what_it_raises_behind_a_jump_host(exc: Exception, code: Code, said: str) -> None:
    (direct,) = hops.find_way(HEAD)
    hop = replace(direct, first=False, before="bastion")
    problem = asyncssh_problems.explain(exc, HEAD, hop, attempt_at(hop))
    assert problem.code is code
    assert said in problem.cause


@pytest.mark.parametrize(
    ("exc", "said"),
    [
        (
            asyncssh.ChannelOpenError(FAILED, "open failed"),
            "has no head at its socket .rayfwd/head",
        ),
        (NoSftpError("no such subsystem"), "has no SFTP, which says where .rayfwd/head is"),
    ],
)
def test_what_it_raises_behind_a_meeting_place(exc: Exception, said: str) -> None:
    (direct,) = hops.find_way(HEAD)
    hop = replace(direct, first=False, before="meet", meet=".rayfwd/head")
    problem = asyncssh_problems.explain(exc, HEAD, hop, attempt_at(hop))
    assert problem.code is codes.JUMP_REFUSED
    assert said in problem.cause


def test_an_agent_with_too_many_keys_is_named() -> None:
    (hop,) = hops.find_way(HEAD)
    exc = asyncssh.DisconnectError(asyncssh.DISC_PROTOCOL_ERROR, "Too many authentication failures")
    problem = asyncssh_problems.explain(exc, HEAD, hop, attempt_at(hop))
    assert "IdentitiesOnly" in problem.remedy


def test_what_the_kernel_says_is_told_in_its_words() -> None:
    """asyncio says "Connect call failed" of whatever it was."""
    (hop,) = hops.find_way(HEAD)
    exc = OSError(errno.EHOSTUNREACH, "Connect call failed ('198.51.100.250', 22)")
    problem = asyncssh_problems.explain(exc, HEAD, hop, attempt_at(hop))
    assert problem.code is codes.SSH_UNREACHABLE
    assert problem.cause == "ray@the-head: No route to host"


def test_an_option_that_had_no_effect_may_be_what_is_missing() -> None:
    (hop,) = hops.find_way(HEAD)
    problem = codes.SSH_FAILED.problem("cause", "remedy")
    assert asyncssh_problems.with_passed_over(problem, hop) == problem
    told = asyncssh_problems.with_passed_over(
        problem, replace(hop, passed_over=("ProxyUseFdpass",))
    )
    assert (told.code, told.cause) == (problem.code, problem.cause)
    assert "ProxyUseFdpass of the SSH configuration has no effect on AsyncSSH" in told.remedy


def attempt_at(hop: hops.Hop, **reached: Any) -> Attempt:
    attempt = Attempt(hop, None, asyncio.Event(), AdaptiveTimeout(1.0, 1.0), Witness())
    for name, value in reached.items():
        of = attempt.watch if hasattr(attempt.watch, name) else attempt
        assert hasattr(of, name), name
        setattr(of, name, value)
    return attempt
