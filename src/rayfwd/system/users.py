"""Users of the machine, by name and by number."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable

from rayfwd import codes


def allowed_uids(users: Iterable[str], key: str) -> frozenset[int]:
    """The daemon's own uid, root's, and those of the users that `key` of the configuration names.

    Raises ProblemError for a name that the machine does not know.
    """
    uids = {0, os.geteuid()}
    for name in users:
        try:
            uids.add(pwd.getpwnam(name).pw_uid)
        except KeyError:
            raise codes.USER_UNKNOWN.error(
                f'{key}: this machine has no user "{name}"',
                "correct the name, or add the user",
            ) from None
    return frozenset(uids)


def user_name(uid: int) -> str:
    """The login name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
