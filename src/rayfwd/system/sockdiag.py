"""The kernel's word on this machine's sockets (sock_diag(7)): who has the other end of a TCP
connection, and who listens where, on Unix sockets too. It takes no privilege.

Sockets are those of this network namespace. Uids are as this process's user namespace has them: one
that it does not have is the overflow uid (65534).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from functools import lru_cache
from typing import NamedTuple

Address = tuple[str, int]
"""An IPv4 address and a port."""

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_TCP_CLOSE, _TCP_LISTEN = 7, 10
_ANY_STATE = 0xFFFFFFFF
_NLMSGHDR = struct.Struct("=IHHII")
"""length, type, flags, sequence number, port id"""
_REQUEST = struct.Struct("=BBBxI")
"""inet_diag_req_v2: family, protocol, extensions, states; an _ID follows"""
_ID = struct.Struct("!HH16s16s4s8s")
"""inet_diag_sockid: its port, the other's, its address, the other's, interface, cookie"""
_INTERFACE = struct.Struct("=I")
_ANY_COOKIE = b"\xff" * 8
_MESSAGE = struct.Struct("=BBBB48sIIIII")
"""inet_diag_msg: family, state, timer, retransmits, _ID, expires, queues, uid, inode; attributes
follow"""
_IPV6_ONLY = 11
"""The attribute of a listening IPv6 socket that says whether it is for IPv6 only
(INET_DIAG_SKV6ONLY)."""

_BYTECODE = 1
"""The attribute of a request that has a filter (INET_DIAG_REQ_BYTECODE)."""
_OP = struct.Struct("=BBH")
"""inet_diag_bc_op: code, how far to go if so, how far if not; behind the end: not this socket"""
_HOST = struct.Struct("=BBxxi4s")
"""inet_diag_hostcond: family, length of the prefix, port (-1: any), address"""
_BC_JMP, _BC_S_COND = 1, 7

# linux/unix_diag.h
_UNIX_REQUEST = struct.Struct("=BBxxIII8s")
"""unix_diag_req: family, protocol, states, inode, what to show, cookie"""
_UNIX_MESSAGE = struct.Struct("=BBBxI8s")
"""unix_diag_msg: family, type, state, inode, cookie; attributes follow"""
_ATTRIBUTE = struct.Struct("=HH")
"""nlattr, rtattr: length with this header, type; each begins at a multiple of four"""
_SHOW_NAME, _SHOW_UID = 0x1, 0x40
_UNIX_NAME, _UNIX_UID = 0, 7

_MOST = 1 << 16
"""Bytes of one message of a dump; the kernel fits them to what is asked for."""


class SocketOwner(NamedTuple):
    """Whose a socket is."""

    uid: int
    inode: int


class ListeningSocket(NamedTuple):
    """A socket that listens."""

    address: str
    """IPv4 or IPv6; `0.0.0.0` and `::` are all of the machine's."""
    port: int
    uid: int
    inode: int
    ipv6_only: bool = False
    """It takes no connection that is made by IPv4, though it listens on `::`."""
    interface: int = 0
    """The number of the one interface by which it takes connections; 0: by any."""

    def takes(self, at: Address) -> bool:
        """Whether it takes connections to this IPv4 address, and keeps others from listening there.
        `::` does unless it is for IPv6 only."""
        if self.port != at[1] or self.ipv6_only:
            return False
        return self.address in {"0.0.0.0", "::"} or self.address in {at[0], f"::ffff:{at[0]}"}


class UnixName(NamedTuple):
    """The name of a Unix socket that listens, or may come to."""

    name: bytes
    """Its path; of an abstract one it begins with a zero byte."""
    uid: int | None
    """Who has made it; None: a kernel before 5.3 does not tell."""
    inode: int


class SockDiag:
    """A way to ask the kernel. Every question is answered at once: it is worked on within send(2).

    Raises OSError where the kernel or a sandbox does not let this process ask.
    """

    def __init__(self) -> None:
        family = getattr(socket, "AF_NETLINK", None)
        if family is None:
            raise OSError("this system has no netlink sockets")
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._sock = socket.socket(family, kind, _NETLINK_SOCK_DIAG)
        self._sequence = 0

    def close(self) -> None:
        self._sock.close()

    def owner_of_peer(self, own: Address, peer: Address) -> SocketOwner | None:
        """Who has the other end of the connection whose ends are these, both on this machine.

        None: nobody any more. A socket that its program has closed lives on in the kernel until its
        bytes are delivered, and has no inode then; older kernels name root as its owner.

        Raises OSError.
        """
        # Where no connection is found, the kernel looks for who listens there.
        state, owner = self._find(peer, own)
        return owner if state != _TCP_LISTEN else None

    def owner_of_listener(self, at: Address, interface: int = 0) -> SocketOwner | None:
        """Who takes connections to `at`, which is on this machine, where they come by that
        interface; None: nobody. Raises OSError."""
        state, owner = self._find(at, (at[0], 0), interface)
        return owner if state == _TCP_LISTEN else None

    def _find(
        self, near: Address, far: Address, interface: int = 0
    ) -> tuple[int, SocketOwner | None]:
        """State and owner of the socket that takes what `far` sends to `near`. Raises OSError."""
        by, ends = _INTERFACE.pack(interface), (_packed(near[0]), _packed(far[0]))
        wanted = _ID.pack(near[1], far[1], *ends, by, _ANY_COOKIE)
        for message in self._ask(socket.AF_INET, _ANY_STATE, wanted, 0):
            _, state, *_, uid, inode = _MESSAGE.unpack_from(message)
            return state, SocketOwner(uid, inode) if inode else None
        return 0, None

    def listening(self, at: str | None = None) -> list[ListeningSocket]:
        """Every TCP socket that listens; `at`: of IPv4, those on this address or on all. The kernel
        leaves out the others, which may be thousands. Raises OSError."""
        found: list[ListeningSocket] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            about = _ID.pack(0, 0, b"", b"", b"", _ANY_COOKIE)
            if at is not None and family == socket.AF_INET:
                about += _on_either(at, "0.0.0.0")
            asked = self._ask(family, 1 << _TCP_LISTEN, about, _NLM_F_DUMP)
            found += map(_listening_socket, asked)
        return found

    def unix_names(self) -> list[UnixName]:
        """The name of every Unix socket that listens, or may come to. Raises OSError."""
        family, show = socket.AF_UNIX, _SHOW_NAME | _SHOW_UID
        states = (_TCP_LISTEN, _TCP_CLOSE)
        mask = sum(1 << state for state in states)
        request = _UNIX_REQUEST.pack(family, 0, mask, 0, show, _ANY_COOKIE)
        found = []
        for message in self._asked(request, _NLM_F_DUMP):
            _, _, state, inode, _ = _UNIX_MESSAGE.unpack_from(message)
            about = dict(_attributes(message, _UNIX_MESSAGE.size))
            if state in states and _UNIX_NAME in about:
                uid = about.get(_UNIX_UID)
                number = None if uid is None else struct.unpack_from("=I", uid)[0]
                found.append(UnixName(about[_UNIX_NAME], number, inode))
        return found

    def _ask(self, family: int, states: int, about: bytes, flags: int) -> Iterator[bytes]:
        """Of TCP sockets: the answers; none where there is no such socket. Raises OSError."""
        return self._asked(_REQUEST.pack(family, socket.IPPROTO_TCP, 0, states) + about, flags)

    def _asked(self, request: bytes, flags: int) -> Iterator[bytes]:
        """Raises OSError."""
        self._sequence += 1
        length = _NLMSGHDR.size + len(request)
        header = (length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | flags, self._sequence, 0)
        self._sock.send(_NLMSGHDR.pack(*header) + request)
        while True:
            for kind, sequence, payload in _messages(self._sock.recv(_MOST)):
                if sequence != self._sequence:
                    continue  # of a question that was given up
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    error = -struct.unpack_from("=i", payload)[0]
                    if error == 2 and not flags:  # ENOENT
                        return
                    raise OSError(error, os.strerror(error))
                yield payload
                if not flags:
                    return


@lru_cache(maxsize=4096)
def _listening_socket(message: bytes) -> ListeningSocket:
    """Of a socket the same is said time and again: whoever watches them asks a hundred times a
    second."""
    family, _, _, _, about, *_, uid, inode = _MESSAGE.unpack_from(message)
    port, _, address, _, interface, _ = _ID.unpack(about)
    size = 4 if family == socket.AF_INET else 16
    text = socket.inet_ntop(family, address[:size])
    only = dict(_attributes(message, _MESSAGE.size)).get(_IPV6_ONLY, b"")
    return ListeningSocket(text, port, uid, inode, any(only), *_INTERFACE.unpack(interface))


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and payload of each message."""
    at = 0
    while at + _NLMSGHDR.size <= len(data):
        length, kind, _, sequence, _ = _NLMSGHDR.unpack_from(data, at)
        yield kind, sequence, data[at + _NLMSGHDR.size : at + length]
        at += max((length + 3) & ~3, _NLMSGHDR.size)


def _attributes(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """Type and value of each."""
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += max((length + 3) & ~3, _ATTRIBUTE.size)


def _on_either(one: str, other: str) -> bytes:
    """A request's filter: sockets on one of these addresses."""
    size = _OP.size + _HOST.size
    conditions = [
        # Past the jump where it is not so; else by the jump, past the other condition.
        _OP.pack(_BC_S_COND, size, size + _OP.size) + _host(one),
        _OP.pack(_BC_JMP, _OP.size, _OP.size + size),
        _OP.pack(_BC_S_COND, size, size + 4) + _host(other),
    ]
    code = b"".join(conditions)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(code), _BYTECODE) + code


def _host(address: str) -> bytes:
    return _HOST.pack(socket.AF_INET, 32, -1, _packed(address))


def _packed(address: str) -> bytes:
    return socket.inet_aton(address)


def opened() -> SockDiag:
    """A way to ask that has shown on a connection of our own that it answers rightly: a kernel
    without the module says of every socket that there is none.

    Raises OSError.
    """
    diag = SockDiag()
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            with socket.create_connection(listener.getsockname()) as near:
                with closing(listener.accept()[0]) as far:
                    owner = diag.owner_of_peer(far.getsockname(), far.getpeername())
                inode = os.fstat(near.fileno()).st_ino
        if owner is None or owner.inode != inode or owner.uid != os.geteuid():
            raise OSError("the kernel does not know whose a connection is (no tcp_diag module)")
    except BaseException:
        diag.close()
        raise
    return diag


class Program(NamedTuple):
    """A process, as far as it can be seen."""

    pid: int
    name: str


def programs(inodes: Collection[int]) -> dict[int, Program]:
    """Which process has each of these sockets, by its inode. Those of other users are seen by root
    only. Walks all of /proc: milliseconds, and more where many files are open.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes if inode}
    found: dict[int, Program] = {}
    for pid in _pids() if wanted else ():
        try:
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                inode = wanted.get(_link(f"/proc/{pid}/fd/{descriptor}"))
                if inode is not None and inode not in found:
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                        found[inode] = Program(pid, comm.read().strip())
        except OSError:
            continue  # another user's, or it has just ended
    return found


class PortHolder(NamedTuple):
    """Who listens where somebody else would."""

    owner: SocketOwner
    program: Program | None
    """None: it cannot be seen, as it is another user's."""


def holders(
    places: Collection[Address], before: Mapping[Address, PortHolder]
) -> dict[Address, PortHolder]:
    """Who listens at these places; `before` is the last answer, from which programs are known.

    Places of which the kernel does not tell are left out. Blocks for milliseconds.
    """
    try:
        with closing(SockDiag()) as diag:
            listening = diag.listening()
    except OSError:
        return {}
    found = {}
    for at in places:
        for sock in listening:
            if sock.takes(at):
                found[at] = SocketOwner(sock.uid, sock.inode)
                break
    news = [owner.inode for at, owner in found.items() if _known(before, at, owner) is None]
    seen = programs(news)
    return {
        at: _known(before, at, owner) or PortHolder(owner, seen.get(owner.inode))
        for at, owner in found.items()
    }


def _known(
    before: Mapping[Address, PortHolder], at: Address, owner: SocketOwner
) -> PortHolder | None:
    known = before.get(at)
    return known if known is not None and known.owner == owner else None


def _pids() -> Iterable[int]:
    try:
        return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
    except OSError:
        return ()


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
