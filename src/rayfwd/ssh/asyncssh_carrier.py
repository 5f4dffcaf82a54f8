"""Lanes by SSH, in this process: a connection each, and on it one channel to the hub's socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import asyncssh

from rayfwd.config import HeadConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.session.frames import Chunk
from rayfwd.ssh.fastpath import FastPath
from rayfwd.ssh.hops import Hop
from rayfwd.ssh.ssh_connector import SshConnector
from rayfwd.transport.carrier import CLOSED, AfterPreamble, PipeOwner

WRITE_BUFFER = 1 << 18
"""Bytes that may wait in a channel before the session is asked for no more."""


KEEPALIVE_SECONDS, KEEPALIVE_COUNT = 5, 3
"""Between two questions whether the far side is there; so many without an answer end it."""


class SshCarrier:
    """Dials one head as its configuration says."""

    def __init__(self, head: HeadConfig) -> None:
        self._connector = SshConnector(head)

    async def dial(self, urgent: asyncio.Event) -> SshConnection:
        """Raises ProblemError."""
        return SshConnection(self._connector, await self._connector.connect(urgent))

    @property
    def stopped_at(self) -> Hop | None:
        """Where the last attempt failed."""
        return self._connector.stopped_at

    async def place(self) -> tuple[str, int, bool]:
        """As the connector has it. Raises ProblemError."""
        return await self._connector.place()

    def close(self, parked: bool = False) -> None:
        self._connector.close(parked)


class SshConnection:
    """An SSH connection to the head."""

    def __init__(self, connector: SshConnector, connection: asyncssh.SSHClientConnection) -> None:
        self.ssh = connection
        self._connector = connector
        self._by_command = connector.by_command

    def by(self, head: HeadConfig) -> SshConnection:
        """The same, to open a pipe to the hub in another way."""
        return SshConnection(SshConnector(head), self.ssh)

    @property
    def takes_another(self) -> bool:
        return not self.ssh.is_closed()

    async def open(self, owner: PipeOwner) -> SshPipe:
        """Raises ProblemError."""
        connector = self._connector
        try:
            return await self._open(owner, connector.by_command)
        except ProblemError as exc:
            if not (connector.tries_both and exc.problem.code.another_way):
                raise
            self._by_command = True
            return await self._open(owner, True, exc.problem)

    async def _open(
        self, owner: PipeOwner, by_command: bool, instead: Problem | None = None
    ) -> SshPipe:
        if by_command:
            shell = AfterPreamble(owner, instead)
            pipe = shell.pipe = SshPipe(self.ssh, shell)
        else:
            pipe = SshPipe(self.ssh, owner)
        await self._connector.open_channel(self.ssh, lambda: pipe, by_command)
        return pipe

    async def tune(self) -> None:
        if not self._by_command:  # a command's channel is a session, which sends at once
            await self._connector.send_at_once(self.ssh)

    def keep_alive(self) -> None:
        self.ssh.set_keepalive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)

    def close(self) -> None:
        self.ssh.close()

    def abort(self) -> None:
        self.ssh.abort()


class SshPipe(asyncssh.SSHClientSession[bytes], asyncssh.SSHUNIXSession[bytes]):
    """A channel to the hub's socket, or to `rayfwd attach`."""

    def __init__(self, connection: asyncssh.SSHClientConnection, owner: PipeOwner) -> None:
        self._connection = connection
        self._owner = owner
        self._channel: Any = None
        self._fast: FastPath | None = None
        self._full = False

    # -- AsyncSSH's callbacks ------------------------------------------------------------

    def connection_made(self, chan: Any) -> None:
        self._channel = chan
        chan.set_write_buffer_limits(WRITE_BUFFER)

    def session_started(self) -> None: ...

    def data_received(self, data: Any, datatype: int | None) -> None:
        if datatype is not None:
            self._owner.pipe_said(data)
        else:
            self._owner.pipe_data(data)

    def eof_received(self) -> bool:
        self._owner.pipe_lost(CLOSED)
        return False

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._owner.pipe_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.pipe_lost(str(exc) if exc else CLOSED)

    # -- as the lane's pipe --------------------------------------------------------------

    @property
    def paused(self) -> bool:
        return self._full or (self._fast is not None and self._fast.paused)

    def write(self, chunks: Sequence[Chunk]) -> None:
        if self._fast is not None:
            self._fast.write(chunks)
        else:
            self._channel.write(b"".join(chunks))

    def carry(
        self, deliver: Callable[[Sequence[bytes | memoryview]], None], resume: Callable[[], None]
    ) -> None:
        self._fast = FastPath.install(self._connection, self._channel, deliver, resume)

    def close(self) -> None:
        if self._fast is not None:
            self._fast.close()
        self._channel.close()

    def abort(self) -> None:
        self._channel.abort()
