"""systemd's journal by its native protocol: an event's fields become fields of its entry.

The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")

FIELD_LIMIT = 4000
"""Bytes of a field's value: `journalctl -o json` shows a field of 4096 bytes, name and all, as
null (JSON_THRESHOLD in systemd's logs-show.c)."""

LONG_FIELD_LIMIT = 16000
"""Bytes of a traceback; all of it is shown with `--all`."""

ENTRY_FIELDS = 64
"""Fields of one entry; what comes on top is left out."""

NAME_LIMIT = 64
"""Characters of a field's name: journald drops an entry's longer ones."""

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}

LOST = "RAYFWD_LOST"
"""How many entries before this one the journal had no room for."""

_RESERVED = re.compile(
    r"MESSAGE|MESSAGE_ID|PRIORITY|CODE_(FILE|LINE|FUNC)|ERRNO|(USER_)?INVOCATION_ID|SYSLOG_\w+"
    r"|DOCUMENTATION|TID|(USER_)?UNIT|COREDUMP_\w+|OBJECT_\w+"
)
"""Names that have a meaning for the journal (systemd.journal-fields(7))."""


def is_stream(descriptor: int, env: Mapping[str, str]) -> bool:
    """Whether `descriptor` leads to the journal: JOURNAL_STREAM names its device and inode."""
    device, _, inode = env.get("JOURNAL_STREAM", "").partition(":")
    if not (device.isdecimal() and inode.isdecimal()):
        return False
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (int(device), int(inode))


def field_name(name: str) -> str:
    """`name` as the journal takes it: A to Z, digits and _, beginning with a letter.

    One that the journal has a meaning of its own for gets RAYFWD_ before it.
    """
    upper = re.sub(r"[^A-Z0-9_]", "_", name.upper()).lstrip("_0123456789") or "FIELD"
    if _RESERVED.fullmatch(upper):
        upper = f"RAYFWD_{upper}"
    return upper[:NAME_LIMIT]


def encode(fields: Iterable[tuple[str, str]]) -> bytes:
    """An entry's datagram. Names must be as `field_name` gives them."""
    out = bytearray()
    for name, value in list(fields)[:ENTRY_FIELDS]:
        data = value.encode("utf-8", "backslashreplace")
        if b"\n" in data:
            out += name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        else:
            out += name.encode() + b"=" + data + b"\n"
    return bytes(out)


def printable(text: str) -> str:
    """Control characters but line ends and tabs as escapes: journalctl shows others as a blob."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _code(c) for c in text)


def _code(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def bounded(text: str, limit: int = FIELD_LIMIT, keep_end: bool = False) -> str:
    """`text` cut to `limit` bytes of UTF-8, whole characters."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= limit:
        return text
    mark = "…"
    room = limit - len(mark.encode())
    kept = data[-room:] if keep_end else data[:room]
    shown = kept.decode("utf-8", "ignore")
    return mark + shown if keep_end else shown + mark


class Journal:
    """A way to journald. It never waits: an entry that has no room is counted, and `LOST` in the
    next one says how many there were."""

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._lost = 0

    def send(self, fields: Mapping[str, str]) -> bool:
        """Write an entry. False: there is no journald there, so that it must be said otherwise."""
        lost = {LOST: str(self._lost)} if self._lost else {}
        data = encode([*lost.items(), *fields.items()])
        try:
            self._put(data)
        except BlockingIOError:
            # Its queue is full. Waiting would hold up every connection that we carry.
            self._lost += 1
            return True
        except OSError:
            return False
        self._lost = 0
        return True

    def _put(self, data: bytes) -> None:
        # Connected anew each time: journald may have been replaced in the meantime.
        try:
            self._socket.sendto(data, self._path)
        except OSError as exc:
            # ENOBUFS: as the protocol's own text has it; both say "too large".
            if exc.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                raise
            self._put_as_file(data)

    def _put_as_file(self, data: bytes) -> None:
        """What is too large for a datagram goes as a sealed file in memory."""
        descriptor = os.memfd_create("rayfwd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))
            self._socket.sendmsg([], [rights], 0, self._path)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        self._socket.close()
