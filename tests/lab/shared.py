"""A cluster that several files share: those of one directory below tests/lab/.

A start of Ray on three machines takes 16 s of a processor. Where files run side by side, those of
such a directory are run on one side, one after the other (`tests/conftest.py`). Each file takes the
cluster by `whole`; the cluster ends with the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from tests.lab.cluster import Cluster

AGAIN = 20.0
"""Seconds in which what the file before has ended with is over."""


class Shared:
    """Made when a file first asks for it."""

    def __init__(self, make: Callable[[], AbstractContextManager[Cluster]]) -> None:
        self._make = make
        self._held = ExitStack()
        self._cluster: Cluster | None = None

    def whole(self) -> Cluster:
        """With every daemon that was started ready, and nothing wrong. Where a test has left it
        otherwise, it is made anew."""
        if self._cluster is not None and not _is_whole(self._cluster):
            with suppress(AssertionError):  # what is wrong was that test's to say
                self.close()
        if self._cluster is None:
            self._cluster = self._held.enter_context(self._make())
        return self._cluster

    def close(self) -> None:
        """End it."""
        self._cluster = None
        self._held.close()


def _is_whole(cluster: Cluster) -> bool:
    try:
        for daemon in cluster.daemons:
            daemon.wait_status(lambda s: s["state"] == "ready" and not s["conditions"], AGAIN)
    except AssertionError:
        return False
    return True


@contextmanager
def shared(make: Callable[[], AbstractContextManager[Cluster]]) -> Iterator[Shared]:
    """For a fixture of the directory's, with the scope `package`."""
    made = Shared(make)
    yield made
    made.close()
