"""The credit that a session gives its peer: what each stream may still send, and what all of them
may, together.

A stream's own window is the stream's (`ReceiveSide`); what windows have grown by, and what has come
and no reader has taken yet, are counted here, over all streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rayfwd.session.stream import ReceiveSide, Stream


class Credit:
    """Of one session. All in bytes."""

    def __init__(self, window: int, ceiling: int, budget: int) -> None:
        """`window`: what a new stream has; `ceiling`: what one may grow to; `budget`: what all may
        grow by, together."""
        self.held = 0
        """Received, and not yet taken by a reader."""
        self._window: Final = window
        self._ceiling: Final = ceiling
        self._budget: Final = budget
        self._spent = 0
        """What the windows of all streams have grown by."""

    def widen(self, receive: ReceiveSide, round_trip: float, now: float) -> None:
        """Give more to a stream whose reader keeps up."""
        ceiling = min(self._ceiling, receive.window + self._budget - self._spent)
        window = receive.wanted_window(now, round_trip, ceiling)
        if window > receive.window:
            self._spent += window - receive.window
            receive.window = window

    def drop(self, receive: ReceiveSide) -> None:
        """Nobody takes any more of this stream: what it held and had been given is free."""
        self.held -= receive.memory
        receive.drop()
        self._spent -= receive.window - self._window
        receive.window = self._window

    def restored(self, receive: ReceiveSide, live: bool) -> None:
        """A stream of a snapshot; not `live`: it is being given up, and has its first window."""
        self.held += receive.memory
        if live:
            self._spent += receive.window - self._window

    def clear(self) -> None:
        """There are no streams any more."""
        self.held = self._spent = 0

    def check_invariants(self, streams: Mapping[int, Stream]) -> None:
        """What holds between any two calls. Raises AssertionError."""
        spent = sum(stream.receive.window - self._window for stream in streams.values())
        assert self._spent == spent, "the count of credit that was added is wrong"
        assert 0 <= spent <= self._budget, "more credit was added than there is"
        held = sum(stream.receive.memory for stream in streams.values())
        assert self.held == held, "the count of bytes that nobody has taken is wrong"
        for stream in streams.values():
            assert stream.receive.window <= max(self._window, self._ceiling)
