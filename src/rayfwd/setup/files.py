"""Files written whole or not at all, with their owner and mode from the first moment."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path


def write_new(
    path: Path,
    data: bytes,
    mode: int,
    uid: int = -1,
    gid: int = -1,
    *,
    replace: bool = False,
) -> None:
    """Write beside `path` and move it there.

    Raises FileExistsError where it is there already, if not `replace`.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(data)
            out.flush()
            os.fchown(out.fileno(), uid, gid)
            os.fchmod(out.fileno(), mode)
            os.fsync(out.fileno())
        if replace:
            os.rename(fresh, path)
        else:
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
