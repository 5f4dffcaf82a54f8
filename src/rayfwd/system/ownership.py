"""Who has a say about a path, and who listens on a socket (standard library only).

A name is only worth what its directories are: whoever may write one of them may put something else
in its place, at any moment. So each directory from the root on is looked at, and each link's way.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_LINKS = 40
"""As many as the kernel follows (path_resolution(7))."""
_ROOT = 0


@dataclass(frozen=True, slots=True)
class Stranger:
    """Somebody who has a say about a path, and should have none."""

    path: Path
    """What of the path's parts is theirs."""
    uid: int | None
    """None: any user, or any of a group."""

    def __str__(self) -> str:
        if self.uid is None:
            return f"other users can write to {self.path}"
        return f"{self.path} belongs to user id {self.uid}"


@cache
def _unmapped() -> int | None:
    """The id that the kernel shows for every user whom this user namespace has no id for
    (user_namespaces(7)); None: a user of this namespace has it, or every user has an id."""
    try:
        shown = int(Path("/proc/sys/kernel/overflowuid").read_text())
        lines = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except (OSError, ValueError):
        return None
    maps = [range(int(first), int(first) + int(count)) for first, _, count in lines]
    return None if any(shown in ids for ids in maps) else shown


def stranger_in(path: Path, owners: Collection[int]) -> Stranger | None:
    """The first who has a say about what `path` stands for, and is none of `owners` (user ids).

    What is not there yet, nobody has. Raises PermissionError where it may not be looked at.

    In a user namespace that has no id for the machine's root (Apptainer, `unshare --user`), `/` and
    /home belong to a user who has none: he is taken for root, but not where everybody makes names.
    """
    unmapped = _unmapped()
    left = list(reversed(Path(os.path.abspath(path)).parts[1:]))
    at = Path("/")
    links = 0
    anybodys = False
    while True:
        try:
            found = at.lstat()
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            return Stranger(at.parent, None)
        if found.st_uid not in owners and found.st_uid != unmapped:
            return Stranger(at, found.st_uid)
        if anybodys and found.st_uid not in (_ROOT, os.geteuid()):
            # Where everybody makes names, its owner may have been faster than who was meant.
            return Stranger(at, found.st_uid)
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _LINKS:
                return Stranger(at, None)
            target = Path(os.readlink(at))
            left += reversed([part for part in target.parts if part != "/"])
            at = Path("/") if target.is_absolute() else at.parent
        else:
            anybodys = False
            if _others_write(found, unmapped):
                if not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
                    return Stranger(at, None)
                anybodys = True
        if not left:
            return None
        part = left.pop()
        at = at.parent if part == ".." else at / part


def _others_write(found: os.stat_result, unmapped: int | None) -> bool:
    """A group that is the owner's own, by its number, is the owner; of one without an id here
    nobody knows whose it is."""
    own = (_ROOT, found.st_uid) if found.st_uid != unmapped else (_ROOT,)
    group = found.st_mode & stat.S_IWGRP and found.st_gid not in own
    return bool(found.st_mode & stat.S_IWOTH or group)


def is_ours(path: Path) -> bool:
    """Whether only this user and root have a say about it."""
    try:
        return stranger_in(path, (_ROOT, os.geteuid())) is None
    except OSError:
        return False


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Process id, user id and group id of who is at the other end (SO_PEERCRED, unix(7))."""
    pid, uid, gid = struct.unpack(
        "iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    )
    return pid, uid, gid


def check_listener(sock: socket.socket, path: Path) -> None:
    """See that who listens on the socket at `path`, to which `sock` is connected, may be believed.

    This user, root, or the one whose directory it is in, if that is nobody else's.
    Raises PermissionError.
    """
    _, uid, _ = peer_credentials(sock)
    if uid in (_ROOT, os.geteuid()):
        return
    directory = path.parent
    owner = directory.stat().st_uid
    if uid != owner or stranger_in(directory, (_ROOT, os.geteuid(), owner)) is not None:
        raise PermissionError(
            f"user id {uid} listens on {path}, and rayfwd does not trust that user"
        )
