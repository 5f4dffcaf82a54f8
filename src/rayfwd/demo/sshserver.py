"""The demo's SSH server: throw-away keys, and one thing allowed, a channel to the hub's socket.

It listens on a Unix socket, because the worker's machine has no network. `cut` ends every
connection, as a firewall or a router that restarts would.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from pathlib import Path

import asyncssh

USER = "demo"
ALIAS = "demo-head"


class SSHServer:
    """The server, and the client's files for it."""

    def __init__(self, folder: Path, hub: Path) -> None:
        """`folder` (made here) gets the keys, the SSH configuration and the socket."""
        self.refusing = False
        """New connections are closed at once."""
        self.config = folder / "config"
        self.identity = folder / "id"
        self.known_hosts = folder / "known_hosts"
        self._folder = folder
        self._socket = folder / "ssh.sock"
        self._hub = hub
        self._connections: set[asyncssh.SSHServerConnection] = set()
        self._acceptor: asyncssh.SSHAcceptor | None = None

    async def start(self) -> None:
        """Make keys and listen."""
        self._folder.mkdir(mode=0o700)
        host_key = asyncssh.generate_private_key("ssh-ed25519")
        client_key = asyncssh.generate_private_key("ssh-ed25519")
        self._write_client_files(host_key, client_key)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self._socket))
        self._acceptor = await asyncssh.listen(
            sock=listener,
            server_factory=lambda: _Login(self),
            server_host_keys=[host_key],
            authorized_client_keys=asyncssh.import_authorized_keys(
                client_key.export_public_key().decode()
            ),
            password_auth=False,
            kbdint_auth=False,
            agent_forwarding=False,
            compression_algs=None,
        )

    def cut(self) -> int:
        """Abort every connection; how many there were."""
        cut = list(self._connections)
        for connection in cut:
            connection.abort()
        return len(cut)

    async def close(self) -> None:
        """Stop listening and abort what is left."""
        self.cut()
        if self._acceptor is not None:
            self._acceptor.close()
            await self._acceptor.wait_closed()
            self._acceptor = None

    def allows(self, path: str) -> bool:
        """Whether a client may open a channel to this socket: the hub's, and no other."""
        return path == str(self._hub)

    def came(self, connection: asyncssh.SSHServerConnection) -> None:
        """A client, before it has said anything."""
        self._connections.add(connection)
        if self.refusing:
            connection.abort()

    def went(self, connection: asyncssh.SSHServerConnection) -> None:
        """A client's connection has ended."""
        self._connections.discard(connection)

    def _write_client_files(self, host_key: asyncssh.SSHKey, client_key: asyncssh.SSHKey) -> None:
        with open(self.identity, "wb", opener=lambda p, f: os.open(p, f, 0o600)) as file:
            file.write(client_key.export_private_key())
        public = host_key.export_public_key().decode().strip()
        self.known_hosts.write_text(f"{ALIAS} {public}\n")
        # The percent sign is SSH's own escape in this line.
        proxy = shlex.join(
            [sys.executable, "-m", "rayfwd", "attach", "--socket", str(self._socket)]
        ).replace("%", "%%")
        lines = [f"Host {ALIAS}", f"    User {USER}", f"    ProxyCommand {proxy}"]
        self.config.write_text("\n".join(lines) + "\n")


class _Login(asyncssh.SSHServer):
    """One client's connection: its key decides, and it may reach the hub."""

    def __init__(self, server: SSHServer) -> None:
        self._server = server
        self._connection: asyncssh.SSHServerConnection | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._server.came(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connection is not None:
            self._server.went(self._connection)

    def begin_auth(self, username: str) -> bool:
        return True  # authentication is required

    def unix_connection_requested(self, dest_path: str) -> bool:
        # True lets AsyncSSH join the channel to the socket. It may lose what a socket says before
        # the join is made, and the hub says nothing before it has been spoken to.
        return self._server.allows(dest_path)
