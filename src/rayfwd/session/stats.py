"""How a session is, for those who look at it from outside: a record that does not change."""

from __future__ import annotations

from dataclasses import dataclass

from rayfwd.session.lane import Lane, LaneClass
from rayfwd.session.states import SessionState


@dataclass(frozen=True, slots=True)
class LaneStats:
    """One lane. Times are the session's clock, in seconds; None: not known yet."""

    number: int
    lane_class: LaneClass
    sidelined: bool
    """Its answers are late while others' are not: its streams go by the others."""
    heard: float
    """When bytes last came in."""
    rtt: float | None
    """Smoothed round-trip time, in seconds."""
    newest_rtt: float | None
    """The last one measured, in seconds."""
    base_rtt: float | None
    """The least one seen, in seconds."""
    confirmed: int
    """Bytes of streams put on it that have certainly arrived."""
    answered_at: float
    """When the last PONG came, and `confirmed` with it."""
    bytes_in: int
    bytes_out: int

    @classmethod
    def of(cls, lane: Lane) -> LaneStats:
        return cls(
            number=lane.id,
            lane_class=lane.lane_class,
            sidelined=lane.sidelined,
            heard=lane.heard,
            rtt=lane.rtt,
            newest_rtt=lane.newest_rtt,
            base_rtt=lane.base_rtt,
            confirmed=lane.confirmed,
            answered_at=lane.answered_at,
            bytes_in=lane.bytes_in,
            bytes_out=lane.bytes_out,
        )


@dataclass(frozen=True, slots=True)
class SessionStats:
    """A session."""

    state: SessionState
    ride_through: float
    """Seconds that it waits for a lane."""
    streams: int
    """Streams that are not over, the control stream apart."""
    buffered: int
    """Bytes kept for sending, of all streams."""
    held: int
    """Bytes received and not yet taken by a reader, of all streams."""
    backlog: bool
    """Bytes of streams wait for a lane, and not for the peer to have room."""
    cuts: int
    """How often the last lane went down."""
    bytes_in: int
    bytes_out: int
    lanes: tuple[LaneStats, ...]
