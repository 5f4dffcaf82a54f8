"""The hub's connections that are no lanes: who has just come, who proves a key, who only asks.

Each kind is bounded, and whoever has most of it gives way.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from rayfwd import codes
from rayfwd.hub.connection import HubConnection
from rayfwd.system.logs import get_logger
from rayfwd.system.seldom import Seldom
from rayfwd.system.users import user_name

log = get_logger(__name__)

MAX_UNGREETED = 64
"""Connections that have not said hello, at most. One more takes the place of the oldest one of the
user who has most of them: who is about to say hello has just come."""
MAX_CHALLENGED = 512
"""Connections that have said hello and not yet proved their keys, at most; likewise. A whole
cluster may come at once, and each takes a round trip."""
MAX_CHECKUPS = 8
"""Connections of `rayfwd doctor`, at most; what comes on top is refused."""
CROWDED_AGAIN = 60.0
"""Seconds after which it is logged again that there are too many."""


class Pending:
    """Knows each of them until it is a lane or gone."""

    def __init__(self) -> None:
        self._ungreeted: dict[HubConnection, None] = {}
        """The oldest first."""
        self._challenged: dict[HubConnection, None] = {}
        """Those that were asked to prove their keys, the oldest first."""
        self._asking: set[HubConnection] = set()
        """Connections of `rayfwd doctor`."""
        self._crowded_logged = Seldom(CROWDED_AGAIN)

    def __len__(self) -> int:
        return len(self._ungreeted) + len(self._challenged) + len(self._asking)

    def came(self, connection: HubConnection) -> None:
        """It has said nothing yet."""
        self._ungreeted[connection] = None

    def bound(self) -> None:
        """Cut one of the silent ones where there are too many."""
        if len(self._ungreeted) > MAX_UNGREETED:
            self._make_room(self._ungreeted)

    def challenged(self, connection: HubConnection) -> None:
        """It is not silent any more, and has to prove its key."""
        del self._ungreeted[connection]
        self._challenged[connection] = None
        if len(self._challenged) > MAX_CHALLENGED:
            self._make_room(self._challenged)

    def asks(self, connection: HubConnection) -> None:
        """It is a doctor's from now on. Raises ProblemError where there are as many as may be."""
        if len(self._asking) >= MAX_CHECKUPS:
            raise codes.CHECK_BUSY.error(
                f"{MAX_CHECKUPS} runs of `rayfwd doctor` are in progress", "try again later"
            )
        self.went(connection)
        self._asking.add(connection)

    def went(self, connection: HubConnection) -> None:
        """It was greeted or refused, or it is gone."""
        self._ungreeted.pop(connection, None)
        self._challenged.pop(connection, None)
        self._asking.discard(connection)

    def close(self) -> None:
        """Close all of them."""
        for connection in [*self._ungreeted, *self._challenged, *self._asking]:
            connection.close()

    def may_say_crowded(self) -> bool:
        """Whether it is time to log again that there are too many, which is then done."""
        return self._crowded_logged.due(asyncio.get_running_loop().time())

    def _make_room(self, waiting: Iterable[HubConnection]) -> None:
        """Close the oldest of the user who has most of them."""
        counts = Counter(connection.uid for connection in waiting)
        uid, count = counts.most_common(1)[0]
        oldest = next(connection for connection in waiting if connection.uid == uid)
        self.went(oldest)
        oldest.abort("it said nothing more, and the place was needed for other connections")
        if self.may_say_crowded():
            log.warning("hub_crowded", user=user_name(uid), silent=count)
