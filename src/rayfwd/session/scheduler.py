"""Which stream's frame goes next, and by which lane.

Short messages go by the interactive lane, long transfers by the bulk lanes; where one class is
missing or sidelined the other serves both, short messages first. Where both are, the lanes in
reserve serve all. Streams of a class take turns, a frame each. Where many are bulk, less makes a
stream bulk.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from rayfwd.session.frames import Chunk
from rayfwd.session.lane import Lane, LaneClass
from rayfwd.session.states import StreamState
from rayfwd.session.stream import BULK_BYTES, CROWDED_BULK_BYTES, Stream

CROWD: Final = 4
"""So many bulk streams at once are a crowd. One or two transfers are none: they may begin on the
lane for short messages, which then wait for one process less."""


class Scheduler:
    """The queues of streams that have something to send, and the judgement on the lanes."""

    __slots__ = ("_lanes", "bulk", "bulk_ids", "relieved", "short")

    def __init__(self, lanes: dict[int, Lane]) -> None:
        """`lanes` are the session's; it adds them and takes them away."""
        self._lanes = lanes
        self.short: deque[Stream] = deque()
        self.bulk: deque[Stream] = deque()
        self.bulk_ids: set[int] = set()
        """The streams that are bulk now; the session notes them."""
        self.relieved: list[Stream] = []
        """Streams whose writers wait, of which `put` has taken bytes; the session's to clear."""

    def bulk_above(self) -> int:
        """Bytes kept beyond which a stream is bulk."""
        return CROWDED_BULK_BYTES if len(self.bulk_ids) >= CROWD else BULK_BYTES

    def enqueue(self, stream: Stream) -> None:
        """The stream has, or may have, something to send."""
        if not stream.queued:
            stream.queued = True
            if stream.bulk and stream.state is StreamState.OPEN:
                self.bulk.append(stream)
            else:
                self.short.append(stream)

    def clear(self) -> None:
        self.short.clear()
        self.bulk.clear()
        self.bulk_ids.clear()
        self.relieved.clear()

    def put(self, lane: Lane, budget: int, out: list[Chunk]) -> int:
        """Put frames for a lane behind `out`, about `budget` bytes of them. Returns their size."""
        size = 0
        for queue in self._queues(lane):
            skipped = 0
            while size < budget and skipped < len(queue) and lane.has_room():
                stream = queue.popleft()
                stream.queued = False
                state = stream.state
                if state is StreamState.OVER or not stream.ready:
                    continue
                if state is StreamState.OPENING and stream.lane not in {None, lane.id}:
                    skipped += 1  # its bytes must not overtake its OPEN
                    self.enqueue(stream)
                    continue
                frame = stream.put_next(lane.id, out)
                if stream.paused:
                    self.relieved.append(stream)
                if stream.ready:
                    self.enqueue(stream)
                lane.sent += frame
                size += frame
        return size

    def _queues(self, lane: Lane) -> tuple[deque[Stream], ...]:
        """What this lane serves, in order."""
        kind = lane.lane_class
        for beside in self._lanes.values():
            if beside.lane_class is kind or beside.sidelined:
                continue
            if kind is LaneClass.RESERVE:
                return ()
            if beside.lane_class is not LaneClass.RESERVE:
                return (self.bulk if kind is LaneClass.BULK else self.short,)
        return self.short, self.bulk

    def is_spared(self, lane: Lane) -> bool:
        """It is in reserve, and another lane is well: nothing goes by it but its PINGs."""
        return lane.lane_class is LaneClass.RESERVE and not self._queues(lane)

    # -- which lanes are trusted -----------------------------------------------------------------

    def round_trip(self) -> float:
        """Seconds: the longest of the lanes, at least a millisecond."""
        longest = 0.001
        for lane in self._lanes.values():
            if lane.rtt is not None and lane.rtt > longest:
                longest = lane.rtt
        return longest

    def to_sideline(self, lane: Lane, now: float) -> bool:
        """The lane is overdue, and another is well: streams had better go by that."""
        return (
            not lane.sidelined
            and lane.overdue(now)
            and any(
                other is not lane and not other.sidelined and not other.overdue(now)
                for other in self._lanes.values()
            )
        )

    def gone_round(self, carrier: Lane, now: float) -> list[Lane]:
        """Lanes that the peer goes round, as a bulk lane shows that carries what belongs to short
        messages, or one in reserve that carries anything. One that is unheard here too is
        sidelined: our answer would wait for our PING."""
        spared = carrier.lane_class is not LaneClass.RESERVE
        return [
            lane
            for lane in self._lanes.values()
            if lane.lane_class is not carrier.lane_class
            and not (spared and lane.lane_class is LaneClass.RESERVE)
            and not lane.sidelined
            and lane.unheard(now)
        ]

    def check_invariants(self, streams: dict[int, Stream]) -> None:
        """Raises AssertionError."""
        standing = [stream.id for queue in (self.short, self.bulk) for stream in queue]
        assert len(standing) == len(set(standing)), "a stream stands in the queues twice"
        assert all(stream.queued for queue in (self.short, self.bulk) for stream in queue)
        for stream in streams.values():
            assert stream.queued == (stream.id in standing), "a stream stands in no queue"
            if stream.state is not StreamState.RESETTING:
                assert stream.bulk == (stream.id in self.bulk_ids), "a bulk stream is not noted"
        assert self.bulk_ids <= streams.keys(), "a stream that is over is noted as bulk"
        assert not self.relieved, "writers were not looked after"
