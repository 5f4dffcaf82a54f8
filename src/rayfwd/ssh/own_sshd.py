"""The head's own end of SSH at a meeting place, where it has no sshd: it leads to the hub only.

Nothing listens for it: it is given connections one by one, which came over the head's own login at
the third host. Who may log in is in the user's authorized_keys, as with sshd: a forced command is
run, `restrict` shuts the way to the socket, and what it cannot check itself (`from=`) lets nobody
in. There is no shell, no forwarding to anything but the hub's socket, no file.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncssh

from rayfwd import codes
from rayfwd.ssh.channel_relay import ChannelRelay
from rayfwd.system.budget import Budget
from rayfwd.system.files import read_regular, replace_file, write_new
from rayfwd.system.users import user_name

KEY_FILE = "ssh_host_ed25519_key"
"""In the state directory; what is to be known of it stands beside it, in `.pub`."""
AUTHORIZED = Path("~/.ssh/authorized_keys")
LOGIN_SECONDS = 60.0
"""For a login; sshd gives 120."""
LAST_WORDS = 1.0
"""Seconds for what a command says on its standard error once its output is at its end: a child of
its may hold that open."""
MOST_LOGINS = 32
"""Connections that have not logged in yet; one more is closed at once."""
LOGINS_AT_ONCE, LOGINS_A_SECOND = 64, 10
"""Connections that may come at once, and then: each costs this process some milliseconds."""
MOST_TRIES = 12
"""Questions whether a key may log in, of one connection: each key may be asked for twice. After six
keys sshd ends a connection (MaxAuthTries)."""
MOST_SESSIONS = 10
"""Of one connection, each of which runs a command; as sshd has it (MaxSessions)."""


class OwnSsh:
    """Answers connections as sshd would. Owns the host key."""

    def __init__(self, directory: Path, hub: Path, authorized: Path = AUTHORIZED) -> None:
        """`directory`: where the host key is kept. Raises ProblemError."""
        self._key = _host_key(directory / KEY_FILE)
        self.hub = hub
        self._authorized = authorized
        self._logging_in = 0
        self._logins = Budget(LOGINS_AT_ONCE, LOGINS_A_SECOND, time.monotonic)
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def public_key(self) -> str:
        """What a worker's file of known hosts is to have: its type and the key."""
        return " ".join(self._key.export_public_key().decode().split()[:2])

    async def connect(self, factory: Callable[[], asyncio.Protocol]) -> None:
        """Join that protocol to a server of ours. Raises OSError."""
        if self._logging_in >= MOST_LOGINS or not self._logins.take():
            raise OSError("too many others are logging in")
        near, far = socket.socketpair()
        task = asyncio.create_task(self._serve(far), name="own ssh")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: far.close())  # also of one that is ended before it begins
        await asyncio.get_running_loop().create_connection(factory, sock=near)

    async def _serve(self, sock: socket.socket) -> None:
        self._logging_in += 1
        try:
            async with asyncio.timeout(LOGIN_SECONDS):
                connection = await asyncssh.run_server(
                    sock,
                    server_factory=lambda: Login(self),
                    server_host_keys=[self._key],
                    encoding=None,
                    allow_scp=False,
                    agent_forwarding=False,
                    x11_forwarding=False,
                    compression_algs=None,
                    gss_host=None,
                )
        except (OSError, asyncssh.Error, TimeoutError):
            return  # whoever it was says so himself
        finally:
            self._logging_in -= 1
        try:
            await connection.wait_closed()
        finally:
            connection.abort()

    def allowed(self, user: str, key: asyncssh.SSHKey) -> Mapping[str, object] | None:
        """The options of that key's line; None: it lets nobody in.

        It is read for each login, and for each session of one: whoever removes a line need end no
        connection.
        """
        file = self._authorized.expanduser()
        if user != user_name(os.geteuid()) or not _ours_alone(file):
            return None
        try:
            text = read_regular(file).decode(errors="replace")
            found = asyncssh.import_authorized_keys(text).validate(key, "", "0.0.0.0")
        except (OSError, ValueError):
            return None
        return None if found is None or _expired(found) else found

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


class Login(asyncssh.SSHServer):
    """One connection."""

    def __init__(self, home: OwnSsh) -> None:
        self._home = home
        self._user = ""
        self._key: asyncssh.SSHKey | None = None
        self._connection: asyncssh.SSHServerConnection | None = None
        self._tries = self._sessions = 0
        self.options: Mapping[str, object] = {}

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn

    def begin_auth(self, username: str) -> bool:
        self._user = username
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        self._tries += 1
        if self._tries > MOST_TRIES:
            if self._connection is not None:
                self._connection.abort()
            return False
        return self._is_allowed(username, key)

    def _is_allowed(self, user: str, key: asyncssh.SSHKey) -> bool:
        found = self._home.allowed(user, key)
        self._key, self.options = key, found or {}
        return found is not None

    def _still_allowed(self) -> bool:
        return self._key is not None and self._is_allowed(self._user, self._key)

    @property
    def command(self) -> list[str]:
        """What a session runs, whatever was asked for."""
        forced = self.options.get("command")
        if isinstance(forced, str):
            return ["/bin/sh", "-c", forced]
        return [sys.executable, "-m", "rayfwd", "attach", "--socket", str(self._home.hub)]

    def session_requested(self) -> Command | bool:
        """False: refused."""
        if self._sessions >= MOST_SESSIONS or not self._still_allowed():
            return False
        self._sessions += 1
        return Command(self.command, self._session_over)

    def _session_over(self) -> None:
        self._sessions -= 1

    def unix_connection_requested(self, dest_path: str) -> bool:
        """True: AsyncSSH connects to it."""
        if not self._still_allowed():
            return False
        shut = "restrict" in self.options and "port-forwarding" not in self.options
        return (
            not (shut or "no-port-forwarding" in self.options) and Path(dest_path) == self._home.hub
        )


class Command(ChannelRelay, asyncssh.SSHServerSession[bytes]):
    """A session: a command, joined to the channel by one socket for its input and output."""

    def __init__(self, command: Sequence[str], on_end: Callable[[], None]) -> None:
        super().__init__(self._start, lambda why: None)
        self._words = command
        self._on_end = on_end
        self._asked = ""
        self._child: asyncio.SubprocessTransport | None = None
        self._complains = True
        """Its standard error is not at its end."""
        self._last_words: asyncio.TimerHandle | None = None

    def exec_requested(self, command: str) -> bool:
        self._asked = command
        return True

    async def _start(self, factory: Callable[[], asyncio.Protocol]) -> None:
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        with far:
            self._child, _ = await loop.subprocess_exec(
                lambda: _Complaints(self),
                *self._words,
                stdin=far.fileno(),
                stdout=far.fileno(),
                env=_environment(self._asked),
            )
        await loop.create_connection(factory, sock=near)

    def over(self) -> None:
        """Its output is at its end. Why it failed may be on its way still."""
        if self._complains and self._last_words is None:
            self._last_words = asyncio.get_running_loop().call_later(LAST_WORDS, super().over)
        elif not self._complains:
            super().over()

    def complained(self, data: bytes) -> None:
        if not self._channel.is_closing():
            self._channel.write_stderr(data)

    def complains_no_more(self) -> None:
        self._complains = False
        if self._last_words is not None:
            self.over()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._on_end()
        if self._last_words is not None:
            self._last_words.cancel()
        if self._child is not None:
            self._child.close()  # kills it where it still runs


class _Complaints(asyncio.SubprocessProtocol):
    """What a command says on its standard error: why it fails."""

    def __init__(self, command: Command) -> None:
        self._command = command

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        del fd
        self._command.complained(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        del fd, exc
        self._command.complains_no_more()


def _environment(asked: str) -> dict[str, str]:
    """As sshd gives it to a forced command; no word on keys, which would be of another login."""
    kept = {name: value for name, value in os.environ.items() if name != "SSH_USER_AUTH"}
    return {**kept, "SSH_ORIGINAL_COMMAND": asked}


def _ours_alone(file: Path) -> bool:
    """Nobody else may write it, or put another in its place; as StrictModes of sshd_config(5)."""
    try:
        found = [os.stat(path) for path in (file, file.parent)]
    except OSError:
        return False
    return all(s.st_uid in {0, os.geteuid()} and not s.st_mode & 0o022 for s in found)


def _expired(options: Mapping[str, object]) -> bool:
    """By `expiry-time` of authorized_keys(5), in UTC here where no zone is given."""
    until = options.get("expiry-time")
    if not isinstance(until, list):
        return False
    now = time.strftime("%Y%m%d%H%M%S", time.gmtime())
    return any(now >= str(text).removesuffix("Z").ljust(14, "0") for text in until)


def _host_key(path: Path) -> asyncssh.SSHKey:
    """Made at the first start. Raises ProblemError."""
    try:
        if path.exists():
            return asyncssh.import_private_key(read_regular(path))
        key = asyncssh.generate_private_key("ssh-ed25519")
        replace_file(path, key.export_private_key())
        public = path.with_name(f"{path.name}.pub")
        write_new(public, key.export_public_key(), 0o644, replace=True)
        return key
    except (OSError, ValueError) as exc:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"{path}: {exc}", "make it readable for this user, or remove it and its .pub"
        ) from exc
