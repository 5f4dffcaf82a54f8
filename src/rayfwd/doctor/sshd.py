"""What the head's sshd is set to: by its own word where it gives it, else by reading its files.

`sshd -T` and, for who is not root, `sshd -G` (OpenSSH 9.3 on) print the options that hold for one
user, with `Match` blocks applied. Without them the files are read here, and a `Match` block is not.
"""

from __future__ import annotations

import asyncio
import glob
import os
import shlex
import shutil
from pathlib import Path

from rayfwd.doctor.judgements import SshdOptions
from rayfwd.system import children

SSHD_CONFIG = Path("/etc/ssh/sshd_config")
SSHD_TIMEOUT = 10.0
"""Seconds for `sshd -T`, which only reads files."""
MOST_INCLUDES = 16
"""Files that include each other, at most (sshd_config(5))."""

_ADDRESS = "192.0.2.1"
"""Of nobody (RFC 5737): `Match Address` wants one, and workers may come from anywhere."""


async def sshd_options(user: str) -> SshdOptions | None:
    """As they hold when `user` logs in. None: they cannot be read by this user."""
    printed = await _printed("-T" if os.geteuid() == 0 else "-G", user)
    if printed is not None:
        return SshdOptions(parse_printed(printed), user)
    values = await asyncio.to_thread(read_options)
    return None if values is None else SshdOptions(values, None)


async def _printed(flag: str, user: str) -> str | None:
    """What sshd prints of itself; None: it does not."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")
    if sshd is None:
        return None
    argv = [sshd, flag, "-C", f"user={user},host=localhost,addr={_ADDRESS}"]
    try:
        ran = await children.run(*argv, seconds=SSHD_TIMEOUT)
    except OSError:
        return None
    return ran.out.decode(errors="replace") if ran.code == 0 else None


def parse_printed(text: str) -> dict[str, list[str]]:
    """Of `sshd -T`: a line an option, its name in small letters already."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if value:
            found.setdefault(name, []).append(value.lower())
    return found


def read_options(path: Path | None = None) -> dict[str, list[str]] | None:
    """Of the files, for everybody; None: they cannot be read.

    An included file that cannot be read is left out. Of an option that counts once, the first value
    holds (sshd_config(5)).
    """
    found: dict[str, list[str]] = {}
    try:
        _read(SSHD_CONFIG if path is None else path, found, 0)
    except OSError:
        return None
    return found


def _read(path: Path, found: dict[str, list[str]], depth: int) -> None:
    for line in path.read_text(errors="replace").splitlines():
        words = _words(line)
        if not words:
            continue
        name, values = words[0].lower(), words[1:]
        if name == "match":
            return
        if name == "include" and depth < MOST_INCLUDES:
            for pattern in values:
                for file in sorted(glob.glob(str(SSHD_CONFIG.parent / pattern))):
                    try:
                        _read(Path(file), found, depth + 1)
                    except OSError:
                        continue
        elif values:
            found.setdefault(name, []).append(" ".join(values).lower())


def _words(line: str) -> list[str]:
    name, _, rest = line.strip().replace("=", " ", 1).partition(" ")
    if not name or name.startswith("#"):
        return []
    try:
        return [name, *shlex.split(rest, comments=True)]
    except ValueError:
        return [name, *rest.split()]
