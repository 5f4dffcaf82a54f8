"""Children that are other users of this machine; only root can have them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NOBODY, OTHER = 65534, 4242
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
UIDS = [pytest.param(uid, marks=needs_root) for uid in (0, OTHER, NOBODY)]

_BECOME = """
import os, socket, sys
uid = int(sys.argv.pop(1))
if uid != os.geteuid():
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
"""


@contextmanager
def child(
    script: str, *arguments: object, uid: int | None = None, first: str = ""
) -> Iterator[Child]:
    """Python that runs `script` as that user (None: as this one) with `sys.argv[1:]`; it may read
    its standard input to its end, which comes when this is left. `first` runs before it changes."""
    became = os.geteuid() if uid is None else uid
    words = [str(word) for word in (became, *arguments)]
    process = subprocess.Popen(
        [sys.executable, "-c", first + _BECOME + script, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Child(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


class Child:
    """One that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def says(self) -> str:
        """Its next line."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
