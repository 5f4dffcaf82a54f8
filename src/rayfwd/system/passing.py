"""Descriptors that come with a connection's first bytes, by a Unix socket (SCM_RIGHTS, unix(7)).

asyncio reads a connection by `recv`, which closes what is passed. Here the first `recv` keeps it
for the connection's protocol.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
from collections.abc import Iterable
from typing import Any

MOST = 2
"""Descriptors that are taken; the kernel closes what is more."""


class Listening(socket.socket):
    """Listens in place of the socket that it is made of.

    `passed` is what came with the bytes that a protocol is just given, by the number of its
    connection: the protocol takes it at once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passed: dict[int, list[int]] = {}

    @classmethod
    def instead_of(cls, sock: socket.socket) -> Listening:
        return cls(fileno=sock.detach())

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        return _Connection(connection.detach(), self.passed), address


class _Connection(socket.socket):
    def __init__(self, descriptor: int, passed: dict[int, list[int]]) -> None:
        super().__init__(fileno=descriptor)
        self._passed = passed

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """The first one; those after it are the socket's own."""
        data, came = _receive(self, bufsize, flags)
        if came:
            self._passed[self.fileno()] = came
        self.recv = super().recv  # type: ignore[method-assign]
        return data


def _receive(sock: socket.socket, size: int, flags: int) -> tuple[bytes, list[int]]:
    # Not `socket.recv_fds`: a program that is started meanwhile would inherit what came.
    came = array.array("i")
    room = socket.CMSG_LEN(MOST * came.itemsize)
    data, ancillary, _, _ = sock.recvmsg(size, room, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            came.frombytes(content[: len(content) - len(content) % came.itemsize])
    return data, list(came)


def is_stream(descriptor: int) -> bool:
    """Whether it is a pipe or a stream socket: what a loop can wait for. It is asked of the kernel
    alone, never of a file system, which might not answer."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)
    except OSError:
        pass
    else:
        return True
    try:
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            return sock.type == socket.SOCK_STREAM
    except OSError:
        return False


def close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
