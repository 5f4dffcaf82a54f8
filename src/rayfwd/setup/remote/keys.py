"""Lines of this user's authorized_keys that `rayfwd add` has written: each ends with a name.

Other lines are left as they are, byte by byte.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import asyncssh

from rayfwd import codes
from rayfwd.system.files import locked, write_new

MARK = "rayfwd-add"
"""Before the name, at the end of a line."""


def public_part(text: str) -> str:
    """Type and key of a public key that another machine has told. Raises ValueError."""
    key = asyncssh.import_public_key(text)
    return " ".join(key.export_public_key().decode().split()[:2])


def forced_line(words: list[str], key: str, name: str) -> str:
    """A line by which `key` runs these words and nothing else (sshd(8))."""
    command = shlex.join(words).replace("\\", "\\\\").replace('"', '\\"')
    return f'restrict,command="{command}" {public_part(key)} {MARK} {name}'


def authorize(home: Path, line: str, name: str) -> bool:
    """Have `line` for `name`, in place of what was there for that name; whether it is new.

    Raises ProblemError.
    """
    with _opened(home) as path:
        before = _read(path)
        others = [old for old in before if not _is_of(old, name)]
        if [old for old in before if _is_of(old, name)] == [line]:
            return False
        _write(path, [*others, line])
    return True


def take_back(home: Path, name: str) -> bool:
    """Remove the line for `name`; whether there was one. Raises ProblemError."""
    with _opened(home) as path:
        before = _read(path)
        others = [old for old in before if not _is_of(old, name)]
        if others == before:
            return False
        _write(path, others)
    return True


def _is_of(line: str, name: str) -> bool:
    return line.split()[-2:] == [MARK, name]


@contextlib.contextmanager
def _opened(home: Path) -> Iterator[Path]:
    """The file, for one process at a time. Raises ProblemError."""
    folder = home / ".ssh"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        with locked(folder):
            yield (folder / "authorized_keys").resolve()
    except OSError as exc:
        raise codes.SETUP_FAILED.error(
            f"{folder / 'authorized_keys'}: {exc.strerror or exc}",
            "make it writable for this user, then run the same command again",
        ) from None


def _read(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except FileNotFoundError:
        return []


def _write(path: Path, lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    write_new(path, text.encode(errors="surrogateescape"), mode, replace=True)
