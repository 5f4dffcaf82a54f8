"""A server's full name, and what an SSH configuration says of that: CanonicalizeHostname,
`Match canonical` and `Match final` (ssh_config(5)).

AsyncSSH looks for it when it dials. Here it is needed before: the host key, the keys that are
offered and the jump hosts are those of the full name.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from fnmatch import fnmatchcase

import asyncssh

from rayfwd import codes
from rayfwd.system.addresses import is_address

ALWAYS = "always"
"""Also where a jump host or a command dials, which resolves names itself as a rule."""


def canonicalized(
    options: asyncssh.SSHClientConnectionOptions,
) -> asyncssh.SSHClientConnectionOptions:
    """With what the configuration has for the full name. What it had for the name before counts
    first. Blocks: it asks the resolver. Raises ProblemError."""
    name, final = full_name(options), options.config.has_match_final()
    if name is None and not final:
        return options
    host = name or options.host
    again = asyncssh.SSHClientConnectionOptions(
        options=options, host=host, canonical=name is not None, final=final
    )
    if name is not None:
        again.config._options["Hostname"] = name
        again.host = name
    return again


def full_name(options: asyncssh.SSHClientConnectionOptions) -> str | None:
    """None: none is looked for, or there is none. Raises ProblemError."""
    name, domains = options.host, options.canonical_domains
    asked = options.canonicalize_hostname
    if not asked or not domains or is_address(name):
        return None
    indirect = options.config.get("ProxyJump") or options.proxy_command
    if indirect and asked != ALWAYS:
        return None
    if name.count(".") > options.canonicalize_max_dots:
        return None
    for domain in domains:
        if (found := _resolved(f"{name}.{domain}")) is not None:
            return _followed(f"{name}.{domain}", found, options)
    if options.canonicalize_fallback_local:
        return None
    raise codes.SSH_UNREACHABLE.error(
        f"the name {name} is found in none of CanonicalDomains ({' '.join(domains)}), and "
        "CanonicalizeFallbackLocal is no",
        "correct CanonicalDomains in the SSH configuration, or this machine's DNS",
    )


def _resolved(name: str) -> str | None:
    """What the resolver calls it; None: it is not known there."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    except OSError:
        return None
    return found[0][3]


def _followed(name: str, alias_of: str, options: asyncssh.SSHClientConnectionOptions) -> str:
    """The name, or what it is an alias of, where the configuration has it followed."""
    rules: Sequence[tuple[str, str]] = options.canonicalize_permitted_cnames
    for names, targets in rules:
        if _matches(name, names) and _matches(alias_of, targets):
            return alias_of
    return name


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split(","))
