"""What is wrong at a hop, and what a message says to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.ssh.hop_problems import host_key_problem
from rayfwd.ssh.hops import find_way


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("ProxyJump none", "`ssh-keyscan -p 2222 192.0.2.1 >> ~/.ssh/known_hosts`; or"),
        ("UserKnownHostsFile ~/mine /x", "`ssh-keyscan -p 2222 192.0.2.1 >> ~/mine`; or"),
        (
            "UserKnownHostsFile none",
            ">> ~/.ssh/known_hosts`, and set head.known_hosts to ~/.ssh/known_hosts; or",
        ),
        (
            "ProxyJump the-listener",
            "`ssh -o 'UserKnownHostsFile=~/.ssh/known_hosts' -F {file} ray@the-head`, once; or",
        ),
        (
            "HostKeyAlias its-name",
            "`ssh -o 'UserKnownHostsFile=~/.ssh/known_hosts' -F {file} ray@the-head`, once; or",
        ),
    ],
)
def test_where_an_unknown_host_key_is_to_be_added(tmp_path: Path, config: str, said: str) -> None:
    file = tmp_path / "ssh_config"
    file.write_text(f"Host the-head\n  HostName 192.0.2.1\n  Port 2222\n  {config}\n")

    head = HeadConfig(ssh="ray@the-head", ssh_config=file)
    problem = host_key_problem(head, find_way(head)[-1])
    assert problem.code is codes.HOST_KEY_UNKNOWN
    assert said.format(file=file) in problem.remedy
