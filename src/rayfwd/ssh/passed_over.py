"""Where AsyncSSH reads an SSH configuration otherwise than `ssh`: options that it has no use for,
and the order of files that are included.

AsyncSSH skips what it does not know without a word. It is told of these, so that it keeps them as
it does the others, by `Host` and `Match`; then whoever cannot be reached for want of one is told.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from asyncssh.config import SSHClientConfig
from asyncssh.pkcs11 import pkcs11_available

from rayfwd.ssh.asyncssh_internals import (
    CONFIG,
    CONFIG_CLASS,
    Table,
    UnexpectedError,
    check,
)

OPTIONS = (
    "BindInterface",
    "KnownHostsCommand",
    "ProxyUseFdpass",
    "PubkeyAcceptedAlgorithms",
    "RevokedHostKeys",
    "SecurityKeyProvider",
    "VerifyHostKeyDNS",
)
"""ssh_config(5). Those that may decide whether a server is reached, and by what it is known."""
TOKENS = "PKCS11Provider"
"""Has no effect without the library python-pkcs11."""
SYSTEM = Path("/etc/ssh")
_NOTHING = (None, "none", "no")


def found_in(config: Any) -> tuple[str, ...]:
    """Those that an SSH configuration has set."""
    names = OPTIONS if pkcs11_available else (*OPTIONS, TOKENS)
    return tuple(name for name in names if config.get(name) not in _NOTHING)


@cache
def make_known() -> None:
    """Before a configuration is read. An AsyncSSH that is laid out otherwise is left alone."""
    if not _is_as_known(SSHClientConfig, CONFIG_CLASS):
        return
    handlers = SSHClientConfig._handlers
    for name in OPTIONS:
        handlers.setdefault(name.lower(), (name, _keep))
    if "include" in handlers:
        name, include = handlers["include"]
        handlers["include"] = name, _in_order(include)


def _is_as_known(thing: Any, expected: Table) -> bool:
    try:
        check(thing, expected)
    except UnexpectedError:
        return False
    return True


def _keep(config: Any, option: str, args: list[str]) -> None:
    """The first one that holds counts."""
    if _is_as_known(config, CONFIG):
        config._options.setdefault(option, " ".join(args))
    args.clear()


def _in_order(include: Callable[[Any, str, list[str]], None]) -> Callable[..., None]:
    """As ssh has it: sorted by name, and what has no slash before it is beside the file that
    includes it, where that is the system's. AsyncSSH takes them as the directory has them."""

    def included(config: Any, option: str, args: list[str]) -> None:
        if not _is_as_known(config, CONFIG):
            include(config, option, args)
            return
        beside = SYSTEM if Path(config._path).is_relative_to(SYSTEM) else Path("~/.ssh")
        patterns = [beside.expanduser() / Path(arg).expanduser() for arg in args]
        args[:] = [
            glob.escape(found) for pattern in patterns for found in sorted(glob.glob(str(pattern)))
        ]
        include(config, option, args)

    return included
