"""Sockets that the service manager holds while this process runs, so that they outlive its crash.

It has them as one descriptor (`fdpass`): it gives that to the process that it starts next. Between
the two nobody else can listen where they do. Without a service manager they end with the process.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, MutableMapping

from rayfwd.system import fdpass
from rayfwd.system.fdpass import BundleError
from rayfwd.system.logs import get_logger
from rayfwd.system.notify import Notifier

log = get_logger(__name__)

NAMES = ("rayfwd-listeners-a", "rayfwd-listeners-b")
"""Of the descriptor in the manager's store. The next set goes in under the other name, and only
then the last one comes out: at every moment one is there."""


class FdStore:
    """Keeps one set of sockets in the service manager's store."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._next = 0

    def keep(self, sockets: Collection[socket.socket]) -> None:
        """Hold these, and no others any more. Where they cannot be held, this is logged."""
        if not self._notifier:
            return
        name, last = NAMES[self._next], NAMES[1 - self._next]
        self._next = 1 - self._next
        try:
            if sockets and not self._store(name, sockets):
                raise OSError("the service manager did not accept them")
        except OSError as exc:
            log.warning("listeners_not_held", cause=str(exc))
        self._notifier.send("FDSTOREREMOVE=1", f"FDNAME={last}")

    def _store(self, name: str, sockets: Collection[socket.socket]) -> bool:
        bundle, other_end = fdpass.pack([], [sock.fileno() for sock in sockets])
        with bundle, other_end:
            # It is not to look into it (FDPOLL): its other end is closed.
            words = ("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0")
            return self._notifier.send_descriptors([bundle.fileno()], *words)


def taken(given: MutableMapping[str, list[socket.socket]]) -> dict[tuple[str, int], socket.socket]:
    """The same, out of what this process was started with."""
    return held([bundle for name in NAMES for bundle in given.pop(name, [])])


def held(bundles: Collection[socket.socket]) -> dict[tuple[str, int], socket.socket]:
    """The sockets that an earlier process had in the store, by where they listen. The bundles are
    closed."""
    found: dict[tuple[str, int], socket.socket] = {}
    for bundle in bundles:
        with bundle:
            try:
                unpacked = fdpass.unpack(bundle)
            except BundleError as exc:
                log.warning("listeners_not_held", cause=str(exc))
                continue
        for descriptor in unpacked[1] if unpacked is not None else ():
            sock = socket.socket(fileno=descriptor)
            place = sock.getsockname()
            if sock.family != socket.AF_INET or place in found:
                sock.close()
            else:
                found[place] = sock
    return found
