"""`rayfwd` for a machine that is head and worker of one cluster at once, as no machine is but here.

A daemon takes another one on its machine with the same network for a cluster that is in its way.
And each would open a listener for the other's ports, which are its own.
"""

from __future__ import annotations

import sys

from rayfwd.cli import main
from rayfwd.daemon.claim import MachineClaim
from rayfwd.network.open_ports import OpenPortsWatch


def take(_self: MachineClaim, _network: str) -> bool:
    """Nobody is in the way."""
    return True


def look(_self: OpenPortsWatch) -> None:
    """Nothing is told."""


if __name__ == "__main__":
    MachineClaim.take = take  # type: ignore[method-assign, assignment]
    OpenPortsWatch.look = look  # type: ignore[method-assign, assignment]
    sys.exit(main(sys.argv[1:]))
