"""Which writers must wait: the bounds on what is kept for sending, of a stream and of all."""

from __future__ import annotations

from rayfwd.session.events import Event, StreamWritable
from rayfwd.session.numbers import CONTROL_STREAM
from rayfwd.session.stream import Stream


class Writers:
    """The bytes that are kept for sending, and the writers that were told to wait for it."""

    __slots__ = (
        "_drained", "_dropped", "_session_bound", "_stream_bound", "_streams", "buffered", "paused",
    )  # fmt: skip

    def __init__(self, streams: dict[int, Stream], stream_bound: int, session_bound: int) -> None:
        """`streams` are the session's. A writer waits from `stream_bound` unsent bytes of its own
        on, or from `session_bound` bytes kept of all streams on."""
        self._streams = streams
        self._stream_bound = stream_bound
        self._session_bound = session_bound
        self.buffered = 0
        """Bytes kept for sending, of all streams."""
        self.paused: dict[int, None] = {}
        """Streams whose writers were told to wait."""
        self._drained: list[Event] = []
        self._dropped = False
        """A stream's bytes were dropped since writers were last looked after."""

    def wrote(self, stream: Stream, size: int) -> bool:
        """`size` more bytes are kept of a stream. False: its writer must wait."""
        self.buffered += size
        if stream.id == CONTROL_STREAM or (
            stream.send.pending_bytes < self._stream_bound and self.buffered < self._session_bound
        ):
            return True
        stream.paused = True
        self.paused[stream.id] = None
        return False

    def acknowledged(self, stream: Stream, events: list[Event]) -> None:
        """Bytes of a stream have arrived: whoever waits may go on, as far as there is room."""
        crowded = self.buffered >= self._session_bound // 2
        for number in [stream.id] if crowded else list(self.paused):
            waiting = self._streams.get(number)
            if waiting is not None and waiting.paused:
                self._let_write(waiting, events)

    def taken(self, streams: list[Stream]) -> None:
        """Bytes of these were put on a lane."""
        for stream in streams:
            if stream.paused:
                self._let_write(stream, self._drained)
        streams.clear()

    def dropped(self, stream: Stream) -> None:
        """What was kept of a stream is dropped, and nobody waits for it any more."""
        self.buffered -= stream.send.buffered
        self._dropped = True
        stream.paused = False
        self.paused.pop(stream.id, None)

    def restored(self, stream: Stream) -> None:
        """A stream of a snapshot is there, with what is kept of it."""
        self.buffered += stream.send.buffered
        self._dropped = True
        if stream.paused:
            self.paused[stream.id] = None

    def drained(self) -> list[Event]:
        """Writers that may go on since bytes were `taken` or `dropped`."""
        if self._dropped:
            self._dropped = False
            if self.paused and self.buffered < self._session_bound // 2:
                for number in list(self.paused):
                    self._let_write(self._streams[number], self._drained)
        events, self._drained = self._drained, []
        return events

    def _let_write(self, stream: Stream, events: list[Event]) -> None:
        """The writer may go on, if there is room for it by now."""
        if (
            stream.send.pending_bytes <= self._stream_bound // 2
            and self.buffered < self._session_bound
        ):
            self.paused.pop(stream.id, None)
            stream.paused = False
            events.append(StreamWritable(stream.id))

    def clear(self) -> None:
        """Nothing is kept any more, and nobody waits."""
        self.buffered = 0
        self.paused.clear()
        self._drained.clear()

    def check_invariants(self) -> None:
        """Raises AssertionError."""
        kept = sum(stream.send.buffered for stream in self._streams.values())
        assert self.buffered == kept, "the count of kept bytes is wrong"
        waiting = {stream.id for stream in self._streams.values() if stream.paused}
        assert self.paused.keys() == waiting, "a writer waits unseen"
