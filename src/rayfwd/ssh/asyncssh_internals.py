"""AsyncSSH's insides: tables of all that rayfwd uses of them, and what the fast path does there.

None of this is public, so another version may lay it out otherwise. Every attribute is in the
tables below with the types that it may have. All are looked at before anything is touched: here,
by a login (`login_watch.py`), and where an SSH configuration is read (`passed_over.py`). Where
something is not as it is known, AsyncSSH goes its own way.

For the fast path, each new key is tried on copies of the ciphers: AsyncSSH's way and the way here,
in turn, must give the same bytes and move the same counter. A counter that is used twice gives an
AES-GCM key away.

Sources: RFC 4253 section 6 (packets), RFC 4254 section 5.2 (data and window), RFC 5647 with
OpenSSH's PROTOCOL (AES-GCM: the length is authenticated and not encrypted).
"""

from __future__ import annotations

import asyncio
import copy
import struct
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from asyncssh.constants import MSG_CHANNEL_WINDOW_ADJUST
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

TAG = 16
"""Bytes of authentication behind a packet."""

LENGTH = struct.Struct(">I")

Table = tuple[tuple[str, Callable[[Any], bool]], ...]
"""Names of attributes, each with whether a value is of a type that it may have."""


def _one_of(*types: type) -> Callable[[Any], bool]:
    """Exactly these: bool is an int elsewhere, and a flag is no counter."""
    return lambda value: type(value) in types


CONNECTION: Table = (
    # What is closed already has none.
    ("_transport", lambda value: value is None or hasattr(value, "write")),
    ("_recv_encryption", lambda value: hasattr(value, "decrypt_packet")),
    ("_send_encryption", lambda value: hasattr(value, "encrypt_packet")),
    ("_compressor", lambda value: value is None or hasattr(value, "compress")),
    ("_decompressor", lambda value: value is None or hasattr(value, "decompress")),
    ("_deferred_packets", _one_of(list)),
    ("_inpbuf", _one_of(bytes)),
    ("_packet", _one_of(bytes)),
    ("_recv_handler", callable),
    ("_recv_pkthdr", callable),
    ("_recv_seq", _one_of(int)),
    ("_send_seq", _one_of(int)),
    ("_auth_complete", _one_of(bool)),
    ("_kex_complete", _one_of(bool)),
    ("_rekey_bytes", _one_of(int)),
    ("_rekey_bytes_sent", _one_of(int)),
    ("_rekey_seconds", _one_of(int, float, type(None))),
    ("_rekey_time", _one_of(float)),
)

CHANNEL: Table = (
    ("_recv_state", _one_of(str)),
    ("_recv_paused", _one_of(bool, str)),
    ("_recv_chan", _one_of(int, type(None))),
    ("_recv_window", _one_of(int)),
    ("_init_recv_window", _one_of(int)),
    ("_send_state", _one_of(str)),
    ("_send_chan", _one_of(int, type(None))),
    ("_send_buf", _one_of(list)),
    ("_send_window", _one_of(int)),
    ("_send_pktsize", _one_of(int)),
)

ENCRYPTION: Table = (("_cipher", lambda value: hasattr(value, "encrypt_and_sign")),)

CIPHER: Table = (
    ("_key", _one_of(bytes)),
    ("_iv", _one_of(bytes)),
    ("_update_iv", callable),
)


LOGIN: Table = (
    ("_server_kexinit", _one_of(bytes)),
    ("get_server_auth_methods", callable),
    ("send_userauth_request", callable),
    ("try_next_auth", callable),
)
"""Of a connection that has not logged in yet."""

CONFIG_CLASS: Table = (
    (
        "_handlers",
        lambda value: (
            type(value) is dict
            and all(type(row) is tuple and len(row) == 2 for row in value.values())
        ),
    ),
)
"""Of SSHClientConfig: by an option in small letters, its name and what keeps it."""

CONFIG: Table = (
    ("_options", _one_of(dict)),
    ("_path", lambda value: isinstance(value, PurePath)),
)
"""Of such a configuration while it is read."""


class UnexpectedError(Exception):
    """AsyncSSH is not laid out as it is known here; it says where."""


def check(thing: Any, expected: Table) -> None:
    """Look at each attribute. Raises UnexpectedError."""
    for name, fits in expected:
        try:
            value = getattr(thing, name)
        except AttributeError:
            raise UnexpectedError(f"{type(thing).__name__} has no {name}") from None
        if not fits(value):
            raise UnexpectedError(f"{type(thing).__name__}.{name} is a {type(value).__name__}")


class AsyncsshInternals:
    """A connection and one channel of it. Who makes one has the transport untouched.

    What a packet costs is spent here, so its steps are few and long.
    """

    __slots__ = (
        "_between",
        "_incoming",
        "_outgoing",
        "channel",
        "connection",
        "number",
        "own_number",
        "transport",
    )

    def __init__(self, connection: Any, channel: Any) -> None:
        """Raises UnexpectedError where something is not as it is known here."""
        check(connection, CONNECTION)
        check(channel, CHANNEL)
        self.connection = connection
        self.channel = channel
        self.transport: Any = connection._transport
        """An asyncio.Transport, if the connection is `direct`."""
        self._between = connection._recv_pkthdr
        """AsyncSSH's state when it is between two packets."""
        self.number: int = channel._send_chan
        """The channel's number at the server, as long as it is open."""
        self.own_number: int = channel._recv_chan
        """Its number here."""
        self._incoming = _Key(_try_opening)
        self._outgoing = _Key(_try_sealing)

    def usable(self) -> bool:
        """There can be a fast path. False: a jump host or a command carries the connection, the
        cipher is another, packets are compressed, or keys are being exchanged.

        Raises UnexpectedError.
        """
        connection, channel = self.connection, self.channel
        return (
            isinstance(self.transport, asyncio.Transport)
            and self._incoming.follow(connection._recv_encryption)
            and self._outgoing.follow(connection._send_encryption)
            and connection._compressor is None
            and connection._decompressor is None
            and channel._recv_paused is False
            and self.may_send()
        )

    # -- packets in ------------------------------------------------------------------------------

    def idle(self) -> bool:
        """AsyncSSH has nothing of a packet, and does not work on one."""
        connection = self.connection
        return not connection._inpbuf and bool(connection._recv_handler == self._between)

    def between_packets(self) -> bool:
        """What comes in next is the start of a packet."""
        return self.idle() and not self.connection._packet

    def may_open(self) -> bool:
        """The key of what comes in is known, also after an exchange of keys."""
        return self._incoming.still(self.connection._recv_encryption)

    def open(self, view: memoryview, position: int, stop: int) -> bytes | None:
        """A packet without its length, decrypted and not yet counted. None: it is AsyncSSH's."""
        channel, connection = self.channel, self.connection
        if (
            channel._recv_state != "open"
            or channel._recv_paused
            or connection._inpbuf
            or connection._recv_handler != self._between
        ):
            return None
        start = position + LENGTH.size
        incoming = self._incoming
        try:
            packet: bytes = incoming.aead.decrypt(
                incoming.cipher._iv, view[start:stop], view[position:start]
            )
        except InvalidTag:
            return None  # AsyncSSH finds the same, and ends the connection
        return packet

    def take_room(self, length: int) -> bool:
        """A packet says that the server's window has grown; it is counted. False: AsyncSSH has
        data waiting for that, and sends it itself."""
        if self.channel._send_buf:
            return False
        self._opened()
        self.channel._send_window += length
        return True

    def take_data(self, length: int) -> bool:
        """A packet brings data; it is counted, and room for more is given as AsyncSSH does.

        False: it brings more than the window allows, and AsyncSSH ends the connection.
        """
        channel = self.channel
        left = channel._recv_window - length
        if length <= 0 or left < 0:
            return False
        self._opened()
        channel._recv_window = left
        if left < channel._init_recv_window // 2:
            room = LENGTH.pack(channel._init_recv_window - left)
            channel.send_packet(MSG_CHANNEL_WINDOW_ADJUST, room)
            channel._recv_window = channel._init_recv_window
        return True

    def _opened(self) -> None:
        """Count a packet as AsyncSSH does."""
        self._incoming.cipher._update_iv()
        self.connection._recv_seq = (self.connection._recv_seq + 1) & 0xFFFFFFFF

    # -- packets out -----------------------------------------------------------------------------

    def has_room(self) -> bool:
        """The server takes data now."""
        return bool(self.channel._send_window)

    def may_send(self) -> bool:
        """Data may go out now, in AsyncSSH's eyes too."""
        connection, channel = self.connection, self.channel
        return bool(
            connection._auth_complete
            and connection._kex_complete
            and not connection._deferred_packets
            and connection._rekey_bytes_sent < connection._rekey_bytes
            and channel._send_state == "open"
            and channel._send_pktsize
            and (not connection._rekey_seconds or time.monotonic() < connection._rekey_time)
        )

    def reserve(self, size: int) -> tuple[int, int] | None:
        """Room for data in the server's window: how many of `size` bytes it takes now, and how many
        in a packet, at most. None: they are AsyncSSH's to send."""
        channel = self.channel
        if (
            channel._send_buf
            or not self.may_send()
            or not self._outgoing.still(self.connection._send_encryption)
        ):
            return None
        left = channel._send_window - size
        if left < 0:
            size += left
            left = 0
        channel._send_window = left
        return size, channel._send_pktsize

    def seal(self, packet: bytes) -> tuple[bytes, bytes]:
        """A packet's length, and the rest of it encrypted; it is counted as AsyncSSH does."""
        connection, outgoing = self.connection, self._outgoing
        cipher = outgoing.cipher
        prefix = LENGTH.pack(len(packet))
        sealed = outgoing.aead.encrypt(cipher._iv, packet, prefix)
        cipher._update_iv()  # at once: a counter that is used twice gives the key away
        connection._send_seq = (connection._send_seq + 1) & 0xFFFFFFFF
        connection._rekey_bytes_sent += len(packet)
        return prefix, sealed


class _Key:
    """The AES-GCM key of one direction, as AsyncSSH has it until the next key exchange."""

    __slots__ = ("_encryption", "_try", "aead", "cipher")

    def __init__(self, trial: Callable[[Any, AESGCM], None]) -> None:
        self._encryption: Any = None
        self._try = trial
        self.cipher: Any = None
        self.aead: Any = None

    def follow(self, encryption: Any) -> bool:
        """Be up to date with AsyncSSH. False: the cipher is another than AES-GCM.

        Raises UnexpectedError where it is not as it is known here.
        """
        self._encryption = encryption
        self.cipher = self.aead = None
        if type(encryption).__name__ != "GCMEncryption":
            return False
        check(encryption, ENCRYPTION)
        check(encryption._cipher, CIPHER)
        aead = AESGCM(encryption._cipher._key)
        try:
            self._try(copy.deepcopy(encryption), aead)
        except UnexpectedError:
            raise
        except Exception as exc:
            # Whatever a cipher of another layout raises, it is not the one that is known.
            raise UnexpectedError(
                f"a cipher that does not seal and open as known: {exc!r}"
            ) from exc
        self.cipher, self.aead = encryption._cipher, aead
        return True

    def still(self, encryption: Any) -> bool:
        """The same while a connection runs. False as well where it is not as it was: then
        AsyncSSH goes on by itself."""
        if encryption is self._encryption:
            return self.aead is not None
        try:
            return self.follow(encryption)
        except UnexpectedError:
            return False


TRIAL = bytes(range(32))
"""A packet that never goes out."""
_TURNS = 2
"""By turns, as on a lane: each way has to find the counter where the other has left it."""


def _try_sealing(encryption: Any, aead: AESGCM) -> None:
    """Seal by AsyncSSH's way and by ours in turn. Raises UnexpectedError."""
    cipher, prefix = encryption._cipher, LENGTH.pack(len(TRIAL))
    for _ in range(_TURNS):
        nonce = cipher._iv
        header, tag = encryption.encrypt_packet(0, prefix, TRIAL)
        if header + tag != prefix + aead.encrypt(nonce, TRIAL, prefix):
            raise UnexpectedError("AsyncSSH seals a packet otherwise")
        _moved(cipher, nonce)
        _step(cipher)


def _try_opening(encryption: Any, aead: AESGCM) -> None:
    """Have AsyncSSH open what is sealed here, in turn with ours. Raises UnexpectedError."""
    cipher, prefix = encryption._cipher, LENGTH.pack(len(TRIAL))
    for _ in range(_TURNS):
        nonce = cipher._iv
        sealed = aead.encrypt(nonce, TRIAL, prefix)
        first, rest, tag = prefix + sealed[:12], sealed[12:-TAG], sealed[-TAG:]
        first, length = encryption.decrypt_header(0, first, LENGTH.size)
        if length != prefix:
            raise UnexpectedError("AsyncSSH reads a packet's length otherwise")
        if encryption.decrypt_packet(0, first, rest, LENGTH.size, tag) != TRIAL:
            raise UnexpectedError("AsyncSSH opens a packet otherwise")
        _moved(cipher, nonce)
        _step(cipher)


def _step(cipher: Any) -> None:
    """Move the counter as a packet of ours does."""
    nonce = cipher._iv
    cipher._update_iv()
    _moved(cipher, nonce)


def _moved(cipher: Any, nonce: bytes) -> None:
    """The counter is the one after `nonce` (RFC 5647: the last eight bytes count packets)."""
    count = (int.from_bytes(nonce[4:], "big") + 1) & 0xFFFFFFFFFFFFFFFF
    if cipher._iv != nonce[:4] + count.to_bytes(8, "big"):
        raise UnexpectedError("AsyncSSH's counter of packets moves otherwise")
