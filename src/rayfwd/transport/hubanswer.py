"""What the first answer says where it is no welcome, for a lane and for a doctor's probe."""

from __future__ import annotations

from rayfwd.config import HEAD, Destination
from rayfwd.problems import Problem
from rayfwd.session.frames import Frame, ProtocolError
from rayfwd.session.handshake import Refusal


def refusal_in(frame: Frame, to: Destination = HEAD) -> Problem:
    """Why the hub, or another worker, refuses, by its REFUSE."""
    try:
        return Refusal.decode(frame).problem
    except ProtocolError as exc:
        return not_the_hubs(exc, to)


def not_the_hubs(exc: ProtocolError, to: Destination = HEAD) -> Problem:
    """Whatever answers there is no hub, and no other worker."""
    return exc.code.problem(
        f"the program at {to.socket_called} is not rayfwd: {exc}",
        f"check that {to.key('socket')} is {to.socket_called}, and run the same version of rayfwd "
        "on both sides",
    )
