"""What a session owes the peer for what came: ACKs, urgent or in company, and GONEs."""

from __future__ import annotations

import struct
from typing import Final

from rayfwd.session.frames import HEADER_SIZE, Chunk, Kind, frame_header
from rayfwd.session.states import StreamState
from rayfwd.session.stream import Stream

ACK_DELAY: Final = 0.1
"""Seconds that an ACK may wait for company."""
MOST_GONE: Final = 1 << 16
"""Streams that wait to be told GONE; of further ones it is asked again, and told then."""
LIMIT: Final = struct.Struct(">Q")
"""The payload of an ACK."""


class Answers:
    """The streams, by number, of which something is to be acknowledged."""

    __slots__ = ("_lazy", "_lazy_at", "_streams", "gone", "urgent")

    def __init__(self, streams: dict[int, Stream]) -> None:
        """`streams` are the session's; it adds them and takes them away."""
        self._streams = streams
        self.urgent: dict[int, None] = {}
        """To be acknowledged with the next write."""
        self.gone: dict[int, None] = {}
        """To be answered with GONE; see `over`."""
        self._lazy: dict[int, None] = {}
        self._lazy_at = 0.0

    def after(self, stream: Stream, now: float, again: bool = False) -> None:
        """Something of a stream came or was read. `again`: it came a second time."""
        if stream.id not in self._streams:
            return
        receive = stream.receive
        if again or receive.ack_urgent():
            self.urgent[stream.id] = None
        elif receive.ack_due():
            self.soon(stream, now)

    def over(self, number: int) -> None:
        """The peer speaks of a stream that is over here."""
        if len(self.gone) < MOST_GONE:
            self.gone[number] = None

    def soon(self, stream: Stream, now: float) -> None:
        """Acknowledge within ACK_DELAY, together with others."""
        if not self._lazy:
            self._lazy_at = now + ACK_DELAY
        self._lazy[stream.id] = None

    def again(self, stream: Stream) -> None:
        """Its last ACK may have gone down with a lane."""
        if stream.receive.next or not stream.mine:
            self.urgent[stream.id] = None

    def forget(self, number: int) -> None:
        """Nothing is acknowledged of a stream that was given up or is over."""
        self.urgent.pop(number, None)
        self._lazy.pop(number, None)

    def clear(self) -> None:
        """Nothing is owed any more."""
        self.urgent.clear()
        self.gone.clear()
        self._lazy.clear()

    def tick(self, now: float) -> None:
        """What waited for company has waited long enough."""
        if self._lazy and now >= self._lazy_at:
            self.urgent.update(self._lazy)
            self._lazy.clear()

    def deadline(self) -> float | None:
        """When `tick` has something to do; None: nothing waits."""
        return self._lazy_at if self._lazy else None

    def put(self, out: list[Chunk], budget: int) -> int:
        """Put what is owed now behind `out`, about `budget` bytes of it. Returns its size."""
        size = 0
        while self.gone and size < budget:
            out.append(frame_header(Kind.GONE, _first(self.gone), 0, 0))
            size += HEADER_SIZE
        while self.urgent and size < budget:
            number = _first(self.urgent)
            stream = self._streams.get(number)
            if stream is None or stream.state is StreamState.RESETTING:
                continue
            receive = stream.receive
            limit = receive.limit
            receive.ack_sent, receive.limit_sent = receive.next, limit
            out.append(frame_header(Kind.ACK, number, receive.next, LIMIT.size) + LIMIT.pack(limit))
            size += HEADER_SIZE + LIMIT.size
            self._lazy.pop(number, None)
        return size

    def check_invariants(self) -> None:
        """Raises AssertionError."""
        for number in (*self.urgent, *self._lazy):
            assert number in self._streams, "an ACK of a stream that is over"


def _first(numbers: dict[int, None]) -> int:
    """Take the number that waits longest."""
    number = next(iter(numbers))
    del numbers[number]
    return number
