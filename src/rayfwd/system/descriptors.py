"""File descriptors: how many there may be, and a part of them that is kept for what must not wait.

The kernel gives out the lowest free number. So a number says how many are taken at least, and what
stays below a number leaves all from there on to others.
"""

from __future__ import annotations

import os
import resource

_CEILING = 1 << 20
"""The most that a kernel gives by default (fs.nr_open), where there is no limit."""


def limit() -> int:
    """How many this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CEILING if soft == resource.RLIM_INFINITY else soft


def reserve() -> int:
    """The first number of the reserve, a tenth of all: lanes, the hub and the control socket take
    theirs there when the rest is used up by connections and listeners."""
    return limit() * 9 // 10


def for_listeners() -> int:
    """How many the listeners of other nodes' ports may take: three quarters of all, so that there
    are some for connections whatever nodes there are."""
    return limit() * 3 // 4


def scarce(part: float) -> bool:
    """Whether every number below that part of the limit is taken."""
    try:
        lowest = os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return True
    os.close(lowest)
    return lowest >= limit() * part
