"""SSH from this machine to the head: through which hops, and to the hub there.

Host keys are always checked, strictly (`knownhosts.py`). One connector dials for all lanes of a
link; the connections to jump hosts are its own and serve them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakSet

import asyncssh

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.ssh import agent, asyncssh_problems, channel_problems, hop_problems
from rayfwd.ssh.dial import CONNECT_TIMEOUT, LOGIN_TIMEOUT, PATIENT, Attempt, Made
from rayfwd.ssh.hops import Hop, find_way
from rayfwd.ssh.meeting_socket import NoSftpError
from rayfwd.ssh.witness import Witness
from rayfwd.system.logs import get_logger
from rayfwd.transport.urgency import AdaptiveTimeout

log = get_logger(__name__)

URGENT_LOGIN = 3.0
"""Seconds for the first login while streams wait."""
SLOW_LOGIN = 10.0
"""Seconds from which a login is said to be slow: after a cut the link is back that much later."""
HOST_KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512", "rsa-sha2-256")
"""In order of preference, where no host key is known yet."""
CHANNEL_WINDOW = 1 << 25
"""Bytes that the server may send ahead on a channel: as many as a lane's own window may grow to, so
that this one bounds nothing. What comes is taken at once."""

Channel = asyncssh.SSHClientChannel[bytes] | asyncssh.SSHUNIXChannel[bytes]


@dataclass(frozen=True, slots=True)
class HostKey:
    """What the head's sshd shows, unchecked."""

    host: str
    """Its name as files of known hosts have it."""
    port: int
    key: str
    """Type and key."""
    fingerprint: str
    known: bool
    """The files of known hosts have it."""


class SshConnector:
    """Connects to one head as its configuration says. `close` it when no connection is wanted."""

    def __init__(self, head: HeadConfig) -> None:
        self._head = head
        self._to = head.destination
        self._login_timeout = AdaptiveTimeout(URGENT_LOGIN, LOGIN_TIMEOUT)
        self._jumps: list[asyncssh.SSHClientConnection] = []
        """To each jump host in turn, each through the one before."""
        self._jumping = asyncio.Lock()
        self.stopped_at: Hop | None = None
        """Where the last attempt failed."""
        self._direct: WeakSet[asyncssh.SSHClientConnection] = WeakSet()
        """Those that were dialled from here."""
        self._witness = Witness()
        self._tries = 0
        self._slow: set[str] = set()
        """Hops whose logins were said to be slow."""

    @property
    def by_command(self) -> bool:
        """A channel to the hub is a command that a login shell runs, and no socket."""
        return self._head.via == "exec"

    async def connect(self, urgent: asyncio.Event | None = None) -> asyncssh.SSHClientConnection:
        """An authenticated connection. Raises ProblemError.

        `urgent`: set while streams wait for it, perhaps from some moment of it on; see BESIDE in
        `dial.py` and URGENT_LOGIN.
        """
        urgent = urgent or asyncio.Event()
        if not urgent.is_set():
            self._witness.drop()
        hops = await self._hops()
        jump = await self._jump(hops[:-1], urgent)
        try:
            return await self._log_in(hops[-1], jump, urgent)
        except ProblemError as exc:
            said_no = isinstance(exc.__cause__, asyncssh.ChannelOpenError)
            gone = exc.problem.code in {codes.SSH_UNREACHABLE, codes.SSH_LOST} and not said_no
            if jump is not None and gone:
                self.close()  # it may be the jump host that is gone, in silence
            raise

    def close(self, parked: bool = False) -> None:
        """Give up the connections to jump hosts; what goes through them ends. `parked`: what was
        dialled from here and stands is listened to, while it is dialled again."""
        self._witness.drop()
        if parked:
            for connection in self._direct:
                sock = connection.get_extra_info("socket")
                if sock is not None and not connection.is_closed():
                    self._witness.hold(sock)
        while self._jumps:
            self._jumps.pop().abort()

    async def place(self) -> tuple[str, int, bool]:
        """Host and port as the SSH configuration has them, and whether they are dialled from here.

        False: a jump host or a command does, which looks the name up as well. Raises ProblemError.
        """
        head = (await self._hops())[-1]
        return head.known.host, head.known.port, head.direct

    async def login(self) -> str:
        """Whom it logs in as, by `head.ssh` or the SSH configuration. Raises ProblemError."""
        return (await self._hops())[-1].options.username

    async def host_key(self) -> HostKey:
        """The host key that the head shows now; nothing is sent to it.

        Raises ProblemError where it cannot be reached, is known with another key, or shows one that
        is revoked.
        """
        hops, never = await self._hops(), asyncio.Event()
        head, jump = hops[-1], await self._jump(hops[:-1], never)
        known = head.known
        trusted = known.trusted()
        # A key of a type that is known, as the link will ask for it.
        types = [a.decode() for k in trusted for a in k.sig_algorithms] or HOST_KEY_TYPES

        def ask(attempt: Attempt) -> Awaitable[asyncssh.SSHKey | None]:
            return asyncssh.get_server_host_key(
                known.host,
                known.port,
                options=head.options,
                tunnel=cast(Any, attempt),
                server_host_key_algs=types,
            )

        key = await self._attempt(head, jump, never, ask)
        known_here = key is not None and key.public_data in [k.public_data for k in trusted]
        if key is None or (trusted and not known_here):
            raise ProblemError(hop_problems.host_key_problem(self._head, head))
        if key.public_data in [k.public_data for k in known.revoked()]:
            raise ProblemError(hop_problems.host_key_problem(self._head, head, revoked=True))
        public = " ".join(key.export_public_key().decode().split()[:2])
        return HostKey(known.host, known.port, public, key.get_fingerprint(), known_here)

    async def _hops(self) -> list[Hop]:
        try:
            return await asyncio.to_thread(find_way, self._head)
        except (OSError, asyncssh.Error, ValueError) as exc:
            raise ProblemError(asyncssh_problems.explain_files(exc, self._head)) from exc

    async def _jump(
        self, hops: list[Hop], urgent: asyncio.Event
    ) -> asyncssh.SSHClientConnection | None:
        """The connection to the last of these jump hosts; None: there are none."""
        async with self._jumping:
            if any(connection.is_closed() for connection in self._jumps):
                self.close()
            for hop in hops[len(self._jumps) :]:
                before = self._jumps[-1] if self._jumps else None
                made = await self._log_in(hop, before, urgent)
                self._jumps.append(made)
                if hop.meets:
                    await self.send_at_once(made)
            return self._jumps[-1] if self._jumps else None

    async def _log_in(
        self, hop: Hop, jump: asyncssh.SSHClientConnection | None, urgent: asyncio.Event
    ) -> asyncssh.SSHClientConnection:
        def connect(attempt: Attempt) -> Awaitable[asyncssh.SSHClientConnection]:
            return asyncssh.connect(
                hop.known.host,
                hop.known.port,
                options=hop.options,
                known_hosts=hop.known.for_asyncssh,
                client_factory=lambda: attempt,
                tunnel=cast(Any, attempt),
            )

        made = await self._attempt(hop, jump, urgent, connect)
        if hop.direct:
            self._witness.drop()
            self._direct.add(made)
        return made

    async def _attempt(
        self,
        hop: Hop,
        jump: asyncssh.SSHClientConnection | None,
        urgent: asyncio.Event,
        connecting: Callable[[Attempt], Awaitable[Made]],
    ) -> Made:
        """Raises ProblemError."""
        self._tries += 1
        patient = self._tries % PATIENT == 0
        attempt = Attempt(hop, jump, urgent, self._login_timeout, self._witness, patient)
        try:
            made = await attempt.log_in(lambda: connecting(attempt))
        except (OSError, asyncssh.Error, NoSftpError, ValueError, TimeoutError) as exc:
            self.stopped_at = hop
            problem = await agent.blamed(
                asyncssh_problems.explain(exc, self._head, hop, attempt), hop
            )
            raise ProblemError(asyncssh_problems.with_passed_over(problem, hop)) from exc
        if not isinstance(made, asyncssh.SSHClientConnection):
            attempt.close()
        self._took(hop, attempt.seconds)
        return made

    def _took(self, hop: Hop, seconds: float) -> None:
        if seconds < SLOW_LOGIN:
            self._slow.discard(hop.written)
        elif hop.written not in self._slow:
            self._slow.add(hop.written)
            log.warning("login_slow", hop=hop.written, seconds=round(seconds, 1))

    @property
    def tries_both(self) -> bool:
        """Where the socket is no way to the hub, the command may be one."""
        return self._head.via == "auto"

    async def open_channel(
        self,
        connection: asyncssh.SSHClientConnection,
        factory: Callable[[], Any],
        by_command: bool = False,
    ) -> Channel:
        """A channel to the hub, for a session made by `factory`. Raises ProblemError."""
        by_command = by_command or self.by_command
        try:
            if by_command:
                channel, _ = await connection.create_session(
                    factory,
                    self._head.attach_command,
                    encoding=None,
                    window=CHANNEL_WINDOW,
                    request_pty=False,
                )
                return channel
            unix, _ = await connection.create_unix_connection(
                factory, str(self._head.socket), encoding=None, window=CHANNEL_WINDOW
            )
            return unix
        except asyncssh.ChannelOpenError as exc:
            raise ProblemError(await self._why_no_channel(connection, exc, by_command)) from exc
        except (OSError, asyncssh.Error) as exc:
            raise ProblemError(
                codes.SSH_LOST.problem(
                    f"the SSH connection to {self._head.ssh} ended: {exc}",
                    f"nothing if it comes back; otherwise read {self._to.name}'s sshd log",
                )
            ) from exc

    async def send_at_once(self, connection: asyncssh.SSHClientConnection) -> None:
        """Have the head's sshd send small packets at once, as it does for a session.

        OpenSSH's server switches Nagle's algorithm off when a session begins and never else
        (`ssh_packet_set_interactive`, called from session.c): on a connection that has forwarded
        channels only, each small answer after another waits for a delayed acknowledgement, 40 ms.
        Whether the command does anything is no matter, so that it fails is none either.
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                channel, _ = await connection.create_session(
                    asyncssh.SSHClientSession, "true", request_pty=False
                )
                channel.close()
        except (asyncssh.Error, OSError, TimeoutError):
            pass

    async def _why_no_channel(
        self,
        connection: asyncssh.SSHClientConnection,
        exc: asyncssh.ChannelOpenError,
        by_command: bool,
    ) -> Problem:
        if exc.code == asyncssh.OPEN_REQUEST_SESSION_FAILED:
            return channel_problems.not_started(exc.reason, self._to)
        if exc.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED or by_command:
            return codes.CHANNEL_REFUSED.problem(
                f"{self._to.name}'s sshd refuses this kind of channel: {exc.reason}",
                f"set {self._to.set_to('via', 'exec')}"
                if not by_command
                else channel_problems.sessions_allowed(self._to),
            )
        return await asyncssh_problems.look_at_socket(connection, self._head, exc.reason)
