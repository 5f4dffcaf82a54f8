"""How workers reach each other: a stream of one's session joined to a stream of another's."""

from __future__ import annotations

from collections.abc import Sequence

from rayfwd.session.frames import Chunk
from rayfwd.session.stream import ResetReason
from rayfwd.transport.mux import MuxStream


class StreamRelay:
    """Joins two streams of two sessions: one end of it owns one stream and feeds the other."""

    def __init__(self) -> None:
        self.stream: MuxStream | None = None
        self.other: StreamRelay | None = None
        self._owed = 0
        """Bytes taken from our stream that wait for room in the other."""

    def own(self, stream: MuxStream) -> None:
        """Take up a stream of which some may wait for room in the other."""
        self.stream, (self._owed, _) = stream, stream.unread

    def stream_data(self, chunks: Sequence[Chunk]) -> None:
        assert self.stream is not None
        if self.other is not None and self.other.stream is not None:
            size = sum(map(len, chunks))
            if self.other.stream.send(*chunks):
                self.stream.consumed(size)
            else:
                self._owed += size

    def stream_ended(self) -> None:
        if self.other is not None and self.other.stream is not None:
            self.other.stream.end()

    def stream_writable(self) -> None:
        if self.other is not None:
            self.other.pass_on()

    def pass_on(self) -> None:
        """There is room again: what was taken is consumed."""
        if self._owed and self.stream is not None:
            owed, self._owed = self._owed, 0
            self.stream.consumed(owed)

    def stream_lost(self, reason: ResetReason, text: str) -> None:
        other, self.other = self.other, None
        if other is not None and other.stream is not None:
            other.other = None
            of = "" if self.stream is None else self.stream.mux.peer
            other.stream.reset(reason, text, of)

    def stream_finished(self) -> None:
        pass  # the other end finishes by itself: both directions ended there too
