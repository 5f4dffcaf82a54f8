"""Where an SSH server's host key is looked for, and what is found there.

Strict always. AsyncSSH takes an empty list for its default file, and `UserKnownHostsFile none` as
"do not check": it is never given either, but the keys themselves. A key that is revoked under any
of the server's names is refused, whatever else is known of it, as ssh does
(`check_host_key` in sshconnect.c); a name is what the user wrote, never an address that DNS gave.
"""

from __future__ import annotations

import errno
import getpass
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import asyncssh

from rayfwd import codes
from rayfwd.config import HEAD, Destination
from rayfwd.problems import Problem, ProblemError
from rayfwd.system.logs import get_logger

log = get_logger(__name__)

USER_FILES = (Path("~/.ssh/known_hosts"), Path("~/.ssh/known_hosts2"))
SYSTEM_FILES = (Path("/etc/ssh/ssh_known_hosts"), Path("/etc/ssh/ssh_known_hosts2"))
"""ssh_config(5), UserKnownHostsFile and GlobalKnownHostsFile."""
SSH_PORT = 22
_TRUSTING = (0, 1, 3, 5)
"""Which of AsyncSSH's seven lists trust somebody."""
_TOKEN = re.compile(r"%(.)")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    hosts: asyncssh.SSHKnownHosts
    damaged: tuple[int, ...] = ()
    """Numbers of lines that say nothing."""


@dataclass(frozen=True, slots=True)
class KnownHosts:
    """What is known of one server."""

    host: str
    port: int = SSH_PORT
    alias: str | None = None
    """`HostKeyAlias` of the SSH configuration."""
    files: tuple[_File, ...] = ()
    """Those that exist and may be read."""
    new: Path | None = USER_FILES[0]
    """The one to which a key is to be added; None: `none` or /dev/null is to be it."""

    def for_asyncssh(self, host: str, address: str, port: int | None) -> Sequence[Sequence[Any]]:
        """Trusted keys, trusted authorities, revoked keys, and the same for X.509 (AsyncSSH's
        `known_hosts` as a function). The address is what DNS gave: nothing is trusted for it."""
        lists = self._named(host if port is None else f"[{host}]:{port}")
        if port is not None and not any(lists[kind] for kind in _TRUSTING):
            lists = self._named(host)
        lists[2] = self.revoked(address)
        return lists

    def _named(self, name: str) -> list[list[Any]]:
        """What all files say of a name, with its port."""
        matches = [file.hosts.match(name, "", None) for file in self.files]
        return [[each for match in matches for each in match[kind]] for kind in range(7)]

    def trusted(self) -> list[asyncssh.SSHKey]:
        """The server's own keys, without those of authorities."""
        return list(self.for_asyncssh(self.alias or self.host, "", self._own_port)[0])

    def key_types(self) -> list[bytes] | None:
        """Algorithms of the host keys that are known; None: of any, as none or an authority is."""
        lists = self.for_asyncssh(self.alias or self.host, "", self._own_port)
        if not lists[0] or any(lists[kind] for kind in _TRUSTING[1:]):
            return None
        return [each for key in lists[0] for each in key.sig_algorithms]

    def revoked(self, address: str = "") -> list[asyncssh.SSHKey]:
        """Under any of its names, with its port and without."""
        names = {self.host, self.alias, address} - {None, ""}
        names |= {f"[{name}]:{self.port}" for name in names}
        return [key for name in names for key in self._named(str(name))[2]]

    def having_it(self) -> list[str]:
        """The files that know the server, with whatever key."""
        name = self.alias or self.host
        return [
            str(file.path)
            for file in self.files
            if any(file.hosts.match(name, "", self._own_port)[:2])
        ]

    @property
    def name(self) -> str:
        """As files of known hosts have it."""
        name = self.alias or self.host
        return name if self._own_port is None else f"[{name}]:{self.port}"

    @property
    def _own_port(self) -> int | None:
        return None if self.alias is not None or self.port == SSH_PORT else self.port

    @property
    def damaged(self) -> list[str]:
        """Lines that were passed over, in words."""
        return [f"{file.path} line {line}" for file in self.files for line in file.damaged]


def named_files(
    config: asyncssh.config.SSHConfig, tokens: Mapping[str, str]
) -> tuple[list[Path], list[Path]]:
    """The user's and the system's files, as an SSH configuration names them; else the usual."""
    found = []
    for option, usual in (
        ("UserKnownHostsFile", USER_FILES),
        ("GlobalKnownHostsFile", SYSTEM_FILES),
    ):
        named = config.get(option)
        names = named if isinstance(named, list) else usual
        found.append([expanded(str(name), tokens) for name in names])
    return found[0], found[1]


def tokens(written: str, host: str, port: int, alias: str | None, user: str) -> dict[str, str]:
    """What percent signs stand for in the name of a file (ssh_config(5)); `written`: the host as it
    was given."""
    return {
        "%": "%",
        "d": str(Path.home()),
        "h": host,
        "i": str(os.getuid()),
        "k": alias or host,
        "n": written,
        "p": str(port),
        "r": user,
        "u": getpass.getuser(),
    }


def expanded(name: str, tokens: Mapping[str, str]) -> Path:
    """With these, and variables of the environment as `${NAME}`; what is neither stays."""
    name = _TOKEN.sub(lambda found: tokens.get(found[1], found[0]), name)
    return Path(_VARIABLE.sub(lambda found: os.environ.get(found[1], found[0]), name))


def read(
    paths: Iterable[Path], required: Path | None = None, to: Destination = HEAD
) -> tuple[_File, ...]:
    """Read what is there. Raises ProblemError where `required` is not, or cannot be read, and where
    a line that revokes a key cannot be understood."""
    return tuple(_readable(paths, required, to))


def _readable(paths: Iterable[Path], required: Path | None, to: Destination) -> Iterator[_File]:
    for path in paths:
        expanded = path.expanduser()
        try:
            if expanded.exists() and not (expanded.is_file() or expanded == Path(os.devnull)):
                raise OSError(errno.EINVAL, "it is no regular file")
            text = expanded.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as exc:
            if path == required:
                raise ProblemError(_unreadable(expanded, exc, to)) from exc
            continue
        yield _parsed(expanded, text)


def _unreadable(path: Path, exc: OSError, to: Destination) -> Problem:
    key = to.key("known_hosts")
    return codes.SSH_FILE_UNREADABLE.problem(
        f"{path}: {exc.strerror or exc}; {key} names this file, so {to.name}'s host key is looked "
        "up nowhere else",
        f"correct {key}, or make that file readable and put {to.name}'s host key into it "
        f"(/etc/ssh/ssh_host_ed25519_key.pub on {to.name}); or remove {key} from the file",
    )


def _parsed(path: Path, text: str) -> _File:
    """A line that cannot be understood is passed over, as by ssh, and said."""
    hosts, damaged = asyncssh.SSHKnownHosts(), []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            hosts.load(line)
        except ValueError:
            if line.lstrip().startswith("@revoked"):
                raise ProblemError(_lost_revocation(path, number)) from None
            damaged.append(number)
            say_damaged(str(path), number)
    return _File(path, hosts, tuple(damaged))


def _lost_revocation(path: Path, number: int) -> Problem:
    return codes.SSH_FILE_UNREADABLE.problem(
        f"{path} line {number} revokes a host key, but the line cannot be parsed",
        "correct that line or delete it: rayfwd does not know which key it revokes",
    )


@cache
def say_damaged(path: str, number: int) -> None:
    """Once: the file is read for every lane."""
    log.warning("known_hosts_damaged", path=path, line=number)
