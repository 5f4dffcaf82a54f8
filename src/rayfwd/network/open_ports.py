"""Which ports of this machine other nodes may dial besides the plan's: what Ray's user has open.

`KernelPorts` is asked at each connection, `OpenPortsWatch` looks every so often, so that the others
can be told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import closing, suppress

from rayfwd.network.ruleset import LOWEST_PORT
from rayfwd.session.messages import MOST_OPEN_PORTS
from rayfwd.session.target import Target
from rayfwd.system.budget import Budget
from rayfwd.system.logs import get_logger
from rayfwd.system.sockdiag import ListeningSocket, SockDiag

log = get_logger(__name__)

LOOK_INTERVAL, QUIET_INTERVAL = 0.01, 0.5
"""Seconds between two looks: while ports open and close, and when none did for some time. What
begins to work together opens a first port for which the others wait, and then further ones, which
are dialled some ten milliseconds later, and by gloo but once."""
QUIET_AFTER = 10.0
"""Seconds without a change, here or on another node, after which it is quiet."""
SLOWEST, PART = 1.0, 0.02
"""A look may take this part of the time, unless the pause would be longer than so many seconds."""
SHORT = 4096
"""Bytes that a program may say at once to tell others of a port; more is data."""
LOOKS_AT_ONCE, LOOKS_A_SECOND = 200, 200
"""Looks before what programs say is passed on, for each kind of connection; one takes a tenth of a
millisecond."""

LOOPBACK = "127.0.0.1"

Listening = Callable[[str], Iterable[ListeningSocket]]
"""The TCP sockets that listen on an address or on all. Raises OSError."""


class KernelPorts:
    """Asks the kernel at each connection: a program may have begun to listen a moment ago."""

    def __init__(
        self, uid: int, deny: Collection[int], interface: Callable[[], int] = lambda: 0
    ) -> None:
        """Ports on which programs of `uid` listen, but for those of `deny`. `interface`: the number
        of the one by which connections come to this node's address."""
        self._uid = uid
        self._deny = frozenset(deny)
        self._interface = interface

    def has(self, target: Target) -> bool:
        """Whether it may be dialled. False also where the kernel cannot be asked."""
        return self.listens(target) is True

    def listens(self, target: Target) -> bool | None:
        """The same; None: the kernel cannot be asked."""
        if target.port in self._deny or target.port < LOWEST_PORT:
            return False
        try:
            with closing(SockDiag()) as diag:
                owner = diag.owner_of_listener(target, self._interface())
        except OSError:
            return None
        return owner is not None and owner.uid == self._uid

    def exposed(self, port: int) -> bool | None:
        """Whether any program listens there for this machine; None: the kernel cannot be asked."""
        try:
            with closing(SockDiag()) as diag:
                return diag.owner_of_listener((LOOPBACK, port)) is not None
        except OSError:
            return None


class OpenPortsWatch:
    """Knows them as they were at the last look. `run` looks until it is cancelled."""

    def __init__(
        self,
        listening: Listening,
        uid: int,
        left_out: Callable[[], Collection[int]],
        exposed: Callable[[], Collection[int]],
        on_change: Callable[[], None],
        interface: Callable[[], int] = lambda: 0,
    ) -> None:
        """`left_out`: ports that are never told, or are known without. `exposed`: ports that count
        also where they listen on 127.0.0.1, whosever they are. `on_change` is called when `ports`
        has changed. `interface` is as `KernelPorts` has it."""
        self.address: str | None = None
        """This node's; None: not known yet, and nothing is looked at."""
        self.ports: frozenset[int] | None = None
        """None: not known, as before the first look or where the kernel does not say."""
        self.of_user: frozenset[int] = frozenset()
        """Those on which programs of `uid` listen; the others are exposed, and may be anybody's."""
        self._listening = listening
        self._uid = uid
        self._left_out = left_out
        self._exposed = exposed
        self._on_change = on_change
        self._interface = interface
        self._stirred_at = 0.0
        self._stirred = asyncio.Event()
        self._too_many = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            began = time.perf_counter()
            self.look()
            self._stirred.clear()
            await self._rest(self._pause(time.perf_counter() - began))

    async def _rest(self, seconds: float) -> None:
        """A long rest ends when ports begin to open and close."""
        if seconds < QUIET_INTERVAL:
            await asyncio.sleep(seconds)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stirred.wait()

    def _pause(self, took: float) -> float:
        quiet = asyncio.get_running_loop().time() - self._stirred_at > QUIET_AFTER
        interval = QUIET_INTERVAL if quiet else LOOK_INTERVAL
        return max(interval, min(took / PART, SLOWEST))

    def stir(self) -> None:
        """A port has opened or closed, here or elsewhere: more may follow soon."""
        self._stirred_at = asyncio.get_running_loop().time()
        self._stirred.set()

    def herald(self, wanted: Callable[[], bool]) -> Callable[[int], None]:
        """To be called before so many bytes of a program here are passed on to another node.

        They may name a port that has opened a moment ago, and who hears of it may dial it at once,
        as gloo does, but once. So the news of it goes first, by the same way. `wanted`: whether
        anybody needs that. Each herald has looks of its own to spend.
        """
        looks = Budget(LOOKS_AT_ONCE, LOOKS_A_SECOND, time.monotonic)

        def before_send(size: int) -> None:
            if size <= SHORT and self.address is not None and wanted() and looks.take():
                self.look()

        return before_send

    def look(self) -> None:
        """See what is open now."""
        seen = self._seen()
        if seen != (self.ports, self.of_user):
            self.ports, self.of_user = seen
            self.stir()
            self._on_change()

    def _seen(self) -> tuple[frozenset[int] | None, frozenset[int]]:
        """What `ports` and `of_user` are now."""
        unknown = None, frozenset[int]()
        if self.address is None:
            return unknown
        try:
            interfaces = {0, self._interface()}
            of_user = {
                sock.port
                for sock in self._listening(self.address)
                if sock.uid == self._uid
                and sock.port >= LOWEST_PORT
                and sock.interface in interfaces
                and sock.takes((self.address, sock.port))
            }
            found = set(of_user)
            if exposed := self._exposed():
                there = self._listening(LOOPBACK)
                found |= {p for p in exposed if any(s.takes((LOOPBACK, p)) for s in there)}
        except OSError:
            return unknown
        ports = self._bounded(found.difference(self._left_out()))
        return unknown if ports is None else (ports, ports & of_user)

    def _bounded(self, ports: set[int]) -> frozenset[int] | None:
        """Where there are more than may be told, it is not known which are open."""
        if len(ports) <= MOST_OPEN_PORTS:
            self._too_many = False
            return frozenset(ports)
        if not self._too_many:
            self._too_many = True
            log.warning("open_ports_many", ports=len(ports), most=MOST_OPEN_PORTS)
        return None


def listening(address: str) -> list[ListeningSocket]:
    """The TCP sockets that listen on an address or on all. Raises OSError."""
    with closing(SockDiag()) as diag:
        return diag.listening(address)
