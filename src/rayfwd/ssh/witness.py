"""Whether the path is alive over which no new connection comes: by what old ones still hear.

A path that is cut and a firewall that lets no more new connections through are the same to whoever
dials: silence. And a firewall that counts what it drops (`ufw limit`) never lets him through who
goes on dialling as often as a cut path asks for. But such firewalls let packets of old connections
pass. So those whose lanes were given up are kept a while, and the kernel asks on each every second:
where it is answered, and new ones are not, that is a limit.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

ASKED_EVERY = 1
"""Seconds between two questions of the kernel's on a connection where all has arrived."""
ALIVE_WITHIN = 1.6
"""Seconds since the last answer: a path that was alive a question ago."""
BARRED_AFTER = 3.0
"""Seconds for which the path is to be alive: six new connections went unanswered meanwhile."""
LAST_ACK = 56
"""Where `tcpi_last_ack_recv` is in the kernel's `tcp_info`, in milliseconds."""


class Witness:
    """Holds connections that nobody uses any more. `drop` them when they are not needed."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []
        self._alive_since: float | None = None

    def hold(self, connection: socket.socket) -> None:
        """From now on it outlives its owner's `close`. Where the system does not tell what it
        hears, nothing is held."""
        if not hasattr(socket, "TCP_INFO"):
            return
        with suppress(OSError):
            held = socket.socket(fileno=os.dup(connection.fileno()))
            self._held.append(held)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
                held.setsockopt(socket.IPPROTO_TCP, option, ASKED_EVERY)

    def drop(self) -> None:
        while self._held:
            self._held.pop().close()
        self._alive_since = None

    def barred(self, now: float) -> bool:
        """The path has been alive for a while, up to now; to be asked every half a second while
        new connections are tried."""
        ages = [age for held in self._held if (age := _last_heard(held)) is not None]
        if not ages or min(ages) > ALIVE_WITHIN:
            self._alive_since = None
            return False
        if self._alive_since is None:
            self._alive_since = now
        if now - self._alive_since < BARRED_AFTER:
            return False
        self._alive_since = None  # the next attempt is one of its own
        return True


def _last_heard(connection: socket.socket) -> float | None:
    """Seconds since anything was acknowledged there. None: it is over."""
    try:
        connection.getpeername()
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, LAST_ACK + 4)
    except OSError:
        return None
    return float(struct.unpack_from("=I", info, LAST_ACK)[0]) / 1000
