"""What is set at TCP sockets."""

from __future__ import annotations

import asyncio
import socket
import struct
from asyncio.trsock import TransportSocket
from contextlib import suppress

_SO_ORIGINAL_DST = 80
"""linux/netfilter_ipv4.h; `socket` does not have it."""
_SOCKADDR_IN = struct.Struct(">2xH4s8x")
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER for no time at all (socket(7))."""


def no_delay(sock: socket.socket | TransportSocket) -> None:
    """Send what is short at once, not when the other end has confirmed what went before (Nagle's
    algorithm), which it may do 40 ms later. asyncio sees to that only where a socket was made with
    the protocol's number, and what comes from a listening socket inherits that from it."""
    with suppress(OSError):  # no TCP, or already closed
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def reset_on_close(sock: socket.socket | TransportSocket) -> None:
    """A reset is what the other end sees when this is closed."""
    with suppress(OSError):  # already closed
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


def cut(transport: asyncio.WriteTransport) -> None:
    """Close a connection with a reset: what was not sent yet is dropped."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        reset_on_close(sock)
    transport.abort()


def original_destination(sock: socket.socket) -> tuple[str, int]:
    """Where a connection that was accepted was to go before a rule of the kernel redirected it; of
    one that was not redirected, where it came. Raises OSError."""
    raw = sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, _SOCKADDR_IN.size)
    port, address = _SOCKADDR_IN.unpack(raw)
    return socket.inet_ntoa(address), port
