"""`rayfwd` for a machine that is head and worker of one cluster at once, as no machine is but here.

A daemon takes another one on its machine with the same network for a cluster that is in its way.
"""

from __future__ import annotations

import sys

from rayfwd.cli import main
from rayfwd.daemon.claim import MachineClaim


def take(_self: MachineClaim, _network: str) -> bool:
    """Nobody is in the way."""
    return True


if __name__ == "__main__":
    MachineClaim.take = take  # type: ignore[method-assign, assignment]
    sys.exit(main(sys.argv[1:]))
