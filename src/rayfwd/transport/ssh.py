"""SSH from the worker to the head: how to connect, how to reach the hub, and what a failure means.

Host keys are always checked. AsyncSSH takes `UserKnownHostsFile none` as "do not check"; here it
means that no host is known.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.system import unixsocket

CONNECT_TIMEOUT = 10.0
"""Seconds for the TCP connection."""
HASTY_EVERY = 0.5
"""Seconds between TCP attempts beside each other while streams wait for a lane. The kernel repeats
a SYN that got lost after 1, 3 and 7 seconds only; a new attempt finds a path that has come back
sooner."""
HASTY_LOGIN = 3.0
"""Seconds for the first login while streams wait: the path may go away again in the middle of it.
Each that takes longer doubles this, up to LOGIN_TIMEOUT, for heads that are slow."""
TURNED_AWAY_EVERY = 5.0
"""Seconds between two looks, while streams wait, at whether sshd turns connections away: each is
one more connection to an sshd that has too many."""
TURNED_AWAY_HASTY = 1.0
"""Seconds that such a look may take."""
LOGIN_TIMEOUT = 20.0
"""Seconds for key exchange and authentication."""
CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
)
"""In order of preference: with AES in the CPU, GCM moves about twice what chacha20 does."""
HOST_KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512", "rsa-sha2-256")
"""In order of preference, where no host key is known yet."""
CHANNEL_WINDOW = 1 << 25
"""Bytes that the server may send ahead on a channel: as many as a lane's own window may grow to, so
that this one bounds nothing. What comes is taken at once."""
USER_KNOWN_HOSTS = Path("~/.ssh/known_hosts")
SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")

TABLE_LIMIT = 1 << 21
"""Bytes of /proc/net/unix on the head that are read; a line is some 70."""
TABLE_PIECE = 1 << 14

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


@dataclass(frozen=True, slots=True)
class _KnownHosts:
    """Where the head's host key is looked for, and under which name."""

    host: str
    port: int = 22
    alias: str | None = None
    """`HostKeyAlias` of the SSH configuration."""
    files: tuple[str, ...] = ()
    """Those that exist and may be read."""
    new: Path | None = USER_KNOWN_HOSTS
    """The one to which a key is to be added; None: `none` or /dev/null is to be it."""
    direct: bool = True
    """False: a jump host or a command dials it."""

    @property
    def trusted(self) -> list[str] | bytes:
        """For AsyncSSH; never None, which would switch the check off."""
        return list(self.files) or b""

    def having_it(self) -> list[str]:
        """The files that know the head, with whatever key."""
        port = self.port if self.port != 22 else None
        return [
            file
            for file in self.files
            if any(asyncssh.match_known_hosts([file], self.alias or self.host, "", port)[:2])
        ]


class SshConnector:
    """Connects to one head as its configuration says."""

    def __init__(self, head: HeadConfig) -> None:
        self._head = head
        self._hasty_login = HASTY_LOGIN
        self._turned_away: Problem | None = None
        self._looked_at = -TURNED_AWAY_EVERY

    async def connect(self, hasty: bool = False) -> asyncssh.SSHClientConnection:
        """An authenticated connection. Raises ProblemError.

        `hasty`: streams wait; see HASTY_EVERY and HASTY_LOGIN.
        """
        known = _KnownHosts(self._head.ssh_target()[1])
        options: asyncssh.SSHClientConnectionOptions | None = None
        try:
            options = await self._options()
            known = _known_hosts(self._head, options)
            # Given as an argument, whatever the options have.
            trusted = known.trusted
            if not hasty or not known.direct:
                return await asyncssh.connect(known.host, options=options, known_hosts=trusted)
            sock = await _first_to_answer(known.host, options)
            return await self._hasty(known.host, options, trusted, sock)
        except (OSError, asyncssh.Error, ValueError, TimeoutError) as exc:
            problem = explain(exc, self._head, known)
            if problem.code == codes.SSH_LOST and options is not None:
                problem = await self._why_lost(known.host, options, hasty) or problem
            raise ProblemError(problem) from exc

    async def place(self) -> tuple[str, int, bool]:
        """Host and port as the SSH configuration has them, and whether they are dialled from here.

        False: a jump host or a command does, which looks the name up as well. Raises ProblemError.
        """
        known = _KnownHosts(self._head.ssh_target()[1])
        try:
            known = _known_hosts(self._head, await self._options())
        except (OSError, asyncssh.Error, ValueError) as exc:
            raise ProblemError(explain(exc, self._head, known)) from exc
        return known.host, known.port, known.direct

    async def login(self) -> str:
        """Whom it logs in as, by `head.ssh` or the SSH configuration. Raises ProblemError."""
        try:
            return (await self._options()).username
        except (OSError, asyncssh.Error, ValueError) as exc:
            raise ProblemError(explain(exc, self._head, _KnownHosts(self._head.ssh))) from exc

    async def host_key(self) -> HostKey:
        """The host key that the head shows now; nothing is sent to it.

        Raises ProblemError where it cannot be reached, or is known with another key.
        """
        known = _KnownHosts(self._head.ssh_target()[1])
        try:
            options = await self._options()
            known = _known_hosts(self._head, options)
            host = known.host
            files = list(known.files)
            trusted = asyncssh.match_known_hosts(files, host, "", options.port)[0] if files else []
            # A key of a type that is known, as the link will ask for it.
            types = [a.decode() for k in trusted for a in k.sig_algorithms] or HOST_KEY_TYPES
            key = await asyncssh.get_server_host_key(
                host, options=options, server_host_key_algs=types
            )
            if key is None:
                raise asyncssh.HostKeyNotVerifiable("the server shows no host key")
            known_here = key.public_data in [k.public_data for k in trusted]
            if trusted and not known_here:
                raise asyncssh.HostKeyNotVerifiable("the host key has changed")
        except (OSError, asyncssh.Error, ValueError, TimeoutError) as exc:
            raise ProblemError(explain(exc, self._head, known)) from exc
        public = " ".join(key.export_public_key().decode().split()[:2])
        return HostKey(host, options.port, public, key.get_fingerprint(), known_here)

    async def _hasty(
        self,
        host: str,
        options: asyncssh.SSHClientConnectionOptions,
        trusted: list[str] | bytes,
        sock: socket.socket,
    ) -> asyncssh.SSHClientConnection:
        """Log in over a connection that stands."""
        within = self._hasty_login
        try:
            # AsyncSSH's connect_timeout goes from the dialling to the end of the login.
            connection = await asyncssh.connect(
                host, options=options, known_hosts=trusted, sock=sock, connect_timeout=within
            )
        except TimeoutError:
            self._hasty_login = max(within, min(2 * within, LOGIN_TIMEOUT))
            raise
        self._hasty_login = max(HASTY_LOGIN, within / 2)
        return connection

    async def _why_lost(
        self, host: str, options: asyncssh.SSHClientConnectionOptions, hasty: bool
    ) -> Problem | None:
        """Whether it is that sshd turns everybody away; looked at seldom while streams wait."""
        now = asyncio.get_running_loop().time()
        if not hasty or now - self._looked_at >= TURNED_AWAY_EVERY:
            within = TURNED_AWAY_HASTY if hasty else CONNECT_TIMEOUT
            self._turned_away = await _turned_away(host, options, self._head, within)
            self._looked_at = now
        return self._turned_away

    async def _options(self) -> asyncssh.SSHClientConnectionOptions:
        user, host, port = self._head.ssh_target()
        # (): the user's own file, which options that are made apart from `connect` leave out.
        given: dict[str, Any] = {"host": host, "config": ()}
        if user is not None:
            given["username"] = user
        if port is not None:
            given["port"] = port
        if self._head.ssh_config is not None:
            given["config"] = [str(self._head.ssh_config.expanduser())]
        if self._head.identity is not None:
            given["client_keys"] = [str(self._head.identity.expanduser())]
        options = await asyncio.to_thread(
            asyncssh.SSHClientConnectionOptions,
            **given,
            connect_timeout=CONNECT_TIMEOUT,
            login_timeout=LOGIN_TIMEOUT,
            password_auth=False,
            kbdint_auth=False,
            compression_algs=None,
        )
        changes: dict[str, Any] = {}
        if not options.config.get("Ciphers"):
            changes["encryption_algs"] = CIPHERS
        if changes:
            options = await asyncio.to_thread(
                asyncssh.SSHClientConnectionOptions, options=options, **changes
            )
        return options

    async def open_channel(
        self, connection: asyncssh.SSHClientConnection, factory: Callable[[], Any]
    ) -> Channel:
        """A channel to the hub, for a session made by `factory`. Raises ProblemError."""
        try:
            if self._head.via == "exec":
                channel, _ = await connection.create_session(
                    factory, self._head.attach_command, encoding=None, window=CHANNEL_WINDOW
                )
                return channel
            unix, _ = await connection.create_unix_connection(
                factory, str(self._head.socket), encoding=None, window=CHANNEL_WINDOW
            )
            return unix
        except asyncssh.ChannelOpenError as exc:
            raise ProblemError(await self._why_no_channel(connection, exc)) from exc
        except (OSError, asyncssh.Error) as exc:
            raise ProblemError(explain(exc, self._head, _KnownHosts(self._head.ssh))) from exc

    async def send_at_once(self, connection: asyncssh.SSHClientConnection) -> None:
        """Have the head's sshd send small packets at once, as it does for a session.

        OpenSSH's server switches Nagle's algorithm off when a session begins and never else
        (`ssh_packet_set_interactive`, called from session.c): on a connection that has forwarded
        channels only, each small answer after another waits for a delayed acknowledgement, 40 ms.
        Whether the command does anything is no matter, so that it fails is none either.
        """
        if self._head.via == "exec":
            return  # the lane is a session
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                channel, _ = await connection.create_session(asyncssh.SSHClientSession, "true")
                channel.close()
        except (asyncssh.Error, OSError, TimeoutError):
            pass

    async def _why_no_channel(
        self, connection: asyncssh.SSHClientConnection, exc: asyncssh.ChannelOpenError
    ) -> Problem:
        if exc.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED or self._head.via == "exec":
            return codes.CHANNEL_REFUSED.problem(
                f"the head's sshd refuses this kind of channel: {exc.reason}",
                'set via = "exec" in [head]'
                if self._head.via == "socket"
                else "allow sessions for this key on the head (MaxSessions, authorized_keys)",
            )
        return await look_at_socket(connection, self._head.socket, exc.reason)


async def _turned_away(
    host: str, options: asyncssh.SSHClientConnectionOptions, head: HeadConfig, within: float
) -> Problem | None:
    """Whether sshd closes connections before it has said what it is; AsyncSSH does not tell.

    OpenSSH does so from MaxStartups on (`drop_connection` in sshd.c), and what bars addresses too.
    """
    if options.tunnel or options.proxy_command:
        return None
    writer = None
    try:
        async with asyncio.timeout(within):
            reader, writer = await asyncio.open_connection(host, options.port)
            try:
                said = await reader.read(256)
            except ConnectionResetError:
                said = b""
    except (OSError, TimeoutError):
        return None
    finally:
        if writer is not None:
            writer.transport.abort()
    if said.startswith(b"SSH-"):
        return None
    words = said.decode(errors="replace").strip()
    return codes.SSH_TURNED_AWAY.problem(
        f"the sshd of {head.ssh} closes connections at once: {words or 'it says nothing'}",
        "raise MaxStartups in the head's sshd_config (too many logins are under way), and see "
        "whether something there bars this machine (fail2ban, hosts.deny); it is tried again",
    )


async def _first_to_answer(
    host: str, options: asyncssh.SSHClientConnectionOptions
) -> socket.socket:
    """The first TCP connection to stand, of attempts that begin one after another.

    Raises OSError when every attempt has failed, TimeoutError when there was no answer.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(
        host, options.port, family=options.family, type=socket.SOCK_STREAM
    )
    attempts: set[asyncio.Task[socket.socket]] = set()
    failure: BaseException | None = None
    number = 0
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            while attempts or failure is None or number < len(found):
                family, _, _, _, address = found[number % len(found)]
                number += 1
                attempt = _dial(family, address, options.local_addr)
                attempts.add(asyncio.create_task(attempt, name=f"dial {host}"))
                next_at = loop.time() + HASTY_EVERY
                while attempts and (left := next_at - loop.time()) > 0:
                    ready, attempts = await asyncio.wait(
                        attempts, timeout=left, return_when=asyncio.FIRST_COMPLETED
                    )
                    standing = [task.result() for task in ready if task.exception() is None]
                    for late in standing[1:]:
                        late.close()
                    if standing:
                        return standing[0]
                    failure = next((task.exception() for task in ready), failure)
                    if ready and number < len(found):
                        break  # there is another address
        assert failure is not None, "no attempt is left, so one has failed"
        raise failure
    finally:
        for task in attempts:
            task.cancel()
            task.add_done_callback(_close_late)


def _close_late(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


async def _dial(family: int, address: Any, local: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if local is not None:
            sock.bind(local)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _known_hosts(head: HeadConfig, options: asyncssh.SSHClientConnectionOptions) -> _KnownHosts:
    """The files of host keys: the configured one, or those that ssh would read."""
    named = options.config.get("UserKnownHostsFile")
    if head.known_hosts is not None:
        own, paths = head.known_hosts, [head.known_hosts]
    else:
        names = named if isinstance(named, list) else [USER_KNOWN_HOSTS]
        paths = [*(Path(str(name)) for name in names), SYSTEM_KNOWN_HOSTS]
        own = paths[0] if names else Path(os.devnull)
    expanded = [path.expanduser() for path in paths]
    there = [str(path) for path in expanded if path.is_file() and os.access(path, os.R_OK)]
    return _KnownHosts(
        host=options.host or head.ssh_target()[1],
        port=options.port,
        alias=options.host_key_alias,
        files=tuple(there),
        new=own if str(own) != os.devnull else None,
        direct=not (options.tunnel or options.proxy_command),
    )


async def look_at_socket(
    connection: asyncssh.SSHClientConnection, path: Path, reason: str
) -> Problem:
    """Why sshd did not open the hub's socket: sshd does not say, SFTP's view of the head does.

    OpenSSH answers "open failed" as well where it forbids such channels: a reason is given for
    direct-tcpip only (`server_input_channel_open` in serverloop.c). So where the kernel there says
    that somebody listens, and this user may, it is sshd that will not.
    """
    absent = codes.HUB_ABSENT.problem(
        f"nothing answers at {path} on the head",
        "start rayfwd on the head, or set head.socket to the path that `rayfwd check` prints there",
    )
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT), connection.start_sftp_client() as sftp:
            own = (await sftp.stat(".")).uid
            seen = await sftp.stat(str(path))
            real = Path(str(await sftp.realpath(str(path))))
            table = await _read_table(sftp)
    except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath):
        return absent
    except asyncssh.SFTPPermissionDenied:
        return _not_permitted(path, "its directory is closed to this user")
    except (asyncssh.Error, OSError, TimeoutError):
        return codes.HUB_UNREACHABLE.problem(
            f"the head's sshd could not open {path}: {reason}",
            "see that rayfwd runs on the head, that this is its hub's socket, that this user "
            "may open it (hub.users), and that sshd allows it (AllowStreamLocalForwarding)",
        )
    mode = seen.permissions or 0
    if own not in {0, seen.uid} and not mode & 0o002:
        return _not_permitted(path, f"it belongs to uid {seen.uid} with mode {mode & 0o777:04o}")
    if unixsocket.listens(table, path) or unixsocket.listens(table, real):
        return codes.CHANNEL_REFUSED.problem(
            f"the head's sshd refuses this kind of channel: rayfwd listens at {path} there, and "
            f"sshd says: {reason}",
            'set via = "exec" in [head]; or allow it on the head: AllowStreamLocalForwarding and '
            "DisableForwarding in sshd_config, `restrict` and `no-port-forwarding` in "
            "authorized_keys",
        )
    return absent


async def _read_table(sftp: asyncssh.SFTPClient) -> str:
    """The head's Unix sockets; nothing where they are not to be seen."""
    found = b""
    try:
        async with sftp.open("/proc/net/unix", "rb", encoding=None) as file:
            # Chunk by chunk: its size is told as 0.
            while len(found) < TABLE_LIMIT and (data := await file.read(TABLE_PIECE, len(found))):
                found += data  # type: ignore[operator]  # bytes, as no encoding is asked for
    except asyncssh.SFTPError:
        pass
    return found.decode(errors="replace")


def _not_permitted(path: Path, why: str) -> Problem:
    return codes.HUB_NOT_PERMITTED.problem(
        f"this SSH user may not open {path} on the head: {why}",
        "add the user to hub.users in the head's file, or log in as the user that runs rayfwd",
    )


def why_no_answer(said: str, why: str) -> Problem:
    """Why a channel to the hub ended before the hub had answered.

    `said` is what `rayfwd attach` wrote on standard error, `why` what is known otherwise.
    """
    for line in said.splitlines():
        prefix, _, rest = line.partition("rayfwd attach: ")
        code, colon, text = rest.partition(": ")
        if not prefix and colon and code.isidentifier():
            cause, _, remedy = text.partition("; ")
            return codes.named(code).problem(
                f"on the head: {cause}", remedy or "see the head's log"
            )
    return codes.HUB_CLOSED.problem(
        f"the hub closed the lane before it answered: {said or why}",
        'see rayfwd\'s log on the head; with via = "exec", that `rayfwd` is found there',
    )


def explain(exc: Exception, head: HeadConfig, known: _KnownHosts) -> Problem:
    """The problem behind an exception of `asyncssh.connect`."""
    match exc:
        case asyncssh.HostKeyNotVerifiable():
            return _host_key(head, known)
        case asyncssh.KeyExchangeFailed() if "host key" in str(exc).lower():
            return _host_key(head, known)
        case asyncssh.PermissionDenied():
            return codes.SSH_AUTH_REFUSED.problem(
                f"{head.ssh} refuses this machine's SSH keys ({exc.reason})",
                "add the public key to authorized_keys of that user on the head, or set "
                "head.identity to the key that is there",
            )
        case asyncssh.KeyImportError() | asyncssh.KeyEncryptionError():
            return codes.SSH_KEY_UNUSABLE.problem(
                f"the private key cannot be read: {exc}",
                "set head.identity to a private key without a passphrase (`ssh-keygen -p -f KEY` "
                "takes it away); or leave head.identity out, and load the key into an agent whose "
                "SSH_AUTH_SOCK the daemon has",
            )
        case asyncssh.ConfigParseError():
            return codes.SSH_CONFIG_INVALID.problem(str(exc), "correct the SSH configuration")
        case asyncssh.DisconnectError():
            return codes.SSH_LOST.problem(
                f"the SSH connection to {head.ssh} ended: {exc.reason or type(exc).__name__}",
                "nothing, if it comes back; else see the head's sshd log (MaxStartups, firewall)",
            )
        case socket.gaierror():
            return codes.SSH_UNREACHABLE.problem(
                f"the name {known.host} cannot be resolved: {exc.strerror}",
                "correct head.ssh, or this machine's DNS",
            )
        case FileNotFoundError() | PermissionError() if exc.filename:
            return codes.SSH_FILE_UNREADABLE.problem(
                f"{exc.filename}: {exc.strerror}",
                "correct head.identity or head.ssh_config, or the file's owner and mode",
            )
        case ConnectionRefusedError():
            return codes.SSH_UNREACHABLE.problem(
                f"nothing listens on the SSH port of {head.ssh}",
                "see that sshd runs on the head and that the port in head.ssh is right",
            )
        case TimeoutError():
            return codes.SSH_UNREACHABLE.problem(
                f"{head.ssh} did not answer in time",
                "see that the head is up and that firewalls let SSH through",
            )
        case OSError():
            return codes.SSH_UNREACHABLE.problem(
                f"{head.ssh}: {exc.strerror or exc}",
                "see that this machine's network is up and that head.ssh is right",
            )
        case _:
            return codes.SSH_FAILED.problem(
                f"{head.ssh}: {exc}", "see `ssh -v` from this machine to the head"
            )


def _host_key(head: HeadConfig, known: _KnownHosts) -> Problem:
    """What is wrong with the host key that the head showed, and was not taken."""
    by_init = "`rayfwd init worker --fingerprint SHA256:…`, where `rayfwd init` has made that file"
    if having_it := known.having_it():
        name = known.alias or known.host
        if known.port != 22 and known.alias is None:
            name = f"[{name}]:{known.port}"
        removed = " and ".join(
            f"`ssh-keygen -R {shlex.quote(name)} -f {shlex.quote(file)}`" for file in having_it
        )
        return codes.HOST_KEY_MISMATCH.problem(
            f"{known.host} shows another host key than {', '.join(having_it)} has",
            "compare the new key with the head's owner; if the head was reinstalled, "
            f"{removed} and add the new one, or {by_init}; if not, somebody is in between",
        )
    where = ", ".join(known.files)
    if not known.files:
        looked = head.known_hosts or "any file of known hosts"
        where = f"{looked}: there is none that this user may read"
    return codes.HOST_KEY_UNKNOWN.problem(
        f"the host key of {known.host} is not in {where}",
        f"compare its fingerprint with the head's owner and add it: {_add_key(head, known)}; or "
        f"{by_init}",
    )


def _add_key(head: HeadConfig, known: _KnownHosts) -> str:
    """How an unknown host key gets to where it is looked for."""
    file = str(known.new or USER_KNOWN_HOSTS)
    also = "" if known.new else f", and set head.known_hosts to {file}"
    if known.direct and known.alias is None:
        # The home directory is the shell's to find.
        to = file if file.startswith("~/") else shlex.quote(file)
        return f"`ssh-keyscan -p {known.port} {known.host} >> {to}`{also}"
    # Through a jump host, or under another name: ssh itself knows how, and asks.
    user, host, port = head.ssh_target()
    words = ["ssh", "-o", f"UserKnownHostsFile={file}"]
    words += ["-F", str(head.ssh_config.expanduser())] if head.ssh_config is not None else []
    words += ["-p", str(port)] if port is not None else []
    words.append(f"{user}@{host}" if user is not None else host)
    return f"`{shlex.join(words)}`, once{also}"
