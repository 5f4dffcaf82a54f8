"""What a failure of SSH means: at which hop, what was seen there, and what to do about it."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import asyncssh
from asyncssh.gss import gss_available

from rayfwd import codes
from rayfwd.config import HEAD, Destination, HeadConfig
from rayfwd.problems import Problem
from rayfwd.session.preamble import MARKER
from rayfwd.system import setting, unixsocket
from rayfwd.system.files import read_regular
from rayfwd.transport import credentials
from rayfwd.transport.algorithms import HOST_KEYS, missing_in
from rayfwd.transport.dial import CONNECT_TIMEOUT, Attempt, BarredError
from rayfwd.transport.hops import Hop
from rayfwd.transport.hubanswer import limited, password_expired, start_or_name_socket
from rayfwd.transport.knownhosts import USER_FILES, KnownHosts
from rayfwd.transport.looked_there import Look
from rayfwd.transport.places import NoSftpError


class Server(Protocol):
    """An SSH server of the way, whoever dials it."""

    @property
    def written(self) -> str: ...
    @property
    def known(self) -> KnownHosts: ...
    @property
    def user(self) -> str: ...
    @property
    def is_head(self) -> bool: ...
    @property
    def direct(self) -> bool: ...
    @property
    def called(self) -> str: ...
    @property
    def before(self) -> str: ...
    @property
    def meet(self) -> str | None: ...
    @property
    def meets(self) -> bool: ...
    @property
    def to(self) -> Destination: ...
    @property
    def keys(self) -> tuple[Path, ...]: ...
    @property
    def agent_socket(self) -> str: ...


TABLE_LIMIT = 1 << 21
"""Bytes of /proc/net/unix on the head that are read; a line is some 70."""
TABLE_PIECE = 1 << 14
OUTDATED_HOST_KEYS = {"ssh-rsa", "ssh-dss"}
"""Algorithms of host keys (with SHA-1) that neither AsyncSSH nor `ssh` takes unless told to."""
USER_CERTIFICATE = 1
"""The kind of a certificate that is a user's (SSH_CERT_TYPE_USER in PROTOCOL.certkeys)."""
_OTHERS = re.compile(r"HTTP/|220[ -]|\+OK|\* OK|RFB |<|\x15\x03|\x16\x03")
"""How servers of other protocols begin: the web, mail, FTP, VNC, TLS."""


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
            return key_unusable(exc, to, head.identity)
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


def key_unusable(exc: Exception | str, to: Destination, file: Path | None = None) -> Problem:
    """`file`: the one that is named by the configuration, if one is."""
    key = to.key("identity")
    which = "the private key" if file is None else f"the private key {file}"
    if "permissions" in str(exc):
        return codes.SSH_KEY_UNUSABLE.problem(
            f"{which} is not used: {exc}",
            "run `chmod 600` on that file: `ssh` uses no key that others may read",
        )
    return codes.SSH_KEY_UNUSABLE.problem(
        f"{which} cannot be read: {exc}",
        f"set {key} to a private key without a passphrase (`ssh-keygen -p -f KEY` removes it); or "
        f"remove {key}, and load the key into an agent whose SSH_AUTH_SOCK is in the daemon's "
        "environment",
    )


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
            return certificate_invalid(exc.reason.partition(" for host ")[0], hop, dialled)
        case asyncssh.HostKeyNotVerifiable():
            return host_key_problem(head, hop, "revoked" in str(exc), dialled)
        case asyncssh.PermissionDenied() if attempt.not_signed:
            return credentials.not_signed(*attempt.not_signed, hop, dialled)
        case asyncssh.PermissionDenied() if attempt.wants_more:
            return second_factor(hop, dialled)
        case asyncssh.PermissionDenied() if credentials.TICKETS in attempt.accepted and not (
            credentials.KEYS in attempt.accepted and has_key(hop)
        ):
            return _ticket_of_asyncssh(hop, dialled)
        case asyncssh.PermissionDenied() if attempt.signed:
            return credentials.signature_refused(attempt.signed, hop, dialled)
        case asyncssh.PermissionDenied():
            return keys_refused(exc.reason, hop, dialled)
        case asyncssh.DisconnectError() if "too many authentication" in str(exc).lower():
            return too_many_keys(exc.reason, hop, dialled)
        case asyncssh.KeyImportError() | asyncssh.KeyEncryptionError():
            return key_unusable(exc, hop.to)
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


def _where(hop: Server) -> str:
    return f"on {_its(hop)}"


def _its(hop: Server) -> str:
    """Whose machine it is."""
    return hop.to.name if hop.is_head else hop.called


def second_factor(hop: Server, dialled: str) -> Problem:
    """A key was accepted, and was not enough."""
    by_hand = (
        f"; or set {hop.to.set_to('transport', 'openssh')} and log in once by hand as a "
        "ControlMaster, whose connection is used (docs/ways.md)"
    )
    return codes.SSH_SECOND_FACTOR.problem(
        f"{hop.called} accepted this machine's key{dialled}, but wants a second factor as well "
        "(a one-time code or a password), which a daemon cannot give",
        f"let this key log in alone {_where(hop)}: in its sshd_config, `Match User {hop.user}` "
        "with `AuthenticationMethods publickey`, and restrict the key in authorized_keys "
        f"(docs/security.md){by_hand if hop.to.takes_transport else ''}",
    )


def keys_refused(reason: str, hop: Server, dialled: str) -> Problem:
    """No key was accepted. sshd never says why: its log does."""
    named = (
        f"set {hop.to.key('identity')} to a key that is already there"
        if hop.is_head
        else "set IdentityFile of that host in the SSH configuration to a key that is already there"
    )
    refused = f"{hop.called} refuses this machine's SSH keys{dialled}: {reason}"
    if locked := _with_passphrase(hop.keys):
        return codes.SSH_AUTH_REFUSED.problem(
            f"{refused}; {locked} has a passphrase, and was not offered",
            f"run `ssh-add {locked}` for an agent whose SSH_AUTH_SOCK the daemon has; or "
            f"{named}, without a passphrase",
        )
    if hop.keys and not hop.agent_socket and not any(map(_is_there, hop.keys)):
        return codes.SSH_AUTH_REFUSED.problem(
            f"{hop.called} wants an SSH key{dialled}, and this machine has none to offer: there is "
            f"no agent, and no {', '.join(map(str, hop.keys))}",
            f"as the user that runs rayfwd, make one (`ssh-keygen -t ed25519`), and add its public "
            f"half to authorized_keys of {hop.user} {_where(hop)}; or {named}",
        )
    if expired := _out_of_date(hop.keys):
        return codes.SSH_AUTH_REFUSED.problem(
            f"{refused}; {expired} at {_now()}, as this machine's clock has it",
            f"make a new certificate (`ssh-keygen -s CA -I NAME -n {hop.user} KEY.pub`), "
            "and check the clocks of both machines",
        )
    return codes.SSH_AUTH_REFUSED.problem(
        refused,
        f"add the public key to authorized_keys of {hop.user} {_where(hop)}, or {named}; if it is "
        "there, the sshd log there says what is wrong: that file or a directory above it may be "
        "writable for others (StrictModes), the account is locked or not allowed (AllowUsers, "
        "DenyUsers, PermitRootLogin), its login shell does not exist, or `from=` or `expiry-time=` "
        "stands before the key",
    )


def has_key(hop: Server) -> bool:
    """There is one that could be offered, or an agent that may have some."""
    return bool(hop.agent_socket) or any(map(_is_there, hop.keys))


def _with_passphrase(keys: Sequence[Path]) -> Path | None:
    """The first of these files that cannot be read for want of one."""
    for path in keys:
        try:
            asyncssh.import_private_key(read_regular(path.expanduser()))
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as exc:
            if "assphrase" in str(exc):
                return path
        except OSError:
            continue
    return None


def _is_there(path: Path) -> bool:
    return os.path.lexists(path.expanduser())


def _out_of_date(keys: Sequence[Path]) -> str:
    """Which certificate of these keys does not hold now, in words."""
    for key in keys:
        for path in (key.expanduser(), key.expanduser().with_name(f"{key.name}-cert.pub")):
            try:
                certificate = asyncssh.import_certificate(read_regular(path))
            except (OSError, asyncssh.KeyImportError):
                continue
            try:
                certificate.validate(USER_CERTIFICATE, None)  # type: ignore[attr-defined]
            except (AttributeError, ValueError) as exc:
                why = str(exc).removeprefix("Certificate ")
                return f"the certificate {path} is {why}"
    return ""


def too_many_keys(reason: str, hop: Server, dialled: str) -> Problem:
    """The server ended before all keys were tried."""
    return codes.SSH_AUTH_REFUSED.problem(
        f"{hop.called} refused several of this machine's keys{dialled}, and ended the connection "
        f"before all were tried: {reason}",
        f"set {hop.to.key('identity')} to the one key that the server accepts; or set "
        "`IdentitiesOnly yes` with IdentityFile in the SSH configuration, so that an agent's other "
        "keys are not tried",
    )


def _of_connection(exc: Exception, head: HeadConfig, hop: Hop, attempt: Attempt) -> Problem:
    """Where no login was tried, or the connection ended under it."""
    dialled = _dialled(attempt)
    words = attempt.words.decode(errors="replace").strip()
    if hop.direct_command and not attempt.is_ssh:
        return command_ended(hop, attempt.said_by_command or _why_command_ended(exc, words))
    match exc:
        case NoSftpError():
            return no_sftp(str(exc), hop)
        case asyncssh.ChannelOpenError():
            if hop.meet is not None:
                return nobody_waits(exc.reason, hop)
            if exc.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED:
                return jump_forbids(exc.reason, hop)
            return jump_cannot(exc.reason, hop)
        case asyncssh.DisconnectError() | ConnectionError() if (
            attempt.connected and not attempt.is_ssh
        ):
            return turned_away(words, hop, dialled)
        case asyncssh.DisconnectError() | ConnectionError() if (
            attempt.is_ssh
            and not attempt.has_keys
            and (missing := missing_in(attempt.offered, hop.options, hop.known.key_types()))
        ):
            if missing.what == HOST_KEYS and not set(missing.theirs) <= OUTDATED_HOST_KEYS:
                return host_key_problem(head, hop, dialled=dialled)
            return nothing_in_common(missing.what, missing.theirs, hop, dialled)
        case asyncssh.DisconnectError() | ConnectionError() if attempt.connected:
            why = str(exc) or type(exc).__name__
            return ended(why, hop, dialled, in_login=attempt.has_keys)
        case socket.gaierror():
            return unresolved(str(exc.strerror), hop)
        case TimeoutError() if attempt.resolving:
            return resolver_silent(CONNECT_TIMEOUT, hop)
        case TimeoutError() if attempt.signing:
            return credentials.signature_awaited(attempt.signing, attempt.login, hop, dialled)
        case TimeoutError() if attempt.connected and attempt.has_keys:
            return login_slow(attempt.login, hop, dialled)
        case TimeoutError() if attempt.connected and attempt.is_ssh:
            return no_key_exchange(attempt.login, hop, dialled)
        case TimeoutError() if attempt.connected and words:
            return no_ssh(words, hop, dialled)
        case TimeoutError() if attempt.connected:
            return says_nothing(hop, dialled)
        case TimeoutError() if hop.before:
            return jump_silent(hop)
        case TimeoutError():
            return no_answer(hop, dialled)
        case ConnectionRefusedError():
            return not_listening(hop, dialled)
        case BarredError():
            return barred(str(exc), hop, dialled)
        case OSError():
            return no_way(str(exc.strerror or exc), hop, dialled)
        case _:
            return _unknown(exc, hop.called)


def ended(why: str, hop: Server, dialled: str, in_login: bool) -> Problem:
    """The connection did; `in_login`: when it was secret already, and the user's turn came."""
    if in_login:
        return codes.SSH_LOST.problem(
            f"the SSH connection to {hop.called}{dialled} ended in the middle of the login of "
            f"{hop.user}: {why}",
            f"nothing, if it comes back; otherwise check the sshd log of {_its(hop)}: the account "
            "may be shut there for now (expired, /run/nologin while it boots or stops, PAM)",
        )
    return codes.SSH_LOST.problem(
        f"the SSH connection to {hop.called}{dialled} ended: {why}",
        f"nothing if it comes back; otherwise read the sshd log of {_its(hop)} "
        "(MaxStartups, firewall)",
    )


def unresolved(why: str, hop: Server) -> Problem:
    """Its name has no address."""
    name = hop.to.key("ssh") if hop.is_head else "its name in the SSH configuration"
    return codes.SSH_UNREACHABLE.problem(
        f"the name {hop.known.host} of {hop.called} cannot be resolved: {why}",
        f"correct {name}, or this machine's DNS",
    )


def resolver_silent(seconds: float, hop: Server) -> Problem:
    """Nothing was dialled yet: nobody says what address its name has."""
    return codes.SSH_UNREACHABLE.problem(
        f"this machine's resolver has no answer for the name {hop.known.host} of {hop.called} in "
        f"{seconds:.0f} s",
        "check this machine's DNS (`getent hosts NAME`; a server in /etc/resolv.conf that does not "
        "answer), or put the name into /etc/hosts here",
    )


def login_slow(seconds: float, hop: Server, dialled: str) -> Problem:
    """It is SSH, and the login took longer than this."""
    return codes.SSH_LOGIN_TIMEOUT.problem(
        f"{hop.called} answers as SSH{dialled}, but the login does not finish within "
        f"{seconds:.0f} s",
        f"check what sshd waits for on {_its(hop)} (UseDNS, PAM, LDAP, load)",
    )


def no_key_exchange(seconds: float, hop: Server, dialled: str) -> Problem:
    """It is SSH, and then nothing: the first long packets come next."""
    return codes.SSH_UNREACHABLE.problem(
        f"{hop.called} answers as SSH{dialled}, but no key exchange follows within {seconds:.0f} s",
        "check that long packets get through (`ping -M do -s 1400` to it; a VPN or tunnel on the "
        f"way needs a smaller MTU here), and the load and memory of {_its(hop)}",
    )


def says_nothing(hop: Server, dialled: str) -> Problem:
    """A connection, and then silence."""
    if hop.meet is not None:
        return codes.SSH_UNREACHABLE.problem(
            f"the meeting place {hop.before} accepts the connection to {hop.called}{dialled}, but "
            "the head says nothing",
            "nothing if it comes back, as the head connects there again; otherwise check `rayfwd "
            "status` on the head",
        )
    return codes.SSH_UNREACHABLE.problem(
        f"{hop.called} accepts the connection{dialled}, but says nothing",
        f"check that sshd listens there, and the state of {_its(hop)} (load, memory, disk)",
    )


def no_answer(hop: Server, dialled: str) -> Problem:
    """No connection, and no word of why."""
    return codes.SSH_UNREACHABLE.problem(
        f"{hop.called} did not answer in time{dialled}",
        f"check that {_its(hop)} is up, and that firewalls let SSH through",
    )


def not_listening(hop: Server, dialled: str) -> Problem:
    """The connection was refused."""
    return codes.SSH_UNREACHABLE.problem(
        f"nothing listens on the SSH port of {hop.called}{dialled}",
        f"check that sshd runs on {_its(hop)}, and that the port is right",
    )


def barred(why: str, hop: Server, dialled: str) -> Problem:
    """The path is alive, and takes no new connection."""
    return limited(f"{hop.called} lets no new connection through{dialled}: {why}", _where(hop))


def no_way(why: str, hop: Server, dialled: str) -> Problem:
    """The network here says so."""
    return codes.SSH_UNREACHABLE.problem(
        f"{hop.called}: {why}{dialled}",
        "check that this machine's network is up, and that the address is right",
    )


def turned_away(words: str, hop: Server, dialled: str) -> Problem:
    """OpenSSH closes so from MaxStartups on (`drop_connection` in sshd.c), for who was penalised
    (PerSourcePenalties), and whatever else bars addresses. `words`: what it said first."""
    if _OTHERS.match(words):
        return no_ssh(words, hop, dialled)
    return codes.SSH_TURNED_AWAY.problem(
        f"the sshd of {hop.called} closes connections at once{dialled}: "
        f"{words or 'it says nothing'}",
        f"raise MaxStartups in the sshd_config of {_its(hop)} (too many logins are in progress), "
        "and check whether something there blocks this machine (PerSourcePenalties, fail2ban, "
        "hosts.deny); rayfwd tries again by itself",
    )


def no_ssh(words: str, hop: Server, dialled: str) -> Problem:
    """Something else answers."""
    return codes.SSH_UNREACHABLE.problem(
        f"what answers in place of {hop.called}{dialled} is not an SSH server: it says {words!r}",
        f"check that the port is sshd's on {_its(hop)}, and that nothing on the way (a proxy, a "
        "captive portal) answers instead",
    )


def nobody_waits(why: str, hop: Server, by_command: bool = False) -> Problem:
    """The meeting place opens no way to the head. Its sshd does not say why; where a command is to
    do it, that does."""
    allows = (
        "its account there must be able to run commands, and have python3 or perl"
        if by_command
        else "its sshd must allow it: AllowStreamLocalForwarding, AllowTcpForwarding, and "
        "`restrict,port-forwarding` before this machine's key in authorized_keys"
    )
    return codes.JUMP_REFUSED.problem(
        f"the meeting place {hop.before} has no head at its socket {hop.meet}; "
        f"{'what was run there' if by_command else 'its sshd'} says: {why}",
        "check `rayfwd status` on the head: its [[hub.meet]] must be connected, with that socket, "
        f"and logged in as the same user there (only that user can open the socket); {allows}",
    )


def no_sftp(why: str, hop: Server) -> Problem:
    """A path in the home directory of a meeting place cannot be told."""
    return codes.JUMP_REFUSED.problem(
        f"the meeting place {hop.before} has no SFTP, which says where {hop.meet} is: {why}",
        "allow the sftp subsystem in its sshd_config (without a ForceCommand for this key); or "
        f"set the same absolute path in {setting.key('head.meet_socket')} here",
    )


def jump_forbids(why: str, hop: Server) -> Problem:
    """The jump host may not connect to `hop`."""
    target = f"{hop.known.host} port {hop.known.port}"
    return codes.JUMP_REFUSED.problem(
        f"the jump host {hop.before} may not connect to {target} for {hop.called}; its sshd says: "
        f"{why}",
        "allow it on the jump host: AllowTcpForwarding and PermitOpen in sshd_config (without "
        "DisableForwarding), `permitopen` and no `no-port-forwarding` in authorized_keys (after "
        "`restrict`, `port-forwarding`)",
    )


def jump_cannot(why: str, hop: Server) -> Problem:
    """The jump host has tried to connect to `hop`."""
    target = f"{hop.known.host} port {hop.known.port}"
    return codes.SSH_UNREACHABLE.problem(
        f"the jump host {hop.before} cannot connect to {target} for {hop.called}: {why}",
        "check that the name and the port are right from the jump host's point of view, that sshd "
        "runs there, and that firewalls between the two let SSH through",
    )


def jump_silent(hop: Server) -> Problem:
    """The jump host was asked for a connection to `hop`, and nothing came of it: its resolver may
    be silent, or what it dials."""
    if hop.meet is not None:
        return codes.SSH_UNREACHABLE.problem(
            f"the meeting place {hop.before} does not answer whether it leads on to {hop.called}",
            f"check the load of {hop.before} and its sshd log, and that no ForceCommand holds for "
            "this key there",
        )
    target = f"{hop.known.host} port {hop.known.port}"
    return codes.SSH_UNREACHABLE.problem(
        f"the jump host {hop.before} was asked to connect to {target} for {hop.called}, and "
        "nothing came back",
        f"on the jump host, check that the name is found (`getent hosts {hop.known.host}`), that "
        "sshd answers there, and that firewalls between the two let SSH through",
    )


def host_key_problem(
    head: HeadConfig, hop: Server, revoked: bool | str = False, dialled: str = ""
) -> Problem:
    """What is wrong with the host key that the hop showed, and was not taken. `revoked`: it is so,
    or by that file (RevokedHostKeys)."""
    known = hop.known
    what = _its(hop).removeprefix("the ") if hop.is_head else _kind(hop)
    called = known.host if hop.is_head else f"{hop.called} ({known.host} port {known.port})"
    called += dialled if known.host not in dialled else ""
    if revoked:
        files, line = ", ".join(str(file.path) for file in known.files), "the @revoked line"
        if isinstance(revoked, str):
            files, line = revoked, "it from that file"
        return codes.HOST_KEY_REVOKED.problem(
            f"{called} shows a host key that is revoked in {files}",
            f"ask the {what}'s owner for a new key, and compare it: whoever has the old key can "
            f"pretend to be the {what}. Delete {line} only if it was a mistake",
        )
    by_init = "`rayfwd init worker --fingerprint SHA256:…`, if `rayfwd init` made that file"
    of_init = hop.is_head and hop.to == HEAD and not setting.is_without_a_file("worker", "client")
    or_init = f", or {by_init}" if of_init else ""
    if having_it := known.having_it():
        removed = " and ".join(
            f"`ssh-keygen -R {shlex.quote(known.name)} -f {shlex.quote(file)}`"
            for file in having_it
        )
        return codes.HOST_KEY_MISMATCH.problem(
            f"{called} shows another host key than the one in {', '.join(having_it)}",
            f"ask the {what}'s owner whether the new key is right; if the {what} was reinstalled, "
            f"{removed} and add the new one{or_init}; if not, there may be a man in the middle",
        )
    where = ", ".join(str(file.path) for file in known.files)
    if not known.files:
        where = "any file of known hosts: this user has none that can be read"
    if known.damaged:
        where += f" (lines that cannot be parsed were skipped: {', '.join(known.damaged)})"
    or_init = f"; or {by_init}" if of_init else ""
    return codes.HOST_KEY_UNKNOWN.problem(
        f"the host key of {called} is not in {where}",
        f"compare its fingerprint with the one that the {what}'s owner names, then add it: "
        f"{_add_key(head, hop)}{or_init}",
    )


def _kind(hop: Server) -> str:
    return "meeting place" if hop.meets else "jump host"


def certificate_invalid(why: str, hop: Server, dialled: str) -> Problem:
    """An authority that is trusted has signed its key, and that does not hold here and now."""
    return codes.HOST_CERTIFICATE_INVALID.problem(
        f"the host certificate of {hop.called}{dialled} is not valid: {why}",
        f"make a new one for the name {hop.known.host} (`ssh-keygen -h -s CA -n NAME`), and check "
        f"this machine's clock: it says {_now()}",
    )


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def nothing_in_common(what: str, theirs: Sequence[str], hop: Server, dialled: str) -> Problem:
    """Its SSH server is too old for the one here, or the other way round."""
    return codes.SSH_ALGORITHMS.problem(
        f"{hop.called} and this machine have no {what} in common{dialled}: it offers "
        f"{', '.join(theirs)}",
        f"upgrade sshd {_where(hop)}; or, as what it offers may be weak, allow it for that host "
        "alone in the SSH configuration here (HostKeyAlgorithms, KexAlgorithms, Ciphers or MACs, "
        "as in `HostKeyAlgorithms +ssh-rsa`)",
    )


def command_ended(hop: Server, why: str) -> Problem:
    """Only who wrote the ProxyCommand knows what it was to dial."""
    return codes.SSH_UNREACHABLE.problem(
        f"the ProxyCommand of {hop.called} did not lead to an SSH server: {why}",
        "check that the command works when the user that runs rayfwd runs it, and that it leads "
        "to an SSH server",
    )


def _why_command_ended(exc: Exception, words: str) -> str:
    if words:
        return f"what answers says {words!r}"
    return "none in time" if isinstance(exc, TimeoutError) else "it ended without a word"


def _add_key(head: HeadConfig, hop: Server) -> str:
    """How an unknown host key gets to where it is looked for."""
    known = hop.known
    file = str(known.new or USER_FILES[0])
    also = "" if known.new else f", and set {hop.to.key('known_hosts')} to {file}"
    if hop.direct and known.alias is None:
        # The home directory is the shell's to find.
        to = file if file.startswith("~/") else shlex.quote(file)
        return f"`ssh-keyscan -p {known.port} {known.host} >> {to}`{also}"
    # Through a jump host, or under another name: ssh itself knows how, and asks.
    user, host, port = head.model_copy(update={"ssh": hop.written}).ssh_target()
    words = ["ssh", "-o", f"UserKnownHostsFile={file}"]
    words += ["-F", str(head.ssh_config.expanduser())] if head.ssh_config is not None else []
    words += ["-p", str(port)] if port is not None else []
    words.append(f"{user}@{host}" if user is not None else host)
    return f"`{shlex.join(words)}`, once{also}"


def hub_absent(path: Path, to: Destination) -> Problem:
    """Nobody listens there."""
    cause = f"nothing answers at {path} on {to.name}"
    return codes.HUB_ABSENT.problem(cause, start_or_name_socket(to))


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
        return attach_forced(to)
    absent = hub_absent(path, to)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT), connection.start_sftp_client() as sftp:
            own = (await sftp.stat(".")).uid
            seen = await sftp.stat(str(path))
            real = Path(str(await sftp.realpath(str(path))))
            table = await _read_table(sftp)
    except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath):
        return absent
    except asyncssh.SFTPPermissionDenied:
        return _not_permitted(path, "this user may not enter its directory", to)
    except (asyncssh.Error, OSError, TimeoutError):
        said = "" if ran is None else ran.stderr
        return password_expired(said, to) or socket_unreachable(path, reason, to)
    mode = seen.permissions or 0
    if own not in {0, seen.uid} and not mode & 0o002:
        whose = f"it belongs to uid {seen.uid} with mode {mode & 0o777:04o}"
        return _not_permitted(path, whose, to)
    if unixsocket.listens(table, path) or unixsocket.listens(table, real):
        return codes.CHANNEL_REFUSED.problem(
            f"{to.name}'s sshd refuses this kind of channel: rayfwd listens at {path} there, but "
            f"sshd says: {reason}",
            f"set {to.set_to('via', 'exec')}; or {forwarding_allowed(to)}",
        )
    return absent


def of_look(look: Look | None, path: Path, to: Destination) -> Problem:
    """The same, by what a command saw there; as words of that machine's own."""
    if look is None:
        remedy = socket_unreachable(path, "", to).remedy
        return codes.HUB_UNREACHABLE.problem(f"its sshd could not open {path}", remedy)
    match look.seen:
        case "absent" | "silent":
            absent = hub_absent(path, to)
            return absent.code.problem(f"nothing answers at {path}", absent.remedy)
        case "shut":
            return _not_permitted(path, "this user may not enter its directory", to)
        case "owned":
            whose = f"it belongs to uid {look.uid} with mode {look.mode:04o}"
            return _not_permitted(path, whose, to)
        case "listens":
            return codes.CHANNEL_REFUSED.problem(
                f"its sshd refuses this kind of channel, while rayfwd listens at {path}",
                f"set {to.set_to('via', 'exec')}, or {forwarding_allowed(to)}",
            )


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


def attach_forced(to: Destination) -> Problem:
    """The line of authorized_keys decides what runs, and lets nothing else be done."""
    return codes.CHANNEL_REFUSED.problem(
        f"this machine's key may run `rayfwd attach` on {to.name} and nothing else (a forced "
        "command in authorized_keys, or rayfwd's own SSH there), so no socket is opened for it",
        f"set {to.set_to('via', 'exec')}",
    )


def forwarding_allowed(to: Destination) -> str:
    """What may shut the way to a socket, and is to let it be."""
    return (
        f"allow it on {to.name}: AllowStreamLocalForwarding, AllowTcpForwarding and PermitOpen in "
        "sshd_config (any PermitOpen other than `any` blocks sockets too; no DisableForwarding), "
        "and no `restrict` or `no-port-forwarding` in authorized_keys"
    )


def not_started(why: str, to: Destination) -> Problem:
    """There is a session, and the command in it could not be begun."""
    return codes.CHANNEL_REFUSED.problem(
        f"{to.name}'s sshd could not start a command for this user: {why}",
        f"check this account's limits on {to.name} (nproc in /etc/security/limits.conf, TasksMax "
        "of its systemd slice), the memory there, and its sshd log",
    )


def sessions_allowed(to: Destination) -> str:
    """What may shut the way by a command."""
    return f"allow sessions for this key on {to.name} (MaxSessions, authorized_keys)"


def socket_unreachable(path: Path, reason: str, to: Destination) -> Problem:
    """Nobody says what keeps sshd from it."""
    who = (
        f"the hub's, and open to this user ({setting.theirs('hub.users')})"
        if to == HEAD
        else "where its daemon waits"
    )
    return codes.HUB_UNREACHABLE.problem(
        f"{to.name}'s sshd could not open {path}: {reason}",
        f"check that rayfwd runs on {to.name}, that this socket is {who}, and that sshd allows it "
        "(AllowStreamLocalForwarding, AllowTcpForwarding, PermitOpen); or set "
        f"{to.set_to('via', 'exec')}, where the key is restricted in authorized_keys (`restrict`, "
        "as in the line that `rayfwd init` prints)",
    )


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


def _not_permitted(path: Path, why: str, to: Destination) -> Problem:
    remedy = "log in as the user that runs rayfwd"
    if to == HEAD:
        add = f"add the user to {setting.theirs('hub.users')} and restart rayfwd there"
        remedy = f"{add}, or {remedy}"
    return codes.HUB_NOT_PERMITTED.problem(
        f"this SSH user may not open {path} on {to.name}: {why}", remedy
    )
