"""Whom root's own file lets dial other nodes, for the process that is root's."""

from __future__ import annotations

import os
import pwd
import tomllib
from pathlib import Path

from rayfwd.system.files import read_regular
from rayfwd.system.ownership import stranger_in

_ROOT = 0


def named_users(file: Path) -> frozenset[int]:
    """The ids of the users in `listeners.users` of that configuration.

    Raises ValueError, which says why, where nobody can be taken at that file's word: it cannot be
    read, or somebody besides root may write it. Names that this machine does not know are left out:
    the daemon refuses a file that has one.
    """
    try:
        stranger = stranger_in(file, (_ROOT,))
        if stranger is not None:
            raise ValueError(str(stranger))
        data = tomllib.loads(read_regular(file).decode())
    except OSError as exc:
        raise ValueError(f"{file}: {os.strerror(exc.errno or 0)}") from exc
    except ValueError as exc:
        raise ValueError(f"{file}: {exc}") from exc
    section = data.get("listeners", {})
    names = section.get("users", ()) if isinstance(section, dict) else ()
    found = set()
    for name in names if isinstance(names, list) else ():
        try:
            found.add(pwd.getpwnam(str(name)).pw_uid)
        except (KeyError, ValueError):
            continue
    return frozenset(found)
