"""The service manager's notification socket (sd_notify(3)): sdnotify, and what it cannot do.

Where nobody listens, nothing is sent: a daemon that is run by hand need not know.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from contextlib import suppress

import sdnotify

SEND_SECONDS = 1.0
"""A send waits only while the manager's queue is full, and no longer than this."""


class Notifier:
    """A way to the service manager that started this process, if one did."""

    def __init__(self) -> None:
        self._inner: sdnotify.SystemdNotifier | None = None
        if not os.environ.get("NOTIFY_SOCKET"):
            return  # there sdnotify would open a socket all the same
        with suppress(OSError):
            self._inner = sdnotify.SystemdNotifier(debug=True)
            self._inner.socket.settimeout(SEND_SECONDS)

    def __bool__(self) -> bool:
        return self._inner is not None

    def send(self, *lines: str, descriptors: Sequence[int] = ()) -> bool:
        """`NAME=value` each; with file descriptors for its store. False: it was not taken."""
        if self._inner is None:
            return False
        data = "\n".join(line.replace("\n", " ") for line in lines).encode("utf-8", "replace")
        try:
            if descriptors:
                rights = array.array("i", descriptors).tobytes()
                control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                self._inner.socket.sendmsg([data], control)
            else:
                # It sends Latin-1: so the bytes of UTF-8 come out as they are.
                self._inner.notify(data.decode("latin-1"))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Nothing is sent after this."""
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.socket.close()
