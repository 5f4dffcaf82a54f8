"""The head's side of a meeting place: a third host, from which workers find the way to its sshd.

The head logs in there and has that host's sshd listen on a Unix socket. Whoever connects to it is
joined to the head's own sshd, and logs in there: what the host in the middle sees is SSH.
"""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable
from typing import Any, cast

import asyncssh

from rayfwd import codes
from rayfwd.config import MeetConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.system.logs import get_logger
from rayfwd.transport.held import Held, said_of
from rayfwd.transport.link import (
    HANDSHAKE_TIMEOUT,
    URGENT_HANDSHAKE,
    within_time,
)
from rayfwd.transport.places import place_of
from rayfwd.transport.ssh import CHANNEL_WINDOW, SshConnector
from rayfwd.transport.urgency import AdaptiveTimeout

log = get_logger(__name__)

KEEPALIVE_SECONDS, KEEPALIVE_COUNT = 2, 2
"""Between two questions whether the host is there; so many without an answer end the connection,
about as soon as a lane is found to be silent."""
BUFFER = 1 << 18
"""Bytes that may wait on either side of a passage before the other is read no more."""


def of_meeting(problem: Problem) -> Problem:
    """A problem on the way to a head as one on the way to a meeting place."""
    return said_of(problem, "the meeting place", "[[hub.meet]]")


class Meeting(Held):
    """Holds the way to this head open at one host. `run` until it is cancelled."""

    def __init__(
        self, meet: MeetConfig, ride_through: float, on_change: Callable[[], None]
    ) -> None:
        """`on_change`: `problem` is another."""
        super().__init__(meet.called, ride_through, on_change)
        self._meet = meet
        self._connector = SshConnector(meet.way())
        self._timeout = AdaptiveTimeout(URGENT_HANDSHAKE, HANDSHAKE_TIMEOUT)
        self._no_sshd: Problem | None = None
        self._connection: asyncssh.SSHClientConnection | None = None

    @property
    def problem(self) -> Problem | None:
        """What keeps workers from finding the way; the head's own sshd may be it."""
        return super().problem or self._no_sshd

    async def run(self) -> None:
        await self._redial(
            self._one, lambda problem: self._met(of_meeting(problem), place=self.called)
        )

    def close(self) -> None:
        """Dial no more, and give up what stands."""
        self._closing = True
        self._be_calm()
        if self._connection is not None:
            self._connection.abort()
        self._connector.close()

    async def _one(self) -> None:
        """Log in, listen there, and stay until it is over. Raises ProblemError."""
        connection = self._connection = await self._connector.connect(self._urgent)
        try:
            path = await within_time(
                self._listen(connection),
                self._urgent,
                self._timeout,
                f"the sshd of the meeting place {self.called} opened no socket",
                "nothing if it comes back; otherwise check that host's load and its sshd log",
            )
            connection.set_keepalive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)
            await self._connector.send_at_once(connection)
            log.info("meeting_held", place=self.called, socket=path)
            self._now_stands()
            await connection.wait_closed()
        finally:
            self._connection = None
            connection.abort()
            if self._now_gone():
                log.warning("meeting_lost", place=self.called)
                self._connector.close(parked=True)

    async def _listen(self, connection: asyncssh.SSHClientConnection) -> str:
        """Raises ProblemError."""
        try:
            path = await self._free_place(connection)
            await connection.create_unix_server(
                lambda: Passage(self._meet.sshd, self._sshd_answers),
                path,
                encoding=None,
                window=CHANNEL_WINDOW,
            )
        except asyncssh.ChannelListenError as exc:
            raise self._refused(f"its sshd opens no socket at {path}: {exc}") from exc
        except asyncssh.SFTPError as exc:
            raise self._refused(f"by SFTP: {exc.reason}") from exc
        except (OSError, asyncssh.Error) as exc:
            raise codes.SSH_LOST.error(
                f"the SSH connection to the meeting place {self.called} ended: {exc}",
                "nothing if it comes back; otherwise read the sshd log of that host",
            ) from exc
        return path

    async def _free_place(self, connection: asyncssh.SSHClientConnection) -> str:
        """What an earlier connection has left there is in the way: sshd takes no socket away, and
        may hold it for hours where nobody told it that the connection is gone."""
        path = await place_of(connection, self._meet.socket)
        async with connection.start_sftp_client() as sftp:
            try:
                found = await sftp.lstat(path)
            except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath):
                return path
            if not stat.S_ISSOCK(found.permissions or 0):
                raise self._refused(f"{path} exists and is not a socket")
            await sftp.remove(path)
            return path

    def _refused(self, why: str) -> ProblemError:
        return codes.MEETING_REFUSED.error(
            f"the meeting place {self.called} does not let this head wait there: {why}",
            "on that host, allow AllowStreamLocalForwarding, AllowTcpForwarding and the sftp "
            "subsystem in sshd_config (without DisableForwarding), and put "
            "`restrict,port-forwarding` before the key in authorized_keys; or set another socket "
            "in the [[hub.meet]], and in head.meet_socket on the workers",
        )

    def _sshd_answers(self, why: str) -> None:
        """Whether this head's own sshd does: nothing, or why not."""
        before = self._no_sshd
        host, port = self._meet.sshd_address()
        self._no_sshd = (
            codes.MEETING_REFUSED.problem(
                f"a worker came by the meeting place {self.called}, but this head's own sshd does "
                f"not answer at {host} port {port}: {why}",
                "start sshd here (it may listen on 127.0.0.1 only), or set `sshd` of the "
                "[[hub.meet]] to its address",
            )
            if why
            else None
        )
        if self._no_sshd != before:
            if self._no_sshd is not None:
                self._say(self._no_sshd, place=self.called)
            self._on_change()


class Passage(asyncssh.SSHUNIXSession[bytes]):
    """Joins who came to the meeting place to this head's sshd, which is dialled only then: it
    speaks first, and nothing of that may come before there is somebody to hear it."""

    def __init__(self, sshd: str, tell: Callable[[str], None]) -> None:
        self._host, _, port = sshd.rpartition(":")
        self._port = int(port)
        self._tell = tell
        self._channel: Any = None
        self._far: asyncio.Transport | None = None
        self._dialling: asyncio.Task[Any] | None = None
        self._before = bytearray()
        """What came before sshd was there; pausing a channel at its start has no effect."""

    def connection_made(self, chan: Any) -> None:
        self._channel = chan
        chan.set_write_buffer_limits(BUFFER)

    def session_started(self) -> None:
        self._dialling = asyncio.create_task(self._dial(), name="passage to sshd")

    async def _dial(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: FarEnd(self), self._host, self._port)
        except OSError as exc:
            self._tell(str(exc.strerror or exc))
            self._channel.close()
            return
        self._tell("")

    # -- from who came -------------------------------------------------------------------

    def data_received(self, data: bytes, datatype: int | None) -> None:
        del datatype
        if self._far is not None:
            self._far.write(data)
            return
        self._before += data
        if len(self._before) > BUFFER:
            self._channel.abort()

    def eof_received(self) -> bool:
        if self._far is not None and not self._far.is_closing():
            self._far.write_eof()
        return True  # sshd may have more to say

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self._dialling is not None:
            self._dialling.cancel()
        if self._far is not None:
            self._far.close()

    def pause_writing(self) -> None:
        if self._far is not None and not self._far.is_closing():
            self._far.pause_reading()

    def resume_writing(self) -> None:
        if self._far is not None and not self._far.is_closing():
            self._far.resume_reading()

    # -- from sshd -----------------------------------------------------------------------

    def joined(self, far: asyncio.Transport) -> None:
        self._far = far
        if self._channel.is_closing():
            far.abort()
            return
        far.set_write_buffer_limits(BUFFER)
        far.write(bytes(self._before))
        self._before.clear()

    def said(self, data: bytes) -> None:
        if not self._channel.is_closing():
            self._channel.write(data)

    def full(self, is_full: bool) -> None:
        """Whether sshd takes no more for now."""
        if is_full:
            self._channel.pause_reading()
        else:
            self._channel.resume_reading()

    def over(self) -> None:
        self._far = None
        self._channel.close()


class FarEnd(asyncio.Protocol):
    """The connection to sshd, for a passage."""

    def __init__(self, passage: Passage) -> None:
        self._passage = passage

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._passage.joined(cast(asyncio.Transport, transport))

    def data_received(self, data: bytes) -> None:
        self._passage.said(data)

    def pause_writing(self) -> None:
        self._passage.full(True)

    def resume_writing(self) -> None:
        self._passage.full(False)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._passage.over()
