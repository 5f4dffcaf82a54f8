"""The way to the head as the SSH configuration has it: the head, and the jump hosts before it.

Each hop has options, keys and known hosts of its own, as with `ssh`. What `ssh` would read is read:
the file that is named (`head.ssh_config`) alone, as by `ssh -F`, else the user's and the system's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncssh
from asyncssh.pkcs11 import pkcs11_available

from rayfwd import codes
from rayfwd.config import HEAD, Destination, HeadConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.ssh import knownhosts, passed_over
from rayfwd.ssh.agent import agent_at
from rayfwd.ssh.canonical import canonicalized
from rayfwd.ssh.knownhosts import KnownHosts

USER_CONFIG = Path("~/.ssh/config")
SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
DEFAULT_KEYS = ("id_ed25519_sk", "id_ecdsa_sk", "id_ed25519", "id_ecdsa", "id_rsa")
"""In ~/.ssh; those that AsyncSSH would take where none is named."""
JUMPS = 8
"""Jump hosts of a way, at most."""
CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
)
"""In order of preference: with AES in the CPU, GCM moves about twice what chacha20 does."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One SSH server of the way."""

    written: str
    """As the configuration names it: `ray@head`."""
    options: asyncssh.SSHClientConnectionOptions
    known: KnownHosts
    is_head: bool
    first: bool
    """No jump host is before it."""
    agent: str = ""
    """The socket of an agent, whose other keys are offered after those that are named, as by
    `ssh`: servers end a login that offers many (MaxAuthTries)."""
    before: str = ""
    """The hop before, as the configuration names it."""
    meet: str | None = None
    """The socket of a meeting place where it waits: the hop before is that host."""
    meets: bool = False
    """It is such a host."""
    to: Destination = HEAD
    """Whom the way leads to."""
    keys: tuple[Path, ...] = ()
    """Files of private keys that are offered, and of certificates."""
    passed_over: tuple[str, ...] = ()
    """Options of the SSH configuration that AsyncSSH has no use for."""

    command: str = ""
    """Of the SSH configuration (ProxyCommand), which dials it."""

    @property
    def direct(self) -> bool:
        """It is dialled from here, not by a jump host or a command."""
        return self.first and not self.command

    @property
    def direct_command(self) -> bool:
        """A command of the SSH configuration (ProxyCommand) dials it."""
        return self.first and bool(self.command)

    @property
    def user(self) -> str:
        """Whom it is logged in as there."""
        return self.options.username

    @property
    def agent_socket(self) -> str:
        """Of the agent whose keys are offered; empty: none is asked."""
        return self.agent or self.options.agent_path or ""

    @property
    def called(self) -> str:
        """In a sentence."""
        if self.is_head:
            return self.written
        return f"the {'meeting place' if self.meets else 'jump host'} {self.written}"


def find_way(head: HeadConfig) -> list[Hop]:
    """The hops to the head, which is the last. Blocks: it reads files.

    Raises ProblemError, and AsyncSSH's and the system's errors.
    """
    way = _way(head, head.ssh, True, ())
    if head.meet:
        *before, host = _way(head, head.meet, False, ())
        at_head = replace(way[-1], first=False, command="", meet=head.meet_socket)
        way = [*before, replace(host, meets=True), at_head]
    return [way[0], *(replace(hop, before=last.written) for last, hop in pairwise(way))]


def _way(head: HeadConfig, written: str, is_head: bool, after: tuple[str, ...]) -> list[Hop]:
    if written in after or len(after) > JUMPS:
        raise ProblemError(jumps_in_a_circle((*after, written)))
    options, agent = _options(head, written, is_head)
    jumps = options.config.get("ProxyJump")
    known = _known_hosts(head, _host_of(head, written), options, is_head)
    command = options.config.get("ProxyCommand")
    by_command = isinstance(command, str) and not isinstance(jumps, str)
    ignored = passed_over.found_in(options.config)
    if "RevokedHostKeys" in ignored:
        raise ProblemError(_revocations_unread(head, written))
    hop = Hop(
        written,
        options,
        known,
        is_head,
        first=not isinstance(jumps, str),
        agent=agent,
        to=head.destination,
        keys=_keys(head, options, is_head),
        passed_over=ignored,
        command=str(command) if by_command else "",
    )
    if not isinstance(jumps, str):
        return [hop]
    first, *others = [jump.strip().removeprefix("ssh://") for jump in jumps.split(",")]
    after = (*after, written)
    # As with ssh: the first has a way of its own, the others are reached from the one before.
    way = _way(head, first, False, after)
    for other in others:
        reached = _way(head, other, False, (*after, first))[-1]
        way.append(replace(reached, first=False, command=""))
    return [*way, hop]


def _host_of(head: HeadConfig, written: str) -> str:
    """As it was given to the SSH configuration."""
    return head.model_copy(update={"ssh": written}).ssh_target()[1]


def jumps_in_a_circle(names: Sequence[str]) -> Problem:
    """Each of these names has the one before it behind it."""
    return codes.SSH_CONFIG_INVALID.problem(
        f"the jump hosts form a loop: {' after '.join(names)}",
        "correct ProxyJump in the SSH configuration: a jump host must not lead through itself "
        "(`Host * !bastion` excludes it)",
    )


def _revocations_unread(head: HeadConfig, written: str) -> Problem:
    remedy = "put those keys into a file of known hosts, as lines that begin with `@revoked *`"
    if head.destination.takes_transport:
        remedy += f"; or set {head.destination.set_to('transport', 'openssh')}"
    return codes.SSH_CONFIG_INVALID.problem(
        f"the SSH configuration names RevokedHostKeys for {written}, which AsyncSSH does not read",
        remedy,
    )


def _options(
    head: HeadConfig, written: str, is_head: bool
) -> tuple[asyncssh.SSHClientConnectionOptions, str]:
    """And the agent whose keys come after those that are named."""
    passed_over.make_known()
    user, host, port = head.model_copy(update={"ssh": written}).ssh_target()
    given: dict[str, Any] = {"host": host, "config": _config_files(head)}
    if user is not None:
        given["username"] = user
    if port is not None:
        given["port"] = port
    options = asyncssh.SSHClientConnectionOptions(
        **given,
        client_keys=None,  # they are loaded below, where they are
        tunnel=None,  # it is ours: each hop is dialled with known hosts of its own
        connect_timeout=None,
        login_timeout=None,
        # Both are asked for and never answered: so it is known that a key was not enough.
        password_auth=True,
        kbdint_auth=True,
        compression_algs=None,
        agent_forwarding=False,  # whatever the configuration has (ForwardAgent)
    )
    options = canonicalized(options)
    keys, agent = _keys_and_agent(head, options, is_head)
    # Read once: a second time its percent signs would be expanded again.
    changes: dict[str, Any] = {"config": [], "proxy_command": None, **keys}
    changes |= {"canonical": False, "final": False, "canonicalize_hostname": False}
    if not pkcs11_available:
        changes["pkcs11_provider"] = None  # to ask a token without that library ends the login
    if not options.config.get("Ciphers"):
        changes["encryption_algs"] = CIPHERS
    return asyncssh.SSHClientConnectionOptions(options=options, **changes), agent


def _keys_and_agent(
    head: HeadConfig, options: asyncssh.SSHClientConnectionOptions, is_head: bool
) -> tuple[dict[str, Any], str]:
    """Options for AsyncSSH, and the agent whose keys come after those that are named. As by ssh, a
    file that the configuration names and that is not there is passed over."""
    named_agent = options.config.get("IdentityAgent", "")
    path = agent_at(named_agent) if isinstance(named_agent, str) else ""  # none
    if head.identity is not None and is_head:
        return {"client_keys": [str(head.identity.expanduser())], "agent_path": None}, ""
    if head.identity is not None:
        keys = _keys_for_jump(options, head.identity)
        return {"client_keys": keys, "ignore_encrypted": True, "agent_path": None}, path
    if not isinstance(options.config.get("IdentityFile"), list):
        return {"client_keys": (), "agent_path": path}, ""
    named = _named_keys(options)
    there = [str(each) for each in named if _is_readable(each)]
    if options.config.get("IdentitiesOnly"):
        # Of a key that the agent has the public half is enough.
        public = [each.with_name(f"{each.name}.pub") for each in named if not _is_readable(each)]
        there += [str(each) for each in public if _is_readable(each)]
        return {"client_keys": there or None, "ignore_encrypted": True, "agent_path": path}, ""
    return {"client_keys": there or None, "ignore_encrypted": True, "agent_path": None}, path


def _is_readable(path: Path) -> bool:
    return os.access(path, os.R_OK)


def _config_files(head: HeadConfig) -> list[str]:
    if head.ssh_config is not None:
        return [str(head.ssh_config.expanduser())]
    usual = [USER_CONFIG.expanduser(), SYSTEM_CONFIG]
    return [str(path) for path in usual if path.is_file() and _is_readable(path)]


def _named_keys(options: asyncssh.SSHClientConnectionOptions) -> list[Path]:
    named = options.config.get("IdentityFile")
    names = named if isinstance(named, list) else [f"~/.ssh/{name}" for name in DEFAULT_KEYS]
    return [Path(str(name)).expanduser() for name in names]


def _keys(
    head: HeadConfig, options: asyncssh.SSHClientConnectionOptions, is_head: bool
) -> tuple[Path, ...]:
    named = () if head.identity is None else (head.identity.expanduser(),)
    found = named if is_head and named else (*named, *_named_keys(options))
    if options.config.get("PKCS11Provider"):
        return ()  # a token has them
    certificates = options.config.get("CertificateFile")
    listed = certificates if isinstance(certificates, list) else []
    return (*found, *(Path(str(name)).expanduser() for name in listed))


def _keys_for_jump(options: asyncssh.SSHClientConnectionOptions, identity: Path) -> list[str]:
    """The keys that ssh would offer a jump host, and the one that the configuration names."""
    paths = _named_keys(options)
    own = identity.expanduser()
    return [str(path) for path in paths if path != own and _is_readable(path)] + [str(own)]


def _known_hosts(
    head: HeadConfig, written: str, options: asyncssh.SSHClientConnectionOptions, is_head: bool
) -> KnownHosts:
    """Raises ProblemError."""
    user, system = knownhosts.named_files(
        options.config,
        knownhosts.tokens(
            written, options.host, options.port, options.host_key_alias, options.username
        ),
    )
    new = user[0] if user else None
    named = head.known_hosts
    paths = [*user, *system]
    if named is not None and is_head:
        paths, new = [named], named
    elif named is not None:
        paths, new = [named, *paths], named
    return KnownHosts(
        host=options.host,
        port=options.port,
        alias=options.host_key_alias,
        files=knownhosts.read(paths, required=named, to=head.destination),
        new=None if new is None or str(new) == os.devnull else new,
    )
