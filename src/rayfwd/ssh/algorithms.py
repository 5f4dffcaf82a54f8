"""What two ends of SSH have in common before anything is secret, by what the server has sent.

A server that finds nothing in common closes the connection, mostly before the client has looked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from asyncssh.packet import PacketDecodeError, SSHPacket

HOST_KEYS = "host key algorithm"
_SKIPPED = 17
"""Bytes before the lists: the message's number and a cookie (RFC 4253, section 7.1)."""
_LISTS = ("key exchange method", HOST_KEYS, "cipher", "cipher", "MAC", "MAC")
_OWN_MAC = ("gcm@openssh.com", "poly1305@openssh.com")
"""Ciphers that end so need no MAC."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Of what kind there is nothing in common, and what the server has of it."""

    what: str
    theirs: Sequence[str]


def missing_in(kexinit: bytes, options: Any, host_keys: Iterable[bytes] | None) -> Missing | None:
    """`options`: AsyncSSH's, of this end. `host_keys`: what is known of the server's; None: any."""
    try:
        packet = SSHPacket(kexinit)
        packet.get_bytes(_SKIPPED)
        offered = [(what, packet.get_namelist()) for what in _LISTS]
    except PacketDecodeError:
        return None
    ciphers = list(options.encryption_algs)
    own = {
        "key exchange method": list(options.kex_algs),
        HOST_KEYS: None if host_keys is None else list(host_keys),
        "cipher": ciphers,
        "MAC": None if any(c.decode().endswith(_OWN_MAC) for c in ciphers) else options.mac_algs,
    }
    for what, theirs in offered:
        ours = own[what]
        if ours is not None and not set(ours) & set(theirs):
            return Missing(what, [each.decode("ascii", "replace") for each in theirs])
    return None
