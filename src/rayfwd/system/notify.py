"""The service manager's notification socket (sd_notify(3)): sdnotify, and what it cannot do.

Where nobody listens, nothing is sent: a daemon that is run by hand need not know.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import sdnotify

SEND_TIMEOUT = 1.0
"""Seconds: a send waits only while the manager's queue is full, and no longer than this."""


class Notifier:
    """A way to the service manager that started this process, if one did."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        # Without the variable sdnotify would leave a socket behind.
        inner = sdnotify.SystemdNotifier() if self._address else None
        self._inner = inner if inner is not None and inner.socket is not None else None
        if self._inner is not None:
            self._inner.socket.settimeout(SEND_TIMEOUT)

    def __bool__(self) -> bool:
        return self._inner is not None

    def send(self, *lines: str) -> None:
        """`NAME=value` each. Whether it was taken, nobody can tell."""
        if self._inner is not None:
            # It sends Latin-1, and systemd takes UTF-8: what is both is ASCII.
            text = "\n".join(line.replace("\n", " ") for line in lines)
            self._inner.notify(text.encode("ascii", "replace").decode("ascii"))

    def send_descriptors(self, descriptors: Sequence[int], *lines: str) -> bool:
        """The same with file descriptors, for its store. False: it was not taken.

        Of its own: sdnotify sends text, and descriptors go beside the text (SCM_RIGHTS).
        """
        if self._inner is None:
            return False
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(SEND_TIMEOUT)
                sock.connect(address)
                socket.send_fds(sock, ["\n".join(lines).encode()], list(descriptors))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Nothing is sent after this."""
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.socket.close()
