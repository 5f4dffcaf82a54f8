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
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from rayfwd.system import sockdiag
from rayfwd.system.ownership import peer_credentials
from rayfwd.system.sockdiag import SockDiag, UnixListener
from rayfwd.system.users import user_name

_PREFIX = "rayfwd-network-"
_NAME = re.compile(rb"\0rayfwd-network-([0-9.]{7,15})-([0-9]{1,2})-.{1,64}", re.DOTALL)
_SOCKETS = Path("/proc/self/net/unix")
_ROOT = 0
BACKLOG = 1024
"""Of who asks whose it is by connecting, where the kernel does not say it otherwise: nobody is ever
taken in."""


@dataclass(frozen=True, slots=True)
class NetworkHolder:
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
            self._socket.listen(BACKLOG)
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


def holders_of(network: str) -> list[NetworkHolder]:
    """Who has a network that overlaps this one, those that count first."""
    return overlapping(network, holders())


def overlapping(network: str, among: Iterable[NetworkHolder]) -> list[NetworkHolder]:
    """Those of them who have a network that overlaps this one, those that count first."""
    wanted = ipaddress.IPv4Network(network)
    found = [holder for holder in among if ipaddress.IPv4Network(holder.network).overlaps(wanted)]
    return sorted(found, key=lambda holder: not holder.counts)


def holders() -> list[NetworkHolder]:
    """Of every network."""
    try:
        with closing(SockDiag()) as diag:
            listening = diag.unix_listeners()
    except OSError:  # a kernel without the module, or a sandbox
        listening = _listed()
    found = (_holder(sock) for sock in listening)
    return [holder for holder in found if holder is not None]


def _listed() -> list[UnixListener]:
    """The abstract sockets of our name, as far as /proc tells."""
    found = []
    with suppress(OSError):
        for line in _SOCKETS.read_bytes().splitlines():
            head, at, name = line.partition(b" @" + _PREFIX.encode())
            if at:
                inode = int(head.split()[-1])
                found.append(UnixListener(b"\0" + _PREFIX.encode() + name, None, inode))
    return found


def _maker_of(name: bytes) -> int | None:
    """Who listens there, as whoever connects is told; None: it takes nobody in, or is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(name)
        except OSError:
            return None
        return peer_credentials(probe)[1]


def _holder(sock: UnixListener) -> NetworkHolder | None:
    """None: it is for something else."""
    said = _NAME.fullmatch(sock.name)
    if said is None:
        return None
    try:
        network = ipaddress.IPv4Network(f"{said[1].decode()}/{said[2].decode()}")
    except ValueError:
        return None
    uid = _maker_of(sock.name) if sock.uid is None else sock.uid
    return NetworkHolder(str(network), uid, sock.inode)
