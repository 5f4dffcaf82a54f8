"""Where on this machine a port of a node may be dialled: nowhere that a stranger may have taken.

Any user of a machine can listen on any address of its loopback, another node's among them, where
that node's listener is not open. So whatever of ours dials Ray has its endpoint from here: an open
listener of our own, the overlay, the node itself where it is reached directly, or our own address
where no other user listens. Functions that dial ask for an `Endpoint`, which nothing else makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NewType

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.problems import ProblemError
from rayfwd.session.target import Target
from rayfwd.system.users import user_name

if TYPE_CHECKING:  # whoever is given one needs none of what serves listeners
    from rayfwd.transport.listeners import Listeners

Endpoint = NewType("Endpoint", Target)
"""An address and a port that may be dialled now."""

EndpointOf = Callable[[NodePlan, int], Endpoint]
"""Gives that of a port of a node. Raises ProblemError: there is none now."""


class Endpoints:
    """Those of one node."""

    def __init__(
        self, listeners: Listeners, redirected: Callable[[], bool] = lambda: False
    ) -> None:
        """`redirected`: the kernel brings what is dialled there to us, before any listener."""
        self._listeners = listeners
        self._redirected = redirected

    def to(self, node: NodePlan, port: int, own: NodePlan | None) -> Endpoint:
        """Of a port of `node`, seen from `own`. Raises ProblemError: there is none now."""
        at = Target(node.address, port)
        if node.advertised and (own is None or node.name != own.name):
            return Endpoint(at)
        if own is not None and node.name == own.name:
            stranger = self._listeners.admission.stranger_at(at)
            if stranger is None:
                return Endpoint(at)
            raise codes.PORT_IN_USE.error(
                f"port {port} of this node's own address is in use by user {user_name(stranger)}, "
                f"so nothing is sent to {at}",
                f"stop the program that listens there (`ss -ltnp sport = :{port}`)",
            )
        if self._redirected():
            return Endpoint(at)
        place = self._listeners.place_of(at)
        if self._listeners.is_open(place):
            return Endpoint(place)
        problem = self._listeners.blocked_at.get(place)
        if problem is not None:
            raise ProblemError(problem)
        raise codes.LISTENER_BLOCKED.error(
            f"the listener {place} is not open, so nothing is sent there",
            "nothing while rayfwd starts; otherwise check the conditions in `rayfwd status`",
        )
