"""Options of an SSH configuration that AsyncSSH has no use for: which of them hold for a server.

AsyncSSH skips what it does not know without a word. It is told of these, so that it keeps them as
it does the others, by `Host` and `Match`; then whoever cannot be reached for want of one is told.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from asyncssh.config import SSHClientConfig

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
_NOTHING = (None, "none", "no")


def found_in(config: Any) -> tuple[str, ...]:
    """Those that an SSH configuration has set."""
    return tuple(name for name in OPTIONS if config.get(name) not in _NOTHING)


@cache
def make_known() -> None:
    """Before a configuration is read. An AsyncSSH that is laid out otherwise is left alone."""
    handlers = getattr(SSHClientConfig, "_handlers", None)
    if isinstance(handlers, dict):
        for name in OPTIONS:
            handlers.setdefault(name.lower(), (name, _keep))


def _keep(config: Any, option: str, args: list[str]) -> None:
    """The first one that holds counts."""
    config._options.setdefault(option, " ".join(args))
    args.clear()
