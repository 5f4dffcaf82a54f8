"""Lanes by the system's `ssh`: a process each, which joins a socket of ours to the hub's.

By `via = "exec"` its standard input and output are one end of a socket pair. By `via = "socket"` it
listens for us in a private directory (`-L`), which is gone once the lane has connected. Where a
ControlMaster of the user's serves the head, the same is asked of that.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import ProblemError
from rayfwd.ssh import agent, openssh, openssh_problems, socket_check
from rayfwd.ssh.dial import LOGIN_TIMEOUT
from rayfwd.ssh.openssh import CONNECT_TIMEOUT, OpensshHop
from rayfwd.ssh.openssh_words import reached
from rayfwd.ssh.ssh_connector import SLOW_LOGIN
from rayfwd.ssh.ssh_process import SshProcess
from rayfwd.system.logs import get_logger
from rayfwd.system.paths import default_runtime_dir
from rayfwd.transport.carrier import CLOSED, AfterPreamble, PipeOwner
from rayfwd.transport.socketpipe import SocketPipe
from rayfwd.transport.urgency import AdaptiveTimeout, time_limit

log = get_logger(__name__)

SOCKET_BUFFER = 1 << 20
"""Bytes that the kernel keeps between `ssh` and this process, if it grants as many."""
URGENT_DIAL = 4.0
"""Seconds for all of it at first while streams wait."""
URGENT_CONNECT = 2
"""Seconds for the connection while streams wait: the kernel repeats a SYN that got lost ever less
often, and a new attempt finds a path that has come back sooner."""
SEVERAL_CONNECT = 3
"""Seconds for the connection to an address, where there are others."""
RESOLVES_WITHIN = 2.0
"""Seconds for a look at how many addresses a name has."""
LISTENS_WITHIN = 5.0
"""Seconds from the login until `ssh` listens for us."""
LOOK_AGAIN = 0.01
SAYS_WITHIN = 2.0
"""Seconds for what runs on the head to say why a channel was not opened."""
ENDS_WITHIN = 1.0
"""Seconds for `ssh` to end by itself."""


class OpensshCarrier:
    """Calls `ssh` as the configuration of one head says."""

    def __init__(self, head: HeadConfig) -> None:
        self._head = head
        self._login_timeout = AdaptiveTimeout(URGENT_DIAL, LOGIN_TIMEOUT)
        self._slow = False
        self._mute = False
        """The last server dialled took the connection and did not say in time that it is SSH."""
        self.stopped_at: OpensshHop | None = None
        """Where the last attempt failed."""

    async def dial(self, urgent: asyncio.Event) -> OpensshConnection:
        """`urgent`: set while streams wait for it. Raises ProblemError."""
        hops = await self.hops()
        connection = OpensshConnection(self._head, hops)
        connect = await self._connect_time(urgent, hops[0])
        loop = asyncio.get_running_loop()
        began = loop.time()
        usual = len(hops) * CONNECT_TIMEOUT + LOGIN_TIMEOUT
        try:
            async with time_limit(urgent, usual, self._login_timeout):
                await connection.log_in(connect)
        except TimeoutError:
            hop = self.stopped_at = connection.reached
            why = openssh_problems.not_in_time(hop, connection.said, loop.time() - began)
            raise ProblemError(await agent.blamed(why, hop)) from None
        except ProblemError:
            self.stopped_at = connection.reached
            at = reached(connection.said)
            self._mute = at.connected and not at.is_ssh
            raise
        finally:
            if not connection.stands:
                connection.abort()
        self._took(loop.time() - began)
        return connection

    async def _connect_time(self, urgent: asyncio.Event, first: OpensshHop) -> int:
        """Seconds for each address, and for what a server says first. `ssh` tries one address after
        the other: where a name has several, the first may be a black hole."""
        if self._mute:
            return CONNECT_TIMEOUT
        if urgent.is_set():
            return URGENT_CONNECT
        return SEVERAL_CONNECT if await _has_several(first) else CONNECT_TIMEOUT

    async def hops(self) -> list[OpensshHop]:
        """The way as `ssh` has it. Raises ProblemError."""
        return await asyncio.to_thread(openssh.find_way, self._head)

    async def place(self) -> tuple[str, int, bool]:
        """Host and port as `ssh` has them, and whether they are dialled from here; False: a jump
        host or a command does. Raises ProblemError."""
        head = (await self.hops())[-1]
        return head.known.host, head.known.port, head.direct

    def _took(self, seconds: float) -> None:
        if seconds >= SLOW_LOGIN and not self._slow:
            log.warning("login_slow", hop=self._head.ssh, seconds=round(seconds, 1))
        self._slow = seconds >= SLOW_LOGIN

    def close(self, parked: bool = False) -> None:
        """Its connections share nothing of ours."""


async def _has_several(hop: OpensshHop) -> bool:
    """Whether its name has more than one address, as far as this is known soon."""
    if not hop.direct or hop.shared:
        return False
    loop, found = asyncio.get_running_loop(), []
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(RESOLVES_WITHIN):
            found = await loop.getaddrinfo(hop.known.host, None, type=socket.SOCK_STREAM)
    return len(found) > 1


class OpensshConnection:
    """A process that has logged in at the head, or a ControlMaster that has."""

    def __init__(self, head: HeadConfig, hops: Sequence[OpensshHop]) -> None:
        self.hops = hops
        self.stands = False
        """It has logged in."""
        self._head = head
        self._process: SshProcess | None = None
        self._near: socket.socket | None = None
        """Our end of its standard input and output."""
        self._directory: Path | None = None
        self._pipe: OpensshPipe | None = None
        self._aside: OpensshConnection | None = None

    @property
    def shared(self) -> bool:
        """It goes over a connection that stood already."""
        return self.hops[-1].shared

    @property
    def reached(self) -> OpensshHop:
        """The hop that it has not got past."""
        passed = openssh_problems.hops_passed(self.hops, self.said)
        return self.hops[min(passed, len(self.hops) - 1)]

    @property
    def said(self) -> str:
        """By `ssh`, so far."""
        return self._process.said if self._process is not None else ""

    async def log_in(self, connect: int) -> None:
        """`connect`: seconds for each address of a hop. Raises ProblemError."""
        words = openssh.command(self._head, self.hops, connect)
        if self._head.via == "exec":
            self._near, far = socket.socketpair()
            with far:
                for end in (self._near, far):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
                number = far.fileno()
                await self._start([*words, self._head.attach_command], number, number)
        else:
            self._directory = _private_directory(self._head)
            forward = f"{self._directory}/hub:{self._head.socket}"
            if self.shared:
                await self._of_master("forward", forward)
            else:
                # With a session, which does nothing: see `send_at_once` in ssh.py.
                looks = socket_check.command()
                await self._start([words[0], "-L", forward, *words[1:], looks], subprocess.PIPE)
        self.stands = True

    async def _start(
        self,
        words: Sequence[str],
        stdin: int,
        stdout: int = subprocess.DEVNULL,
    ) -> None:
        """Start `ssh`, and wait for its logins."""
        try:
            process = self._process = SshProcess(words, stdin, stdout)
        except OSError as exc:
            raise codes.SSH_FAILED.error(
                f"`ssh` cannot be started: {exc}", "read the daemon's log"
            ) from exc
        await process.listen()
        while openssh_problems.hops_passed(self.hops, process.said) < len(self.hops):
            await process.news.wait()
            process.news.clear()
            if process.over.done():
                raise ProblemError(openssh_problems.explain(self._head, self.hops, process.said))

    async def _of_master(self, verb: str, forward: str) -> None:
        """Have the ControlMaster begin or end a forward. Raises ProblemError."""
        words = openssh.command(self._head, self.hops, CONNECT_TIMEOUT)
        argv = [words[0], "-O", verb, "-L", forward, *words[1:]]
        ran = await asyncio.to_thread(openssh.run, argv[1:])
        if ran is None or ran.returncode != 0:
            said = "" if ran is None else ran.stderr
            raise ProblemError(openssh_problems.explain(self._head, self.hops, said))

    def by(self, head: HeadConfig) -> OpensshConnection:
        """The same; by another way to the hub's socket it is another process."""
        if head.via == self._head.via:
            return self
        self._aside = OpensshConnection(head, self.hops)
        return self._aside

    @property
    def takes_another(self) -> bool:
        """The process ends with its one pipe."""
        return False

    async def open(self, owner: PipeOwner) -> OpensshPipe:
        """Raises ProblemError."""
        loop = asyncio.get_running_loop()
        if not self.stands:
            await self.log_in(CONNECT_TIMEOUT)
        if self._near is not None:
            shell = AfterPreamble(owner)
            pipe = shell.pipe = OpensshPipe(shell, self._process, self._head)
        else:
            pipe = OpensshPipe(owner, self._process, self._head)
        self._pipe = pipe
        near = self._near if self._near is not None else await self._connected()
        self._near = None
        await loop.create_unix_connection(lambda: pipe, sock=near)
        return pipe

    async def _connected(self) -> socket.socket:
        """To where `ssh`, or the ControlMaster, listens for us; once is enough."""
        assert self._directory is not None, "it was made with the process"
        near, path = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), self._directory / "hub"
        near.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(LISTENS_WITHIN):
                while True:
                    try:
                        await loop.sock_connect(near, str(path))
                        break
                    except (FileNotFoundError, ConnectionRefusedError):
                        self._check_alive()
                        await asyncio.sleep(LOOK_AGAIN)
        except BaseException as exc:
            near.close()
            if isinstance(exc, TimeoutError | OSError):
                raise codes.SSH_FAILED.error(
                    f"`ssh` does not listen at {path}: {exc}",
                    "run `ssh -v` by hand, as the user that runs rayfwd, to see more",
                ) from exc
            raise
        if self.shared:
            with suppress(ProblemError):
                await self._of_master("cancel", f"{path}:{self._head.socket}")
        self._remove_directory()
        return near

    def _check_alive(self) -> None:
        """Raises ProblemError."""
        process = self._process
        if process is not None and process.over.done():
            raise ProblemError(openssh_problems.explain(self._head, self.hops, process.said))

    def _remove_directory(self) -> None:
        directory, self._directory = self._directory, None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)

    async def tune(self) -> None:
        if self._process is not None:
            self._process.close_stdin()

    def keep_alive(self) -> None:
        """It does by itself (ServerAliveInterval)."""

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._remove_directory()
        if self._near is not None:
            self._near.close()
            self._near = None
        if self._pipe is not None:
            self._pipe.abort()
        if self._process is not None:
            self._process.end()
        if self._aside is not None:
            self._aside.abort()


def _private_directory(head: HeadConfig) -> Path:
    """Nobody else may look into it; its name is short, as a socket's must be. Raises
    ProblemError."""
    usual = default_runtime_dir(os.environ)
    own = usual if os.access(usual, os.W_OK) else None
    try:
        return Path(tempfile.mkdtemp(prefix="ssh-", dir=own))
    except OSError as exc:
        raise codes.SSH_FAILED.error(
            f"no directory for the socket of `ssh` can be created here: {exc}",
            "make room on this machine (`df` and `df -i` show what is full), or set "
            f"{head.destination.set_to('via', 'exec')}, which needs none",
        ) from exc


class OpensshPipe(SocketPipe):
    """The socket that `ssh` reads and writes."""

    def __init__(self, owner: PipeOwner, process: SshProcess | None, head: HeadConfig) -> None:
        super().__init__(owner)
        self._receiver = owner
        self._process = process
        self._head = head
        self._silent = True
        """Nothing has come by it: sshd may have refused what it was to be."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)

    def data_received(self, data: bytes) -> None:
        self._silent = False
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        process = self._process
        if process is None or process.over.done():
            self._tell()
            return
        # What it has to say of that comes by another pipe. By `via = "socket"` it goes on.
        loop = asyncio.get_running_loop()
        goes_on = self._silent and self._head.via != "exec"
        if goes_on:
            process.ask(f"{self._head.socket}\n".encode())
        waiting = loop.call_later(SAYS_WITHIN if goes_on else ENDS_WITHIN, process.end)
        if goes_on:
            process.on_news = self._heard
        process.over.add_done_callback(lambda _: waiting.cancel())
        process.over.add_done_callback(lambda _: self._tell())

    def _heard(self) -> None:
        """Of what runs on the head, that was asked."""
        if self._process is not None and socket_check.is_over(self._process.said):
            self._process.end()

    def _tell(self) -> None:
        said = self._process.said if self._process is not None else ""
        self._receiver.pipe_said(openssh_problems.beside(said).encode())
        if self._silent and (line := openssh_problems.not_opened(self._head, said)):
            self._receiver.pipe_said(f"\n{line}".encode())
        self._receiver.pipe_lost(openssh_problems.why_lost(said) or CLOSED)

    def close(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()
