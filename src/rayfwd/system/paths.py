"""Where rayfwd's files lie by default (standard library only: `rayfwd attach` starts with it)."""

from __future__ import annotations

import contextlib
import fcntl
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
RECORD_BEGINS = "# What a daemon was started with that has no file."


def usual_config(env: Mapping[str, str], cluster: str | None = None) -> Path:
    """The file that is read where none is named: a user's own, where there is one."""
    name = DEFAULT_CONFIG.name if cluster is None else f"rayfwd-{cluster}.toml"
    if os.geteuid() != 0:
        home = _home(env)
        for own in (
            own_place(home / ".local" / "state" / "rayfwd") / name,
            home / ".config" / name,
        ):
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

MACHINES = "machines"
"""Below a user's state directory: those of the machines that share this user's home."""
LOCK = "lock"
"""In a state directory: its daemon holds it, and has written there on which machine it runs."""
_NAME_SHOWN = 20
"""Characters of a machine's name in a path: a socket's has room for about a hundred."""
_MOUNTS = "/proc/self/mountinfo"
_ESCAPED = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))
"""What its paths have in the place of these; what stands for itself comes last (proc(5))."""
_NETWORK_DISKS = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "afs",
        "ceph",
        "lustre",
        "gpfs",
        "beegfs",
        "beegfs_nodev",
        "glusterfs",
        "orangefs",
        "pvfs2",
        "panfs",
        "wekafs",
        "fuse.glusterfs",
        "fuse.ceph",
        "fuse.ceph-fuse",
        "fuse.sshfs",
        "fuse.juicefs",
        "fuse.moosefs",
        "fuse.cvmfs",
    ]
)
"""Kinds of file systems on which several machines have one home (proc(5))."""

SERVICE_RUNTIME_DIR = Path("/run/rayfwd")
"""The runtime directory of root's rayfwd and of the systemd service, whatever user that has."""


def default_state_dir(env: Mapping[str, str], cluster: str | None = None) -> Path:
    """systemd's STATE_DIRECTORY; /var/lib/rayfwd for root; else XDG's, or this machine's own below
    that (`of_this_machine`). A cluster that has a name here has one of its own below that."""
    return _of_cluster(_state_dir(env), cluster)


def _state_dir(env: Mapping[str, str]) -> Path:
    if given := env.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/rayfwd")
    usual = Path(env.get("XDG_STATE_HOME") or _home(env) / ".local" / "state") / "rayfwd"
    return of_this_machine(usual)


def own_place(directory: Path) -> Path:
    """Below a user's state directory, the place of this machine alone."""
    name = os.uname().nodename
    plain = "".join(c for c in name if (c.isascii() and c.isalnum()) or c == "-")
    if len(name) > _NAME_SHOWN or plain != name:
        import hashlib  # noqa: PLC0415  # few names are so, and `rayfwd attach` starts with this

        digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8]
        name = f"{plain[: _NAME_SHOWN - 9]}-{digest}"
    return directory / MACHINES / name


def of_this_machine(directory: Path) -> Path:
    """A user's state directory; or the place of this machine below it, where other machines have
    the same one, as of a home on NFS.

    That is so on a disk of the network, and where another machine has been seen there. Who was
    there first keeps the directory itself. What is said here stays true: a place that was made, or
    a directory that this machine has had, is found again, whoever else comes and goes.
    """
    own, us = own_place(directory), os.uname().nodename
    if os.path.isdir(own):
        return own
    locks = [directory / LOCK]
    with contextlib.suppress(OSError):
        clusters = directory / CLUSTERS
        locks += [clusters / name / LOCK for name in os.listdir(clusters)]
    signed = {lock: name for lock in locks if (name := signed_by(lock)) is not None}
    if us in signed.values() or "" in signed.values():  # empty: an earlier version's
        return directory
    if is_on_a_network(directory):
        return own
    known = os.path.isdir(own.parent)  # of several machines
    return own if signed and (known or any(map(_is_held, signed))) else directory


def signed_by(lock: Path) -> str | None:
    """The machine whose daemon has that lock, or had it last; empty: it has not said; None: there
    is no lock."""
    try:
        with lock.open("rb") as file:
            return file.read(256).decode(errors="replace")
    except OSError:
        return None


def _is_held(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def is_on_a_network(path: Path) -> bool:
    """Whether other machines are likely to have the same file system."""
    real = os.path.realpath(path)
    best, kind = "", ""
    with contextlib.suppress(OSError), open(_MOUNTS, "rb") as mounts:
        for line in mounts:
            before, _, after = os.fsdecode(line).partition(" - ")
            words = before.split()
            if len(words) < 5 or not after:  # proc(5)
                continue
            at = words[4]
            for code, character in _ESCAPED:
                at = at.replace(code, character)
            inside = at in ("/", real) or real.startswith(f"{at}/")
            if inside and len(at) >= len(best):  # the last of one place hides the others
                best, kind = at, after.split()[0]
    return kind in _NETWORK_DISKS


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
    return Path(os.path.abspath(env.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir))
