"""Names on this machine that one process holds at a time.

Such a name is an abstract Unix socket. It lives in the network namespace, which is what one machine
is to Ray. Every user sees it, and it is gone with its process, however that ends.

Any user can make any name. So a name is worth what the kernel says of its maker: root and this user
count. Where somebody else has the name, it is held with a random end.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from rayfwd.system.ownership import peer_credentials
from rayfwd.system.sockdiag import SockDiag, UnixName

_SOCKETS = Path("/proc/self/net/unix")
_STATE, _INODE, _UNCONNECTED = 5, 6, b"01"
"""Columns of it, and the state of a socket that listens or has a name only. A connection that waits
to be taken in has the name as well."""
_ROOT = 0
BACKLOG = 1024
"""Of who asks whose it is by connecting, where the kernel does not say it otherwise: nobody is ever
taken in."""


@dataclass(frozen=True, slots=True)
class NameHolder:
    """Who has a name."""

    name: bytes
    """Without the zero byte of an abstract socket."""
    uid: int | None
    """None: the kernel does not tell."""
    inode: int

    @property
    def counts(self) -> bool:
        """Whether nobody but a process of root's or of this user's can have made it."""
        return self.uid in (_ROOT, os.geteuid())


class HeldName:
    """A name that is this process's until `close`."""

    def __init__(self, name: str, rivals: Callable[[], Iterable[NameHolder]]) -> None:
        """`rivals`: those who have it, or another name for the same thing, and keep this process
        from it; this process may be among them. Raises OSError where there is one."""
        self._rivals = rivals
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind(f"\0{name}")
            self._socket.listen(BACKLOG)
            self._see_that_nobody_else_has_it()
        except OSError:
            self._socket.close()
            raise

    def _bind(self, name: str) -> None:
        try:
            self._socket.bind(name)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            self._see_that_nobody_else_has_it()
            self._socket.bind(f"{name}-{secrets.token_hex(8)}")

    def _see_that_nobody_else_has_it(self) -> None:
        own = os.fstat(self._socket.fileno()).st_ino
        if any(rival.inode != own for rival in self._rivals()):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def close(self) -> None:
        self._socket.close()


def holders_of_names(beginning: str) -> list[NameHolder]:
    """Who has a name that begins so."""
    start = b"\0" + beginning.encode()
    try:
        with closing(SockDiag()) as diag:
            there = diag.unix_names()
    except OSError:  # a kernel without the module, or a sandbox
        there = _listed(start)
    return [
        NameHolder(
            each.name[1:], _maker_of(each.name) if each.uid is None else each.uid, each.inode
        )
        for each in there
        if each.name.startswith(start)
    ]


def _listed(start: bytes) -> list[UnixName]:
    """The abstract names that begin so, as far as /proc tells."""
    found = []
    with suppress(OSError):
        for line in _SOCKETS.read_bytes().splitlines():
            head, at, rest = line.partition(b" @" + start[1:])
            if at and head.split()[_STATE] == _UNCONNECTED:
                found.append(UnixName(start + rest, None, int(head.split()[_INODE])))
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
