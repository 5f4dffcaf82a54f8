"""What the hub's first answer says where it is no welcome, for a lane and for a doctor's probe."""

from __future__ import annotations

from rayfwd.problems import Problem
from rayfwd.session.frames import Frame, ProtocolError
from rayfwd.session.handshake import Refusal


def refusal_in(frame: Frame) -> Problem:
    """Why the hub refuses, by its REFUSE."""
    try:
        return Refusal.decode(frame).problem
    except ProtocolError as exc:
        return not_the_hubs(exc)


def not_the_hubs(exc: ProtocolError) -> Problem:
    """Whatever answers there is no hub."""
    return exc.code.problem(
        f"the program at the hub's socket is not rayfwd: {exc}",
        "check that head.socket is the hub's socket, and run the same version of rayfwd on both "
        "sides",
    )
