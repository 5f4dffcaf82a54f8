"""Streams outlive a restart: what this process holds goes to the one that comes after it.

`leave` packs sessions, connections and listeners of the process that ends; `Arrival` is what the
next one found. Both know muxes, relays and listeners; what else head and worker give along is
theirs. The bundle between them is `rayfwd.system.fdpass`'s, its bytes are a `session.snapshot`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn, Protocol

from rayfwd import __version__
from rayfwd.session import snapshot
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.session.target import Opening, Target
from rayfwd.system import fdpass
from rayfwd.system.fdpass import BundleError, Packed
from rayfwd.system.logs import close_journal, get_logger
from rayfwd.system.notify import Notifier
from rayfwd.system.tcp import reset_on_close
from rayfwd.transport.connector import LocalConnector
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.mux import Mux
from rayfwd.transport.relay import HeldConnection, SocketRelay

log = get_logger(__name__)

RESET = "nothing: the streams are reset once, and everything recovers by itself"
KEEP_SECONDS = 10
"""Seconds that the service manager may take to store a descriptor: as long as it is busy."""
SETTLE_SECONDS = 5.0
"""Seconds that a process which is told to restart waits for the end of its own beginning."""
PROBE = f"{fdpass.NAME}-probe"
ACCEPT_TURNS = 5
"""Turns of the loop after which what a listener accepted has its relay: asyncio takes three."""


class Holder(Protocol):
    """A role, as far as it hands over and takes over."""

    @property
    def listeners(self) -> Listeners: ...

    @property
    def connector(self) -> LocalConnector: ...

    def muxes(self) -> Mapping[str, Mux]:
        """The sessions, by the peer's name."""

    def waiting(self) -> Iterable[tuple[Target, SocketRelay]]:
        """Connections of listeners that wait for a session."""

    def stop_accepting(self) -> socket.socket | None:
        """The role's own listening socket, which goes on listening. Raises OSError."""

    def hand_over(self) -> Tree:
        """Stop, and give the sessions as they are then, and what else the role needs to go on."""

    def take_over(self, tree: Tree) -> None:
        """Go on with what `hand_over` gave. Raises SnapshotError."""

    def take_over_splices(self, tree: Tree) -> None:
        """Once the sessions are there: join streams that are joined to each other."""


class Departure:
    """What is handed over, as it is put together."""

    def __init__(self, role: str, name: str) -> None:
        self.descriptors: list[int] = []
        self.tree: Tree = {
            "version": __version__,
            "role": role,
            "name": name,
            "taken_at": time.monotonic(),
        }

    def add(self, descriptor: int) -> int:
        """The number by which the tree names this one."""
        self.descriptors.append(descriptor)
        return len(self.descriptors) - 1

    def add_listening(
        self, listeners: Mapping[Target, socket.socket], own: socket.socket | None
    ) -> None:
        self.tree["listeners"] = [[*at, self.add(s.fileno())] for at, s in listeners.items()]
        self.tree["listening"] = None if own is None else self.add(own.fileno())

    def add_relays(self, holder: Holder) -> None:
        """The connections: those of streams, those that wait for a session, and those that only
        wait for their last bytes."""
        rows, connector = [], holder.connector
        rest = holder.listeners.relays | connector.relays
        for name, mux in holder.muxes().items():
            for number, owner in mux.owners.items():
                if isinstance(owner, SocketRelay):
                    rest.discard(owner)
                    held, opening = owner.held, connector.opening_of(owner)
                    dialled = None if opening is None else opening.encode()
                    rows.append([name, number, self._of(held), dialled, held.data])
        self.tree["relays"] = rows
        self.tree["waiting"] = waiting = []
        for target, relay in holder.waiting():
            if relay in rest:
                rest.discard(relay)
                waiting.append([target, self._of(relay.held)])
        last = [relay.held for relay in rest]
        self.tree["finishing"] = [[self._of(held), held.data] for held in last]

    def _of(self, held: HeldConnection) -> int | None:
        return None if held.descriptor is None else self.add(held.descriptor)


async def leave(holder: Holder, role: str, name: str) -> Packed:
    """Stop, and pack everything. Raises OSError.

    Nothing of the holder's works afterwards, whether this succeeds or not.
    """
    leaving = Departure(role, name)
    relays: set[SocketRelay] = set()
    with contextlib.ExitStack() as stack:
        try:
            listeners = holder.listeners.stop_accepting()
            for sock in listeners.values():
                stack.enter_context(sock)
            own = holder.stop_accepting()
            if own is not None:
                stack.enter_context(own)
            leaving.add_listening(listeners, own)
            for _ in range(ACCEPT_TURNS):
                await asyncio.sleep(0)
            # From here on in one go, so that no byte is read that is not in the bundle.
            relays = holder.listeners.relays | holder.connector.relays
            leaving.add_relays(holder)
            leaving.tree["sessions"] = holder.hand_over()
            packed = fdpass.pack(snapshot.dump(leaving.tree), leaving.descriptors)
        except BaseException:
            for relay in relays:
                relay.refuse()
            raise
        holder.connector.release()
        for relay in relays:
            relay.release()
    log.info("handover_packed", streams=len(leaving.tree["relays"]), listeners=len(listeners))
    return packed


class Arrival:
    """What an earlier process has handed over. Sockets that nobody claims are reset."""

    def __init__(self, tree: Tree, descriptors: Iterable[int]) -> None:
        self.tree = tree
        self._taken = asyncio.Event()
        self._sockets: dict[int, socket.socket] = {}
        for number, descriptor in enumerate(descriptors):
            self._sockets[number] = sock = socket.socket(fileno=descriptor)
            sock.setblocking(False)

    @property
    def seconds(self) -> float:
        """Since it was handed over."""
        return time.monotonic() - float(self.tree["taken_at"])

    def claim(self, number: int | None) -> socket.socket:
        """Raises SnapshotError."""
        sock = None if number is None else self._sockets.pop(number, None)
        if sock is None:
            raise SnapshotError(f"there is no socket {number}")
        return sock

    def listeners(self) -> dict[Target, socket.socket]:
        """The sockets of listeners."""
        return {
            Target(address, port): self.claim(at) for address, port, at in self.tree["listeners"]
        }

    def listening(self) -> socket.socket | None:
        """The role's own listening socket."""
        at = self.tree["listening"]
        return None if at is None else self.claim(at)

    def close(self) -> None:
        while self._sockets:
            _, sock = self._sockets.popitem()
            reset_on_close(sock)
            sock.close()

    async def settled(self) -> None:
        """Until it was taken over, or for SETTLE_SECONDS: half of it is nothing to hand on."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                await self._taken.wait()

    async def take_over(self, holder: Holder) -> None:
        """Give the holder its sessions, and these their connections. What does not fit is reset."""
        joined = lost = 0
        try:
            holder.take_over(self.tree["sessions"])
            joined = await self._connect(holder)
            holder.take_over_splices(self.tree["sessions"])
        except (SnapshotError, KeyError, TypeError, ValueError) as exc:
            log.error("handover_refused", cause=str(exc), remedy=RESET)
        finally:
            self.close()
            self._taken.set()
            for mux in holder.muxes().values():
                lost += mux.reset_unowned()
        log.info("handover_taken", streams=joined, reset=lost, seconds=round(self.seconds, 1))

    async def _connect(self, holder: Holder) -> int:
        """Join connections and streams again; how many. Raises SnapshotError."""
        muxes, joined = holder.muxes(), 0
        listeners, connector = holder.listeners, holder.connector
        for name, number, at, dialled, data in self.tree["relays"]:
            mux = muxes.get(name)
            if mux is None or not mux.has(number) or (at is None and dialled is None):
                continue
            relay = SocketRelay(listeners.relays if dialled is None else connector.relays)
            stream = mux.own(number, relay)
            relay.restore(stream, data, at is not None)
            joined += 1
            if at is None:
                connector.dial(stream, relay, Opening.decode(dialled))
            else:
                await _connected(relay, self.claim(at))
        for target, at in self.tree["waiting"]:
            await _connected(listeners.relay_for(Target(*target)), self.claim(at))
        for at, data in self.tree["finishing"]:
            relay = SocketRelay(listeners.relays)
            relay.restore_last(data)
            await _connected(relay, self.claim(at))
        return joined


async def _connected(relay: SocketRelay, sock: socket.socket) -> None:
    await asyncio.get_running_loop().create_connection(lambda: relay, sock=sock)


def can_keep(notifier: Notifier) -> bool:
    """Whether the service manager keeps descriptors for the next process."""
    if not _keep(notifier, PROBE, Packed(*socket.socketpair())):
        return False
    notifier.send("FDSTOREREMOVE=1", f"FDNAME={PROBE}")
    return True


def keep(left: Packed, notifier: Notifier) -> None:
    """Give the bundle to the service manager, which gives it to the next process. Raises OSError
    where it has not taken it."""
    if not _keep(notifier, fdpass.NAME, left):
        raise OSError("the service manager did not accept it")


def _keep(notifier: Notifier, name: str, left: Packed) -> bool:
    """Give a descriptor away, and see that somebody has it."""
    wait_until, taken = os.pipe()
    with left.bundle, left.other_end, open(wait_until, "rb"):
        try:
            # It is not to look into it (FDPOLL), and to have taken it before this process ends:
            # who has ended is nobody to systemd (sd_notify_barrier(3)).
            words = ("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0")
            notifier.send_descriptors([left.bundle.fileno()], *words)
            sent = notifier.send_descriptors([taken], "BARRIER=1")
        finally:
            os.close(taken)
        hung_up = select.poll()
        hung_up.register(wait_until, 0)
        left.bundle.close()
        if not sent or not hung_up.poll(KEEP_SECONDS * 1000):
            return False
        hung_up.unregister(wait_until)
        hung_up.register(left.other_end, 0)
        return not hung_up.poll(0)


def arrived(
    bundles: Sequence[socket.socket], role: str, name: str, notifier: Notifier
) -> Arrival | None:
    """What an earlier process of this node has handed over to this one; where that cannot be
    used, it is said why. The bundles are closed."""
    found: Arrival | None = None
    if bundles:
        notifier.send("FDSTOREREMOVE=1", f"FDNAME={fdpass.NAME}")  # they are here now
    for each in bundles:
        with each:
            try:
                unpacked = fdpass.unpack(each)
                if unpacked is None:
                    continue
                arrival = opened(*unpacked, role, name)
            except (BundleError, SnapshotError) as exc:
                log.error("handover_refused", cause=str(exc), remedy=RESET)
                continue
        if found is not None:
            found.close()
        found = arrival
    return found


def opened(data: bytes, descriptors: list[int], role: str, name: str) -> Arrival:
    """Raises SnapshotError."""
    tree: Tree = {}
    try:
        tree = snapshot.load(data)
        of = (tree.get("role"), tree.get("name"))
        if of != (role, name):
            raise SnapshotError(f"it belongs to the {of[0]} {of[1]}, and this is the {role} {name}")
        if "doors" in tree:
            _renew(tree)
    except SnapshotError:
        Arrival(tree, descriptors).close()
        raise
    return Arrival(tree, descriptors)


def _renew(tree: Tree) -> None:
    """Give the tree of a 0.1.0 the names of this version. Raises SnapshotError."""
    try:
        tree["listeners"] = tree.pop("doors")
        tree["relays"] = [
            [name, number, at, None if target is None else Target(*target).encode(), data]
            for name, number, at, target, data in tree.pop("pumps")
        ]
    except (KeyError, TypeError, ValueError, struct.error) as exc:
        raise SnapshotError(f"it is no bundle of 0.1.0: {exc!r}") from exc


def exec_again(left: Packed | None) -> NoReturn:
    """Become the next process, in the place of this one, with the bundle if there is one."""
    close_journal()  # its thread would end with this program
    sys.stdout.flush()
    sys.stderr.flush()
    env = os.environ if left is None else fdpass.start_with(left.bundle, os.environ)
    os.execve(sys.executable, sys.orig_argv, env)
