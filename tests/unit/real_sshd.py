"""The system's own sshd on loopback, as the user that runs the tests."""

from __future__ import annotations

import asyncio
import getpass
import os
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import asyncssh

from tests.need import need, tool
from tests.unit.ports import free_port


class RealSshd:
    """One server with a host key of its own; it lets in `identity`."""

    def __init__(self, directory: Path, address: str = "127.0.0.1") -> None:
        need(None if shutil.which(tool("sshd")) else "there is no sshd")
        directory.mkdir()
        self.directory = directory
        self.address = address
        self.user = getpass.getuser()
        self.port = free_port(address)
        self.identity = directory / "id"
        self._host_key = asyncssh.generate_private_key("ssh-ed25519")
        self._host_key.write_private_key(directory / "host_key")
        user_key = asyncssh.generate_private_key("ssh-ed25519")
        user_key.write_private_key(self.identity)
        for private in (directory / "host_key", self.identity):
            private.chmod(0o600)
        self.public_key = user_key.export_public_key().decode().strip()
        self.authorize(self.public_key)
        self._process: asyncio.subprocess.Process | None = None
        self.within: Sequence[str] = ()
        """A command that runs it, in surroundings of its own."""

    @property
    def target(self) -> str:
        return f"{self.user}@{self._host}:{self.port}"

    @property
    def _host(self) -> str:
        return f"[{self.address}]" if ":" in self.address else self.address

    def known_hosts_line(self, name: str | None = None) -> str:
        """`name`: under which it is known instead of its address and port."""
        public = " ".join(self._host_key.export_public_key().decode().split()[:2])
        return f"{name or f'[{self.address}]:{self.port}'} {public}\n"

    def authorize(self, *lines: str) -> None:
        (self.directory / "authorized_keys").write_text("".join(f"{line}\n" for line in lines))

    async def start(self, *options: str, sftp: bool = True) -> None:
        """Listen; `options` are lines of sshd_config."""
        config = self.directory / "sshd_config"
        config.write_text(
            "\n".join(
                [
                    *options,
                    f"ListenAddress {self._host}:{self.port}",
                    f"HostKey {self.directory}/host_key",
                    f"AuthorizedKeysFile {self.directory}/authorized_keys",
                    "PidFile none",
                    "StrictModes no",
                    "UsePAM no",
                    "PasswordAuthentication no",
                    "KbdInteractiveAuthentication no",
                    "PerSourcePenalties no" if await _has_penalties() else "",
                    "LogLevel VERBOSE",
                    f"SetEnv HOME={self.directory}",  # no ~/.bashrc of whoever runs the tests
                    "Subsystem sftp internal-sftp" if sftp else "",
                ]
            )
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        with (self.directory / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(*self.within, tool("sshd"), "-D", "-e", "-f", str(config)),
                stderr=log,
                start_new_session=True,
            )
        async with asyncio.timeout(10):
            while not await self._listens():
                assert self._process.returncode is None, self.log
                await asyncio.sleep(0.02)

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(self.address, self.port)
        except OSError:
            return False
        writer.close()
        return True

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    async def stop(self, all_of_it: bool = True) -> None:
        """`all_of_it`: with the connections that stand."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            if all_of_it:
                process.send_signal(signal.SIGSTOP)  # else one might begin right now
                self._end_children(process.pid)
                process.kill()  # at SIGTERM it would accept who waits in the kernel's queue first
            else:
                process.terminate()
            await process.wait()

    def cut(self) -> None:
        """End the connections that stand; it listens on."""
        assert self._process is not None
        self._end_children(self._process.pid)

    def _end_children(self, pid: int) -> None:
        ended: set[int] = set()
        # The kernel leaves some out where another one ends while it is read (proc(5)).
        while new := set(_children(pid)) - ended:
            for child in new:
                with suppress(ProcessLookupError):  # that one alone has ended by itself
                    os.kill(child, signal.SIGSTOP)  # so that it has no more children
                    self._end_children(child)
                    os.kill(child, signal.SIGKILL)
            ended |= new


def _children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


async def _has_penalties() -> bool:
    process = await asyncio.create_subprocess_exec(
        tool("ssh"), "-V", stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    number = said.decode().partition("OpenSSH_")[2][:4]
    try:
        return float(number.rstrip("p")) >= 9.8
    except ValueError:
        return False
