"""Looks whether a node's ports are free before Ray is started on them."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable

from rayfwd import codes
from rayfwd.ray import procfs
from rayfwd.system import setting

MOST_NAMED = 5
"""Ports in use that a problem names one by one."""


def check_free(ports: Iterable[int]) -> None:
    """Raises ProblemError (port_in_use) that names the ports and, where it can be seen, by whom.

    Blocks for some milliseconds: call it in a thread.
    """
    taken = [(port, error) for port in ports if (error := _bind(port)) is not None]
    if not taken:
        return
    named = ", ".join(_describe(port, error) for port, error in taken[:MOST_NAMED])
    more = f" and {len(taken) - MOST_NAMED} more" if len(taken) > MOST_NAMED else ""
    what = "port" if len(taken) == 1 else "ports"
    raise codes.PORT_IN_USE.error(
        f"Ray's {what} {named}{more} cannot be opened",
        "stop the programs that use these ports, or move this cluster's ports: set "
        + setting.keys("hub.port_base", "ray.port", "ray.dashboard_port", "ray.client_port")
        + " on the head",
    )


def _bind(port: int) -> int | None:
    """The error number of a bind on the wildcard, as Ray's servers do it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Without it, connections of the last run that linger in TIME_WAIT would count as users.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as exc:
            return exc.errno or errno.EADDRINUSE
    return None


def _describe(port: int, error: int) -> str:
    if error != errno.EADDRINUSE:
        return f"{port} ({os.strerror(error)})"
    holder = procfs.listener(port)
    return f"{port} (held by {holder.name}, pid {holder.pid})" if holder else f"{port} (in use)"
