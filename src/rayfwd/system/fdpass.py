"""A bundle: bytes and open sockets for the process that comes after this one, as one descriptor.

It is an end of a socket pair in which all the rest is under way (SCM_RIGHTS, unix(7)). So whoever
keeps it meanwhile, the service manager or this very process across exec, keeps one descriptor and
need not know what is in it; and when nobody keeps it any more, all that is in it is closed.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import NamedTuple

NAME = "rayfwd-handover"
"""Of the descriptor, among those that a process is started with (sd_listen_fds_with_names(3))."""
FIRST_FD = 3
"""The first descriptor that a process is started with beside the standard three."""
MOST_AT_ONCE = 250
"""Descriptors in one message; the kernel's bound is 253 (SCM_MAX_FD)."""
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_SOME, _LAST = b"some", b"last"


class BundleError(Exception):
    """What came is no whole bundle; the text says why."""


class Packed(NamedTuple):
    """A bundle, and the other end of the pair: that is hung up when nobody has the bundle."""

    bundle: socket.socket
    other_end: socket.socket


def pack(data: Sequence[bytes | memoryview], descriptors: Sequence[int]) -> Packed:
    """Put a bundle together. The descriptors are copied. Raises OSError."""
    bundle, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        other_end.setblocking(False)
        other_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)  # as far as it may
        for begin in range(0, len(descriptors), MOST_AT_ONCE):
            socket.send_fds(other_end, [_SOME], descriptors[begin : begin + MOST_AT_ONCE])
        memory = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(memory, "wb") as file:
            file.writelines(data)
            file.flush()
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            socket.send_fds(other_end, [_LAST], [memory])
    except BaseException:
        bundle.close()
        other_end.close()
        raise
    return Packed(bundle, other_end)


def unpack(bundle: socket.socket) -> tuple[bytes, list[int]] | None:
    """Bytes and descriptors, in order; None: it was emptied before. Raises BundleError."""
    bundle.setblocking(False)
    descriptors: list[int] = []
    try:
        while True:
            try:
                word, came, flags, _ = socket.recv_fds(bundle, len(_SOME), MOST_AT_ONCE)
            except BlockingIOError:
                word, came, flags = b"", [], 0
            descriptors += came
            for descriptor in came:
                os.set_inheritable(descriptor, False)  # recv_fds leaves out its flags (3.11)
            if not word and not descriptors:
                return None
            if flags & socket.MSG_CTRUNC:
                raise BundleError("there are not enough file descriptors for it")
            if word == _LAST and len(came) == 1:
                break
            if word != _SOME:
                raise BundleError("it is not whole")
        memory = descriptors.pop()
        with os.fdopen(memory, "rb") as file:
            if fcntl.fcntl(memory, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise BundleError("its bytes are not sealed")
            file.seek(0)
            return file.read(), descriptors
    except (BundleError, OSError) as exc:
        for descriptor in descriptors:
            os.close(descriptor)
        raise BundleError(str(exc)) from exc


def received(env: MutableMapping[str, str]) -> dict[str, list[socket.socket]]:
    """The bundles that this process was started with, by name; what told of them goes from `env`.
    Sockets of other makes are among them, where somebody passes such."""
    pid, count = env.pop("LISTEN_PID", ""), env.pop("LISTEN_FDS", "")
    names = env.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, list[socket.socket]] = {}
    for descriptor, name in zip(range(FIRST_FD, FIRST_FD + int(count)), names, strict=False):
        os.set_inheritable(descriptor, False)
        with suppress(OSError):  # no socket
            found.setdefault(name, []).append(socket.socket(fileno=descriptor))
    return found


def start_with(bundle: socket.socket, env: Mapping[str, str]) -> dict[str, str]:
    """Ready for exec: the environment in which `received` finds this bundle."""
    if bundle.fileno() == FIRST_FD:
        os.set_inheritable(FIRST_FD, True)
    else:
        os.dup2(bundle.fileno(), FIRST_FD, inheritable=True)
    return {**env, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": NAME}
