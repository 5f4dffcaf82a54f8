"""Where rayfwd's files lie by default (standard library only: `rayfwd attach` starts with it)."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Mapping
from pathlib import Path

from rayfwd.system.ownership import is_ours, stranger_in

DEFAULT_CONFIG = Path("/etc/rayfwd.toml")


def usual_config(env: Mapping[str, str]) -> Path:
    """The file that is read where none is named: a user's own, where there is one."""
    if os.geteuid() != 0:
        own = _home(env) / ".config" / "rayfwd.toml"
        if own.exists():
            return own
    return DEFAULT_CONFIG


SERVICE_RUNTIME_DIR = Path("/run/rayfwd")
"""The runtime directory of root's rayfwd and of the systemd service, whatever user that has."""


def default_state_dir(env: Mapping[str, str]) -> Path:
    """systemd's STATE_DIRECTORY; /var/lib/rayfwd for root; else XDG's."""
    if given := env.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/rayfwd")
    return Path(env.get("XDG_STATE_HOME") or _home(env) / ".local" / "state") / "rayfwd"


def default_runtime_dir(env: Mapping[str, str]) -> Path:
    """systemd's RUNTIME_DIRECTORY; /run/rayfwd for root; else XDG's, else one below the state's.

    None that others can make first, and XDG's only where it is this user's: su keeps the variable.
    """
    if given := env.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return SERVICE_RUNTIME_DIR
    logind = f"/run/user/{os.geteuid()}"
    for given in (env.get("XDG_RUNTIME_DIR"), logind if os.path.isdir(logind) else None):
        if given and is_ours(Path(given)):
            return Path(given) / "rayfwd"
    return default_state_dir(env) / "run"


def find_socket(directory: Path, name: str) -> Path:
    """The socket `name` of a daemon that was left to choose its runtime directory.

    A command may run as another user, or outside of systemd's environment: where `directory`,
    the default as the command sees it, has no such socket, the service's is taken if it is there.
    So it is where others have a say about `directory`.
    """
    here, service = directory / name, SERVICE_RUNTIME_DIR / name
    try:
        if stranger_in(here, (0, os.geteuid())) is not None:
            return service
        return service if not here.exists() and service.exists() else here
    except PermissionError:  # a directory on the way is closed to us: let connecting say so
        return here


def belongs_to_root(path: Path) -> bool:
    """Whether nobody but root could have put there what is there: every directory above it, and
    above what it is a link to, is root's, and for others not to write."""
    try:
        real = path.resolve(strict=True)
        for place in (*path.absolute().parents, real, *real.parents):
            found = place.stat()
            if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
                return False
    except OSError:
        return False
    return True


def _home(env: Mapping[str, str]) -> Path:
    return Path(env.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir)
