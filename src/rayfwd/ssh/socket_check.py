"""What the system's `ssh` runs on the head beside a lane by the hub's socket: nothing, until it is
asked why that socket was not opened. sshd does not say.

The question is the socket's path, a line on standard input; what is seen of it comes back on
standard error, as lines with a mark of their own. Pure.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rayfwd.system import unixsocket

MARK = "rayfwd-look: "
END = f"{MARK}end"
_LINES = 50
"""Of the kernel's table of Unix sockets, at most."""
_SCRIPT = (
    "while IFS= read -r path; do dir=${path%/*}; { "
    'if LC_ALL=C stat "$path" 2>&1 | grep -q "Permission denied"; then echo shut; '
    'elif ! test -e "$path"; then echo absent; '
    'elif ! test -w "$path"; then stat -c "owned %u %a" "$path"; '
    'else echo open; grep -F -e Inode -e "$dir/" /proc/net/unix | head -n '
    f'{_LINES}; fi; }} 2>/dev/null | sed "s/^/{MARK}/" >&2; echo {END} >&2; done'
)
"""On one line, as `ssh` has it in its log."""

Seen = Literal["absent", "shut", "owned", "listens", "silent"]


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen of a socket, by the user of the login."""

    seen: Seen
    """`silent`: it is there, and nobody listens."""
    uid: int = 0
    mode: int = 0
    """Of one that belongs to somebody else."""


def command() -> str:
    """For the login shell there, whichever it is."""
    return f"exec sh -c {shlex.quote(_SCRIPT)}"


def is_over(said: str) -> bool:
    """It has said all that it sees."""
    return END in said.splitlines()


def look(said: str, path: Path) -> Look | None:
    """None: nothing ran there that looks."""
    lines = [line.removeprefix(MARK) for line in said.splitlines() if line.startswith(MARK)]
    if not is_over(said) or not lines:
        return None
    match lines[0]:
        case "absent":
            return Look("absent")
        case "shut":
            return Look("shut")
        case "open" if len(lines) > 2:  # with the table's heading, and the end
            table = "\n".join(lines[1:-1])
            return Look("listens" if unixsocket.listens(table, path) else "silent")
    if (owned := re.fullmatch(r"owned (\d+) ([0-7]+)", lines[0])) is not None:
        return Look("owned", int(owned[1]), int(owned[2], 8))
    return None
