"""Which network of loopback addresses belongs to which rayfwd on this machine.

Two clusters with one network on one machine would take each other's Ray for their own. So each
daemon holds a name of its network: an abstract Unix socket, which lives in the network namespace
(what is one machine to Ray), is seen by every user, and is gone with its process however that ends.

Any user can make such a name, so it is worth what the kernel says of its maker: root's and this
user's count.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

from rayfwd.system import sockdiag
from rayfwd.system.sockdiag import SockDiag, UnixListener
from rayfwd.system.users import user_name

_PREFIX = "rayfwd-network-"
_NAME = re.compile(rb"\0rayfwd-network-([0-9.]{7,15})-([0-9]{1,2})-.{1,64}", re.DOTALL)
_ROOT = 0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a network."""

    network: str
    uid: int | None
    """None: the kernel does not tell."""
    inode: int

    @property
    def counts(self) -> bool:
        """Whether nobody but a rayfwd of root's or of this user's can say so."""
        return self.uid in (_ROOT, os.geteuid())

    def __str__(self) -> str:
        who = "another user" if self.uid is None else f"user {user_name(self.uid)}"
        program = sockdiag.programs([self.inode]).get(self.inode)
        return who if program is None else f"{who}, pid {program.pid}"


class NetworkLock:
    """A network that is this process's until `close`."""

    def __init__(self, network: str) -> None:
        """Raises OSError where a process of this user's has just taken it."""
        self.network = network
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind()
            self._socket.listen(1)
        except OSError:
            self._socket.close()
            raise

    def _bind(self) -> None:
        name = f"\0{_PREFIX}{self.network.replace('/', '-')}-{os.geteuid()}"
        try:
            self._socket.bind(name)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or any(h.counts for h in holders_of(self.network)):
                raise
            # Another user has made the name that would be ours.
            self._socket.bind(f"{name}-{secrets.token_hex(8)}")

    def close(self) -> None:
        self._socket.close()


def holders_of(network: str) -> list[Holder]:
    """Who has a network that overlaps this one, those that count first."""
    return overlapping(network, holders())


def overlapping(network: str, among: Iterable[Holder]) -> list[Holder]:
    """Those of them who have a network that overlaps this one, those that count first."""
    wanted = ipaddress.IPv4Network(network)
    found = [holder for holder in among if ipaddress.IPv4Network(holder.network).overlaps(wanted)]
    return sorted(found, key=lambda holder: not holder.counts)


def holders() -> list[Holder]:
    """Of every network; nobody where the kernel cannot be asked, who would say whose it is."""
    try:
        with closing(SockDiag()) as diag:
            found = map(_holder, diag.unix_listeners())
            return [holder for holder in found if holder is not None]
    except OSError:
        return []


def _holder(sock: UnixListener) -> Holder | None:
    """None: it is for something else."""
    said = _NAME.fullmatch(sock.name)
    if said is None:
        return None
    try:
        network = ipaddress.IPv4Network(f"{said[1].decode()}/{said[2].decode()}")
    except ValueError:
        return None
    return Holder(str(network), sock.uid, sock.inode)
