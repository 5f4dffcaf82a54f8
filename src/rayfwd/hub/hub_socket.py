"""The socket at which a hub listens, and the secret beside it."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

from rayfwd.cluster.plan import check_name
from rayfwd.session.handshake import Vouch
from rayfwd.system import unixsocket
from rayfwd.system.accepting import accept_no_more, close_server
from rayfwd.system.files import replace_file
from rayfwd.system.logs import get_logger
from rayfwd.system.passing import Listening
from rayfwd.system.paths import SECRET

log = get_logger(__name__)

MakeConnection = Callable[[dict[int, list[int]]], asyncio.BaseProtocol]
"""A protocol for a connection, given the descriptors that come with first bytes."""


class HubSocket:
    """At one path; an earlier process may have listened there, and a later one may go on."""

    def __init__(self, path: Path, shared: bool) -> None:
        """`shared`: users other than our own may connect."""
        self.path = path
        self._shared = shared
        self._server: asyncio.Server | None = None
        self._inherited: socket.socket | None = None
        self.started = False
        """The socket at `path` is, or was, this one's."""
        self._secret = secrets.token_hex(32)

    def inherit(self, listening: socket.socket) -> None:
        """Where an earlier process listened at our path, and `listen` is to go on listening."""
        self._inherited = listening

    async def listen(self, make: MakeConnection) -> None:
        """Where an earlier process did if there is a socket of it. Raises ProblemError."""
        # Anyone may connect where several users are allowed: who may stay is decided by the
        # kernel's word on who is there, so that a stranger gets a sentence and not a riddle.
        mode = 0o666 if self._shared else 0o600
        sock = Listening.instead_of(self._inherited or unixsocket.bind(self.path, mode))
        if self._inherited is not None:
            self.path.chmod(mode)
        self.started = True
        self._write_secret()
        # Ours before the loop turns: who stops meanwhile hands it over, or closes it.
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: make(sock.passed), sock=sock, start_serving=False
        )
        self._inherited = None
        await self._server.start_serving()

    def _write_secret(self) -> None:
        """For `rayfwd attach --node`, which shows by it that it is run by this hub's user."""
        path = self.path.with_name(SECRET)
        try:
            replace_file(path, self._secret.encode() + b"\n")
        except OSError as exc:
            log.warning("secret_not_written", file=str(path), cause=str(exc))

    def vouch_for(self, node: str) -> bytes:
        """What this process itself says first on a connection to the machine of that name; nothing
        where no node can have it."""
        try:
            return Vouch(check_name(node), self._secret).encode()
        except ValueError:
            return b""

    def vouched(self, vouch: Vouch) -> bool:
        """Whether it has read the secret."""
        return hmac.compare_digest(vouch.secret, self._secret)

    def hand_over(self) -> socket.socket | None:
        """The socket, which goes on listening. Raises OSError. A connection that was accepted
        before is there a few turns of the loop later."""
        if self._server is None:
            inherited, self._inherited = self._inherited, None
            return inherited
        sock = self._server.sockets[0].dup()
        self.accept_no_more()
        return sock

    def accept_no_more(self) -> None:
        """The server stays open for what it has accepted."""
        if self._server is not None:
            accept_no_more(self._server)

    def close(self) -> None:
        """What is at `path` stays; see `remove`."""
        server, self._server = self._server, None
        if server is not None:
            close_server(server)

    def remove(self) -> None:
        """Close it, and leave nothing of it on the disk."""
        if self._inherited is not None:
            self._inherited.close()
        self.close()
        if self.started:
            self.path.unlink(missing_ok=True)
            self.path.with_name(SECRET).unlink(missing_ok=True)
