"""Listeners: listening sockets of this machine that stand for ports of other nodes."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from types import MappingProxyType

from rayfwd import codes
from rayfwd.problems import Problem
from rayfwd.session.target import Target
from rayfwd.system import descriptors, setting, sockdiag
from rayfwd.system.backoff import Backoff
from rayfwd.system.logs import get_logger
from rayfwd.system.sockdiag import Address, PortHolder
from rayfwd.system.users import user_name
from rayfwd.transport.acceptor import Acceptor
from rayfwd.transport.admission import Admission
from rayfwd.transport.relay import SocketRelay

log = get_logger(__name__)

OPENED_AT_ONCE = 100
"""Listeners that are opened in one turn of the loop."""
RETRY_FIRST, RETRY_LAST = 1.0, 5.0
"""Seconds between attempts at a listener whose port was taken."""
_TAKEN = frozenset({errno.EADDRINUSE, errno.EACCES, errno.EPERM})
"""Errors in listening there that come of the port's number."""

Route = Callable[[Target, SocketRelay], None]
"""Finds a stream to a target for a relay: calls its `attach`, now or later, or its `refuse`."""


REDIRECTED = Target("0.0.0.0", 0)
"""What a listener stands for that takes connections to anywhere, which the kernel redirects."""


class Listeners:
    """The listeners of this machine. `run` opens and closes them until it is cancelled.

    `on_change` is called in the loop after listeners were opened, closed, blocked or unblocked.
    """

    def __init__(
        self,
        route: Route,
        on_change: Callable[[], None] | None = None,
        admission: Admission | None = None,
    ) -> None:
        """`admission` is opened and closed by `run`; by default our own user and root are let in.

        `route` is asked for connections that were admitted."""
        self.relays: set[SocketRelay] = set()
        """Those behind the listeners that have a connection."""
        self.admission = admission or Admission()
        self._acceptor = Acceptor(self.admission, on_change)
        self._inherited: dict[Target, socket.socket] = {}
        """Sockets of an earlier process that listen already, for listeners that are yet to open."""
        self._wanted_known = False
        """It is known which listeners there are to be."""
        self._left = False
        """Another process has the listeners, or will have them."""
        self._route = route
        self._on_change = on_change
        self._wanted: dict[Target, Target] = {}
        self._at_work = False
        """`run` opens and closes them now."""
        self._early = 0
        """How many were opened since it has looked last."""
        self._passing: frozenset[Target] = frozenset()
        """Those of them that stand for a port on which another node's program listens for now."""
        self._open: dict[Target, socket.socket] = {}
        self._blocked: dict[Target, Problem] = {}
        self._holders: dict[Address, PortHolder] = {}
        """Who has the ports of those that are blocked."""
        self.keep: Callable[[Collection[socket.socket]], None] = lambda _: None
        """Called with the sockets of all, when they have changed: somebody else holds them, too."""
        self._changed = asyncio.Event()

    @property
    def open(self) -> int:
        """How many listeners are open."""
        return len(self._open)

    def place_of(self, target: Target) -> Target:
        """Where the listener is that programs dial for a node's port: where the node itself is."""
        return target

    def is_open(self, listen: Target) -> bool:
        """Whether what listens there is a listener of ours."""
        return listen in self._open

    @property
    def wanted(self) -> int:
        """How many listeners there are to be."""
        return len(self._wanted)

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with all of them at once."""
        return [p for p in (self.admission.problem, self._acceptor.problem) if p is not None]

    @property
    def blocked_at(self) -> dict[Target, Problem]:
        """What keeps listeners from opening, by where they would listen."""
        return dict(self._blocked)

    @property
    def blocked(self) -> tuple[Problem, ...]:
        """Listeners that could not be opened, and why."""
        return tuple(self._blocked.values())

    def for_a_node(self, listen: Target) -> bool:
        """Whether the listener there is the one for a port of a node's Ray, or for all of them, and
        no further one."""
        target = self._wanted.get(listen)
        if target is None or listen in self._passing:
            return False
        return target == REDIRECTED or self.place_of(target) == listen

    def counts(self) -> dict[str, tuple[int, int]]:
        """How many listeners are open and how many blocked, by the address that they stand for."""
        out: dict[str, tuple[int, int]] = {}
        for listen, target in self._wanted.items():
            is_open, blocked = out.get(target.address, (0, 0))
            out[target.address] = (
                is_open + (listen in self._open),
                blocked + (listen in self._blocked),
            )
        return out

    def set_wanted(
        self,
        listeners: Mapping[Target, Target],
        passing: Mapping[Target, Target] = MappingProxyType({}),
    ) -> None:
        """Which listeners there are to be: where each listens, and what it stands for.

        `passing` are further ones: nothing depends on them, and programs of this user that share
        their ports (SO_REUSEPORT) may listen on the wildcard.
        """
        self._wanted_known = True
        self._passing = frozenset(passing.keys() - listeners.keys())
        # The others first, as there may be no descriptor for all.
        wanted = {**listeners, **{at: passing[at] for at in passing if at in self._passing}}
        if self._wanted != wanted:
            news = self._passing - self._wanted.keys()
            self._wanted = wanted
            self._changed.set()
            if self._at_work and not self._left:
                self._open_early(news)

    def _open_early(self, news: Collection[Target]) -> None:
        """A port that has opened on another node is dialled as soon as a program here hears of it,
        which may be with the next bytes: so these do not wait for their turn."""
        for listen in islice(news, OPENED_AT_ONCE):
            if listen not in self._open and len(self._open) < descriptors.for_listeners():
                with suppress(OSError):  # `run` says why
                    self._try(listen)
                    self._early += 1

    def freed(self, ports: Collection[int]) -> None:
        """Programs of this machine listen there no more: what they kept from opening may open."""
        if any(listen.port in ports for listen in self._blocked):
            self._changed.set()

    async def run(self) -> None:
        """Keep the listeners as wanted; a port that is taken is tried again until it is free."""
        self.admission.open()
        self._at_work = True
        backoff = Backoff(RETRY_FIRST, RETRY_LAST)
        try:
            while True:
                self._changed.clear()
                early = self._early
                before, kept = (set(self._open), self._blocked), self._lasting()
                await self._reconcile()
                after = (set(self._open), self._blocked)
                if kept != (lasting := self._lasting()) and self._wanted_known:
                    self.keep(lasting.values())
                if (early or before != after) and self._on_change is not None:
                    self._on_change()
                try:
                    async with asyncio.timeout(backoff.next() if self._blocked else None):
                        await self._changed.wait()
                        backoff.reset()
                except TimeoutError:
                    pass
        finally:
            self._at_work = False
            # Not ended: whoever holds them, too, has them for the next process.
            self._acceptor.close()
            self._open.clear()
            while self._inherited:
                self._inherited.popitem()[1].close()
            self.admission.close()

    def _lasting(self) -> dict[Target, socket.socket]:
        """Those that are open and stand for what the plan and the file name."""
        return {at: sock for at, sock in self._open.items() if at not in self._passing}

    def stop_accepting(self) -> dict[Target, socket.socket]:
        """For the next process: the sockets, which go on listening. None is opened any more."""
        self._left = True
        listening = {at: self._acceptor.release(sock) for at, sock in self._open.items()}
        self._open.clear()
        return listening

    def relay_for(self, target: Target) -> SocketRelay:
        """For a connection to `target` that was admitted; it finds its way once it is there."""
        return SocketRelay(self.relays, lambda relay: self._route(target, relay))

    def _relay_of(self, listen: Target, dialled: Target) -> SocketRelay:
        target = self._wanted.get(listen, listen)
        return self.relay_for(dialled if target == REDIRECTED else target)

    def inherit(self, listening: Mapping[Target, socket.socket]) -> None:
        """Sockets for listeners that `set_wanted` will ask for; what it does not is closed then.
        What is inherited twice is closed but once: it is the same socket."""
        if not listening:
            return
        for at, sock in listening.items():
            if at in self._inherited:
                self._inherited.pop(at).close()
            self._inherited[at] = sock
        self.keep(self._inherited.values())

    def _close_inherited(self) -> None:
        while self._inherited:
            _end(self._inherited.popitem()[1])

    async def _reconcile(self) -> None:
        for listen in [d for d in self._open if d not in self._wanted]:
            _end(self._acceptor.release(self._open.pop(listen)))
        self._blocked = {d: p for d, p in self._blocked.items() if d in self._wanted}
        opened, self._early = self._early, 0
        failed: dict[Target, OSError] = {}
        for listen in list(self._wanted):
            if self._left:
                return
            if listen in self._open or listen not in self._wanted:
                continue  # others are wanted since the last turn
            try:
                if len(self._open) >= descriptors.for_listeners():
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                self._try(listen)
            except OSError as exc:
                failed[listen] = exc
                continue
            opened += 1
            if opened % OPENED_AT_ONCE == 0:
                await asyncio.sleep(0)
        await self._block(failed)
        if self._wanted_known:
            self._close_inherited()
        if opened:
            log.info("listeners_open", listeners=self.open, new=opened)

    def _try(self, listen: Target) -> None:
        """Open a listener. Raises OSError."""
        passing = listen in self._passing
        sock = self._inherited.pop(listen, None) or _bound(listen, shared=passing)
        try:
            redirected = self._wanted[listen] == REDIRECTED
            self._acceptor.add(sock, lambda to: self._relay_of(listen, to), redirected)
        except OSError:
            sock.close()
            raise
        self._open[listen] = sock
        if listen in self._blocked:
            self._blocked = {d: p for d, p in self._blocked.items() if d != listen}
            log.info("listener_unblocked", listen=str(listen))

    async def _block(self, failed: Mapping[Target, OSError]) -> None:
        """Keep what prevents them, with who is in the way."""
        taken = [at for at, exc in failed.items() if exc.errno == errno.EADDRINUSE]
        if taken:
            # On a thread: it looks through all of /proc.
            self._holders = await asyncio.to_thread(sockdiag.holders, taken, self._holders)
        for listen, exc in failed.items():
            if (target := self._wanted.get(listen)) is None:
                continue  # not any more
            holder = self._holders.get(listen)
            if passes := listen in self._passing and exc.errno in _TAKEN:
                problem = why_taken(listen, exc, holder)
            else:
                problem = why_blocked(listen, target, exc, holder)
            if self._blocked.get(listen) != problem:
                said = problem in self._blocked.values()  # one for all that want a descriptor
                self._blocked = self._blocked | {listen: problem}
                if not said:
                    say = log.warning if passes else log.error
                    say(problem.code.event, cause=problem.cause, remedy=problem.remedy)


def _bound(listen: Target, shared: bool = False) -> socket.socket:
    """A socket there; `shared`: with others of this user that share it, too. Raises OSError; EMFILE
    also where only the reserve is left."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sock.fileno() >= descriptors.reserve():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(listen)
    except OSError:
        sock.close()
        raise
    return sock


def _end(sock: socket.socket) -> None:
    """Listen no more, whoever else holds the socket."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def said_of(holder: PortHolder | None) -> str:
    """Who it is, as ` by user …`; empty: not known."""
    if holder is None:
        return ""
    user = f" by user {user_name(holder.owner.uid)}"
    program = holder.program
    return user if program is None else f"{user} ({program.name}, pid {program.pid})"


def why_blocked(
    listen: Target, target: Target, exc: OSError, holder: PortHolder | None = None
) -> Problem:
    """The problem behind an error in listening there; `holder` listens there, if that is known."""
    if exc.errno == errno.EADDRINUSE:
        return codes.LISTENER_BLOCKED.problem(
            f"port {listen.port} is in use on this machine{said_of(holder)}, so {listen} cannot be "
            f"opened for {target}",
            f"stop the program that listens on it (`ss -ltnp sport = :{listen.port}`), or choose "
            "another port: `listen` in [[forward]], or on the head "
            + ", ".join(map(setting.key, ("ray.port", "ray.dashboard_port", "ray.client_port")))
            + f", or {setting.key('hub.port_base')} for all others",
        )
    if exc.errno in {errno.EMFILE, errno.ENFILE}:
        return codes.DESCRIPTORS_EXHAUSTED.problem(
            "no file descriptor is left for more listeners",
            "raise the limit (LimitNOFILE= of the service, or `ulimit -n`)",
        )
    if exc.errno in {errno.EACCES, errno.EPERM}:
        return codes.LISTENER_BLOCKED.problem(
            f"{listen} cannot be opened: {exc.strerror}",
            "choose a port from 1024 on (`listen` in [[forward]]): only root may open lower ones",
        )
    return codes.LISTENER_BLOCKED.problem(
        f"{listen} cannot be opened: {exc.strerror}",
        "run rayfwd on Linux, where all of 127.0.0.0/8 is local",
    )


def why_taken(listen: Target, exc: OSError, holder: PortHolder | None = None) -> Problem:
    """Why a port that has opened on another node is not reached from here."""
    if exc.errno == errno.EADDRINUSE:
        why, change = f"is in use on this machine{said_of(holder)}", "one of the two programs"
    else:
        why, change = "may be opened only by root on this machine", "the program"
    return codes.OPEN_PORT_TAKEN.problem(
        f"a program on the node {listen.address} listens on port {listen.port}, but that port "
        f"{why}, so the program cannot be reached from here",
        f"let {change} use another port, or give this node the overlay "
        "(docs/overlay.md), with which nodes do not share ports; if programs choose such ports "
        "themselves, as Serve's replicas do, name their range in "
        f"{setting.theirs('network.apart')} on every node; if nobody needs to reach it, "
        f"name the port in {setting.theirs('network.deny')} on that node",
    )


def listeners_for(address: str, ports: Iterable[int]) -> dict[Target, Target]:
    """The listeners that stand for all ports of a node: they listen where the node does."""
    return {Target(address, port): Target(address, port) for port in ports}
