"""The service manager's notification socket (sd_notify(3)). Standard library only.

Where nobody listens, nothing is sent: a daemon that is run by hand need not know.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Mapping, Sequence


class Notifier:
    """A way to the service manager that started this process, if one did."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._address = env.get("NOTIFY_SOCKET", "")

    def __bool__(self) -> bool:
        return bool(self._address)

    def send(self, *lines: str, descriptors: Sequence[int] = ()) -> bool:
        """`NAME=value` each; with file descriptors for its store. False: it was not taken."""
        if not self._address:
            return False
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        data = "\n".join(line.replace("\n", " ") for line in lines).encode("utf-8", "replace")
        rights = array.array("i", descriptors).tobytes()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            # Blocking, but only as long as the manager's queue is full.
            sock.settimeout(1.0)
            try:
                control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
                sock.sendmsg([data], control, 0, address)
            except OSError:
                return False
        return True
