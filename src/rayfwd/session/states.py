"""The states of a session and of a stream: their tables, and the one way from state to state.

docs/protocol.md draws the same tables; a test compares the two.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class SessionState(Enum):
    """Where a session is."""

    FRESH = "fresh"
    """It has had no lane yet."""
    UP = "up"
    PARKED = "parked"
    """It has lost its last lane; its streams are held."""
    ENDED = "ended"


class SessionEvent(Enum):
    """What takes a session from one state to another."""

    LANE_UP = "lane_up"
    LAST_LANE_DOWN = "the last lane_down"
    CLOSED = "close()"
    CLOSE_IN = "CLOSE in"
    TIME_OVER = "ride_through"


class StreamState(Enum):
    """Where a stream is. Half-closes are in its two sides, not here."""

    OPENING = "opening"
    """We opened it, and the peer has not answered."""
    OPEN = "open"
    RESETTING = "resetting"
    """We gave it up, and the peer has not said that it did too."""
    OVER = "over"
    """No state that is kept: whoever still holds the stream sees that the session forgot it."""


class StreamEvent(Enum):
    """What takes a stream from one state to another."""

    ANSWERED = "any ACK"
    RESET = "reset()"
    RESET_IN = "RESET in"
    GONE_IN = "GONE in"
    ENDS_THROUGH = "both ENDs through"
    """Ours is acknowledged, the peer's was received."""
    SESSION_ENDED = "session ends"


SESSION_TRANSITIONS: Final[dict[SessionState, dict[SessionEvent, SessionState]]] = {
    SessionState.FRESH: {
        SessionEvent.LANE_UP: SessionState.UP,
        SessionEvent.CLOSED: SessionState.ENDED,
        SessionEvent.TIME_OVER: SessionState.ENDED,
    },
    SessionState.UP: {
        SessionEvent.LANE_UP: SessionState.UP,
        SessionEvent.LAST_LANE_DOWN: SessionState.PARKED,
        SessionEvent.CLOSED: SessionState.ENDED,
        SessionEvent.CLOSE_IN: SessionState.ENDED,
    },
    SessionState.PARKED: {
        SessionEvent.LANE_UP: SessionState.UP,
        SessionEvent.CLOSED: SessionState.ENDED,
        SessionEvent.TIME_OVER: SessionState.ENDED,
    },
    SessionState.ENDED: {},
}

STREAM_TRANSITIONS: Final[dict[StreamState, dict[StreamEvent, StreamState]]] = {
    StreamState.OPENING: {
        StreamEvent.ANSWERED: StreamState.OPEN,
        StreamEvent.RESET: StreamState.RESETTING,
        StreamEvent.RESET_IN: StreamState.OVER,
        StreamEvent.GONE_IN: StreamState.OVER,
        StreamEvent.SESSION_ENDED: StreamState.OVER,
    },
    StreamState.OPEN: {
        StreamEvent.RESET: StreamState.RESETTING,
        StreamEvent.RESET_IN: StreamState.OVER,
        StreamEvent.GONE_IN: StreamState.OVER,
        StreamEvent.ENDS_THROUGH: StreamState.OVER,
        StreamEvent.SESSION_ENDED: StreamState.OVER,
    },
    StreamState.RESETTING: {
        StreamEvent.RESET_IN: StreamState.OVER,
        StreamEvent.GONE_IN: StreamState.OVER,
        StreamEvent.SESSION_ENDED: StreamState.OVER,
    },
    StreamState.OVER: {},
}


def session_after(state: SessionState, event: SessionEvent) -> SessionState:
    """Where `event` takes a session that is in `state`. Raises RuntimeError: nowhere."""
    after = SESSION_TRANSITIONS[state].get(event)
    if after is None:
        raise RuntimeError(f"a session that is {state.value} knows no {event.value!r}")
    return after


def stream_after(state: StreamState, event: StreamEvent) -> StreamState:
    """Where `event` takes a stream that is in `state`. Raises RuntimeError: nowhere."""
    after = STREAM_TRANSITIONS[state].get(event)
    if after is None:
        raise RuntimeError(f"a stream that is {state.value} knows no {event.value!r}")
    return after
