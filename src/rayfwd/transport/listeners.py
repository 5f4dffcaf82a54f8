"""Listeners: listening sockets that stand for ports of other nodes, and the relays behind them.

A relay joins one TCP connection and one stream: bytes, half-closes and resets pass through in both
directions, and neither side is read faster than the other takes it.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct
from asyncio.trsock import TransportSocket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, cast

from rayfwd.problems import Problem
from rayfwd.session.frames import Chunk
from rayfwd.session.stream import ResetReason
from rayfwd.system.logs import get_logger
from rayfwd.transport.mux import MuxStream
from rayfwd.transport.readpacing import Reading
from rayfwd.transport.writev import write

log = get_logger(__name__)

WRITE_BUFFER = 1 << 18
"""Bytes that may wait in a socket's transport before the stream's credit is held back."""
DIAL_TIMEOUT = 10.0
"""Seconds for a connection on this machine: made or refused at once, unless a backlog is full."""
BACKLOG = 1024
LISTENER_RETRY = 5.0
"""Seconds between attempts at a listener whose port was taken."""

_TARGET = struct.Struct(">4sH")
_LINGER_OFF = struct.pack("ii", 1, 0)


class Target(NamedTuple):
    """An IPv4 address and a port: what a stream is opened to."""

    address: str
    port: int

    def encode(self) -> bytes:
        return _TARGET.pack(ipaddress.IPv4Address(self.address).packed, self.port)

    @classmethod
    def decode(cls, data: bytes) -> Target:
        """Raises ValueError."""
        if len(data) != _TARGET.size:
            raise ValueError(f"a target of {len(data)} bytes")
        address, port = _TARGET.unpack(data)
        return cls(str(ipaddress.IPv4Address(address)), port)

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


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
        self._transport: asyncio.Transport | None = None
        self._reading: Reading | None = None
        """Of the transport; it outlives it."""
        self._written: deque[Chunk] = deque()
        """What the transport may not have passed on yet: asyncio says how much it is, not what."""
        self._written_size = 0
        self._stream: MuxStream | None = None
        self._early: list[Chunk] = []
        self._early_end = False
        self._owed = 0
        """Bytes written to the transport and not yet reported as consumed."""
        self._full = False
        self._over = False

    # -- the connection's side -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(WRITE_BUFFER)
        no_delay(self._transport.get_extra_info("socket"))
        self._among.add(self)
        self._reading = Reading(self._transport)
        if self._over:
            self._cut()
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
        if not self._over:
            self._over = True
            if self._stream is not None:
                self._stream.reset(ResetReason.ABORTED, str(exc) if exc else "")

    # -- the stream's side -----------------------------------------------------------------------

    def attach(self, stream: MuxStream) -> None:
        """Give the relay its stream."""
        self._stream = stream
        self._read_on()

    def _read_on(self) -> None:
        if self._reading is not None and self._transport is not None and not self._over:
            self._reading.go_on()

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
        self.refuse()

    def refuse(self) -> None:
        """Reset the connection: what Ray sees is what it would have seen without us between."""
        self._over = True
        if self._transport is not None:
            self._cut()

    def _cut(self) -> None:
        assert self._transport is not None
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            linger_off(sock)
        self._transport.abort()

    # -- for a process that comes after this one -------------------------------------------------

    @property
    def held(self) -> Held:
        """What the next process needs to go on with the connection."""
        if self._transport is None:
            return Held(None, b"".join(self._early))
        descriptor = self._transport.get_extra_info("socket").fileno()
        waiting = self._transport.get_write_buffer_size()
        return Held(descriptor, b"".join(self._written)[-waiting:] if waiting else b"")

    def let_go(self) -> None:
        """Another process has the connection now: close it here without a word to the program."""
        self._over = True
        if self._transport is not None:
            self._transport.abort()

    def go_on(self, stream: MuxStream, data: bytes, dialled: bool) -> None:
        """Take up a stream whose last `data` has not been passed on. The connection comes later;
        `dialled`: it stood before."""
        self._stream = stream
        receive = stream.receive
        self._owed = receive.unread - len(data)
        if data:
            self._early.append(data)
        # Once passed on, an end cannot be passed on again: the program may be done by now.
        self._early_end = receive.complete and (bool(data) or not dialled)

    def finish(self, data: bytes) -> None:
        """Pass the last bytes on to a connection that comes later, and close it."""
        self._early.append(data)
        self._connected = lambda relay: relay.stream_finished()


class Held(NamedTuple):
    """A connection as it is handed over."""

    descriptor: int | None
    """None: it is still being dialled."""
    data: bytes
    """What the program is still to be sent."""


def no_delay(sock: socket.socket | TransportSocket) -> None:
    """Send what is short at once, not when the other end has confirmed what went before (Nagle's
    algorithm), which it may do 40 ms later. asyncio sees to that only where a socket was made with
    the protocol's number, and what comes from a listening socket inherits that from it."""
    with suppress(OSError):  # no TCP, or already closed
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def linger_off(sock: socket.socket | TransportSocket) -> None:
    """A reset is what the other end sees when this is closed."""
    with suppress(OSError):  # already closed
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF)


class LocalConnector:
    """Joins streams that other nodes open to ports of this machine. Owns its attempts."""

    def __init__(self) -> None:
        self.relays: set[SocketRelay] = set()
        """Those that have a connection."""
        self._tasks: dict[asyncio.Task[None], tuple[SocketRelay, Target]] = {}

    def accept(self, stream: MuxStream, target: Target) -> SocketRelay:
        """Dial `target` for a stream; a failure resets it with its reason."""
        relay = SocketRelay(self.relays)
        relay.attach(stream)
        self.dial(stream, relay, target)
        return relay

    def dial(self, stream: MuxStream, relay: SocketRelay, target: Target) -> None:
        """Find the relay of a stream its connection."""
        task = asyncio.create_task(self._dial(stream, relay, target), name=f"dial {target}")
        self._tasks[task] = relay, target
        task.add_done_callback(self._done)

    def target_of(self, relay: SocketRelay) -> Target | None:
        """What is being dialled for this relay."""
        return next((target for p, target in self._tasks.values() if p is relay), None)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (exc := task.exception()) is not None:
            raise exc

    async def _dial(self, stream: MuxStream, relay: SocketRelay, target: Target) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                await loop.create_connection(lambda: relay, target.address, target.port)
        except ConnectionRefusedError:
            stream.reset(ResetReason.REFUSED, f"nothing listens on {target}")
        except TimeoutError:
            stream.reset(ResetReason.UNREACHABLE, f"{target} did not answer")
        except OSError as exc:
            scarce = exc.errno in {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS}
            if scarce:
                log.error("dial_failed", target=str(target), cause=str(exc))
            stream.reset(
                ResetReason.TOO_MANY if scarce else ResetReason.UNREACHABLE, f"{target}: {exc}"
            )

    def let_go(self) -> None:
        """Another process dials what is being dialled."""
        for task, (relay, _) in list(self._tasks.items()):
            relay.let_go()
            task.cancel()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


Route = Callable[[Target, SocketRelay], None]
"""Finds a stream to a target for a relay: calls its `attach`, now or later, or its `refuse`."""


class Listeners:
    """The listeners of this machine. `run` opens and closes them until it is cancelled.

    `on_change` is called in the loop after listeners were opened, closed, blocked or unblocked.
    """

    def __init__(self, route: Route, on_change: Callable[[], None] | None = None) -> None:
        self.relays: set[SocketRelay] = set()
        """Those behind the listeners that have a connection."""
        self._inherited: dict[Target, socket.socket] = {}
        """Sockets of an earlier process that listen already, for listeners that are yet to open."""
        self._told = False
        """It is known which listeners there are to be."""
        self._left = asyncio.Event()
        """Another process has the listeners, or will have them."""
        self._route = route
        self._on_change = on_change
        self._wanted: dict[Target, Target] = {}
        self._servers: dict[Target, asyncio.Server] = {}
        self._blocked: dict[Target, Problem] = {}
        self._changed = asyncio.Event()

    @property
    def open(self) -> int:
        """How many listeners are open."""
        return len(self._servers)

    @property
    def wanted(self) -> int:
        """How many listeners there are to be."""
        return len(self._wanted)

    @property
    def blocked_at(self) -> dict[Target, Problem]:
        """What keeps listeners from opening, by where they would listen."""
        return dict(self._blocked)

    @property
    def blocked(self) -> tuple[Problem, ...]:
        """Listeners that could not be opened, and why."""
        return tuple(self._blocked.values())

    def counts(self) -> dict[str, tuple[int, int]]:
        """How many listeners are open and how many blocked, by the address that they stand for."""
        out: dict[str, tuple[int, int]] = {}
        for listen, target in self._wanted.items():
            is_open, blocked = out.get(target.address, (0, 0))
            out[target.address] = (
                is_open + (listen in self._servers),
                blocked + (listen in self._blocked),
            )
        return out

    def set_wanted(self, listeners: Mapping[Target, Target]) -> None:
        """Which listeners there are to be: where each listens, and what it stands for."""
        self._told = True
        if self._wanted != listeners:
            self._wanted = dict(listeners)
            self._changed.set()

    async def run(self) -> None:
        """Keep the listeners as wanted; a port that is taken is tried again until it is free."""
        try:
            while True:
                self._changed.clear()
                before = (set(self._servers), self._blocked)
                await self._reconcile()
                after = (set(self._servers), self._blocked)
                if before != after and self._on_change is not None:
                    self._on_change()
                try:
                    async with asyncio.timeout(LISTENER_RETRY if self._blocked else None):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            for server in self._servers.values():
                server.close()
            self._servers.clear()
            self._close_inherited()

    def stop_accepting(self) -> dict[Target, socket.socket]:
        """For the next process: the sockets, which go on listening. None is opened any more.

        Raises OSError where no descriptors are left.
        """
        self._left.set()
        listening: dict[Target, socket.socket] = {}
        for listen, server in self._servers.items():
            listening[listen] = server.sockets[0].dup()
        while self._servers:
            self._servers.popitem()[1].close()
        return listening

    def relay_for(self, target: Target) -> SocketRelay:
        """For a connection to `target`; it finds its way once it is there."""
        return SocketRelay(self.relays, lambda relay: self._route(target, relay))

    def inherit(self, listening: Mapping[Target, socket.socket]) -> None:
        """Sockets for listeners that `set_wanted` will ask for; what it does not is closed then."""
        self._inherited.update(listening)

    def _close_inherited(self) -> None:
        while self._inherited:
            self._inherited.popitem()[1].close()

    async def _reconcile(self) -> None:
        for listen in [d for d in self._servers if d not in self._wanted]:
            self._servers.pop(listen).close()
        self._blocked = {d: p for d, p in self._blocked.items() if d in self._wanted}
        opened = 0
        for listen in self._wanted:
            if listen not in self._servers and await self._open(listen):
                opened += 1
        if self._told:
            self._close_inherited()
        if opened:
            log.info("listeners_open", listeners=self.open, new=opened)

    async def _open(self, listen: Target) -> bool:
        if self._left.is_set():
            return False
        loop = asyncio.get_running_loop()
        inherited = self._inherited.pop(listen, None)
        sock = inherited or socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if inherited is None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(listen)
            server = await loop.create_server(
                lambda: self.relay_for(self._wanted.get(listen, listen)),
                sock=sock,
                backlog=BACKLOG,
            )
        except OSError as exc:
            sock.close()
            self._block(listen, exc)
            return False
        if self._left.is_set():
            server.close()
            return False
        self._servers[listen] = server
        if listen in self._blocked:
            self._blocked = {d: p for d, p in self._blocked.items() if d != listen}
            log.info("listener_unblocked", listen=str(listen))
        return True

    def _block(self, listen: Target, exc: OSError) -> None:
        problem = why_blocked(listen, self._wanted[listen], exc)
        if self._blocked.get(listen) != problem:
            self._blocked = self._blocked | {listen: problem}
            log.error(problem.code, cause=problem.cause, remedy=problem.remedy)


def why_blocked(listen: Target, target: Target, exc: OSError) -> Problem:
    """The problem behind an error in listening there."""
    if exc.errno == errno.EADDRINUSE:
        return Problem(
            "listener_blocked",
            f"port {listen.port} is in use on this machine, so {listen} cannot be opened for "
            f"{target}",
            f"end what listens on it (see `ss -ltnp sport = :{listen.port}`), or choose another "
            "port: listen in [[forward]], or on the head ray.port, ray.dashboard_port or "
            "ray.client_port, or for any other hub.port_base",
        )
    if exc.errno in {errno.EMFILE, errno.ENFILE}:
        return Problem(
            "descriptors_exhausted",
            f"no file descriptor is left for the listener {listen}",
            "raise the limit (LimitNOFILE= of the service, or ulimit -n)",
        )
    if exc.errno in {errno.EACCES, errno.EPERM}:
        return Problem(
            "listener_blocked",
            f"{listen} cannot be opened: {exc.strerror}",
            "choose a port from 1024 on (listen in [[forward]]): those below are root's",
        )
    return Problem(
        "listener_blocked",
        f"{listen} cannot be opened: {exc.strerror}",
        "rayfwd needs the loopback network of Linux (all of 127.0.0.0/8 is local there)",
    )


def listeners_for(address: str, ports: Iterable[int]) -> dict[Target, Target]:
    """The listeners that stand for all ports of a node: they listen where the node does."""
    return {Target(address, port): Target(address, port) for port in ports}
