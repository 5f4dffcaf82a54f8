"""An SSH server inside the test's process, as stock as it gets, whose faults a test decides."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncssh

from tests.unit.loops import until

Handler = Callable[[asyncssh.SSHReader[bytes], asyncssh.SSHWriter[bytes]], Awaitable[None]]


class Sshd:
    """Serves one user key, streams to Unix sockets, SFTP's view of files, and `rayfwd attach`."""

    def __init__(self, directory: Path, address: str = "127.0.0.1") -> None:
        self.directory = directory
        self.address = address
        self.port = 0
        self.tries = 0
        """Connections that were made to it."""
        self.prohibits = False
        """It refuses streams to Unix sockets, as with `AllowStreamLocalForwarding no`."""
        self.forwards = True
        """It is a jump host for who logs in; else as with `AllowTcpForwarding no`."""
        self.jumps: list[tuple[str, int]] = []
        """Where it has connected to for others."""
        self.login_takes = 0.0
        """Seconds before a user is let in."""
        self.attach_to: Path | None = None
        """The socket that a command is joined to, whatever the client asked for; None: refused."""
        self.attach_words: tuple[str, ...] = ()
        """Further options of that command."""
        self.shell_prints = b""
        """What a login shell prints before it runs a command."""
        self.attach_says = b""
        """What a command says on standard error before it fails, in place of all that."""
        self.commands: list[asyncio.subprocess.Process] = []
        """Those that run."""
        self._attached = 0
        self.flowing = asyncio.Event()
        """Cleared: no byte of a channel passes, and nobody is told."""
        self.flowing.set()
        self.connections: list[asyncssh.SSHServerConnection] = []
        self._host_key = asyncssh.generate_private_key("ssh-ed25519")
        user_key = asyncssh.generate_private_key("ssh-ed25519")
        self._user_key = user_key.convert_to_public()
        self.identity = directory / "id"
        self.known_hosts = directory / "known_hosts"
        user_key.write_private_key(self.identity)
        self._acceptor: asyncssh.SSHAcceptor | None = None

    async def start(self) -> None:
        """Listen; after `stop` on the same port again, with the same key."""
        self._acceptor = await asyncssh.listen(
            self.address,
            self.port,
            server_factory=lambda: _Server(self),
            server_host_keys=[self._host_key],
            process_factory=self._attach,
            sftp_factory=True,
            encoding=None,
            reuse_address=True,
        )
        self.port = self._acceptor.get_port()
        self.known_hosts.write_text(self.known_hosts_line())

    def known_hosts_line(self, key: asyncssh.SSHKey | None = None) -> str:
        public = (key or self._host_key).export_public_key().decode()
        return f"[{self.address}]:{self.port} {public}"

    async def stop(self) -> None:
        self.flowing.set()
        if self._acceptor is not None:
            self._acceptor.close()
        connections = list(self.connections)
        self.cut()
        if self._acceptor is not None:
            await self._acceptor.wait_closed()  # from Python 3.12 on: until nobody is connected
            self._acceptor = None
        for connection in connections:
            await connection.wait_closed()
        await until(lambda: not self._attached)

    def cut(self, only: int | None = None) -> None:
        """Abort every connection, or the one of that place in the list."""
        chosen = self.connections if only is None else [self.connections[only]]
        for connection in list(chosen):
            connection.abort()
            self.connections.remove(connection)

    def allows(self, key: asyncssh.SSHKey) -> bool:
        return key == self._user_key

    def to_socket(self, path: str, waiting: set[socket.socket]) -> Handler | bool:
        """What a stream to a Unix socket is joined with; False where nothing answers. Its socket
        is among those `waiting` until then, which a cut may make for ever."""
        if self.prohibits:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "open failed"
            )
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            return False

        async def join(
            reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]
        ) -> None:
            waiting.discard(sock)
            near_reader, near_writer = await asyncio.open_unix_connection(sock=sock)
            await asyncio.gather(self._copy(reader, near_writer), self._copy(near_reader, writer))

        waiting.add(sock)
        return join

    async def _copy(self, reader: Any, writer: Any) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self.flowing.wait()
                writer.write(data)
                await writer.drain()
        except (OSError, asyncssh.Error):
            pass
        finally:
            writer.close()

    async def _attach(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.stdout.write(self.shell_prints)
        if self.attach_to is None or self.attach_says:
            process.stderr.write(self.attach_says)
            process.exit(1)
            return
        self._attached += 1
        try:
            await self._run_attach(process)
        finally:
            self._attached -= 1

    async def _run_attach(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        words = ("attach", "--socket", str(self.attach_to), *self.attach_words)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rayfwd", *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert child.stdin is not None
        self.commands.append(child)
        copies = [
            asyncio.create_task(self._copy(process.stdin, child.stdin)),
            asyncio.create_task(self._copy(child.stdout, process.stdout)),
            asyncio.create_task(self._copy(child.stderr, process.stderr)),
        ]
        code = await child.wait()
        await asyncio.gather(*copies[1:])
        copies[0].cancel()
        await asyncio.gather(copies[0], return_exceptions=True)
        self.commands.remove(child)
        process.exit(code)


class _Server(asyncssh.SSHServer):
    def __init__(self, sshd: Sshd) -> None:
        self._sshd = sshd
        self._connection: asyncssh.SSHServerConnection | None = None
        self._waiting: set[socket.socket] = set()
        self._gone = asyncio.Event()

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._sshd.tries += 1
        self._sshd.connections.append(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connection in self._sshd.connections:
            self._sshd.connections.remove(self._connection)
        self._gone.set()
        while self._waiting:
            self._waiting.pop().close()

    async def begin_auth(self, username: str) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), self._sshd.login_takes)
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return self._sshd.allows(key)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> bool:
        if not self._sshd.forwards:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "open failed"
            )
        self._sshd.jumps.append((dest_host, dest_port))
        return True

    def unix_connection_requested(self, dest_path: str) -> Any:
        return self._sshd.to_socket(dest_path, self._waiting)
