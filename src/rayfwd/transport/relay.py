"""A relay joins one TCP connection and one stream.

Bytes, half-closes and resets pass through in both directions, and neither side is read faster than
the other takes it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from rayfwd.session.frames import Chunk
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening, Target
from rayfwd.system.tcp import cut, no_delay
from rayfwd.transport.mux import Mux, MuxStream
from rayfwd.transport.readpacing import Reading
from rayfwd.transport.writev import write

WRITE_BUFFER = 1 << 18
"""Bytes that may wait in a socket's transport before the stream's credit is held back."""


class SocketRelay(asyncio.Protocol):
    """Joins a TCP connection and a stream. Owns the connection; the stream is given to it.

    Either side may be late: the connection while it is being dialled, the stream while the session
    is being awaited.
    """

    def __init__(
        self, among: set[SocketRelay], connected: Callable[[SocketRelay], None] | None = None
    ) -> None:
        """It is in `among` while it has a connection."""
        self._among = among
        self._connected = connected
        self._lost: Callable[[], None] | None = None
        self._not_in_plan: Callable[[str], None] | None = None
        self._before_send: Callable[[int], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._reading: Reading | None = None
        """Of the transport; it outlives it."""
        self._written: deque[Chunk] = deque()
        """What the transport may not have passed on yet: asyncio says how much it is, not what."""
        self._written_size = 0
        self._stream: MuxStream | None = None
        self._dials: Mux | None = None
        """It has dialled, by this session."""
        self._early: list[Chunk] = []
        self._early_end = False
        self._owed = 0
        """Bytes written to the transport and not yet reported as consumed."""
        self._full = False
        self._over = False
        self.refused: tuple[ResetReason, str] | None = None
        """Why its stream was reset from there."""

    @property
    def over(self) -> bool:
        """Its stream has ended, and its connection ends, too."""
        return self._over

    def when_not_in_plan(self, refused: Callable[[str], None]) -> None:
        """`refused` is called, with the far side's words, when that serves no such port."""
        self._not_in_plan = refused

    def when_read(self, before_send: Callable[[int], None]) -> None:
        """`before_send` is called with the number of bytes that came from the program, before they
        are passed on."""
        self._before_send = before_send

    def when_lost(self, lost: Callable[[], None]) -> None:
        """`lost` is called when it had a connection and has it no more."""
        self._lost = lost

    # -- the connection's side -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(WRITE_BUFFER)
        no_delay(self._transport.get_extra_info("socket"))
        self._among.add(self)
        self._reading = Reading(self._transport)
        if self._over:
            cut(self._transport)
            return
        # Not before the loop reads from it: until 3.11.3 asyncio forgets what is said here.
        asyncio.get_running_loop().call_soon(self._hold)
        early, self._early = self._early, []
        if early:
            self.stream_data(early)
        if not self._full:
            self._report()
        if self._early_end:
            self.stream_ended()
        if self._connected is not None:
            self._connected(self)

    def _hold(self) -> None:
        """Read nothing while it has nowhere to go."""
        if self._transport is None or self._reading is None or self._over:
            return
        if self._stream is None or self._stream.must_wait:
            self._reading.stop()

    def data_received(self, data: bytes) -> None:
        assert self._stream is not None, "a relay reads its socket once it has a stream"
        assert self._reading is not None, "a relay that reads has a connection"
        if self._before_send is not None:
            self._before_send(len(data))
        if not self._stream.send(data) and not self._over:
            self._reading.stop()
        self._reading.after_read(len(data))

    def eof_received(self) -> bool:
        if self._stream is not None:
            self._stream.end()
        return True  # half-closed: the other direction lives on

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._trim()
        self._report()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._among.discard(self)
        if self._lost is not None:
            self._lost()
        if not self._over:
            self._over = True
            if self._stream is not None:
                self._stream.reset(ResetReason.ABORTED, str(exc) if exc else "")

    # -- the stream's side -----------------------------------------------------------------------

    def open_stream(self, mux: Mux | None, to: Target | Opening) -> None:
        """Take a new stream of that session; where it has none to give, the connection is reset."""
        if mux is None or not mux.has_room():
            self.refuse()
        else:
            self._dials = mux
            self.attach(mux.open(to.encode(), self))

    def attach(self, stream: MuxStream) -> None:
        """Give the relay its stream."""
        self._stream = stream
        self._read_on()

    def _read_on(self) -> None:
        if self._reading is not None and self._transport is not None and not self._over:
            self._reading.resume()

    def stream_data(self, chunks: Sequence[Chunk]) -> None:
        if self._over:
            return
        if self._transport is None:
            self._early += chunks  # bounded by the stream's credit: nothing is reported
            return
        write(self._transport, chunks)
        size = sum(map(len, chunks))
        if self._written or self._transport.get_write_buffer_size():
            self._written += chunks
            self._written_size += size
            self._trim()
        self._owed += size
        if not self._full:
            self._report()

    def _trim(self) -> None:
        """Forget what the transport has passed on."""
        assert self._transport is not None
        waiting = self._transport.get_write_buffer_size()
        while self._written and self._written_size - len(self._written[0]) >= waiting:
            self._written_size -= len(self._written.popleft())

    def _report(self) -> None:
        if self._owed and self._stream is not None and not self._over:
            owed, self._owed = self._owed, 0
            self._stream.consumed(owed)

    def stream_ended(self) -> None:
        if self._transport is None:
            self._early_end = True
        elif not self._over:
            try:
                self._transport.write_eof()
            except OSError:
                # The program has reset the connection, and the loop has not noticed yet: an END
                # can meet a socket that is no longer connected (ENOTCONN).
                self._transport.abort()

    def stream_writable(self) -> None:
        self._read_on()

    def stream_finished(self) -> None:
        self._over = True
        if self._transport is not None:
            self._transport.close()

    def stream_lost(self, reason: ResetReason, text: str) -> None:
        self.refused = reason, text
        if self._dials is not None:
            self._dials.refused.note("", self._dials.peer, reason, text)
        if reason is ResetReason.NOT_IN_PLAN and self._not_in_plan is not None:
            self._not_in_plan(text)
        self.refuse()

    def refuse(self) -> None:
        """Reset the connection: what Ray sees is what it would have seen without us between."""
        self._over = True
        if self._transport is not None:
            cut(self._transport)

    # -- for a process that comes after this one -------------------------------------------------

    @property
    def held(self) -> HeldConnection:
        """What the next process needs to go on with the connection."""
        if self._transport is None:
            return HeldConnection(None, b"".join(self._early))
        descriptor = self._transport.get_extra_info("socket").fileno()
        waiting = self._transport.get_write_buffer_size()
        return HeldConnection(descriptor, b"".join(self._written)[-waiting:] if waiting else b"")

    def release(self) -> None:
        """Another process has the connection now: close it here without a word to the program."""
        self._over = True
        if self._transport is not None:
            self._transport.abort()

    def restore(self, stream: MuxStream, data: bytes, dialled: bool) -> None:
        """Take up a stream whose last `data` has not been passed on. The connection comes later;
        `dialled`: it stood before."""
        self._stream = stream
        unread, ended = stream.unread
        self._owed = unread - len(data)
        if data:
            self._early.append(data)
        # Once passed on, an end cannot be passed on again: the program may be done by now.
        self._early_end = ended and (bool(data) or not dialled)

    def restore_last(self, data: bytes) -> None:
        """Pass the last bytes on to a connection that comes later, and close it."""
        self._early.append(data)
        self._connected = lambda relay: relay.stream_finished()


class HeldConnection(NamedTuple):
    """A connection as it is handed over."""

    descriptor: int | None
    """None: it is still being dialled."""
    data: bytes
    """What the program is still to be sent."""
