"""Where rayfwd's files lie by default (standard library only: `rayfwd attach` starts with it)."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import stat
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from rayfwd.system.ownership import is_ours, stranger_in

DEFAULT_CONFIG = Path("/etc/rayfwd.toml")

RECORD = "rayfwd.toml"
"""In the runtime directory: the configuration of a daemon that was started without a file."""


def usual_config(env: Mapping[str, str], cluster: str | None = None) -> Path:
    """The file that is read where none is named: a user's own, where there is one."""
    name = DEFAULT_CONFIG.name if cluster is None else f"rayfwd-{cluster}.toml"
    if os.geteuid() != 0:
        own = _home(env) / ".config" / name
        if own.exists():
            return own
    return DEFAULT_CONFIG.with_name(name)


def running_config(env: Mapping[str, str], cluster: str | None = None) -> Path | None:
    """The configuration of this user's daemon that was started without a file, if one was.

    Where `usual_config` has a file, only while that daemon runs. What others can change is none.
    """
    places = (_of_cluster(place, cluster) for place in _runtime_dirs(env))
    records = [place / RECORD for place in places if _is_record(place / RECORD)]
    usual = os.path.exists(usual_config(env, cluster))
    if len(records) == 1 and not usual:
        return records[0]
    running = (record for record in records if _answers(record.with_name(CONTROL_SOCKET)))
    return next(running, records[0] if records and not usual else None)


def _is_record(record: Path) -> bool:
    """Whether it is one, and nobody but this user and root has a say about it."""
    try:
        if not record.is_file() or stranger_in(record, (0, os.geteuid())) is not None:
            return False
        return os.geteuid() != 0 or record.stat().st_uid == 0
    except OSError:
        return False


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def named_clusters(env: Mapping[str, str]) -> list[str]:
    """The clusters with a name of which this user runs a node here."""
    names: set[str] = set()
    for place in _runtime_dirs(env):
        with contextlib.suppress(OSError):
            names.update(os.listdir(place / CLUSTERS))
    return [name for name in sorted(names) if running_config(env, name) is not None]


CONTROL_SOCKET = "control.sock"
SECRET = "attach.key"
"""Beside the hub's socket: what `rayfwd attach --node` shows the hub."""
CLUSTERS = "clusters"
"""Below the usual directories: those of the clusters that have a name here."""

SERVICE_RUNTIME_DIR = Path("/run/rayfwd")
"""The runtime directory of root's rayfwd and of the systemd service, whatever user that has."""


def default_state_dir(env: Mapping[str, str], cluster: str | None = None) -> Path:
    """systemd's STATE_DIRECTORY; /var/lib/rayfwd for root; else XDG's. A cluster that has a name
    here has one of its own below that."""
    return _of_cluster(_state_dir(env), cluster)


def _state_dir(env: Mapping[str, str]) -> Path:
    if given := env.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/rayfwd")
    return Path(env.get("XDG_STATE_HOME") or _home(env) / ".local" / "state") / "rayfwd"


def _of_cluster(directory: Path, cluster: str | None) -> Path:
    return directory if cluster is None else directory / CLUSTERS / cluster


def default_runtime_dir(env: Mapping[str, str], cluster: str | None = None) -> Path:
    """systemd's RUNTIME_DIRECTORY; /run/rayfwd for root; else XDG's, else one below the state's.
    A cluster that has a name here has one of its own below that.

    None that others can make first, and XDG's only where it is there and this user's: su keeps the
    variable, and so do srun and containers, which have no such directory.
    """
    return _of_cluster(_runtime_dirs(env)[0], cluster)


def _runtime_dirs(env: Mapping[str, str]) -> list[Path]:
    """The one that a daemon takes, and then where one may be that began in another environment."""
    if given := env.get("RUNTIME_DIRECTORY"):
        return [Path(given.split(":")[0])]
    if os.geteuid() == 0:
        return [SERVICE_RUNTIME_DIR]
    usual = (env.get("XDG_RUNTIME_DIR"), f"/run/user/{os.geteuid()}")
    there = (Path(place) for place in dict.fromkeys(usual) if place and os.path.isdir(place))
    found = [place / "rayfwd" for place in there if is_ours(place)]
    return [*found, _state_dir(env) / "run"]


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


def have_a_home_and_a_name(env: MutableMapping[str, str]) -> None:
    """Where the user database does not know us, as with `docker run --user 1234`, and the
    environment does not say: AsyncSSH, Ray and Python's own library ask for both, and fail."""
    if env.get("HOME") and env.get("LOGNAME"):
        return
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        env["HOME"] = env.get("HOME") or "/"
        env["LOGNAME"] = env.get("LOGNAME") or str(os.geteuid())


def _home(env: Mapping[str, str]) -> Path:
    return Path(env.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir)
