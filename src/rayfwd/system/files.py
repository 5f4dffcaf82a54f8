"""Files written whole or not at all, with their owner and mode from the first moment.

And read only where they are files: in a directory that others may write, a name may be a link to
what they may not read, or a pipe that nobody ever writes into.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from rayfwd.system.paths import is_on_a_network


def write_new(
    path: Path,
    data: bytes,
    mode: int,
    uid: int = -1,
    gid: int = -1,
    *,
    replace: bool = False,
) -> None:
    """Write beside `path` and move it there; on disk when this returns. Raises OSError.

    Raises FileExistsError where it is there already, if not `replace`.
    """
    with _written_beside(path, data, mode, uid, gid) as fresh:
        if replace:
            os.rename(fresh, path)
        else:
            os.link(fresh, path)
    _sync(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Replace `path` at once with `data`, mode 0600, on disk when this returns. Raises OSError.

    An owner that the file had is kept, so that root can edit for the daemon's user.
    """
    uid = gid = -1
    if os.geteuid() == 0:
        with contextlib.suppress(FileNotFoundError):
            before = path.lstat()
            uid, gid = before.st_uid, before.st_gid
    write_new(path, data, 0o600, uid, gid, replace=True)


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes, mode: int, uid: int, gid: int) -> Iterator[Path]:
    """A file with `data` in the same directory; gone afterwards unless it was moved."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(fresh, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            if (uid, gid) != (-1, -1):  # the service may not call it at all (~@privileged)
                os.fchown(out.fileno(), uid, gid)
            os.fchmod(out.fileno(), mode)
            os.fsync(out.fileno())
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Have the name on disk, not only what it stands for."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LOCK_FILE = ".rayfwd-lock"
"""In a directory of a network disk, while somebody has it locked."""
MOST_READ = 64 << 20
"""Bytes of a file that is read whole: no state of ours has a tenth of it, and one with a hole may
have any size."""
PIECE = 64 << 10
"""Bytes that are read at once: a buffer as large as the most would be made for every file."""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """For one process at a time, as long as all of them ask here: of this machine, and of others
    that have the same directory. Raises OSError."""
    if is_on_a_network(directory):
        with _locked_by_file(directory / LOCK_FILE):
            yield
        return
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def look_anew(directory: Path) -> None:
    """On NFS, have the kernel ask what is in it now. What it remembers, also of names that are not
    there, may be a minute old (nfs(5): acdirmax); opening the directory ends that."""
    with contextlib.suppress(OSError):
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


@contextlib.contextmanager
def _locked_by_file(path: Path) -> Iterator[None]:
    """NFS tells other machines of locks of files, not of directories (flock(2))."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            look_anew(path.parent)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.lstat()):
                    try:
                        yield
                    finally:
                        path.unlink(missing_ok=True)
                    return
        finally:
            os.close(lock)  # else: whoever had it before has removed it


def read_regular(path: Path, most: int = 0) -> bytes:
    """What is in the file, or in the last `most` bytes of it.

    Of a link, a FIFO, a device or a file without end, nothing: so nobody who may write into its
    directory has us read another file, wait, or use up memory. Raises OSError.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if most:
            file.seek(max(0, found.st_size - most))
            return file.read(most)
        data = bytearray()
        while found.st_size <= MOST_READ >= len(data):
            if not (more := file.read(PIECE)):
                return bytes(data)
            data += more
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
