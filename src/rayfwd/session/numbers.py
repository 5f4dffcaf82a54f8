"""The numbers of a session's streams: which are ours, which the peer has used, which it left out.

The worker opens streams with odd numbers, the hub with even ones, each the next one that it has not
used. Lanes deliver in any order to each other, so a lower number may come after a higher one.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from rayfwd import codes
from rayfwd.session.frames import Frame, ProtocolError

CONTROL_STREAM: Final = 0
"""Always open, never ends: messages of worker and hub to each other, each with a u32 length."""

Side = Literal["worker", "hub"]


class StreamNumbers:
    """The numbers that one side of a session has given and has seen."""

    __slots__ = ("_far", "_gaps", "_highest", "_next", "_parity")

    def __init__(self, side: Side, streams: int) -> None:
        """`streams`: how many may be open at once; it bounds what a peer may leave out."""
        self._next = 1 if side == "worker" else 2
        self._parity = 0 if side == "worker" else 1
        """Of the peer's numbers."""
        self._highest = -1 if self._parity else 0
        """The highest that the peer has used."""
        self._gaps: set[int] = set()
        """Lower ones that may still come."""
        self._far = 8 * streams

    @property
    def side(self) -> Side:
        return "hub" if self._parity else "worker"

    def take(self) -> int:
        """The next number of ours."""
        number = self._next
        self._next += 2
        return number

    def is_peers(self, number: int) -> bool:
        """It is the peer's to open."""
        return number != CONTROL_STREAM and number % 2 == self._parity

    def peer_used(self, number: int) -> bool:
        """The peer has opened a stream of this number; of its own numbers only."""
        return number <= self._highest and number not in self._gaps

    def note_peers(self, number: int) -> None:
        """The peer has used a number of its own. Raises ProtocolError: it leaves out too many."""
        if number - self._highest > self._far:
            raise ProtocolError(codes.STREAM_NUMBER, f"stream {number} is far ahead of the others")
        self._gaps.update(range(self._highest + 2, number, 2))
        self._gaps.discard(number)
        if len(self._gaps) > self._far:
            raise ProtocolError(codes.STREAM_NUMBER, f"too many streams below {number} never came")
        self._highest = max(self._highest, number)

    def is_used(self, number: int) -> bool:
        """One of us has opened a stream of this number."""
        return self.peer_used(number) if self.is_peers(number) else number < self._next

    def check_used(self, frame: Frame) -> None:
        """Raises ProtocolError if the frame is of a stream that nobody ever opened."""
        number = frame.stream
        if not self.is_used(number):
            raise ProtocolError(
                codes.STREAM_UNKNOWN,
                f"{frame.kind.name} of stream {number}, which was never opened",
            )

    def check_invariants(self) -> None:
        """Raises AssertionError."""
        assert self._next % 2 != self._parity, "our next number is the peer's"
        assert all(gap < self._highest for gap in self._gaps), "a gap above the highest number"
        assert all(gap % 2 == self._parity for gap in self._gaps), "a gap among our own numbers"

    def snapshot(self) -> dict[str, Any]:
        """For `from_snapshot`: what to add to the session's."""
        return {
            "side": self.side,
            "next_stream": self._next,
            "peer_opened": self._highest,
            "peer_gaps": sorted(self._gaps),
        }

    @classmethod
    def from_snapshot(cls, tree: dict[str, Any], streams: int) -> StreamNumbers:
        numbers = cls(tree["side"], streams)
        numbers._next = tree["next_stream"]
        numbers._highest = tree["peer_opened"]
        numbers._gaps.update(tree["peer_gaps"])
        return numbers
