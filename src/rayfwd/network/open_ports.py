"""Which ports of this machine other nodes may dial besides the plan's: what Ray's user has open."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing

from rayfwd.session.target import Target
from rayfwd.system.sockdiag import SockDiag


class OpenPorts:
    """Asks the kernel at each look: a program may have begun to listen a moment ago."""

    def __init__(self, uid: int, deny: Collection[int]) -> None:
        """Ports on which programs of `uid` listen, but for those of `deny`."""
        self._uid = uid
        self._deny = frozenset(deny)

    def has(self, target: Target) -> bool:
        """Whether it may be dialled. False also where the kernel cannot be asked."""
        if target.port in self._deny:
            return False
        try:
            with closing(SockDiag()) as diag:
                sockets = diag.listening()
        except OSError:
            return False
        return any(s.uid == self._uid and s.takes(target) for s in sockets)
