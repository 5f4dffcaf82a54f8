"""What a daemon takes of its machine: directories, the lock of one, file descriptors."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import tomli_w

from rayfwd import codes
from rayfwd.config import Config
from rayfwd.problems import ProblemError
from rayfwd.system import setting
from rayfwd.system.files import replace_file
from rayfwd.system.ownership import stranger_in
from rayfwd.system.paths import LOCK, RECORD, RECORD_BEGINS, signed_by


@contextlib.contextmanager
def claimed(config: Config) -> Iterator[None]:
    """Have the directories, and be the only daemon there meanwhile. Raises ProblemError."""
    make_directory(config.state_dir, 0o700)
    # Users whom the hub is to serve must get through to its socket; the control socket beside it
    # is for the daemon's own user by its mode.
    make_directory(config.runtime_dir, 0o711 if config.hub.users else 0o700)
    with lock(config.state_dir / LOCK, config.state_dir):
        raise_descriptor_limit()
        yield


@contextlib.contextmanager
def recorded(config: Config) -> Iterator[None]:
    """Where there is no file, have one in the runtime directory meanwhile, for the other verbs."""
    record = config.runtime_dir / RECORD
    if config.path != record:
        yield
        return
    given = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    places = {"name": config.name, "state_dir": str(config.state_dir)}
    text = f"{RECORD_BEGINS}\n" + tomli_w.dumps(
        {**given, **places, "runtime_dir": str(config.runtime_dir)}
    )
    try:
        replace_file(record, text.encode())
    except OSError as exc:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"{record} cannot be written: {exc.strerror or exc}",
            f"make {record.parent} writable for this user, and check that its disk is not full; or "
            f"set {setting.key('runtime_dir')} to another directory",
        ) from exc
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            record.unlink(missing_ok=True)


def make_directory(path: Path, mode: int) -> None:
    """Make a directory with at least this mode, where it is not there, for us alone to change.

    Raises ProblemError (directory_unusable).
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"{path} is no UTF-8, and such a path cannot be written into a file of text",
            f"set {_directories()} to directories with other names",
        ) from None
    try:
        if (
            file := next((p for p in (path, *path.parents) if _is_no_directory(p)), None)
        ) is not None:
            raise codes.DIRECTORY_UNUSABLE.error(
                f"{path} cannot be made: {file} is no directory",
                f"set {_directories()} to directories, or move {file} away",
            )
        _check_ours(path)
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_mode & mode != mode and found.st_uid == os.geteuid():
            path.chmod(found.st_mode & 0o777 | mode)
        _check_ours(path)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as exc:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"{path} cannot be created: {exc.strerror}",
            f"set {_directories()} to directories that this user can write",
        ) from exc
    if not writable:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"{path} is not writable for this user",
            f"set {_directories()} to directories that this user can write",
        )


def _is_no_directory(path: Path) -> bool:
    """It is there, and another thing. Raises PermissionError."""
    return path.exists() and not path.is_dir()


def _directories() -> str:
    return setting.keys("state_dir", "runtime_dir")


def _check_ours(path: Path) -> None:
    """Raises ProblemError where somebody else has a say about what `path` stands for."""
    if (found := stranger_in(path, (0, os.geteuid()))) is not None:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"{path} is not used, because other users can change it: {found}",
            f"set {_directories()} to directories that only this user can write, or run "
            "rayfwd as the user who owns them",
        )


@contextlib.contextmanager
def lock(path: Path, state_dir: Path) -> Iterator[None]:
    """Hold the one lock of a state directory. Raises ProblemError when another daemon has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as exc:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"{path} cannot be opened: {exc.strerror}", "check what is there, and move it away"
        ) from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _running(state_dir, _holder(path)) from None
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def _sign(descriptor: int) -> None:
    """Say who holds it, as the directory may be one for several machines."""
    with contextlib.suppress(OSError):  # a full disk, say
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, os.uname().nodename.encode(), 0)
        os.fsync(descriptor)


def _holder(path: Path) -> str:
    """The machine of the daemon that does; empty: it does not say."""
    for _ in range(20):  # it may have begun in this moment
        if found := signed_by(path):
            return found
        time.sleep(0.01)
    return ""


def _running(state_dir: Path, machine: str) -> ProblemError:
    if machine and machine != os.uname().nodename:
        return codes.ALREADY_RUNNING.error(
            f"another rayfwd is running with {setting.value('state_dir', state_dir)}, on the "
            f"machine {machine}, which has the same directory (as of a home on NFS)",
            f"set {_directories()} to directories of this machine's own; or leave them out: "
            "`rayfwd head` and `rayfwd join` then find such directories by themselves",
        )
    return codes.ALREADY_RUNNING.error(
        f"another rayfwd is running with {setting.value('state_dir', state_dir)}",
        "stop it first; or, to have a second cluster here, give this one a name with "
        f"--cluster, or its own {_directories()}",
    )


def raise_descriptor_limit() -> None:
    """Take as many file descriptors as we may: a listener and a connection cost one each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
