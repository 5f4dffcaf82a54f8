"""systemd's journal by its native protocol: an event's fields become fields of its entry.

The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL. Standard library only.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import re
import socket
import struct
import threading
from collections import deque
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

BACKLOG_LIMIT = 4 * 1024 * 1024
"""Bytes of the entries that wait for journald: of one flood, all that `logs.REPEAT_LIMIT` lets
through. Its socket takes some ten at once (net.unix.max_dgram_qlen)."""

WAIT_TIMEOUT = 0.1
"""For room, before the thread looks again whether it is still wanted."""

CLOSE_TIMEOUT = 1.0
"""For what waits when a process ends."""

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
    return "".join(c if c.isprintable() or c in "\n\t" else code_of(c) for c in text)


def code_of(char: str) -> str:
    """A character that would not be seen, as its number."""
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
    """A way to journald that never waits. What journald has no room for at once follows in order,
    from a thread; beyond `BACKLOG_LIMIT` it is counted, and `LOST` in the next entry says it."""

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        timeval = struct.pack("ll", 0, int(WAIT_TIMEOUT * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._lock = threading.RLock()
        self._sending = False
        self._backlog: deque[bytes] = deque()
        self._backlog_size = 0
        self._lost = 0
        self._sender: threading.Thread | None = None
        self._closing = False
        atexit.register(self.close)  # the last words of a process are worth a moment

    def send(self, fields: Mapping[str, str]) -> bool:
        """Write an entry. False: there is no journald there, so that it must be said otherwise."""
        with self._lock:
            if self._sending:  # a finalizer ran in the midst of this, and has something to say
                self._lost += 1
                return True
            self._sending = True
            try:
                return self._send(fields)
            finally:
                self._sending = False

    def _send(self, fields: Mapping[str, str]) -> bool:
        told = self._lost
        lost = {LOST: str(told)} if told else {}
        data = encode([*lost.items(), *fields.items()])
        try:
            if self._backlog or not self._put(data, socket.MSG_DONTWAIT):
                self._keep(data)
        except OSError:
            return False
        except _NoRoomError:
            self._lost += 1
        else:
            self._lost -= told
        return True

    def _keep(self, data: bytes) -> None:
        """For the thread, which is started where none runs. Raises _NoRoomError."""
        if self._backlog_size + len(data) > BACKLOG_LIMIT or self._closing:
            raise _NoRoomError
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_backlog, name="journal", daemon=True)
            try:
                self._sender.start()  # it waits for the lock, which we hold
            except RuntimeError:  # the system has no thread for us
                self._sender = None
                raise _NoRoomError from None
        self._backlog.append(data)
        self._backlog_size += len(data)

    def _send_backlog(self) -> None:
        while True:
            with self._lock:
                if not self._backlog or self._closing:
                    self._sender = None
                    return
                data = self._backlog[0]
            lost = 0
            try:
                if not self._put(data):
                    continue
            except OSError:  # there is no journald any more
                lost = 1
            with self._lock:
                self._backlog.popleft()
                self._backlog_size -= len(data)
                self._lost += lost

    def _put(self, data: bytes, flags: int = 0) -> bool:
        """False: there was no room, with MSG_DONTWAIT now, else for `WAIT_TIMEOUT`."""
        # Connected anew each time: journald may have been replaced in the meantime.
        try:
            self._socket.sendto(data, flags, self._path)
        except BlockingIOError:
            return False
        except OSError as exc:
            # ENOBUFS: as the protocol's own text has it; both say "too large".
            if exc.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                raise
            return self._put_as_file(data, flags)
        return True

    def _put_as_file(self, data: bytes, flags: int) -> bool:
        """What is too large for a datagram goes as a sealed file in memory."""
        descriptor = os.memfd_create("rayfwd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))
            self._socket.sendmsg([], [rights], flags, self._path)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def close(self) -> None:
        """What waits has `CLOSE_TIMEOUT` to go."""
        atexit.unregister(self.close)
        with self._lock:
            sender = self._sender
        if sender is not None:
            sender.join(CLOSE_TIMEOUT)
            self._closing = True
            sender.join()
        self._socket.close()


class _NoRoomError(Exception):
    """Not even where entries wait."""
