"""What is wrong at a hop, whichever SSH dials it: what was seen there, and what to do about it."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import asyncssh

from rayfwd import codes
from rayfwd.config import HEAD, Destination, HeadConfig
from rayfwd.problems import Problem
from rayfwd.ssh.knownhosts import USER_FILES, KnownHosts
from rayfwd.system import setting
from rayfwd.system.files import read_regular
from rayfwd.system.users import user_name
from rayfwd.transport.hubanswer import limited

USER_CERTIFICATE = 1
"""The kind of a certificate that is a user's (SSH_CERT_TYPE_USER in PROTOCOL.certkeys)."""
_OTHERS = re.compile(r"HTTP/|220[ -]|\+OK|\* OK|RFB |<|\x15\x03|\x16\x03")
"""How servers of other protocols begin: the web, mail, FTP, VNC, TLS."""


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
        f"compare its fingerprint with the one that the {what}'s owner names, then add it as "
        f"{user_name(os.geteuid())}: "
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


def _add_key(head: HeadConfig, hop: Server) -> str:
    """How an unknown host key gets to where it is looked for."""
    known = hop.known
    file = str(known.new or USER_FILES[0])
    also = "" if known.new else f", and set {hop.to.key('known_hosts')} to {file}"
    if hop.direct and known.alias is None:
        # The home directory is the shell's to find.
        folder = os.path.dirname(file)
        to, where = (
            path if path.startswith("~/") else shlex.quote(path) for path in (file, folder)
        )
        first = "" if os.path.isdir(os.path.expanduser(folder)) else f"mkdir -p {where} && "
        return f"`{first}ssh-keyscan -p {known.port} {known.host} >> {to}`{also}"
    # Through a jump host, or under another name: ssh itself knows how, and asks.
    user, host, port = head.model_copy(update={"ssh": hop.written}).ssh_target()
    words = ["ssh", "-o", f"UserKnownHostsFile={file}"]
    words += ["-F", str(head.ssh_config.expanduser())] if head.ssh_config is not None else []
    words += ["-p", str(port)] if port is not None else []
    words.append(f"{user}@{host}" if user is not None else host)
    return f"`{shlex.join(words)}`, once{also}"
