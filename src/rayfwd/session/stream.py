"""One stream: two independent byte sequences, each with offsets, acknowledgements and credit.

The sender keeps what is not acknowledged. The receiver drops what it has and puts in order what
came out of order. An END occupies one offset behind the last byte, as TCP's FIN does, so that its
acknowledgement needs no rule of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from enum import IntEnum
from typing import Final

from rayfwd import codes
from rayfwd.session.frames import (
    HEADER_SIZE,
    MAX_PAYLOAD,
    MAX_U64,
    Chunk,
    Kind,
    ProtocolError,
    frame_header,
    skip_bytes,
)
from rayfwd.session.numbers import CONTROL_STREAM
from rayfwd.session.snapshot import Tree
from rayfwd.session.states import StreamEvent, StreamState, stream_after

FRAME_BYTES: Final = 1 << 16
"""Bytes of data in one frame, at most: what an urgent frame may have to wait behind."""
COALESCE_BYTES: Final = 1 << 14
"""Chunks smaller than this are joined when several wait."""
JOIN_BYTES: Final = 1 << 12
"""A payload up to this length is joined with its header into one chunk."""
BULK_BYTES: Final = 1 << 16
"""A stream that keeps more than this is bulk, until all of it has arrived."""
CROWDED_BULK_BYTES: Final = 1 << 14
"""The same in a crowd of bulk streams: were each of them to begin its bursts on the lane for short
messages, as those of a distributed training would, these would wait for all of them."""
EARLY_COST: Final = 128
"""Bytes of memory that a piece takes which came too early, besides its own."""
PROBE_AFTER: Final = 3.0
"""Seconds without progress, with lanes up, after which the oldest segment is sent once more. It
mends what no lane's loss explains: an acknowledgement that went down with a lane which its sender
still took for alive."""
PROBE_CEILING: Final = 30.0
MAX_SENTENCE: Final = 1024
"""Bytes of the sentence in a RESET or a CLOSE."""


class ResetReason(IntEnum):
    """Why a stream was given up: the offset of a RESET frame. Unknown numbers read as ABORTED."""

    ABORTED = 1
    """The program at the other end reset its connection, or went away."""
    REFUSED = 2
    """Nothing listens on the target's port."""
    UNREACHABLE = 3
    """The target's address did not answer."""
    NOT_IN_PLAN = 4
    """The target is no port that this node may reach."""
    NODE_AWAY = 5
    """The target's node has no session with the hub."""
    SESSION_ENDED = 6
    """The session that carried the stream ended."""
    TOO_MANY = 7
    """The session has as many streams as it may have, or the machine has no descriptor left."""
    LISTENS = 8
    """The answer to an OPEN that asks: a program listens there."""
    NOT_LISTENING = 9
    """The other answer."""

    @classmethod
    def from_wire(cls, number: int) -> ResetReason:
        try:
            return cls(number)
        except ValueError:
            return cls.ABORTED


class Segment:
    """A run of bytes (or an END) that was sent and is not acknowledged."""

    __slots__ = ("data", "end", "lane", "offset", "stop")

    def __init__(self, offset: int, data: Chunk, end: bool) -> None:
        self.offset = offset
        self.stop = offset + (1 if end else len(data))
        """The offset behind it: an END takes one."""
        self.data = data
        self.end = end
        self.lane: int | None = None
        """The lane it was last sent on; None while it waits to be sent again."""


class SendSide:
    """What this side sends: bytes waiting, bytes under way, and the peer's credit."""

    __slots__ = (
        "_end_wanted", "_pending", "_resend", "acked", "end_sent", "limit", "next", "pending_bytes",
        "unacked", "unacked_bytes",
    )  # fmt: skip

    def __init__(self, limit: int) -> None:
        self._pending: deque[Chunk] = deque()
        self._resend: deque[Segment] = deque()
        self._end_wanted = False
        self.pending_bytes = 0
        self.unacked: deque[Segment] = deque()
        self.unacked_bytes = 0
        self.next = 0
        """Offset of the next new byte."""
        self.acked = 0
        """All before this offset has arrived."""
        self.limit = limit
        """The peer takes bytes up to here."""
        self.end_sent = False

    @property
    def buffered(self) -> int:
        """Bytes kept for this direction."""
        return self.pending_bytes + self.unacked_bytes

    @property
    def ended(self) -> bool:
        """An END was asked for; no more may be written."""
        return self._end_wanted

    @property
    def complete(self) -> bool:
        """Everything, the END too, has arrived."""
        return self.end_sent and not self.unacked

    @property
    def ready(self) -> bool:
        """There is something that may be sent now."""
        if self._resend:
            return True
        if self._pending:
            return self.next < self.limit
        return self._end_wanted and not self.end_sent

    def write(self, data: Chunk) -> None:
        if self._end_wanted:
            raise ValueError("bytes after the end of a stream")
        if data:
            self._pending.append(data)
            self.pending_bytes += len(data)

    def end(self) -> None:
        self._end_wanted = True

    def take(self) -> Segment | None:
        """The next segment to put on a lane: what must be sent again first, then new bytes."""
        if self._resend:
            return self._resend.popleft()
        if self._pending:
            room = min(self.limit - self.next, FRAME_BYTES)
            if room <= 0:
                return None
            data = self._chunk(room)
            segment = Segment(self.next, data, False)
            self.pending_bytes -= len(data)
            self.unacked_bytes += len(data)
        elif self._end_wanted and not self.end_sent:
            self.end_sent = True
            segment = Segment(self.next, b"", True)
        else:
            return None
        self.next = segment.stop
        self.unacked.append(segment)
        return segment

    def _chunk(self, room: int) -> Chunk:
        pending = self._pending
        first = pending.popleft()
        if len(first) > room:
            view = memoryview(first)
            pending.appendleft(view[room:])
            return view[:room]
        if not pending or len(first) >= COALESCE_BYTES:
            return first
        parts, size = [first], len(first)
        while pending and size < COALESCE_BYTES and size + len(pending[0]) <= room:
            part = pending.popleft()
            parts.append(part)
            size += len(part)
        return b"".join(parts) if len(parts) > 1 else first

    def acknowledge(self, offset: int, limit: int) -> int:
        """Take in an ACK; old ones do nothing. Returns the bytes that it freed."""
        if offset > self.next:
            raise ProtocolError(codes.ACK_AHEAD, f"ACK of {offset}, but only {self.next} was sent")
        self.limit = max(self.limit, limit)
        if offset <= self.acked:
            return 0
        self.acked = offset
        freed = 0
        unacked = self.unacked
        while unacked and unacked[0].stop <= offset:
            freed += len(unacked.popleft().data)
        self.unacked_bytes -= freed
        while self._resend and self._resend[0].stop <= offset:
            self._resend.popleft()
        return freed

    def lane_lost(self, lane: int) -> bool:
        """Whatever was under way on `lane` must be sent again. True if that was anything."""
        lost = [segment for segment in self.unacked if segment.lane == lane]
        if lost:
            for segment in lost:
                segment.lane = None
            self._resend = deque(segment for segment in self.unacked if segment.lane is None)
        return bool(lost)

    def probe(self) -> bool:
        """Send the oldest segment under way once more. False if there is none."""
        if not self.unacked or self.unacked[0].lane is None:
            return False
        self.unacked[0].lane = None
        self._resend.appendleft(self.unacked[0])
        return True

    def check_invariants(self) -> None:
        """Raises AssertionError."""
        assert self.pending_bytes == sum(map(len, self._pending)), "the bytes not yet sent"
        assert self.unacked_bytes == sum(len(s.data) for s in self.unacked), "the bytes under way"
        waiting = [segment for segment in self.unacked if segment.lane is None]
        assert list(self._resend) == waiting, "what is on no lane is to be sent again"
        assert self.acked <= self.next
        at = self.next
        for segment in reversed(self.unacked):
            assert segment.stop == at, "a gap between two segments"
            at = segment.offset
        assert not self.unacked or at <= self.acked < self.unacked[0].stop, "it has arrived whole"
        assert self._end_wanted or not self.end_sent
        assert self.next <= self.limit + self.end_sent, "beyond the peer's credit"

    def snapshot(self) -> Tree:
        """For `from_snapshot`. Nothing may be under way."""
        return {
            "next": self.next,
            "acked": self.acked,
            "limit": self.limit,
            "end_wanted": self._end_wanted,
            "end_sent": self.end_sent,
            # Each as it was cut: what is sent again is cut as it was the first time.
            "unacked": [[s.offset, s.data, s.end] for s in self.unacked],
            "pending": b"".join(self._pending),
        }

    @classmethod
    def from_snapshot(cls, tree: Tree) -> SendSide:
        side = cls(tree["limit"])
        side.next, side.acked = tree["next"], tree["acked"]
        side._end_wanted, side.end_sent = tree["end_wanted"], tree["end_sent"]
        side.unacked.extend(Segment(*segment) for segment in tree["unacked"])
        side.unacked_bytes = sum(len(segment.data) for segment in side.unacked)
        side._resend.extend(side.unacked)
        if tree["pending"]:
            side._pending.append(tree["pending"])
            side.pending_bytes = len(tree["pending"])
        return side


class ReceiveSide:
    """What this side receives: bytes in order, bytes that came too early, and the credit given."""

    __slots__ = (
        "_early", "_early_at", "ack_sent", "consumed", "early_bytes", "end_at", "limit_sent",
        "mark_consumed", "mark_time", "next", "window",
    )  # fmt: skip

    def __init__(self, window: int, now: float) -> None:
        self._early: dict[int, Chunk] = {}
        self._early_at: list[int] = []
        self.early_bytes = 0
        self.next = 0
        """Offset of the first byte not yet received in order."""
        self.consumed = 0
        """Bytes that this side's reader has taken."""
        self.end_at: int | None = None
        self.window = window
        self.limit_sent = window
        self.ack_sent = 0
        self.mark_time = now
        self.mark_consumed = 0

    @property
    def complete(self) -> bool:
        """The END was received, and all before it."""
        return self.end_at is not None and self.next > self.end_at

    @property
    def unread(self) -> int:
        """Bytes received in order that the reader has not reported as consumed."""
        in_order = self.next - 1 if self.complete else self.next
        return in_order - self.consumed

    @property
    def held(self) -> int:
        """Bytes received and not yet taken by the reader, those out of order too."""
        return self.unread + self.early_bytes

    @property
    def memory(self) -> int:
        """What these take in memory."""
        return self.held + EARLY_COST * len(self._early_at)

    def drop(self) -> None:
        """Nobody reads any more."""
        self.consumed += self.unread
        self._early.clear()
        self._early_at.clear()
        self.early_bytes = 0

    def data(self, offset: int, *payload: Chunk) -> list[Chunk]:
        """Take in a DATA frame, whose payload may be in chunks; returns what is now in order.
        Raises ProtocolError."""
        stop = offset + sum(map(len, payload))
        if stop > self.limit_sent:
            raise ProtocolError(
                codes.CREDIT_EXCEEDED, f"DATA up to {stop}, but the limit is {self.limit_sent}"
            )
        if self.end_at is not None and stop > self.end_at:
            raise ProtocolError(
                codes.DATA_AFTER_END, f"DATA up to {stop}, but END was {self.end_at}"
            )
        if stop <= self.next or stop == offset:
            return []
        if offset > self.next:
            self._keep_early(offset, payload[0] if len(payload) == 1 else b"".join(payload))
            return []
        out = list(payload) if offset == self.next else skip_bytes(payload, self.next - offset)
        self.next = stop
        if self._early_at:
            self._take_early(out)
        self._pass_end()
        return out

    def _keep_early(self, offset: int, payload: Chunk) -> None:
        known = self._early.get(offset)
        if known is not None:
            if len(known) >= len(payload):
                return
            self.early_bytes -= len(known)
        else:
            self._early_at.insert(bisect_left(self._early_at, offset), offset)
        self._early[offset] = payload
        self.early_bytes += len(payload)
        if self.early_bytes > self.limit_sent - self.next:
            # Each byte is sent again at the same cut, so that what is held overlaps only by intent.
            raise ProtocolError(codes.CREDIT_EXCEEDED, f"{self.early_bytes} bytes out of order")

    def _take_early(self, out: list[Chunk]) -> None:
        taken = 0
        for offset in self._early_at:
            if offset > self.next:
                break
            payload = self._early.pop(offset)
            self.early_bytes -= len(payload)
            taken += 1
            if offset + len(payload) > self.next:
                out.append(payload[self.next - offset :])
                self.next = offset + len(payload)
        del self._early_at[:taken]

    def end(self, offset: int) -> bool:
        """Take in an END frame. True when the direction has just ended. Raises ProtocolError."""
        if self.end_at is not None:
            if offset != self.end_at:
                raise ProtocolError(codes.END_MOVED, f"END at {offset}, before at {self.end_at}")
            return False
        if offset > self.limit_sent:
            raise ProtocolError(codes.CREDIT_EXCEEDED, f"END at {offset}, limit {self.limit_sent}")
        highest = max([self.next, *(o + len(p) for o, p in self._early.items())])
        if offset < highest:
            raise ProtocolError(codes.END_MOVED, f"END at {offset}, but DATA reached {highest}")
        self.end_at = offset
        return self._pass_end()

    def _pass_end(self) -> bool:
        if self.end_at is not None and self.next == self.end_at:
            self.next += 1
            return True
        return False

    @property
    def limit(self) -> int:
        """The credit that could be given now; never less than what was given."""
        limit = self.consumed + self.window  # no min and max: it is asked for with each frame
        if limit <= self.limit_sent:
            return self.limit_sent
        return limit if limit < MAX_U64 else MAX_U64

    def ack_urgent(self) -> bool:
        """An ACK is worth a frame of its own now."""
        quarter = self.window >> 2
        return (
            self.next - self.ack_sent >= quarter
            or self.limit - self.limit_sent >= quarter
            or (self.ack_sent < self.next and self.complete)
        )

    def ack_due(self) -> bool:
        """There is something to acknowledge, sooner or later."""
        return self.next > self.ack_sent or self.limit - self.limit_sent >= self.window >> 3

    def wanted_window(self, now: float, round_trip: float, ceiling: int) -> int:
        """The window, four times as large if the reader took half of it within a round trip."""
        if now - self.mark_time < round_trip:
            return self.window
        rate = (self.consumed - self.mark_consumed) / max(now - self.mark_time, 1e-6)
        self.mark_time, self.mark_consumed = now, self.consumed
        if rate * round_trip >= self.window / 2:
            return min(self.window * 4, ceiling)
        return self.window

    def check_invariants(self) -> None:
        """Raises AssertionError."""
        assert self._early_at == sorted(self._early), "offsets out of order, or missing"
        assert self.early_bytes == sum(map(len, self._early.values())), "the bytes that came early"
        assert not self._early_at or self._early_at[0] > self.next, "bytes that are in order wait"
        assert self.unread >= 0, "more was read than came"
        assert self.ack_sent <= self.next
        assert self.next <= self.limit_sent + self.complete, "beyond the credit that was given"

    def snapshot(self) -> Tree:
        """For `from_snapshot`. What came too early is not acknowledged: it is sent again."""
        return {
            "next": self.next,
            "consumed": self.consumed,
            "end_at": self.end_at,
            "window": self.window,
            "limit_sent": self.limit_sent,
            "ack_sent": self.ack_sent,
        }

    @classmethod
    def from_snapshot(cls, tree: Tree, now: float) -> ReceiveSide:
        side = cls(tree["window"], now)
        side.next, side.consumed = tree["next"], tree["consumed"]
        side.end_at = tree["end_at"]
        side.limit_sent, side.ack_sent = tree["limit_sent"], tree["ack_sent"]
        side.mark_consumed = side.consumed
        return side


class Stream:
    """A stream as one of its two ends sees it. Its state changes in `_move` only."""

    __slots__ = (
        "bulk", "id", "lane", "mine", "open_due", "paused", "probe_at", "probes",
        "queued", "reason", "receive", "reset_due", "send", "state", "target", "text",
    )  # fmt: skip

    def __init__(
        self, number: int, mine: bool, target: bytes, limit: int, window: int, now: float
    ) -> None:
        self.id = number
        self.mine = mine
        self.target = target
        self.state = StreamState.OPENING if mine else StreamState.OPEN
        self.send = SendSide(limit)
        self.receive = ReceiveSide(window, now)
        self.lane: int | None = None
        """The lane of the OPEN, or of the RESET, while it is not answered."""
        self.open_due = mine
        self.reset_due = False
        self.reason = ResetReason.ABORTED
        self.text = b""
        self.bulk = False
        self.paused = False
        """The writer was told to wait."""
        self.queued = False
        """It stands in one of the scheduler's queues."""
        self.probe_at = now
        self.probes = 0

    @classmethod
    def control(cls, window: int, now: float) -> Stream:
        """The control stream, which nobody opens."""
        stream = cls(CONTROL_STREAM, True, b"", window, window, now)
        stream.opened()
        return stream

    @property
    def finished(self) -> bool:
        return self.send.complete and self.receive.complete

    @property
    def ready(self) -> bool:
        """There is something of this stream to put on a lane, ACKs apart."""
        if self.state is StreamState.RESETTING:
            return self.reset_due
        return self.open_due or self.send.ready

    # -- its states ------------------------------------------------------------------------------

    def _move(self, event: StreamEvent) -> None:
        self.state = stream_after(self.state, event)

    def opened(self) -> None:
        """The peer has answered: what follows may go by any lane."""
        self._move(StreamEvent.ANSWERED)
        self.open_due = False
        self.lane = None

    def give_up(self, reason: ResetReason, text: str) -> None:
        """Send nothing but a RESET from now on."""
        self._move(StreamEvent.RESET)
        self.reason = reason
        self.text = text.encode()[:MAX_SENTENCE]
        self.open_due = False
        self.reset_due = True
        self.lane = None

    def over(self, event: StreamEvent) -> None:
        """Nothing of it comes or goes any more."""
        self._move(event)

    # -- its bytes -------------------------------------------------------------------------------

    def write(self, data: Chunk, bulk_above: int = BULK_BYTES) -> None:
        """Bytes to send; more than `bulk_above` of them make the stream bulk."""
        send = self.send
        send.write(data)
        if send.pending_bytes + send.unacked_bytes > bulk_above and self.id != CONTROL_STREAM:
            self.bulk = True

    def acknowledged(self, offset: int, limit: int, now: float) -> int:
        """Take in an ACK. Returns the bytes that it freed. Raises ProtocolError."""
        if self.state is StreamState.OPENING:
            self.opened()
        send = self.send
        before = send.acked
        freed = send.acknowledge(offset, limit)
        if send.acked > before:
            self.probe_at, self.probes = now, 0
        if self.bulk and not send.buffered:
            self.bulk = False
        return freed

    def put_next(self, lane: int, out: list[Chunk]) -> int:
        """Put the next frame, which goes by `lane`, behind `out`. Returns its size in bytes. Only
        for a stream that is `ready`."""
        if self.state is StreamState.RESETTING:
            self.reset_due = False
            self.lane = lane
            out.append(frame_header(Kind.RESET, self.id, self.reason, len(self.text)) + self.text)
            return HEADER_SIZE + len(self.text)
        if self.open_due:
            self.open_due = False
            self.lane = lane
            out.append(frame_header(Kind.OPEN, self.id, 0, len(self.target)) + self.target)
            return HEADER_SIZE + len(self.target)
        segment = self.send.take()
        assert segment is not None, "a stream that is ready has a segment"
        segment.lane = lane
        if segment.end:
            out.append(frame_header(Kind.END, self.id, segment.offset, 0))
            return HEADER_SIZE
        data = segment.data
        head = frame_header(Kind.DATA, self.id, segment.offset, len(data))
        if len(data) <= JOIN_BYTES:
            out.append(head + data)
        else:
            out.append(head)
            out.append(data)
        return HEADER_SIZE + len(data)

    def to_resend(self, lane: int) -> bool:
        """What was under way on `lane` must go again. False: nothing was."""
        again = self.send.lane_lost(lane)
        if self.lane == lane:
            self._say_again()
            again = True
        return again

    def _say_again(self) -> None:
        """The OPEN or the RESET, whichever is not answered."""
        self.lane = None
        if self.state is StreamState.RESETTING:
            self.reset_due = True
        elif self.state is StreamState.OPENING:
            self.open_due = True

    def probe(self, now: float) -> bool:
        """Send again what has made no progress for long. False: nothing has waited long enough."""
        if self.lane is None and not self.send.unacked:
            self.probe_at = now
            return False
        timeout = min(PROBE_AFTER * (1 << min(self.probes, 8)), PROBE_CEILING)
        if now - self.probe_at < timeout:
            return False
        self.probe_at = now
        self.probes += 1
        if self.state is StreamState.OPEN:
            return self.send.probe()
        self._say_again()
        self.send.probe()
        return True

    # -- for tests, and for a process that comes after this one ----------------------------------

    def check_invariants(self) -> None:
        """Raises AssertionError."""
        state = self.state
        assert self.mine or state is not StreamState.OPENING, "the peer's, and not answered"
        assert state is StreamState.OPENING or not self.open_due
        assert state is StreamState.RESETTING or not self.reset_due
        assert not (self.lane is not None and (self.open_due or self.reset_due)), "due, and sent"
        assert self.lane is None or state is not StreamState.OPEN, "answered, and waits for it"
        assert self.queued or not self.ready, "it has something to send, and stands in no queue"
        if state is StreamState.RESETTING:
            assert not self.send.buffered, "given up, and keeps bytes"
        self.send.check_invariants()
        self.receive.check_invariants()

    def snapshot(self) -> Tree:
        """For `from_snapshot`. Nothing may be under way."""
        return {
            "id": self.id,
            "mine": self.mine,
            "target": self.target,
            "state": self.state.value,
            "send": self.send.snapshot(),
            "receive": self.receive.snapshot(),
            "reason": int(self.reason),
            "text": self.text,
            "bulk": self.bulk,
            "paused": self.paused,
        }

    @classmethod
    def from_snapshot(cls, tree: Tree, now: float) -> Stream:
        stream = cls(tree["id"], tree["mine"], tree["target"], 0, 0, now)
        stream.state = StreamState(tree["state"])  # where it is, and no change
        stream.send = SendSide.from_snapshot(tree["send"])
        stream.receive = ReceiveSide.from_snapshot(tree["receive"], now)
        stream.reason, stream.text = ResetReason(tree["reason"]), tree["text"]
        stream.bulk, stream.paused = tree["bulk"], tree["paused"]
        # What was not answered goes out again.
        stream.open_due = stream.state is StreamState.OPENING
        stream.reset_due = stream.state is StreamState.RESETTING
        return stream


assert FRAME_BYTES <= MAX_PAYLOAD
