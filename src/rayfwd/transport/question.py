"""A stream that asks whether a port of another node is open, and carries nothing.

The node that is asked resets it with the answer. Whatever else comes of it is no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rayfwd.session.frames import Chunk
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening
from rayfwd.transport.mux import Mux

_ANSWERS = {ResetReason.LISTENS: True, ResetReason.NOT_LISTENING: False}


class Question:
    """Owns its stream. `answer` is called once: whether the port is open; None: nobody says."""

    def __init__(self, answer: Callable[[bool | None], None]) -> None:
        self._answer = answer

    def put(self, mux: Mux | None, opening: Opening) -> None:
        """Ask by that session; where it cannot be asked there is no answer."""
        if mux is None or not mux.has_room():
            self.unanswered()
        else:
            mux.open(opening._replace(asks=True).encode(), self)

    def unanswered(self) -> None:
        """Nobody can be asked."""
        self._answer(None)

    def stream_data(self, chunks: Sequence[Chunk]) -> None:
        """Nobody sends any."""

    def stream_ended(self) -> None:
        """Nobody ends it but by a reset."""

    def stream_writable(self) -> None:
        """Nothing was written."""

    def stream_lost(self, reason: ResetReason, text: str) -> None:
        self._answer(_ANSWERS.get(reason))

    def stream_finished(self) -> None:
        self._answer(None)
