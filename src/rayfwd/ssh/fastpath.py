"""A fast path for the packets of a lane: channel data past AsyncSSH's own handling of packets.

AsyncSSH copies each byte about six times in each direction, makes a cipher a packet, and sends an
IGNORE packet, with a system call of its own, before each packet of data (a measure against an
attack on CBC ciphers). On a lane nearly all packets are data of one channel, or make room for it
(a server says so every 96 KiB), under AES-GCM. This module takes and makes those itself; every
other packet (key exchange, end) it leaves to AsyncSSH, whole and still encrypted. So there is one
cipher state, AsyncSSH's, which both use in turn.

It relies on attributes of AsyncSSH that are not public (`asyncssh_internals.py` has them all).
Where they are not as expected (another version, another cipher, a connection through a jump host)
the lane goes AsyncSSH's way, as slow and as correct as ever. Sources: RFC 4253 section 6
(packets), RFC 4254 section 5.2 (data and window).
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, cast

from asyncssh.constants import MSG_CHANNEL_DATA, MSG_CHANNEL_WINDOW_ADJUST

from rayfwd.session.frames import Chunk
from rayfwd.ssh.asyncssh_internals import LENGTH, TAG, AsyncsshInternals, UnexpectedError
from rayfwd.system.logs import get_logger
from rayfwd.transport.readpacing import pace
from rayfwd.transport.writev import write

log = get_logger(__name__)

BLOCK = 16
"""Bytes that an encrypted packet is a multiple of, without its length."""
PACKET_LIMIT = 1 << 18
"""Bytes of a packet that is taken here; AsyncSSH has a limit of its own for what is longer."""
WRITE_BUFFER = 1 << 17
"""Bytes that may wait in the connection's transport before the lane is asked for no more."""

RANDOM = 1 << 12
"""Random bytes that are asked of the kernel at a time, to fill packets up."""

_DATA = struct.Struct(">BBII")
"""Padding length, message number, channel, length of the data; or by how much the window grows."""


class FastPath(asyncio.Protocol):
    """Stands between a connection's transport and AsyncSSH, for one channel of the connection.

    Owned by the lane that the channel is. AsyncSSH goes on owning the connection: it is told
    everything that is not data of the channel, and closes the transport as ever.
    """

    def __init__(
        self,
        insides: AsyncsshInternals,
        deliver: Callable[[list[memoryview]], None],
        resume: Callable[[], None],
    ) -> None:
        self._insides = insides
        self._connection = insides.connection
        self._channel = insides.channel
        self._deliver_to = deliver
        self._resume = resume
        self._came: list[memoryview] = []
        """Data of the channel that was not yet delivered."""
        self._transport: asyncio.Transport = insides.transport
        self._aligned = False
        """AsyncSSH holds no part of a packet: what comes in next is the start of one."""
        self._rest = b""
        self._random = memoryview(b"")
        self._full = False
        """The transport takes no more bytes for now."""
        self._held: list[Chunk] = []
        """What the server's window had no room for, in order."""
        self._reopened = False
        """What was held has gone out, and nobody was told yet."""

    @property
    def paused(self) -> bool:
        """It wants no more bytes for now."""
        return self._full or bool(self._held)

    @classmethod
    def install(
        cls,
        connection: Any,
        channel: Any,
        deliver: Callable[[list[memoryview]], None],
        resume: Callable[[], None],
    ) -> FastPath | None:
        """Put a fast path under a channel that is open. None where there can be none.

        `deliver` takes data of the channel, in order: all that came in one read. `resume` is called
        when the path is no longer `paused`. Data that AsyncSSH has to handle after all goes to the
        channel's session, as ever.
        """
        try:
            insides = AsyncsshInternals(connection, channel)
            usable = insides.usable()
        except UnexpectedError as exc:
            say_absent(str(exc))
            return None
        if not usable:
            return None
        path = cls(insides, deliver, resume)
        path._align()
        insides.transport.set_write_buffer_limits(WRITE_BUFFER)
        pace.begin(insides.transport)
        insides.transport.set_protocol(path)
        return path

    # -- the transport's side --------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        pace.after_read(self._transport, len(data))
        view = memoryview(data)
        if self._rest:
            # The packet that was cut is put together; the others are taken where they lie.
            missing = self._missing()
            whole, self._rest = self._rest + view[:missing], b""
            self._take_in(memoryview(whole))
            view = view[missing:]
        if view and not self._transport.is_closing():
            self._take_in(view)
        self._deliver()
        self._ask_for_more()

    def _missing(self) -> int:
        """Bytes of the packet that was cut, or more where its length is not known."""
        if len(self._rest) < LENGTH.size:
            return PACKET_LIMIT
        (length,) = LENGTH.unpack_from(self._rest)
        return int(LENGTH.size + length + TAG - len(self._rest))

    def _take_in(self, view: memoryview) -> None:
        """Take packets, the last of which may be cut."""
        if not self._aligned:
            self._pass_on(view)
            self._align()
            return
        position, size = 0, len(view)
        while size - position >= LENGTH.size:
            (length,) = LENGTH.unpack_from(view, position)
            stop = position + LENGTH.size + length + TAG
            if stop > size and length <= PACKET_LIMIT:
                break
            if length > PACKET_LIMIT or not self._insides.may_open():
                # Not for us, and where the next packet starts is not known either.
                self._pass_on(view[position:])
                self._align()
                return
            if not self._take(view, position, stop):
                self._pass_on(view[position:stop])
            if self._transport.is_closing():
                return
            position = stop
        self._rest = bytes(view[position:])

    def eof_received(self) -> bool | None:
        return cast("bool | None", self._connection.eof_received())

    def pause_writing(self) -> None:
        self._full = True
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._full = False
        self._connection.resume_writing()
        self._resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    # -- packets in ------------------------------------------------------------------------------

    def _deliver(self) -> None:
        if self._came:
            came, self._came = self._came, []
            self._deliver_to(came)

    def _pass_on(self, packets: memoryview) -> None:
        """Leave packets to AsyncSSH, after the data before them was delivered."""
        self._deliver()
        self._connection.data_received(bytes(packets))
        self._send_held()

    def _ask_for_more(self) -> None:
        """From AsyncSSH's channel, if what was held has gone out."""
        if self._reopened:
            self._reopened = False
            self._resume()

    def _align(self) -> None:
        self._aligned = self._insides.between_packets()

    def _take(self, view: memoryview, position: int, stop: int) -> bool:
        """Take a packet, if it is data of the channel or room for it. False: it is AsyncSSH's,
        untouched."""
        insides = self._insides
        packet = insides.open(view, position, stop)
        if packet is None or len(packet) < _DATA.size:
            return False
        padding, message, number, length = _DATA.unpack_from(packet)
        size = len(packet) - padding - _DATA.size
        if number != insides.own_number:
            return False
        if message == MSG_CHANNEL_WINDOW_ADJUST and size == 0:
            if not insides.take_room(length):
                return False
            self._send_held()
            return True
        if message != MSG_CHANNEL_DATA or size != length or not insides.take_data(length):
            return False
        self._came.append(memoryview(packet)[_DATA.size : _DATA.size + length])
        return True

    # -- packets out -----------------------------------------------------------------------------

    def write(self, chunks: Sequence[Chunk]) -> None:
        """Send data on the channel. Raises OSError where the channel is closed."""
        if self._held:
            self._held += chunks
        else:
            self._send(chunks)

    def _send(self, chunks: Sequence[Chunk]) -> None:
        wanted = sum(map(len, chunks))
        room = self._insides.reserve(wanted)
        if room is None:
            self._channel.write(b"".join(chunks))
            return
        size, most = room
        if size < wanted:
            chunks, self._held = _split(chunks, size)
            if not size:
                return
        out: list[bytes] = []
        for data, length in _cut(chunks, size, most):
            out += self._packet(data, length)
        write(self._transport, out)

    def _send_held(self) -> None:
        """There may be room for what was held."""
        if self._held and self._insides.has_room():
            held, self._held = self._held, []
            with suppress(OSError):  # the channel is closed, and its lane is told of that
                self._send(held)
            self._reopened = not self._held

    def close(self) -> None:
        """Leave what is held to AsyncSSH, which sends it before it closes the channel."""
        held, self._held = self._held, []
        if held:
            with suppress(OSError):
                self._channel.write(b"".join(held))

    def _packet(self, data: list[Chunk], length: int) -> tuple[bytes, bytes]:
        """A packet of `length` bytes of data: its length, and the rest of it encrypted."""
        padding = -(_DATA.size + length) % BLOCK
        if padding < 4:  # RFC 4253: at least four bytes
            padding += BLOCK
        if len(self._random) < padding:
            self._random = memoryview(os.urandom(RANDOM))
        pad, self._random = self._random[:padding], self._random[padding:]
        head = _DATA.pack(padding, MSG_CHANNEL_DATA, self._insides.number, length)
        return self._insides.seal(b"".join((head, *data, pad)))


@cache
def say_absent(cause: str) -> None:
    """Once, as every lane finds the same."""
    log.info("fast_path_absent", cause=cause)


def _split(chunks: Sequence[Chunk], size: int) -> tuple[list[Chunk], list[Chunk]]:
    """The first `size` bytes, and the rest; nothing is copied."""
    first: list[Chunk] = []
    for number, chunk in enumerate(chunks):
        if len(chunk) > size:
            view = memoryview(chunk)
            return [*first, view[:size]], [view[size:], *chunks[number + 1 :]]
        first.append(chunk)
        size -= len(chunk)
    return first, []


def _cut(chunks: Sequence[Chunk], size: int, most: int) -> Iterator[tuple[list[Chunk], int]]:
    """The chunks in runs of at most `most` bytes, each with its length; nothing is copied."""
    if size <= most:
        yield list(chunks), size
        return
    run: list[Chunk] = []
    room = most
    for chunk in chunks:
        if len(chunk) < room:
            run.append(chunk)
            room -= len(chunk)
            continue
        view = memoryview(chunk)
        while len(view) >= room:
            run.append(view[:room])
            view = view[room:]
            yield run, most
            run, room = [], most
        if view:
            run.append(view)
            room -= len(view)
    if run:
        yield run, most - room
