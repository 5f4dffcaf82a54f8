"""What AsyncSSH raised, as the problem that it is: at which hop, and what to do.

Where sshd has not opened the hub's socket, it also looks there for the reason, over the same
connection.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import asyncssh
from asyncssh.gss import gss_available

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Problem
from rayfwd.session.preamble import MARKER
from rayfwd.ssh import channel_problems, credentials, hop_problems
from rayfwd.ssh.algorithms import HOST_KEYS, missing_in
from rayfwd.ssh.dial import CONNECT_TIMEOUT, Attempt, BarredError
from rayfwd.ssh.hops import Hop
from rayfwd.ssh.meeting_socket import NoSftpError
from rayfwd.system import unixsocket
from rayfwd.transport.hubanswer import password_expired

OUTDATED_HOST_KEYS = {"ssh-rsa", "ssh-dss"}
"""Algorithms of host keys (with SHA-1) that neither AsyncSSH nor `ssh` takes unless told to."""
TABLE_LIMIT = 1 << 21
"""Bytes of /proc/net/unix on the head that are read; a line is some 70."""
TABLE_PIECE = 1 << 14
"""Bytes that are asked for at once."""


def explain(exc: Exception, head: HeadConfig, hop: Hop, attempt: Attempt) -> Problem:
    """The problem behind an exception that ended an attempt at a hop."""
    return _of_login(exc, head, hop, attempt) or _of_connection(exc, head, hop, attempt)


def with_passed_over(problem: Problem, hop: Hop) -> Problem:
    """What of the SSH configuration had no effect may be what is wrong."""
    if not hop.passed_over or not hop.to.takes_transport:
        return problem
    names = ", ".join(hop.passed_over)
    return problem.code.problem(
        problem.cause,
        f"{problem.remedy}; {names} of the SSH configuration has no effect on AsyncSSH: if that is "
        f"what is missing, set {hop.to.set_to('transport', 'openssh')}",
    )


def explain_files(exc: Exception, head: HeadConfig) -> Problem:
    """The problem behind an exception met before anything was dialled."""
    to = head.destination
    match exc:
        case asyncssh.KeyImportError() | asyncssh.KeyEncryptionError():
            return hop_problems.key_unusable(exc, to, head.identity)
        case asyncssh.ConfigParseError():
            remedy = "correct the SSH configuration"
            if head.ssh_config is None:
                named = to.key("ssh_config")
                remedy += f", or set {named} to a file of your own, which is then the only one "
                remedy += "that is read"
            if to.takes_transport:
                remedy += f"; or set {to.set_to('transport', 'openssh')}"
                remedy += " if the system's ssh can read it"
            return codes.SSH_CONFIG_INVALID.problem(str(exc), remedy)
        case FileNotFoundError() | PermissionError() if exc.filename:
            return codes.SSH_FILE_UNREADABLE.problem(
                f"{exc.filename}: {exc.strerror}",
                f"correct {to.key('identity')} or {to.key('ssh_config')}, or the owner and mode of "
                "that file",
            )
        case _:
            return _unknown(exc, head.ssh)


def _unknown(exc: Exception, called: str) -> Problem:
    return codes.SSH_FAILED.problem(
        f"{called}: {exc}",
        "run `ssh -v` on this machine, as the user that runs rayfwd, to see more",
    )


def _of_login(exc: Exception, head: HeadConfig, hop: Hop, attempt: Attempt) -> Problem | None:
    """Where the server has answered."""
    dialled = _dialled(attempt)
    match exc:
        case asyncssh.HostKeyNotVerifiable() if "ertificate " in str(exc):
            return hop_problems.certificate_invalid(
                exc.reason.partition(" for host ")[0], hop, dialled
            )
        case asyncssh.HostKeyNotVerifiable():
            return hop_problems.host_key_problem(head, hop, "revoked" in str(exc), dialled)
        case asyncssh.PermissionDenied() if attempt.watch.not_signed:
            return credentials.not_signed(*attempt.watch.not_signed, hop, dialled)
        case asyncssh.PermissionDenied() if attempt.wants_more:
            return hop_problems.second_factor(hop, dialled)
        case asyncssh.PermissionDenied() if credentials.TICKETS in attempt.watch.accepted and not (
            credentials.KEYS in attempt.watch.accepted and hop_problems.has_key(hop)
        ):
            return _ticket_of_asyncssh(hop, dialled)
        case asyncssh.PermissionDenied() if attempt.watch.signed:
            return credentials.signature_refused(attempt.watch.signed, hop, dialled)
        case asyncssh.PermissionDenied():
            return hop_problems.keys_refused(exc.reason, hop, dialled)
        case asyncssh.DisconnectError() if "too many authentication" in str(exc).lower():
            return hop_problems.too_many_keys(exc.reason, hop, dialled)
        case asyncssh.KeyImportError() | asyncssh.KeyEncryptionError():
            return hop_problems.key_unusable(exc, hop.to)
        case _:
            return None


def _ticket_of_asyncssh(hop: Hop, dialled: str) -> Problem:
    if gss_available:
        return credentials.ticket_unusable("", hop, dialled)
    remedy = "add this machine's public key there"
    if hop.to.takes_transport:
        remedy = f"set {hop.to.set_to('transport', 'openssh')}, and get a ticket with `kinit` as "
        remedy += "the user that runs rayfwd"
    return credentials.tickets_not_tried(hop, dialled, "AsyncSSH", remedy)


def _dialled(attempt: Attempt) -> str:
    """Where the attempt went, in brackets."""
    return f" (dialled {', '.join(attempt.dialled)})" if attempt.dialled else ""


def _of_connection(exc: Exception, head: HeadConfig, hop: Hop, attempt: Attempt) -> Problem:
    """Where no login was tried, or the connection ended under it."""
    dialled = _dialled(attempt)
    words = attempt.words.decode(errors="replace").strip()
    if hop.direct_command and not attempt.is_ssh:
        return hop_problems.command_ended(
            hop, attempt.said_by_command or _why_command_ended(exc, words)
        )
    match exc:
        case NoSftpError():
            return hop_problems.no_sftp(str(exc), hop)
        case asyncssh.ChannelOpenError():
            if hop.meet is not None:
                return hop_problems.nobody_waits(exc.reason, hop)
            if exc.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED:
                return hop_problems.jump_forbids(exc.reason, hop)
            return hop_problems.jump_cannot(exc.reason, hop)
        case asyncssh.DisconnectError() | ConnectionError() if (
            attempt.connected and not attempt.is_ssh
        ):
            return hop_problems.turned_away(words, hop, dialled)
        case asyncssh.DisconnectError() | ConnectionError() if (
            attempt.is_ssh
            and not attempt.has_keys
            and (missing := missing_in(attempt.watch.offered, hop.options, hop.known.key_types()))
        ):
            if missing.what == HOST_KEYS and not set(missing.theirs) <= OUTDATED_HOST_KEYS:
                return hop_problems.host_key_problem(head, hop, dialled=dialled)
            return hop_problems.nothing_in_common(missing.what, missing.theirs, hop, dialled)
        case asyncssh.DisconnectError() | ConnectionError() if attempt.connected:
            why = str(exc) or type(exc).__name__
            return hop_problems.ended(why, hop, dialled, in_login=attempt.has_keys)
        case socket.gaierror():
            return hop_problems.unresolved(str(exc.strerror), hop)
        case TimeoutError() if attempt.resolving:
            return hop_problems.resolver_silent(CONNECT_TIMEOUT, hop)
        case TimeoutError() if attempt.watch.signing:
            return credentials.signature_awaited(attempt.watch.signing, attempt.login, hop, dialled)
        case TimeoutError() if attempt.connected and attempt.has_keys:
            return hop_problems.login_slow(attempt.login, hop, dialled)
        case TimeoutError() if attempt.connected and attempt.is_ssh:
            return hop_problems.no_key_exchange(attempt.login, hop, dialled)
        case TimeoutError() if attempt.connected and words:
            return hop_problems.no_ssh(words, hop, dialled)
        case TimeoutError() if attempt.connected:
            return hop_problems.says_nothing(hop, dialled)
        case TimeoutError() if hop.before:
            return hop_problems.jump_silent(hop)
        case TimeoutError():
            return hop_problems.no_answer(hop, dialled)
        case ConnectionRefusedError():
            return hop_problems.not_listening(hop, dialled)
        case BarredError():
            return hop_problems.barred(str(exc), hop, dialled)
        case OSError():
            return hop_problems.no_way(_of_the_kernel(exc), hop, dialled)
        case _:
            return _unknown(exc, hop.called)


def _of_the_kernel(exc: OSError) -> str:
    """What it says, where asyncio has a text of its own in that place."""
    if exc.errno and str(exc.strerror).startswith("Connect call failed"):
        return os.strerror(exc.errno)
    return str(exc.strerror or exc)


def _why_command_ended(exc: Exception, words: str) -> str:
    if words:
        return f"what answers says {words!r}"
    return "none in time" if isinstance(exc, TimeoutError) else "it ended without a word"


async def look_at_socket(
    connection: asyncssh.SSHClientConnection, head: HeadConfig, reason: str
) -> Problem:
    """Why sshd did not open the hub's socket: sshd does not say, SFTP's view of the head does.

    OpenSSH answers "open failed" as well where it forbids such channels: a reason is given for
    direct-tcpip only (`server_input_channel_open` in serverloop.c). So where the kernel there says
    that somebody listens, and this user may, it is sshd that will not.
    """
    to, path = head.destination, head.socket
    ran = await _ran(connection)
    if ran is not None and ran.by_attach:
        return channel_problems.attach_forced(to)
    absent = channel_problems.hub_absent(path, to)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT), connection.start_sftp_client() as sftp:
            own = (await sftp.stat(".")).uid
            seen = await sftp.stat(str(path))
            real = Path(str(await sftp.realpath(str(path))))
            table = await _read_table(sftp)
    except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath):
        return absent
    except asyncssh.SFTPPermissionDenied:
        return channel_problems.not_permitted(path, "this user may not enter its directory", to)
    except (asyncssh.Error, OSError, TimeoutError):
        said = "" if ran is None else ran.stderr
        return password_expired(said, to) or channel_problems.socket_unreachable(path, reason, to)
    mode = seen.permissions or 0
    if own not in {0, seen.uid} and not mode & 0o002:
        whose = f"it belongs to uid {seen.uid} with mode {mode & 0o777:04o}"
        return channel_problems.not_permitted(path, whose, to)
    if unixsocket.listens(table, path) or unixsocket.listens(table, real):
        return codes.CHANNEL_REFUSED.problem(
            f"{to.name}'s sshd refuses this kind of channel: rayfwd listens at {path} there, but "
            f"sshd says: {reason}",
            f"set {to.set_to('via', 'exec')}; or {channel_problems.forwarding_allowed(to)}",
        )
    return absent


@dataclass(frozen=True, slots=True)
class _Ran:
    """What came of a command that does nothing."""

    stdout: bytes
    stderr: str

    @property
    def by_attach(self) -> bool:
        """`rayfwd attach` ran in its place. To SFTP it would listen, and the hub would wait for a
        hello that never comes."""
        return MARKER in self.stdout or "rayfwd attach: " in self.stderr


async def _ran(connection: asyncssh.SSHClientConnection) -> _Ran | None:
    """None: there was no session, or it did not end."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            ran = await connection.run(
                "true", stdin=asyncssh.DEVNULL, request_pty=False, encoding=None
            )
    except (asyncssh.Error, OSError, TimeoutError):
        return None
    stdout, stderr = ran.stdout or b"", ran.stderr or b""
    assert isinstance(stdout, bytes), "no encoding was asked for"
    assert isinstance(stderr, bytes), "no encoding was asked for"
    return _Ran(stdout, stderr.decode(errors="replace"))


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
