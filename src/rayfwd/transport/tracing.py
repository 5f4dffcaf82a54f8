"""Who is told of the frames of this process's sessions: `rayfwd trace`, and the log at level debug.

There is one `Tracing` in a process, as there is one log: what is traced are all its sessions, also
those that begin meanwhile. While nobody traces, a session does not know of it, and nothing is done.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from rayfwd.session.session import Session
from rayfwd.session.trace import FrameTraced, Traced, line
from rayfwd.system.logs import get_logger

log = get_logger(__name__)

Taker = Callable[[str, Traced], None]
"""Is told the peer's name and what went by; it must not call the session."""


class Tracing:
    """The sessions that may be traced, and who traces them."""

    def __init__(self) -> None:
        self._sessions: dict[Session, str] = {}
        self._takers: list[Taker] = []

    @property
    def peers(self) -> list[str]:
        """Who is at the other end of the sessions that there are."""
        return sorted(self._sessions.values())

    def began(self, session: Session, peer: str) -> None:
        """A session is there; whoever traces is told of it from now on."""
        self._sessions[session] = peer
        self._set_traces(session)

    def ended(self, session: Session) -> None:
        """It is over; its last frames are still told."""
        self._sessions.pop(session, None)

    def add(self, taker: Taker) -> None:
        """Tell `taker` of everything from now on."""
        if taker not in self._takers:
            self._takers.append(taker)
            self._set_traces(*self._sessions)

    def remove(self, taker: Taker) -> None:
        """Tell it nothing more."""
        if taker in self._takers:
            self._takers.remove(taker)
            self._set_traces(*self._sessions)

    def follow(self, level: str) -> None:
        """Write everything to the log if its level is debug, and nothing if it is another."""
        if level == "debug":
            self.add(to_log)
        else:
            self.remove(to_log)

    def _set_traces(self, *sessions: Session) -> None:
        for session in sessions:
            peer = self._sessions[session]
            session.trace = partial(self._traced, peer) if self._takers else None

    def _traced(self, peer: str, traced: Traced) -> None:
        for taker in self._takers:
            taker(peer, traced)


tracing = Tracing()


def to_log(peer: str, traced: Traced) -> None:
    """Write an event of it."""
    if isinstance(traced, FrameTraced):
        log.debug(
            "frame_traced",
            peer=peer,
            lane=traced.lane,
            lane_class=traced.lane_class.value,
            direction=traced.direction,
            kind=traced.kind.name,
            stream=traced.stream,
            offset=traced.offset,
            length=traced.length,
        )
    else:
        log.debug("change_traced", peer=peer, what=line(traced))


class Collector:
    """Takes what goes by until it has enough."""

    def __init__(self, most: int, peer: str | None = None) -> None:
        """`most`: how many it takes; `peer`: of that one's sessions only."""
        self._most = most
        self._peer = peer
        self._taken: list[tuple[float, str, Traced]] = []
        self.full = asyncio.Event()

    def __call__(self, peer: str, traced: Traced) -> None:
        if self.full.is_set() or self._peer not in {None, peer}:
            return
        self._taken.append((time.time(), peer, traced))
        if len(self._taken) >= self._most:
            self.full.set()

    def lines(self) -> list[str]:
        """What it took: a line each, with the time (UTC) and the peer before it."""
        return [
            f"{datetime.fromtimestamp(at, UTC):%H:%M:%S.%f}  {peer}  {line(traced)}"
            for at, peer, traced in self._taken
        ]
