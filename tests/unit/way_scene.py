"""A head with real sshd on loopback, and the files of who dials it, by either SSH."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from rayfwd.config import HeadConfig
from rayfwd.problems import Code
from rayfwd.ssh import dial, openssh_carrier
from tests.need import tool
from tests.unit.loops import closing
from tests.unit.real_sshd import RealSshd
from tests.unit.way_probe import problem

Transport = Literal["asyncssh", "openssh"]
both = pytest.mark.parametrize("transport", ["asyncssh", "openssh"])


class Scene:
    """A head with a hub that echoes, and the files of who dials it."""

    def __init__(self, directory: Path, address: str = "127.0.0.1") -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.sshd = RealSshd(directory / "sshd", address)
        self.known_hosts = directory / "known_hosts"
        self.ssh_config = directory / "ssh_config"
        self.hub = directory / "hub.sock"
        self.attach = directory / "attach"
        self.know(self.sshd.known_hosts_line())
        self.configure("")
        self.attach.write_text("#!/bin/sh\nprintf '\\000rayfwd attach\\000\\n'; exec cat\n")
        self.attach.chmod(0o755)

    def know(self, *lines: str) -> None:
        self.known_hosts.write_text("".join(lines))

    def configure(self, text: str) -> None:
        self.ssh_config.write_text(text)

    def head(self, transport: Transport = "asyncssh", **keys: Any) -> HeadConfig:
        given = {
            "ssh": self.sshd.target,
            "known_hosts": self.known_hosts,
            "ssh_config": self.ssh_config,
            "identity": self.sshd.identity,
            "socket": self.hub,
            "attach_command": str(self.attach),
            "transport": transport,
            **keys,
        }
        return HeadConfig(**{key: value for key, value in given.items() if value is not None})

    def key(self, name: str, *words: str) -> Path:
        """A new key pair."""
        path = self.directory / name
        keygen("-t", "ed25519", "-N", "", "-f", str(path), *words)
        return path

    def host_certificate(self, authority: Path, *words: str) -> Path:
        """Of sshd's own key: the name of the files without `-cert.pub`."""
        own = self.directory / "host"
        shutil.copy(self.sshd.directory / "host_key", own)
        public = [tool("ssh-keygen"), "-y", "-f", str(own)]
        made = subprocess.run(public, capture_output=True, check=True)
        own.with_suffix(".pub").write_bytes(made.stdout)
        keygen("-s", str(authority), "-I", "x", "-h", *words, f"{own}.pub")
        return own


def keygen(*words: str) -> None:
    subprocess.run([tool("ssh-keygen"), "-q", *words], check=True, capture_output=True)


@asynccontextmanager
async def scene(directory: Path, *options: str, address: str = "127.0.0.1") -> AsyncIterator[Scene]:
    made = Scene(directory, address)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    async with closing():
        hub = await asyncio.start_unix_server(echo, made.hub)
        # What the user's own files would have the shell do is no matter here.
        await made.sshd.start(*options, f"SetEnv HOME={directory}")
        try:
            yield made
        finally:
            await made.sshd.stop()
            hub.close()


async def says(head: HeadConfig, code: Code, *words: str) -> None:
    found = await problem(head)
    assert found.code is code, found
    for word in words:
        assert word in found.cause + found.remedy, found


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each step, by both."""
    for module in (dial, openssh_carrier):
        monkeypatch.setattr(module, "LOGIN_TIMEOUT", 1.0)
    monkeypatch.setattr(openssh_carrier, "CONNECT_TIMEOUT", 1)
