"""Ports that programs of several nodes look for, each from the lowest on: every node leaves another
part of them to its programs, and holds the rest.

Serve's replicas do so. Where a node has listeners for others' ports, two programs that begin at the
same moment would come to the same port, and neither would be reached from the other's machine. A
port that is held is in use for whoever wants it on all addresses. Listeners have addresses of their
own, and open beside it.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
from collections.abc import Collection, Iterable

from rayfwd.system import descriptors
from rayfwd.system.logs import get_logger

log = get_logger(__name__)

MOST_PARTS = 64
"""A program tries so many ports at most until it finds one of its node's; Serve gives up at 100."""
HELD_AT_ONCE = 100
"""Ports that are taken in one turn of the loop."""
RETRY = 5.0
"""Seconds between attempts at a port that a program has."""


def held_ports(
    ports: Iterable[int], own: str, others: Collection[str], network: str
) -> frozenset[int]:
    """Which of them the node at `own` holds: those of the parts of others (pure).

    There are so many parts, 2, 4, 8 and so on, that no two nodes have one, but 64 at most.
    """
    first = int(ipaddress.IPv4Network(network).network_address)
    numbers = [int(ipaddress.IPv4Address(address)) - first for address in {own, *others}]
    parts = 2
    while parts < MOST_PARTS and len({number % parts for number in numbers}) < len(numbers):
        parts *= 2
    part = (int(ipaddress.IPv4Address(own)) - first) % parts
    return frozenset(port for port in ports if port % parts != part)


class HeldPorts:
    """Holds ports of this machine. `run` takes and leaves them until it is cancelled."""

    def __init__(self) -> None:
        self._at = ""
        self._wanted: frozenset[int] = frozenset()
        self._held: dict[int, socket.socket] = {}
        self._changed = asyncio.Event()

    @property
    def held(self) -> frozenset[int]:
        """Those that it has now."""
        return frozenset(self._held)

    def want(self, at: str, ports: frozenset[int]) -> None:
        """Which are to be held from now on, by sockets at an address that is nobody's."""
        if (at, ports) != (self._at, self._wanted):
            if at != self._at:
                self._release(self._held)
            self._at, self._wanted = at, ports
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled. A port that a program has is taken when it is free."""
        try:
            while True:
                self._changed.clear()
                await self._take()
                in_use = self._wanted - self._held.keys()
                try:
                    async with asyncio.timeout(RETRY if in_use else None):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            self._release(self._held)

    async def _take(self) -> None:
        self._release(self._held.keys() - self._wanted)
        news = sorted(self._wanted - self._held.keys())
        before = len(self._held)
        for number, port in enumerate(news, 1):
            if port not in self._wanted:
                break  # others are wanted by now
            try:
                self._held[port] = _bound(self._at, port)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    break  # no descriptor: the listeners say so
            if number % HELD_AT_ONCE == 0:
                await asyncio.sleep(0)
        if len(self._held) != before:
            log.info("ports_held", held=len(self._held), new=len(self._held) - before)

    def _release(self, ports: Iterable[int]) -> None:
        for port in list(ports):
            self._held.pop(port).close()


def _bound(at: str, port: int) -> socket.socket:
    """A socket that keeps others from listening on all addresses, and listens on none itself.
    Raises OSError."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sock.fileno() >= descriptors.for_listeners():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        # Without SO_REUSEADDR: with it, a program that has it too might listen.
        sock.bind((at, port))
    except OSError:
        sock.close()
        raise
    return sock
