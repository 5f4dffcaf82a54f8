"""Whose connections our listeners take: by the kernel's word on each.

Every user of a machine can dial any port on its loopback. The listeners there lead into Ray, which
runs what it is told; so only some are let through, and the others are told of once in a while.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable

from rayfwd import codes
from rayfwd.problems import Problem
from rayfwd.system import setting, sockdiag
from rayfwd.system.logs import get_logger
from rayfwd.system.seldom import Seldom
from rayfwd.system.sockdiag import Address, SockDiag
from rayfwd.system.users import user_name

log = get_logger(__name__)

LOG_INTERVAL = 600.0
"""Seconds after which a user who is still refused is named again."""
MOST_USERS = 100
"""Users that are counted by themselves; the rest is counted together."""
MOST_OF_ONE = 4096
"""Connections that another user than our own may have open at once."""

GONE = "(closed)"
"""Who had a connection that was closed before it was looked at."""
OTHERS = "(others)"


def to_admit() -> str:
    """What to do, if a user that is not admitted is to be."""
    users = setting.key("listeners.users")
    anew = "run `rayfwd reload`" if setting.in_a_file() else "start rayfwd again"
    return f"to let this user use Ray here, add the user to {users}, then {anew}"


class Admission:
    """Takes connections of some users only. `open` and `close` are its listeners' to call."""

    def __init__(
        self,
        uids: Iterable[int] = (),
        most_of_one: int = MOST_OF_ONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`uids` are let through besides this process's own user and root."""
        self.refused: Counter[str] = Counter()
        """How many connections, by user."""
        self.problem: Problem | None = None
        """The kernel cannot be asked: all are let through."""
        self._most_of_one = most_of_one
        self._clock = clock
        self._diag: SockDiag | None = None
        self._open: Counter[int] = Counter()
        """Connections of other users than our own."""
        self._refusal_logged = Seldom(LOG_INTERVAL, MOST_USERS + 1)
        self._own = os.geteuid()
        self._uids: frozenset[int] = frozenset()
        self.take_uids(uids)

    def take_uids(self, uids: Iterable[int]) -> None:
        """From now on these, and this process's own user and root."""
        self._uids = frozenset({self._own, 0, *uids})

    def open(self) -> None:
        """Be ready to ask the kernel, or say that it cannot be asked."""
        try:
            self._diag = sockdiag.opened()
        except OSError as exc:
            self.problem = problem = codes.PEER_CHECK_ABSENT.problem(
                f"the kernel does not say who owns a connection ({exc.strerror or exc}), so every "
                "user of this machine can use the listeners",
                "allow rayfwd to open netlink sockets (AF_NETLINK in RestrictAddressFamilies= of "
                "its unit, or the container's seccomp profile), and load the kernel module "
                "tcp_diag; until then, only Ray's token keeps others out",
            )
            log.warning(problem.code.event, cause=problem.cause, remedy=problem.remedy)

    @property
    def asks_kernel(self) -> bool:
        """Whether it knows whose a connection is; else all are let through."""
        return self._diag is not None

    def close(self) -> None:
        """Nothing comes after this."""
        diag, self._diag = self._diag, None
        if diag is not None:
            diag.close()

    def admit(
        self, connection: socket.socket, dialled: tuple[str, int] | None = None
    ) -> Pass | None:
        """A connection that was accepted; None: it is to be reset. Takes some 20 us.

        `dialled`: where it was to go, if the kernel redirected it; the peer's socket has that.

        Of those that were redirected, some have no owner here: when two connections of one port of
        origin come together at this listener, the kernel gives the second another port, which no
        socket has. It is let through, as the rule redirects only what these users dial.
        """
        if self._diag is None:
            return Pass(None, self._open)
        redirected = False
        try:
            here, peer = connection.getsockname(), connection.getpeername()
            redirected = dialled is not None and dialled != here
            owner = self._diag.owner_of_peer(dialled or here, peer)
        except OSError:
            owner = None  # it was reset meanwhile, as a rule
        if owner is None and redirected:
            return Pass(None, self._open)
        if owner is None:
            self._refuse(GONE, connection, "")
        elif owner.uid == self._own:
            return Pass(None, self._open)
        elif owner.uid not in self._uids:
            self._refuse(user_name(owner.uid), connection, to_admit())
        elif self._open[owner.uid] >= self._most_of_one:
            remedy = (
                f"nothing: a user other than Ray's may have {self._most_of_one} connections "
                "open at once"
            )
            self._refuse(user_name(owner.uid), connection, remedy)
        else:
            return Pass(owner.uid, self._open)
        return None

    def stranger_at(self, place: Address) -> int | None:
        """Who takes connections to a place on this machine, if it is neither our own user nor root;
        None as well where nobody does, or the kernel does not tell."""
        if self._diag is None:
            return None
        try:
            owner = self._diag.owner_of_listener(place)
        except OSError:
            return None
        return None if owner is None or owner.uid in {self._own, 0} else owner.uid

    def _refuse(self, user: str, connection: socket.socket, remedy: str) -> None:
        if user not in self.refused and len(self.refused) >= MOST_USERS:
            user = OTHERS
        self.refused[user] += 1
        if not remedy or not self._refusal_logged.due(self._clock(), user):
            return
        listen = ":".join(map(str, connection.getsockname()))
        count = self.refused[user]
        log.warning("connection_refused", user=user, listen=listen, count=count, remedy=remedy)


class Pass:
    """A connection that was let through; `used` and `given_back` count it."""

    __slots__ = ("_open", "_uid")

    def __init__(self, uid: int | None, among: Counter[int]) -> None:
        """None: it is counted nowhere."""
        self._uid = uid
        self._open = among
        if uid is not None:
            among[uid] += 1

    def give_back(self) -> None:
        """The connection is over."""
        if self._uid is not None:
            self._open[self._uid] -= 1
            self._uid = None
