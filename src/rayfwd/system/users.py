"""Users of the machine, by name and by number."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Sequence

from rayfwd import codes

FIRST_PERSON = 1000
NOBODY = 65534
"""User ids: of the first who is no service (login.defs(5)), and of who is nobody."""
SHOWN = 3
"""Users that are named where there may be many."""


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


def who_else_logs_in(uid: int) -> list[str]:
    """People's accounts beside that user's that have a shell. Those of a directory service are not
    listed by the system, and not seen."""
    return [
        entry.pw_name
        for entry in pwd.getpwall()
        if entry.pw_uid >= FIRST_PERSON
        and entry.pw_uid not in (uid, NOBODY)
        and not entry.pw_shell.endswith(("/nologin", "/false", "/sync"))
    ]


def named(users: Sequence[str]) -> str:
    """The first few, for a message."""
    more = [f"{len(users) - SHOWN} more"] if len(users) > SHOWN else []
    return ", ".join([*users[:SHOWN], *more])
