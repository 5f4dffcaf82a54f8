"""The system's `ssh` as a carrier: how it is called. With sshd: tests/lab."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import ProblemError
from rayfwd.ssh import openssh, ssh_process

HEAD = HeadConfig(ssh="ray@the-head", transport="openssh")


def test_it_is_called_strictly_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_ASKPASS", "/usr/bin/ask")
    config = tmp_path / "config"
    config.write_text(
        "Host the-head\n  HostName 198.51.100.1\n  User ray\n  ProxyJump one,me@two:23\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  ControlMaster auto\n"
        "Host *\n  BatchMode no\n"
    )
    known = tmp_path / "known hosts"
    known.write_text("")
    head = HeadConfig(ssh="the-head", ssh_config=config, known_hosts=known, identity=config)
    hops = openssh.find_way(head)
    assert [(hop.written, hop.known.port, hop.first) for hop in hops] == [
        ("one", 22, True),
        ("me@two:23", 23, False),
        ("the-head", 22, False),
    ]
    words = openssh.command(head, hops, 10)
    said = _asked(words)
    assert said["stricthostkeychecking"] == "true"
    assert said["batchmode"] == "yes"
    assert said["controlmaster"] == "false"
    assert said["identitiesonly"] == "yes"
    assert said["userknownhostsfile"] == said["globalknownhostsfile"] == str(known)
    through = said["proxycommand"]
    assert through.endswith(f"-W '[%h]:%p' -F {config} -p 23 -l me -- two")
    # As the shell would run it, once ssh has put in what the percent signs stand for.
    call = shlex.split(through.replace("%%", "%").rpartition(" -W ")[0])
    second = _asked([*call, "--", "two"])
    assert second["stricthostkeychecking"] == "true"
    assert second["proxycommand"].endswith(f"-W '[%h]:%p' -F {config} -- one")
    assert "SSH_ASKPASS" not in ssh_process.environment()


def _asked(words: list[str]) -> dict[str, str]:
    ran = subprocess.run([words[0], "-G", *words[1:]], capture_output=True, text=True, check=True)
    pairs = (line.partition(" ") for line in ran.stdout.splitlines())
    return {name: value for name, _, value in pairs}


def test_a_configuration_that_is_none_is_named(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\n  NoSuchThing yes\n")
    with pytest.raises(ProblemError) as caught:
        openssh.find_way(HeadConfig(ssh="the-head", ssh_config=config))
    assert caught.value.problem.code == codes.SSH_CONFIG_INVALID
    assert "line 2" in caught.value.problem.cause


def test_without_ssh_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ProblemError) as caught:
        openssh.find_way(HEAD)
    assert caught.value.problem.code == codes.OPENSSH_ABSENT
