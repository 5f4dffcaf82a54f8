"""One attempt at one SSH server: its TCP connection, how far it got, how long each step may take.

To AsyncSSH an attempt is a tunnel, whose connection it logs in over. So what the server says before
it says that it is SSH (sshd with too many logins, a firewall, something else altogether) is kept,
and nobody need connect again to hear it: servers count connections that end before a login.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

import aiohappyeyeballs
import asyncssh

from rayfwd.ssh.hops import Hop
from rayfwd.ssh.login_watch import LoginWatch
from rayfwd.ssh.meeting_socket import place_of
from rayfwd.ssh.ssh_process import ProxyCommand
from rayfwd.ssh.witness import Witness
from rayfwd.transport.urgency import AdaptiveTimeout

CONNECT_TIMEOUT = 10.0
"""Seconds for the TCP connection."""
LOGIN_TIMEOUT = 60.0
"""Seconds for key exchange and authentication. sshd gives up after 120 (LoginGraceTime)."""
BESIDE = 0.5
"""Seconds between TCP attempts beside each other: at another address of the name, or, while streams
wait for a lane, at the same. The kernel repeats a SYN that got lost after 1, 3 and 7 seconds only;
a new attempt finds a path that has come back sooner."""
BESIDE_FOR = 2.25
"""Seconds after which an attempt is given up for newer ones; the first one has all of its time, for
ways that are that slow. The kernel's repeats come at the moment of a new attempt: when the path is
back, all are answered at once, and servers count connections that end before a login."""
FIRST_WORDS, PATIENT = 2.0, 4
"""Seconds for what a server says first through a meeting place, while streams wait: the socket
there may still lead to a connection of the head's that is dead. One attempt in so many has the
usual time, for ways that are that slow."""
SAYS_WITHIN = 0.2
"""Seconds for what a ProxyCommand that has ended still has to say."""
WORDS = 1024
"""Bytes of what a server says first that are kept."""

Addresses = Sequence[tuple[int, int, int, str, Any]]
"""As getaddrinfo gives them."""
Made = TypeVar("Made")


class BarredError(OSError):
    """New connections go unanswered, and old ones do not."""


class Attempt(asyncssh.SSHClient):
    """Owned by whoever dials; AsyncSSH calls it back."""

    def __init__(
        self,
        hop: Hop,
        jump: asyncssh.SSHClientConnection | None,
        urgent: asyncio.Event,
        login_timeout: AdaptiveTimeout,
        witness: Witness,
        patient: bool = False,
    ) -> None:
        """`jump`: what the connection goes through. `urgent`: streams wait for it, now or from some
        moment of it on; then the login has what `login_timeout` says. `patient`: what is said first
        has the usual time, also through a meeting place."""
        self._hop = hop
        self._witness = witness
        self._agent_path = hop.agent
        """Where an agent is still to be asked for its keys."""
        self._process: ProxyCommand | None = None
        self._agent: asyncssh.SSHAgentClient | None = None
        self._patient = patient or hop.meet is None
        self._listening: asyncio.Task[None] | None = None
        self.jump = jump
        self.dialled: list[str] = []
        """Addresses that were tried."""
        self.resolving = False
        """The name is being looked up."""
        self.connected = False
        """There was a TCP connection."""
        self.words = b""
        """What came first, up to where it says that it is SSH."""
        self.wants_more = False
        """A key was accepted, and something beside it is wanted."""
        self.watch = LoginWatch()
        self._keys_refused = False
        self._urgent = urgent
        self._login_timeout = login_timeout
        self.login = LOGIN_TIMEOUT
        """Seconds for the login."""
        self._stood_at = 0.0
        self.seconds = 0.0
        """How long the login took."""
        self._connection: Any = None
        self._deadline: asyncio.Timeout | None = None

    @property
    def has_keys(self) -> bool:
        """The key exchange is over: what is left of the login is the user's."""
        connection = self._connection
        return connection is not None and bool(connection.get_extra_info("send_cipher"))

    @property
    def is_ssh(self) -> bool:
        """The server has said that it is one."""
        connection = self._connection
        return connection is not None and bool(connection.get_extra_info("server_version"))

    async def log_in(self, connecting: Callable[[], Awaitable[Made]]) -> Made:
        """Await AsyncSSH's part, which ends with the login. Raises what it raises, and TimeoutError
        where the connection, or the login after it, takes too long."""
        hurrying = asyncio.create_task(self._hurry(), name="hurry")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT) as self._deadline:
                made = await connecting()
        except TimeoutError:
            if self._urgent.is_set() and self.connected and (self.is_ssh or self._patient):
                self._login_timeout.timed_out()
            await self._end_command()
            raise
        except Exception:
            await self._end_command()
            raise
        except BaseException:
            self.close()
            raise
        finally:
            hurrying.cancel()
            if self._listening is not None:
                self._listening.cancel()
            if self._agent is not None:
                self._agent.close()
        self.seconds = asyncio.get_running_loop().time() - self._stood_at
        self._login_timeout.succeeded(self.seconds)
        return made

    # -- as AsyncSSH's tunnel --------------------------------------------------------------------

    async def create_connection(self, factory: Callable[[], Any], host: str, port: int) -> Any:
        """The TCP connection that AsyncSSH is to use."""
        if self.jump is not None and self._hop.meet is not None:
            made = await self._at_meeting(self.jump, self._hop.meet, factory)
            self._stands(made[1])
            if not self._patient:
                self._listening = asyncio.create_task(self._first_words(), name="first words")
            return made
        if self.jump is not None:
            self.dialled = [f"{host} port {port}"]
            made = await self.jump.create_connection(factory, host, port)
            self._stands(made[1])
            return made
        if self._hop.command:
            return await self._by_command(factory)
        sock = await self._connect(host, port)
        with suppress(OSError):  # it has ended already
            reached = sock.getpeername()
            self.dialled = [f"{reached[0]} port {reached[1]}"]
        return await self._listening_along(factory(), sock)

    async def _listening_along(self, connection: Any, sock: socket.socket) -> Any:
        self._stands(connection)
        first = _FirstWords(connection, self)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: first, sock=sock)
        return transport, connection

    async def _by_command(self, factory: Callable[[], Any]) -> Any:
        near, far = socket.socketpair()
        near.setblocking(False)
        try:
            with far:
                self._process = ProxyCommand(self._hop.command, far.fileno())
            await self._process.listen()
        except BaseException:
            near.close()
            raise
        return await self._listening_along(factory(), near)

    async def _end_command(self) -> None:
        """Where it has led to no login."""
        if self._process is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(SAYS_WITHIN):
                    await self._process.silent.wait()
            self.close()

    @property
    def said_by_command(self) -> str:
        """On standard error, in one line."""
        return " ".join(self._process.said.split()) if self._process is not None else ""

    def close(self) -> None:
        """What was started for the connection ends."""
        if self._process is not None:
            self._process.end()

    async def _at_meeting(
        self, jump: asyncssh.SSHClientConnection, socket: str, factory: Callable[[], Any]
    ) -> Any:
        path = await place_of(jump, socket)
        self.dialled = [path]
        return await jump.create_unix_connection(factory, path, encoding=None)

    async def _connect(self, host: str, port: int) -> socket.socket:
        loop = asyncio.get_running_loop()
        stream = socket.SOCK_STREAM
        local: Any = self._hop.options.local_addr
        self.resolving = True
        found = await loop.getaddrinfo(host, port, family=self._hop.options.family, type=stream)
        self.resolving = False
        self.dialled = [f"{address[4][0]} port {port}" for address in found]
        own = None if not local else await loop.getaddrinfo(*local, type=stream)
        return await connect(found, self._urgent, own, self._witness)

    def _stands(self, connection: Any) -> None:
        self.connected = True
        self._connection = connection
        self.watch.follow(connection)
        self._stood_at = asyncio.get_running_loop().time()
        if self._urgent.is_set():
            self.login = self._login_timeout.seconds
        self._allow(self._stood_at + self.login)

    async def _hurry(self) -> None:
        """A login that nobody waited for when it began gets no longer than one begun now."""
        await self._urgent.wait()
        if self.connected:
            now = asyncio.get_running_loop().time()
            self.login = min(self.login, now + self._login_timeout.seconds - self._stood_at)
            self._allow(self._stood_at + self.login)

    async def _first_words(self) -> None:
        await self._urgent.wait()
        await asyncio.sleep(FIRST_WORDS)
        if not self.is_ssh:
            self._allow(asyncio.get_running_loop().time())

    def _allow(self, until: float) -> None:
        assert self._deadline is not None, "it is being awaited"
        if not self._deadline.expired():
            self._deadline.reschedule(until)

    # -- as AsyncSSH's client --------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.close()

    async def public_key_auth_requested(self) -> Any:
        """There is no further key, but for the agent's once."""
        path, self._agent_path = self._agent_path, ""
        if path:
            with suppress(OSError, ValueError):
                self._agent = await asyncssh.connect_agent(path)
                if keys := list(await self._agent.get_keys()):
                    return keys
        self._keys_refused = True
        return None

    def kbdint_auth_requested(self) -> None:
        """Asked for a code, with keys left to try: one was accepted, or this would not be next."""
        self.wants_more = not self._keys_refused

    def password_auth_requested(self) -> None:
        self.wants_more = self.wants_more or not self._keys_refused


class _FirstWords(asyncio.Protocol):
    """Listens along until the server has said that it is SSH."""

    def __init__(self, connection: Any, attempt: Attempt) -> None:
        self._connection = connection
        self._attempt = attempt
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connection.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        attempt = self._attempt
        attempt.words += data[: WORDS - len(attempt.words)]
        self._connection.data_received(data)
        if attempt.is_ssh or len(attempt.words) >= WORDS:
            assert self._transport is not None, "it has brought data"
            if not self._transport.is_closing():
                self._transport.set_protocol(self._connection)

    def eof_received(self) -> bool | None:
        return cast("bool | None", self._connection.eof_received())

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)


async def side_by_side(found: Addresses, own: Addresses | None = None) -> socket.socket:
    """The first TCP connection to stand, of attempts at all these addresses, from an address of our
    `own` where one is given. Raises OSError."""
    return await aiohappyeyeballs.start_connection(
        cast(Any, found),
        local_addr_infos=cast(Any, own),
        happy_eyeballs_delay=BESIDE,
        interleave=1,
    )


async def connect(
    found: Addresses,
    urgent: asyncio.Event,
    own: Addresses | None = None,
    witness: Witness | None = None,
) -> socket.socket:
    """The same, and as soon as it is urgent, with a new round of attempts every half a second, for
    a path that comes back, beside the first one and those of the last moments.

    Raises OSError when every attempt has failed, and BarredError by the word of the `witness`.
    """
    attempts: dict[asyncio.Task[socket.socket], float] = {}
    """When each began, the oldest first."""
    now = asyncio.get_running_loop().time
    try:
        while True:
            if urgent.is_set() and witness is not None and witness.barred(now()):
                raise BarredError("old connections are answered, and new ones are not")
            if urgent.is_set() or not attempts:
                for old in [a for a, at in attempts.items() if now() - at >= BESIDE_FOR][1:]:
                    del attempts[old]
                    _give_up(old)
                attempts[asyncio.create_task(side_by_side(found, own), name="dial")] = now()
            ready, _ = await asyncio.wait(
                attempts, timeout=BESIDE, return_when=asyncio.FIRST_COMPLETED
            )
            for task in ready:
                del attempts[task]
            standing = [task.result() for task in ready if task.exception() is None]
            for late in standing[1:]:
                late.close()
            if standing:
                return standing[0]
            if ready and not attempts:
                failure = ready.pop().exception()
                assert failure is not None, "it does not stand"
                raise failure
            if ready:
                await asyncio.sleep(BESIDE)
    finally:
        for task in attempts:
            _give_up(task)


def _give_up(attempt: asyncio.Task[socket.socket]) -> None:
    attempt.cancel()
    attempt.add_done_callback(_close_late)


def _close_late(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()
