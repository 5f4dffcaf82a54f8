"""`bench.daemon` that lets every user in, and asks the kernel for nobody's connections."""

from __future__ import annotations

import sys

from bench.daemon import take
from rayfwd.cli import main
from rayfwd.daemon.claim import MachineClaim
from rayfwd.transport.admission import Admission


def ask_nobody(_self: Admission) -> None:
    """As where there is no sock_diag."""


if __name__ == "__main__":
    MachineClaim.take = take  # type: ignore[method-assign, assignment]
    Admission.open = ask_nobody  # type: ignore[method-assign, assignment]
    sys.exit(main(sys.argv[1:]))
