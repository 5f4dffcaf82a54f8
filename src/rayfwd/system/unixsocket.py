"""Unix sockets as the control socket and the hub listen on them: bound safely, peers known."""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
from pathlib import Path

from rayfwd import codes
from rayfwd.system import setting

PATH_LIMIT = 107
"""Bytes of a socket's path: `sun_path` has 108, the last of them zero (unix(7))."""

_CONNECT_TIMEOUT = 2.0
_ACCEPTS = "00010000"
"""`__SO_ACCEPTCON` among a socket's flags in /proc/net/unix: it listens."""


def check_path(path: Path) -> None:
    """Raises ProblemError `socket_path_too_long` where the kernel could not take the path."""
    size = len(os.fsencode(path))
    if size > PATH_LIMIT:
        raise codes.SOCKET_PATH_TOO_LONG.error(
            f"the socket path {path} has {size} bytes; Linux allows {PATH_LIMIT}",
            f"set {_elsewhere()} to a shorter path",
        )


def _elsewhere() -> str:
    return setting.either("runtime_dir", "hub.socket")


def bind(path: Path, mode: int = 0o600, uid: int = -1) -> socket.socket:
    """A non-blocking listening socket at `path`, whose mode and owner hold before anyone connects.

    A stale socket file is replaced; one that is answered, or a file that is no socket, is left
    alone. Raises ProblemError `socket_path_too_long`, `socket_in_use`, `socket_not_possible`.
    """
    # Bound under a short-lived name and moved over `path`: the right mode holds from the first
    # moment, and there is no moment at which `path` is missing.
    fresh = path.with_name(_fresh_name(path, secrets.token_hex(2)))
    for candidate in (path, fresh):
        check_path(candidate)
    check_not_taken(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(str(fresh))
        try:
            os.chmod(fresh, mode)
            if uid not in {-1, os.geteuid()}:
                # Not where nothing would change: a confined service may not even ask for it.
                os.chown(fresh, uid, -1)
            listener.listen(128)
            os.rename(fresh, path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
    except OSError as exc:
        listener.close()
        raise codes.SOCKET_NOT_POSSIBLE.error(
            f"cannot listen on {path}: {exc.strerror or exc}",
            f"make its directory writable for this user, or set {_elsewhere()} to another place",
        ) from exc
    except BaseException:
        listener.close()
        raise
    return listener


def _fresh_name(path: Path, mark: str) -> str:
    return f".{path.name[:3]}{mark}"


def listens(table: str, path: Path) -> bool:
    """Whether somebody listens on a socket that `bind` put at `path`, by /proc/net/unix.

    The kernel lists a socket under the name it was bound to, which `bind` gave it only briefly.
    """
    fresh = re.compile(re.escape(_fresh_name(path, "")) + "[0-9a-f]{4}")
    for line in table.splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[3] == _ACCEPTS:
            bound = Path(words[7])
            if bound == path or (bound.parent == path.parent and fresh.fullmatch(bound.name)):
                return True
    return False


def check_not_taken(path: Path) -> None:
    """Raises ProblemError (`socket_in_use`, `socket_not_possible`) where `path` is somebody's."""
    if path.exists() and not path.is_socket():
        raise codes.SOCKET_NOT_POSSIBLE.error(
            f"{path} exists and is not a socket",
            f"move it away, or set {_elsewhere()} to another path",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_TIMEOUT)
        try:
            probe.connect(str(path))
        except TimeoutError:
            pass  # somebody listens but does not accept: in use
        except OSError as exc:
            if exc.errno != errno.EAGAIN:  # EAGAIN: in use, its queue is full
                return
    raise codes.SOCKET_IN_USE.error(
        f"another process answers on {path}",
        f"stop it first: each rayfwd needs its own {setting.key('runtime_dir')}",
    )
