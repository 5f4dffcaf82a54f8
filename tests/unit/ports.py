"""Ports for servers that a test starts later, or again: nobody else takes them meanwhile.

A port that the kernel has chosen is anybody's as soon as it is closed, and the tests of other
processes ask for thousands. So each process that runs tests has some of its own, which the kernel
gives nobody who asks it for any, and which are no cluster's (`cli/chosen.py`).
"""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import suppress

FIRST, LAST, OWN = 10_100, 11_999, 95


def _taken() -> tuple[socket.socket, range]:
    """So many, and what others see that they are taken by, until this process ends."""
    starts = range(FIRST, LAST, OWN)
    first = os.getpid() % len(starts)
    for start in (*starts[first:], *starts[:first]):
        mark = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            mark.bind(f"\0rayfwd-tests-ports-{start}")
            return mark, range(start, start + OWN)
        mark.close()
    raise RuntimeError("other processes have all ports that tests may have")


_MARK, _PORTS = _taken()
_turn = itertools.cycle(_PORTS)


def free_port(address: str = "127.0.0.1") -> int:
    """One that is free at that address, this process's for its next servers. As long as there is
    one, it had no connection in the last minute: that is in the way of a server without
    SO_REUSEADDR."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for reuse in (False, True):
        for port in itertools.islice(_turn, OWN):
            with suppress(OSError), socket.socket(family) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
                sock.bind((address, port))
                sock.listen()
                return port
    raise AssertionError(f"no port of {address} is free")
