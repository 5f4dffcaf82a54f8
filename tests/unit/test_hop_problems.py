"""What is wrong at a hop, and what a message says to do about it."""

from __future__ import annotations

import pwd
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
def test_where_an_unknown_host_key_is_to_be_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, said: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    file = tmp_path / "ssh_config"
    file.write_text(f"Host the-head\n  HostName 192.0.2.1\n  Port 2222\n  {config}\n")

    head = HeadConfig(ssh="ray@the-head", ssh_config=file)
    problem = host_key_problem(head, find_way(head)[-1])
    assert problem.code is codes.HOST_KEY_UNKNOWN
    assert said.format(file=file) in problem.remedy


def test_who_is_to_add_it_and_where_there_is_no_place_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads it may be root, and the service another user's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: pwd.getpwnam("nobody").pw_uid)
    head = HeadConfig(ssh="ray@192.0.2.1", ssh_config=tmp_path / "none")
    (tmp_path / "none").touch()
    problem = host_key_problem(head, find_way(head)[-1])
    command = "`mkdir -p ~/.ssh && ssh-keyscan -p 22 192.0.2.1 >> ~/.ssh/known_hosts`"
    assert f"then add it as nobody: {command}" in problem.remedy
