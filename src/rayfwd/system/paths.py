"""Where rayfwd's files lie by default (standard library only: `rayfwd attach` starts with it)."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

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
    """systemd's RUNTIME_DIRECTORY; /run/rayfwd for root; else XDG's, else one in /tmp."""
    if given := env.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return SERVICE_RUNTIME_DIR
    if given := env.get("XDG_RUNTIME_DIR"):
        return Path(given) / "rayfwd"
    return Path(f"/tmp/rayfwd-{os.geteuid()}")


def find_socket(directory: Path, name: str) -> Path:
    """The socket `name` of a daemon that was left to choose its runtime directory.

    A command may run as another user, or outside of systemd's environment: where `directory`,
    the default as the command sees it, has no such socket, the service's is taken if it is there.
    """
    here, service = directory / name, SERVICE_RUNTIME_DIR / name
    try:
        return service if not here.exists() and service.exists() else here
    except PermissionError:  # a directory on the way is closed to us: let connecting say so
        return here


def _home(env: Mapping[str, str]) -> Path:
    return Path(env.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir)
