"""What keeps the start of a program of ours short."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """For the loading of modules. All of it stays until the process ends: to look through it for
    garbage, again and again while it grows, is a seventh of a daemon's start. It is left out
    afterwards, too. For a process that is a program of ours and nothing else."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def without(module: str) -> Iterator[None]:
    """For the loading of a library that takes this module if it is there, and can do without."""
    loaded = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]  # as if there were none
    try:
        yield
    finally:
        del sys.modules[module]
        if loaded is not None:
            sys.modules[module] = loaded
