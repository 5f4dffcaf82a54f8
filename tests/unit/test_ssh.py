"""How the SSH configuration is read, and what a failure of SSH is called."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rayfwd.config import HeadConfig
from rayfwd.transport.ssh import SshConnector


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
