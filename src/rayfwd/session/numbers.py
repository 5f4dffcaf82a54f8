"""The numbers of a session's streams: which are ours, which the peer has used, which it left out.

The worker opens streams with odd numbers, the hub with even ones, each the next one that it has not
used. Lanes deliver in any order to each other, so a lower number may come after a higher one.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Final, Literal

from rayfwd import codes
from rayfwd.session.frames import Frame, ProtocolError

CONTROL_STREAM: Final = 0
"""Always open, never ends: messages of worker and hub to each other, each with a u32 length."""

Side = Literal["worker", "hub"]


class StreamNumbers:
    """The numbers that one side of a session has given and has seen."""

    __slots__ = ("_far", "_gaps", "_highest", "_missing", "_next", "_parity")

    def __init__(self, side: Side, streams: int) -> None:
        """`streams`: how many may be open at once; it bounds what a peer may leave out."""
        self._next = 1 if side == "worker" else 2
        self._parity = 0 if side == "worker" else 1
        """Of the peer's numbers."""
        self._highest = -1 if self._parity else 0
        """The highest that the peer has used."""
        self._gaps: list[tuple[int, int]] = []
        """Runs of lower ones that may still come, the first and the last of each, in order."""
        self._missing = 0
        """How many these are."""
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
        return number <= self._highest and self._gap_of(number) is None

    def note_peers(self, number: int) -> None:
        """The peer has used a number of its own. Raises ProtocolError: it leaves out too many."""
        if number - self._highest > self._far:
            raise ProtocolError(codes.STREAM_NUMBER, f"stream {number} is far ahead of the others")
        if number > self._highest:
            self._leave_out(self._highest + 2, number - 2)
            self._highest = number
        elif (index := self._gap_of(number)) is not None:
            first, last = self._gaps.pop(index)
            self._missing -= 1
            left = ((first, number - 2), (number + 2, last))
            self._gaps[index:index] = [run for run in left if run[0] <= run[1]]
        if self._missing > self._far or len(self._gaps) > self._far // 8:
            raise ProtocolError(codes.STREAM_NUMBER, f"too many streams below {number} never came")

    def _leave_out(self, first: int, last: int) -> None:
        """These may still come, behind all others that may."""
        if first > last:
            return
        self._missing += (last - first) // 2 + 1
        if self._gaps and self._gaps[-1][1] == first - 2:
            first, _ = self._gaps.pop()
        self._gaps.append((first, last))

    def _gap_of(self, number: int) -> int | None:
        """Where the run is that a number is in; None: in none."""
        index = bisect_right(self._gaps, (number, number)) - 1
        if index + 1 < len(self._gaps) and self._gaps[index + 1][0] == number:
            index += 1
        if index < 0 or self._gaps[index][1] < number:
            return None
        return index

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
        gaps = self._numbers_left_out()
        assert gaps == sorted(set(gaps)), "a gap is there twice"
        assert len(gaps) == self._missing, "the count of gaps is wrong"
        assert all(gap < self._highest for gap in gaps), "a gap above the highest number"
        assert all(gap % 2 == self._parity for gap in gaps), "a gap among our own numbers"

    def _numbers_left_out(self) -> list[int]:
        return [number for first, last in self._gaps for number in range(first, last + 1, 2)]

    def snapshot(self) -> dict[str, Any]:
        """For `from_snapshot`: what to add to the session's."""
        return {
            "side": self.side,
            "next_stream": self._next,
            "peer_opened": self._highest,
            "peer_gaps": self._numbers_left_out(),
        }

    @classmethod
    def from_snapshot(cls, tree: dict[str, Any], streams: int) -> StreamNumbers:
        numbers = cls(tree["side"], streams)
        numbers._next = tree["next_stream"]
        numbers._highest = tree["peer_opened"]
        for number in tree["peer_gaps"]:
            numbers._leave_out(number, number)
        return numbers
