"""The head's side of a meeting place: a third host, from which workers find the way to its sshd.

The head logs in there and has that host's sshd listen on a Unix socket. Whoever connects to it is
joined to the head's own sshd, and logs in there: what the host in the middle sees is SSH.
"""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable
from functools import cache

import asyncssh

from rayfwd import codes
from rayfwd.config import Config, MeetConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.ssh.channel_relay import ChannelRelay
from rayfwd.ssh.meeting_socket import NoSftpError, place_of
from rayfwd.ssh.own_sshd import OwnSsh
from rayfwd.ssh.ssh_connector import CHANNEL_WINDOW, SshConnector
from rayfwd.system import setting
from rayfwd.system.logs import get_logger
from rayfwd.transport.link import (
    HANDSHAKE_TIMEOUT,
    URGENT_HANDSHAKE,
    within_time,
)
from rayfwd.transport.redialled import Redialled
from rayfwd.transport.urgency import AdaptiveTimeout

log = get_logger(__name__)

KEEPALIVE_SECONDS, KEEPALIVE_COUNT = 2, 2
"""Between two questions whether the host is there; so many without an answer end the connection,
about as soon as a lane is found to be silent."""

NO_SSHD = (
    "start sshd here (it may listen on 127.0.0.1 only), or set `sshd` of the [[hub.meet]] to its "
    'address, or to "own" if there is none'
)


class Meeting(Redialled):
    """Holds the way to this head open at one host. `run` until it is cancelled."""

    def __init__(
        self,
        meet: MeetConfig,
        ride_through: float,
        on_change: Callable[[], None],
        own: Callable[[], OwnSsh] | None = None,
    ) -> None:
        """`on_change`: `problem` is another. `own` makes what answers where there is no sshd."""
        super().__init__(meet.called, ride_through, on_change)
        self._meet = meet
        self._connector = SshConnector(meet.way())
        self._timeout = AdaptiveTimeout(URGENT_HANDSHAKE, HANDSHAKE_TIMEOUT)
        self._no_sshd: Problem | None = None
        self._make_own = own
        self._own: OwnSsh | None = None
        self._connection: asyncssh.SSHClientConnection | None = None

    @property
    def problem(self) -> Problem | None:
        """What keeps workers from finding the way; the head's own sshd may be it."""
        return super().problem or self._no_sshd

    async def run(self) -> None:
        if self._make_own is not None and self._meet.sshd_address() is None:
            self._own = self._make_own()
        await self._redial(self._one, lambda problem: self._met(problem, place=self.called))

    def close(self) -> None:
        """Dial no more, and give up what stands."""
        self._closing = True
        self._be_calm()
        if self._connection is not None:
            self._connection.abort()
        if self._own is not None:
            self._own.close()
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
            own_key = None if self._own is None else self._own.public_key
            log.info("meeting_held", place=self.called, socket=path, host_key=own_key)
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
                lambda: ChannelRelay(self._to_sshd, self._sshd_answers),
                path,
                encoding=None,
                window=CHANNEL_WINDOW,
            )
        except asyncssh.ChannelListenError as exc:
            raise self._refused(f"its sshd opens no socket at {path}: {exc}") from exc
        except asyncssh.SFTPError as exc:
            raise self._refused(f"by SFTP: {exc.reason}") from exc
        except (asyncssh.ChannelOpenError, NoSftpError) as exc:
            raise self._refused(f"it has no SFTP: {exc}") from exc
        except (OSError, asyncssh.Error) as exc:
            raise codes.SSH_LOST.error(
                f"the SSH connection to the meeting place {self.called} ended: {exc}",
                "nothing if it comes back; otherwise read the sshd log of that host",
            ) from exc
        return path

    async def _to_sshd(self, factory: Callable[[], asyncio.Protocol]) -> None:
        """Raises OSError."""
        address = self._meet.sshd_address()
        if address is not None:
            await asyncio.get_running_loop().create_connection(factory, *address)
        elif self._own is not None:
            await self._own.connect(factory)

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
            "`restrict,port-forwarding` before the key in authorized_keys; or set another "
            f"socket in {setting.key('hub.meet')}, and in {setting.theirs('head.meet_socket')} on "
            "the workers",
        )

    def _sshd_answers(self, why: str) -> None:
        """Whether this head's own sshd does: nothing, or why not."""
        before = self._no_sshd
        self._no_sshd = (
            codes.MEETING_REFUSED.problem(
                f"a worker came through the meeting place {self.called}, but "
                f"{self._meet.sshd_called} does not answer: {why}",
                NO_SSHD,
            )
            if why
            else None
        )
        if self._no_sshd != before:
            if self._no_sshd is not None:
                self._say(self._no_sshd, place=self.called)
            self._on_change()


def meetings(config: Config, on_change: Callable[[], None]) -> list[Meeting]:
    """All of a head's. Those for which rayfwd answers SSH itself share what answers."""
    own = cache(lambda: OwnSsh(config.state_dir, config.hub_socket))
    return [Meeting(meet, config.ride_through, on_change, own) for meet in config.hub.meet]
