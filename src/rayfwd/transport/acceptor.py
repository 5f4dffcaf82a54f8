"""Accepts connections of listening sockets: those of admitted users, while descriptors last."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

from rayfwd import codes
from rayfwd.problems import Problem
from rayfwd.session.target import Target
from rayfwd.system import descriptors
from rayfwd.system.logs import get_logger
from rayfwd.system.seldom import Seldom
from rayfwd.system.tcp import original_destination, reset_on_close
from rayfwd.transport.admission import Admission
from rayfwd.transport.relay import SocketRelay

log = get_logger(__name__)

BACKLOG = 1024
"""Connections of one listener that the kernel keeps until they are accepted."""
AT_ONCE = 64
"""Connections of one listener that are accepted in one turn of the loop."""
CHECK_INTERVAL = 1.0
"""Seconds between looks whether there are descriptors again."""
LOG_INTERVAL = 60.0
"""Seconds after which it is logged again that connections wait."""
SPARE_PART = 0.8
"""Part of the descriptors that must be all there are in use before new connections are taken."""
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

MakeRelay = Callable[[Target], SocketRelay]
"""Is given where the connection was to go."""


class Acceptor:
    """Owns listening sockets, and each connection until its relay has it.

    `on_change` is called when it begins or ends to hold connections up.
    """

    def __init__(self, admission: Admission, on_change: Callable[[], None] | None = None) -> None:
        self.admission = admission
        self.problem: Problem | None = None
        """Why new connections wait, if they do: in the kernel, which keeps some."""
        self._on_change = on_change
        self._listening: dict[socket.socket, MakeRelay] = {}
        self._redirected: set[socket.socket] = set()
        """Those of the listening ones to which the kernel redirects connections."""
        self._beginning: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None
        self._held_up_logged = Seldom(LOG_INTERVAL)
        self._log_end = False

    def add(self, sock: socket.socket, make_relay: MakeRelay, redirected: bool = False) -> None:
        """Listen; connections are taken from now on. Raises OSError, and has not taken it then.

        `redirected`: they were to go elsewhere, where the kernel says.
        """
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._listening[sock] = make_relay
        if redirected:
            self._redirected.add(sock)
        if self.problem is None:
            self._read(sock)

    def release(self, sock: socket.socket) -> socket.socket:
        """Its connections are another's to accept; it goes on listening."""
        del self._listening[sock]
        self._redirected.discard(sock)
        asyncio.get_running_loop().remove_reader(sock)
        return sock

    def close(self) -> None:
        """Listen no more. What was accepted lives on."""
        for sock in list(self._listening):
            self.release(sock).close()
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _read(self, sock: socket.socket) -> None:
        asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(AT_ONCE):
            if self.problem is not None or sock not in self._listening:
                return
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno not in _SCARCE:
                    raise
                self._hold_up(exc.strerror)
                return
            self._begin(connection, self._listening[sock], sock in self._redirected)
            if connection.fileno() >= descriptors.reserve():
                self._hold_up(f"{descriptors.reserve()} of {descriptors.limit()} are in use")

    def _begin(self, connection: socket.socket, make_relay: MakeRelay, redirected: bool) -> None:
        try:
            dialled = original_destination(connection) if redirected else connection.getsockname()
            admitted = self.admission.admit(connection, dialled)
        except OSError:  # it was reset meanwhile
            admitted = None
        if admitted is None:
            reset_on_close(connection)
            connection.close()
            return
        connection.setblocking(False)
        relay = make_relay(Target(*dialled))
        relay.when_lost(admitted.give_back)
        task = asyncio.create_task(_connected(relay, connection), name="accept")
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    def _hold_up(self, cause: str | None) -> None:
        """Nothing that runs is to be short of descriptors for the sake of new connections."""
        self.problem = problem = codes.DESCRIPTORS_EXHAUSTED.problem(
            "new connections to the listeners have to wait, because few file descriptors "
            f"are left ({cause})",
            "raise the limit (LimitNOFILE= of the service, or `ulimit -n`); connections are "
            f"accepted again when {100 * SPARE_PART:.0f} % of the descriptors are free",
        )
        loop = asyncio.get_running_loop()
        if self._held_up_logged.due(loop.time()):
            self._log_end = True
            log.error(problem.code.event, cause=problem.cause, remedy=problem.remedy)
        for sock in self._listening:
            loop.remove_reader(sock)
        self._look = loop.call_later(CHECK_INTERVAL, self._go_on)
        self._changed()

    def _go_on(self) -> None:
        if descriptors.scarce(SPARE_PART):
            self._look = asyncio.get_running_loop().call_later(CHECK_INTERVAL, self._go_on)
            return
        self._look = self.problem = None
        if self._log_end:
            self._log_end = False
            log.info("descriptors_there")
        for sock in self._listening:
            self._read(sock)
        self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()


async def _connected(relay: SocketRelay, connection: socket.socket) -> None:
    await asyncio.get_running_loop().connect_accepted_socket(lambda: relay, connection)
