"""What the system's `ssh` says, as the problem of a hop. With sshd: tests/lab."""

from __future__ import annotations

import pytest

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Code
from rayfwd.ssh import openssh_problems
from rayfwd.ssh.knownhosts import KnownHosts
from rayfwd.ssh.openssh import OpensshHop

HEAD = HeadConfig(ssh="ray@the-head", transport="openssh")
DIRECT = [OpensshHop("ray@the-head", KnownHosts("the-head"), "ray", True, True, False)]
VIA_COMMAND = [OpensshHop("ray@the-head", KnownHosts("the-head"), "ray", True, True, True)]
BEHIND = [
    OpensshHop("bastion", KnownHosts("198.51.100.9"), "me", False, True, False),
    OpensshHop("ray@the-head", KnownHosts("the-head"), "ray", True, False, False, before="bastion"),
]
IN = 'Authenticated to 198.51.100.9 ([198.51.100.9]:22) using "publickey".\n'
PARTIAL = 'Authenticated using "publickey" with partial success.\n'
DENIED = "ray@the-head: Permission denied (publickey,keyboard-interactive).\n"


@pytest.mark.parametrize(
    ("hops", "said", "code", "words"),
    [
        (
            DIRECT,
            "ssh: connect to host 198.51.100.1 port 22: Connection refused",
            codes.SSH_UNREACHABLE,
            "nothing listens on the SSH port of ray@the-head (dialled 198.51.100.1 port 22)",
        ),
        (
            DIRECT,
            "ssh: connect to host 2001:db8::7 port 22: Connection timed out\n"
            "ssh: connect to host 198.51.100.1 port 22: Connection timed out",
            codes.SSH_UNREACHABLE,
            "did not answer in time (dialled 2001:db8::7 port 22, 198.51.100.1 port 22)",
        ),
        (
            DIRECT,
            "ssh: Could not resolve hostname the-head: Name or service not known",
            codes.SSH_UNREACHABLE,
            "the name the-head of ray@the-head cannot be resolved: Name or service not known",
        ),
        (
            DIRECT,
            "Connection timed out during banner exchange\n"
            "Connection to 198.51.100.1 port 22 timed out",
            codes.SSH_UNREACHABLE,
            "accepts the connection (the-head port 22), but says nothing",
        ),
        (
            DIRECT,
            "kex_exchange_identification: Connection closed by remote host\n"
            "Connection closed by 198.51.100.1 port 22",
            codes.SSH_TURNED_AWAY,
            "the sshd of ray@the-head closes connections at once",
        ),
        (DIRECT, DENIED, codes.SSH_AUTH_REFUSED, "refuses this machine's SSH keys"),
        (DIRECT, PARTIAL + DENIED, codes.SSH_SECOND_FACTOR, "wants a second factor"),
        (
            DIRECT,
            'Load key "/home/ray/.ssh/id": bad permissions\n' + DENIED,
            codes.SSH_KEY_UNUSABLE,
            '"/home/ray/.ssh/id": bad permissions',
        ),
        (
            DIRECT,
            "Received disconnect from 198.51.100.1 port 22:2: Too many authentication failures",
            codes.SSH_AUTH_REFUSED,
            "refused several of this machine's keys",
        ),
        (
            DIRECT,
            "Connection reset by 198.51.100.1 port 22",
            codes.SSH_LOST,
            "ended: Connection reset by 198.51.100.1",
        ),
        (DIRECT, "something new", codes.SSH_FAILED, "something new"),
        (
            VIA_COMMAND,
            "no such tunnel\nkex_exchange_identification: Connection closed by remote host\n"
            "Connection closed by UNKNOWN port 65535",
            codes.SSH_UNREACHABLE,
            "the ProxyCommand of ray@the-head did not lead to an SSH server: no such tunnel",
        ),
        (BEHIND, DENIED, codes.SSH_AUTH_REFUSED, "the jump host bastion refuses"),
        (BEHIND, IN + DENIED, codes.SSH_AUTH_REFUSED, "ray@the-head refuses"),
        (
            BEHIND,
            IN + "channel 0: open failed: administratively prohibited: open failed\n"
            "stdio forwarding failed",
            codes.JUMP_REFUSED,
            "may not connect to the-head port 22 for ray@the-head",
        ),
        (
            BEHIND,
            IN + "Connection timed out during banner exchange\n"
            "Connection to UNKNOWN port 65535 timed out",
            codes.SSH_UNREACHABLE,
            "the jump host bastion was asked to connect to the-head port 22",
        ),
        (
            BEHIND,
            IN + "channel 0: open failed: connect failed: Connection refused\n"
            "stdio forwarding failed",
            codes.SSH_UNREACHABLE,
            "cannot connect to the-head port 22 for ray@the-head: Connection refused",
        ),
    ],
)
def test_what_it_says_is_a_problem_of_a_hop(
    hops: list[OpensshHop], said: str, code: Code, words: str
) -> None:
    problem = openssh_problems.explain(HEAD, hops, said)
    assert problem.code == code
    assert words in problem.cause


def test_a_hop_that_is_shared_needs_no_login() -> None:
    shared = OpensshHop("bastion", KnownHosts("b"), "me", False, True, False, shared=True)
    assert openssh_problems.hops_passed([shared, BEHIND[1]], "") == 1
    assert openssh_problems.hops_passed(BEHIND, "") == 0
    assert openssh_problems.hops_passed(BEHIND, IN + IN) == 2
