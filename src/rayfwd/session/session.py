"""The session: streams over lanes that come and go (pure: bytes and times in, bytes out).

Whoever drives a session tells it what happened (`lane_up`, `receive`, `lane_down`, `tick`), does
what its events say, and asks `data_to_send` for each lane that has room. It keeps no clock: `now`
is monotonic, in seconds.

Lanes are of two classes. Short messages go by the interactive lane, long transfers by the bulk
lanes; where one class is missing or stalled the other serves both, short messages first.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Literal

from rayfwd import codes
from rayfwd.session.events import (
    DataReceived,
    EndReceived,
    Event,
    LaneSilent,
    MessageReceived,
    Parked,
    Resumed,
    SessionEnded,
    StreamFinished,
    StreamOpened,
    StreamReset,
    StreamWritable,
)
from rayfwd.session.frames import (
    HEADER_SIZE,
    Chunk,
    Frame,
    FrameDecoder,
    Kind,
    ProtocolError,
    close_frame,
    header,
)
from rayfwd.session.lane import Lane, LaneClass
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.session.stream import ReceiveSide, ResetReason, SendSide, Stream, StreamState

CONTROL_STREAM = 0
"""Always open, never ends: messages of worker and hub to each other, each with a u32 length."""
MAX_MESSAGE = 1 << 20
"""Bytes of a message on the control stream, at most."""
ACK_DELAY = 0.1
"""Seconds that an ACK may wait for company."""
PROBE_AFTER = 3.0
"""Seconds without progress, with lanes up, after which the oldest segment is sent once more. It
mends what no lane's loss explains: an acknowledgement that went down with a lane which its sender
still took for alive."""
PROBE_CEILING = 30.0
BULK_BYTES = 1 << 16
"""A stream that keeps more than this is bulk, until all of it has arrived."""
REFUSED_STREAMS = 1 << 14
"""Streams over `Limits.streams` that are refused one by one; a peer that opens more is broken."""
SHORT_KINDS = frozenset({Kind.OPEN, Kind.ACK, Kind.GONE, Kind.RESET})
"""Frames that go by the interactive lane while the sender trusts it."""
JOIN_BYTES = 1 << 12
"""A payload up to this length is joined with its header into one chunk."""

_LIMIT = struct.Struct(">Q")
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on memory; all in bytes, but for `streams`. Both sides must agree on `window`."""

    window: int = 1 << 18
    """Credit that each side of a new stream has."""
    window_ceiling: int = 1 << 24
    """What the credit of one stream may grow to."""
    window_budget: int = 1 << 26
    """What the credits of all streams may grow by, together."""
    stream_buffer: int = 1 << 18
    """Unsent bytes of one stream from which its writer must wait."""
    session_buffer: int = 1 << 26
    """Bytes kept for sending, of all streams, from which every writer must wait."""
    streams: int = 1 << 14
    """Streams open at once."""


class SessionState(Enum):
    """Where a session is.

    ::

        FRESH  --lane_up-->                        UP
        UP     --the last lane_down-->             PARKED
        PARKED --lane_up-->                        UP
        any    --close() | CLOSE | ride_through--> ENDED
    """

    FRESH = "fresh"
    UP = "up"
    PARKED = "parked"
    ENDED = "ended"


class Session:
    """One side of a session. The worker opens streams with odd numbers, the hub with even ones."""

    def __init__(
        self, side: Literal["worker", "hub"], ride_through: float, limits: Limits, now: float
    ) -> None:
        self.state = SessionState.FRESH
        self.ride_through = ride_through
        self.limits = limits
        self.lanes: dict[int, Lane] = {}
        self.streams: dict[int, Stream] = {}
        self.buffered = 0
        """Bytes kept for sending, of all streams."""
        self.parked_at: float | None = now
        self.cuts = 0
        """How often the last lane went down."""
        self.bytes_in = 0
        self.bytes_out = 0
        self._next_lane = 1
        self._next_stream = 1 if side == "worker" else 2
        self._peer_parity = 0 if side == "worker" else 1
        self._peer_opened = -1 if self._peer_parity else 0
        self._peer_gaps: set[int] = set()
        self._decoders: dict[int, FrameDecoder] = {}
        self._gone: dict[int, None] = {}
        self._closing: bytes | None = None
        self._acks: dict[int, None] = {}
        self._lazy_acks: dict[int, None] = {}
        self._lazy_at = 0.0
        self._queues: dict[bool, deque[Stream]] = {False: deque(), True: deque()}
        self._paused: dict[int, None] = {}
        self._drained: list[Event] = []
        self._freed = False
        """A stream's buffers were dropped since writers were last looked after."""
        self._window_spent = 0
        self._probe_at = now
        self._message = bytearray()
        control = Stream(CONTROL_STREAM, True, b"", limits.window, limits.window, now)
        control.state, control.open_due = StreamState.OPEN, False
        self.streams[CONTROL_STREAM] = control

    @property
    def ended(self) -> bool:
        return self.state is SessionState.ENDED

    # -- what the driver tells ---------------------------------------------------------------

    def lane_up(self, kind: LaneClass, now: float) -> tuple[int, list[Event]]:
        """A lane has been welcomed. Returns its number and what follows."""
        if self.ended:
            raise ValueError("a lane for a session that has ended")
        number = self._next_lane
        self._next_lane += 1
        self.lanes[number] = Lane(number, kind, now)
        self._decoders[number] = FrameDecoder()
        events: list[Event] = []
        if self.state is SessionState.PARKED and self.parked_at is not None:
            events.append(Resumed(now - self.parked_at))
        self.parked_at = None
        self._set_state(SessionState.UP)
        return number, events

    def lane_down(self, number: int, now: float) -> list[Event]:
        """A lane is gone: what was under way on it goes by others, or waits."""
        if self.lanes.pop(number, None) is None or self.ended:
            return []
        del self._decoders[number]
        self._go_round(number)
        if self.lanes:
            return []
        self.cuts += 1
        self.parked_at = now
        self._set_state(SessionState.PARKED)
        return [Parked()]

    def receive(self, number: int, data: Chunk, now: float) -> list[Event]:
        """Bytes from a lane. Raises ProtocolError: the peer is broken, close the session."""
        lane = self.lanes.get(number)
        if lane is None or self.ended:
            return []
        lane.heard = now
        lane.bytes_in += len(data)
        self.bytes_in += len(data)
        events: list[Event] = []
        for frame in self._decoders[number].feed(data):
            if not self._frame(lane, frame, now, events):
                break
        return events

    def tick(self, now: float) -> list[Event]:
        """Time has passed: what is due by now."""
        if self.ended:
            return []
        if self.parked_at is not None and now - self.parked_at >= self.ride_through:
            return self._end(f"no lane for {now - self.parked_at:.0f} s")
        events: list[Event] = []
        for lane in self.lanes.values():
            if lane.silent(now):
                events.append(LaneSilent(lane.id))
            elif not lane.suspect and lane.stalled(now) and self._healthy_beside(lane, now):
                self._suspect(lane)
        if self._lazy_acks and now >= self._lazy_at:
            self._acks.update(self._lazy_acks)
            self._lazy_acks.clear()
        if self.lanes and now >= self._probe_at:
            self._probe_at = now + PROBE_AFTER / 2
            self._probe(now)
        return events

    def deadline(self, now: float) -> float:
        """When `tick` should be called next, if nothing else happens."""
        if self.ended:
            return now + 3600.0
        if self.parked_at is not None:
            return self.parked_at + self.ride_through
        due = min((lane.deadline(now) for lane in self.lanes.values()), default=now + 1.0)
        if self._lazy_acks:
            due = min(due, self._lazy_at)
        return due

    # -- what the owner of a stream asks ------------------------------------------------------

    @property
    def full(self) -> bool:
        """The peer would refuse one more stream; the control stream is counted, as there."""
        return len(self.streams) >= self.limits.streams

    def open(self, target: bytes, now: float) -> int:
        """Open a stream. Bytes may follow at once. Whoever opens asks first whether it is `full`:
        of streams beyond `Limits.streams` a peer refuses some, and takes more for a fault."""
        if self.ended:
            raise ValueError("a stream in a session that has ended")
        number = self._next_stream
        self._next_stream += 2
        window = self.limits.window
        stream = Stream(number, True, target, window, window, now)
        self.streams[number] = stream
        self._enqueue(stream)
        return number

    def send(self, number: int, data: Chunk) -> bool:
        """Bytes to send. False: no more, please, until StreamWritable (or StreamReset)."""
        stream = self._writable_stream(number)
        if stream is None:
            return True
        stream.send.write(data)
        self.buffered += len(data)
        if stream.send.buffered > BULK_BYTES and number != CONTROL_STREAM:
            stream.bulk = True
        self._enqueue(stream)
        if number == CONTROL_STREAM:
            return True
        if (
            stream.send.pending_bytes >= self.limits.stream_buffer
            or self.buffered >= self.limits.session_buffer
        ):
            stream.paused = True
            self._paused[number] = None
            return False
        return True

    def must_wait(self, number: int) -> bool:
        """The stream's writer was told to wait, and not yet to go on."""
        return number in self._paused

    def end(self, number: int) -> None:
        """No more bytes will be sent on this stream."""
        stream = self._writable_stream(number)
        if stream is not None:
            stream.send.end()
            self._enqueue(stream)

    def reset(self, number: int, reason: ResetReason, text: str = "") -> None:
        """Give a stream up, in both directions. No events of it follow."""
        stream = self.streams.get(number)
        if stream is None or stream.state is StreamState.RESETTING:
            return
        self._drop_buffers(stream)
        stream.state = StreamState.RESETTING
        stream.reason = reason
        stream.text = text.encode()[:1024]
        stream.reset_due = True
        stream.open_due = False
        stream.lane = None
        self._enqueue(stream)

    def consumed(self, number: int, size: int, now: float) -> None:
        """`size` bytes of a stream were passed on: the peer may send as many more."""
        stream = self.streams.get(number)
        if stream is None or stream.state is StreamState.RESETTING:
            return
        receive = stream.receive
        receive.consumed += size
        rtt = 0.001
        for lane in self.lanes.values():
            if lane.rtt is not None and lane.rtt > rtt:
                rtt = lane.rtt
        if now - receive.mark_time >= rtt:
            self._widen(receive, rtt, now)
        self._schedule_ack(stream, now)

    def _widen(self, receive: ReceiveSide, rtt: float, now: float) -> None:
        """Give more credit to a stream whose reader keeps up."""
        ceiling = min(
            self.limits.window_ceiling,
            receive.window + self.limits.window_budget - self._window_spent,
        )
        window = receive.wanted_window(now, rtt, ceiling)
        if window > receive.window:
            self._window_spent += window - receive.window
            receive.window = window

    def send_message(self, data: bytes) -> None:
        """Send a message to the peer: reliable, in order."""
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(data)} bytes is over {MAX_MESSAGE}")
        self.send(CONTROL_STREAM, _LENGTH.pack(len(data)) + data)

    def close(self, why: str) -> list[Event]:
        """End the session in order; a CLOSE goes out on every lane that still takes it."""
        events = self._end(why) if not self.ended else []
        self._closing = close_frame(why)
        return events

    # -- for a process that comes after this one -------------------------------------------------

    def snapshot(self) -> Tree:
        """Everything that `restored` needs to go on. Raises ValueError unless it is parked.

        What events have told is the driver's to keep: it is not told again. What the peer has no
        answer to is not here either, since it sends that again: bytes that came too early, OPENs
        and RESETs.
        """
        if self.state is not SessionState.PARKED:
            raise ValueError(f"a snapshot of a session that is {self.state.value}")
        return {
            "side": "hub" if self._peer_parity else "worker",
            "ride_through": self.ride_through,
            "limits": asdict(self.limits),
            "parked_at": self.parked_at,
            "cuts": self.cuts,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "next_stream": self._next_stream,
            "peer_opened": self._peer_opened,
            "peer_gaps": sorted(self._peer_gaps),
            "message": bytes(self._message),
            "streams": [stream.snapshot() for stream in self.streams.values()],
        }

    @classmethod
    def restored(cls, tree: Tree, now: float) -> Session:
        """The session of a snapshot, parked since it was taken; `now` is of the same clock.

        Raises SnapshotError.
        """
        try:
            session = cls(tree["side"], tree["ride_through"], Limits(**tree["limits"]), now)
            session._set_state(SessionState.PARKED)
            session.parked_at = float(tree["parked_at"])
            session.cuts = tree["cuts"]
            session.bytes_in, session.bytes_out = tree["bytes_in"], tree["bytes_out"]
            session._next_stream = tree["next_stream"]
            session._peer_opened = tree["peer_opened"]
            session._peer_gaps.update(tree["peer_gaps"])
            session._message += tree["message"]
            session._freed = True
            for each in tree["streams"]:
                session._take_in(Stream.restored(each, now))
        except (KeyError, TypeError, ValueError, AttributeError, ProtocolError) as exc:
            raise SnapshotError(f"a session that does not fit: {exc!r}") from exc
        return session

    def _take_in(self, stream: Stream) -> None:
        self.streams[stream.id] = stream
        self.buffered += stream.send.buffered
        if stream.state is not StreamState.RESETTING:
            self._window_spent += stream.receive.window - self.limits.window
        if stream.paused:
            self._paused[stream.id] = None
        self._acknowledge_again(stream)
        self._enqueue(stream)

    # -- what the driver takes ----------------------------------------------------------------

    def data_to_send(self, number: int, budget: int, now: float) -> list[Chunk]:
        """About `budget` bytes for a lane, in order; empty when there is nothing for it."""
        lane = self.lanes.get(number)
        if lane is None:
            return []
        out: list[Chunk] = []
        if self._closing is not None:
            out.append(self._closing)
            del self.lanes[number]
            return out
        if (
            not (lane.pongs or self._acks or self._gone)
            and not (self._queues[False] or self._queues[True])
            and not lane.wants_ping(now)
        ):
            return out  # most often so: each lane is asked after each message
        size = 0
        while lane.pongs:
            out.append(header(Kind.PONG, 0, lane.pongs.popleft(), 0))
            size += HEADER_SIZE
        if not lane.suspect:
            if control := self._control_frames(out):
                lane.spoke = True
                size += control
            for frame in self._stream_frames(lane, budget - size):
                out.extend(frame)
                size += sum(map(len, frame))
        if lane.wants_ping(now):
            out.append(header(Kind.PING, 0, lane.ping(now), 0))
            size += HEADER_SIZE
        lane.bytes_out += size
        self.bytes_out += size
        return out

    @property
    def backlog(self) -> bool:
        """Bytes of streams wait for a lane, and not for the peer to have room."""
        return bool(self._queues[False] or self._queues[True])

    def drained(self) -> list[Event]:
        """Writers that may go on since `data_to_send` took what they had written, or since a
        stream was given up whose bytes had filled the session."""
        if self._freed:
            self._freed = False
            if self._paused and self.buffered < self.limits.session_buffer // 2:
                for number in list(self._paused):
                    self._let_go_on(self.streams[number], self._drained)
        events, self._drained = self._drained, []
        return events

    # -- frames in -----------------------------------------------------------------------------

    def _frame(self, lane: Lane, frame: Frame, now: float, events: list[Event]) -> bool:
        """Take in a frame. False: the session has ended with it."""
        kind = frame.kind
        if lane.kind is LaneClass.BULK and kind in SHORT_KINDS:
            self._peer_goes_round(lane, now)
        if kind is Kind.DATA or kind is Kind.END:
            stream = self._live(frame)
            if stream is None:
                return True
            receive = stream.receive
            known = frame.offset + (frame.size or 1) <= receive.next
            was_complete = receive.complete
            if kind is Kind.DATA:
                for data in receive.data(frame.offset, *(frame.chunks or (frame.payload,))):
                    if stream.id == CONTROL_STREAM:
                        self._control_bytes(data, now, events)
                    else:
                        events.append(DataReceived(stream.id, data))
            elif stream.id == CONTROL_STREAM:
                raise ProtocolError(codes.CONTROL_ENDED, "END of the control stream")
            else:
                receive.end(frame.offset)
            if receive.complete and not was_complete:
                events.append(EndReceived(stream.id))
            # Bytes that come twice say that our acknowledgement was lost.
            self._schedule_ack(stream, now, again=known)
            self._finish(stream, events)
        elif kind is Kind.ACK:
            if len(frame.payload) != _LIMIT.size:
                raise ProtocolError(codes.ACK_MALFORMED, f"ACK with {len(frame.payload)} bytes")
            stream = self.streams.get(frame.stream)
            if stream is not None and stream.state is not StreamState.RESETTING:
                self._acknowledged(stream, frame, now, events)
        elif kind is Kind.PING:
            if len(lane.pongs) < 64:
                lane.pongs.append(frame.offset)
        elif kind is Kind.PONG:
            lane.pong(frame.offset, now)
        elif kind is Kind.OPEN:
            self._opened(frame, now, events)
        elif kind is Kind.RESET:
            if frame.stream == CONTROL_STREAM:
                raise ProtocolError(codes.CONTROL_ENDED, "RESET of the control stream")
            if frame.stream % 2 == self._peer_parity:
                self._note_opened(frame.stream)  # given up before its OPEN was sent, or came
            self._known(frame)
            self._gone[frame.stream] = None
            stream = self.streams.get(frame.stream)
            if stream is not None:
                self._give_up(stream, frame, events)
        elif kind is Kind.GONE:
            stream = self.streams.get(frame.stream)
            if stream is not None and stream.id != CONTROL_STREAM:
                self._peer_is_done(stream, events)
        elif kind is Kind.CLOSE:
            events.extend(self._end(frame.payload.decode(errors="replace")[:1024]))
            return False
        else:
            raise ProtocolError(codes.HANDSHAKE_LATE, f"{kind.name} on a lane that was welcomed")
        return True

    def _opened(self, frame: Frame, now: float, events: list[Event]) -> None:
        number = frame.stream
        if number == CONTROL_STREAM or number % 2 != self._peer_parity:
            raise ProtocolError(
                codes.STREAM_NUMBER, f"OPEN of stream {number}, not the peer's to open"
            )
        if self._was_opened(number):
            if number in self.streams:
                self._acks[number] = None
            else:
                self._gone[number] = None
            return
        self._note_opened(number)
        window = self.limits.window
        stream = Stream(number, False, frame.payload, window, window, now)
        self.streams[number] = stream
        if len(self.streams) > self.limits.streams + REFUSED_STREAMS:
            raise ProtocolError(
                codes.STREAM_NUMBER, "streams are opened faster than they are refused"
            )
        if len(self.streams) > self.limits.streams:
            self.reset(number, ResetReason.TOO_MANY, f"over {self.limits.streams} streams")
            return
        self._lazy(stream, now)
        events.append(StreamOpened(number, frame.payload))

    def _note_opened(self, number: int) -> None:
        """Lanes deliver in any order, so lower numbers may still come."""
        if number - self._peer_opened > 8 * self.limits.streams:
            raise ProtocolError(codes.STREAM_NUMBER, f"stream {number} is far ahead of the others")
        self._peer_gaps.update(range(self._peer_opened + 2, number, 2))
        self._peer_gaps.discard(number)
        if len(self._peer_gaps) > 8 * self.limits.streams:
            raise ProtocolError(codes.STREAM_NUMBER, f"too many streams below {number} never came")
        self._peer_opened = max(self._peer_opened, number)

    def _was_opened(self, number: int) -> bool:
        return number <= self._peer_opened and number not in self._peer_gaps

    def _known(self, frame: Frame) -> None:
        """Raises ProtocolError if the frame is of a stream that nobody ever opened."""
        number = frame.stream
        if number % 2 == self._peer_parity and number != CONTROL_STREAM:
            known = self._was_opened(number)
        else:
            known = number < self._next_stream
        if not known:
            raise ProtocolError(
                codes.STREAM_UNKNOWN,
                f"{frame.kind.name} of stream {number}, which was never opened",
            )

    def _live(self, frame: Frame) -> Stream | None:
        stream = self.streams.get(frame.stream)
        if stream is None:
            self._known(frame)
            self._gone[frame.stream] = None
            return None
        return None if stream.state is StreamState.RESETTING else stream

    def _acknowledged(self, stream: Stream, frame: Frame, now: float, events: list[Event]) -> None:
        if stream.state is StreamState.OPENING:
            stream.state = StreamState.OPEN
            stream.open_due = False
            stream.lane = None
        (limit,) = _LIMIT.unpack(frame.payload)
        before = stream.send.acked
        self.buffered -= stream.send.acknowledge(frame.offset, limit)
        if stream.send.acked > before:
            stream.probe_at, stream.probes = now, 0
        if stream.bulk and not stream.send.buffered:
            stream.bulk = False
        if stream.send.ready:
            self._enqueue(stream)
        self._finish(stream, events)
        if self._paused:
            self._release(stream, events)

    def _release(self, stream: Stream, events: list[Event]) -> None:
        """Let writers go on that had to wait, as far as the bounds allow by now."""
        crowded = self.buffered >= self.limits.session_buffer // 2
        for number in [stream.id] if crowded else list(self._paused):
            waiting = self.streams.get(number)
            if waiting is not None and waiting.paused:
                self._let_go_on(waiting, events)

    def _let_go_on(self, stream: Stream, events: list[Event]) -> None:
        """A writer that had to wait may go on, if there is room for it by now."""
        if (
            stream.send.pending_bytes <= self.limits.stream_buffer // 2
            and self.buffered < self.limits.session_buffer
        ):
            self._paused.pop(stream.id, None)
            stream.paused = False
            events.append(StreamWritable(stream.id))

    def _give_up(self, stream: Stream, frame: Frame, events: list[Event]) -> None:
        said = stream.state is StreamState.RESETTING
        self._forget(stream)
        if not said:
            text = frame.payload.decode(errors="replace")[:1024]
            events.append(StreamReset(stream.id, ResetReason.from_wire(frame.offset), text))

    def _peer_is_done(self, stream: Stream, events: list[Event]) -> None:
        """GONE: the peer has nothing of the stream any more."""
        whole = stream.receive.complete and stream.send.end_sent
        said = stream.state is StreamState.RESETTING
        self._forget(stream)
        if said:
            return
        if whole:
            events.append(StreamFinished(stream.id))
        else:
            events.append(StreamReset(stream.id, ResetReason.ABORTED, "the peer forgot it"))

    def _finish(self, stream: Stream, events: list[Event]) -> None:
        if stream.state is not StreamState.RESETTING and stream.finished:
            if stream.receive.ack_sent < stream.receive.next:
                self._gone[stream.id] = None  # says as much as the ACK would
            self._forget(stream)
            events.append(StreamFinished(stream.id))

    def _control_bytes(self, data: Chunk, now: float, events: list[Event]) -> None:
        buffer = self._message
        buffer += data
        while len(buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer)
            if length > MAX_MESSAGE:
                raise ProtocolError(codes.MESSAGE_TOO_LONG, f"a message of {length} bytes")
            if len(buffer) < _LENGTH.size + length:
                break
            events.append(MessageReceived(bytes(buffer[_LENGTH.size : _LENGTH.size + length])))
            del buffer[: _LENGTH.size + length]
        self.consumed(CONTROL_STREAM, len(data), now)

    # -- frames out ----------------------------------------------------------------------------

    def _control_frames(self, out: list[Chunk]) -> int:
        before = len(out)
        size = 0
        for number in self._gone:
            out.append(header(Kind.GONE, number, 0, 0))
        self._gone.clear()
        size += HEADER_SIZE * (len(out) - before)
        for number in self._acks:
            stream = self.streams.get(number)
            if stream is None or stream.state is StreamState.RESETTING:
                continue
            receive = stream.receive
            receive.ack_sent, receive.limit_sent = receive.next, receive.limit
            out.append(
                header(Kind.ACK, number, receive.next, _LIMIT.size) + _LIMIT.pack(receive.limit)
            )
            size += HEADER_SIZE + _LIMIT.size
            self._lazy_acks.pop(number, None)
        self._acks.clear()
        return size

    def _stream_frames(self, lane: Lane, budget: int) -> Iterator[list[Chunk]]:
        """Frames of streams for a lane, round robin, one a turn."""
        for bulk in self._classes(lane):
            queue = self._queues[bulk]
            skipped = 0
            while budget > 0 and skipped < len(queue) and lane.has_room():
                stream = queue.popleft()
                stream.queued = False
                if stream.state is StreamState.OVER or not stream.ready:
                    continue
                if stream.state is StreamState.OPENING and stream.lane not in {None, lane.id}:
                    skipped += 1  # its bytes must not overtake its OPEN
                    self._enqueue(stream)
                    continue
                frame = self._next_frame(stream, lane)
                if stream.paused:
                    self._let_go_on(stream, self._drained)
                if stream.ready:
                    self._enqueue(stream)
                size = sum(map(len, frame))
                lane.sent += size
                budget -= size
                yield frame

    def _classes(self, lane: Lane) -> tuple[bool, ...]:
        """Which queues this lane serves, in order."""
        for beside in self.lanes.values():
            if beside.kind is not lane.kind and not beside.suspect:
                return (lane.kind is LaneClass.BULK,)
        return (False, True)

    @staticmethod
    def _is_bulk(stream: Stream) -> bool:
        return stream.bulk and stream.state is StreamState.OPEN

    def _next_frame(self, stream: Stream, lane: Lane) -> list[Chunk]:
        if stream.state is StreamState.RESETTING:
            stream.reset_due = False
            stream.lane = lane.id
            return [header(Kind.RESET, stream.id, stream.reason, len(stream.text)) + stream.text]
        if stream.open_due:
            stream.open_due = False
            stream.lane = lane.id
            return [header(Kind.OPEN, stream.id, 0, len(stream.target)) + stream.target]
        segment = stream.send.take()
        assert segment is not None, "a stream that is ready has a segment"
        segment.lane = lane.id
        if segment.end:
            return [header(Kind.END, stream.id, segment.offset, 0)]
        head = header(Kind.DATA, stream.id, segment.offset, len(segment.data))
        if len(segment.data) <= JOIN_BYTES:
            return [head + segment.data]
        return [head, segment.data]

    # -- bookkeeping -----------------------------------------------------------------------------

    def _set_state(self, state: SessionState) -> None:
        self.state = state

    def _writable_stream(self, number: int) -> Stream | None:
        """The stream, if bytes may still be sent on it."""
        stream = self.streams.get(number)
        if stream is None or stream.state is StreamState.RESETTING:
            return None
        return stream

    def _enqueue(self, stream: Stream) -> None:
        if not stream.queued:
            stream.queued = True
            self._queues[self._is_bulk(stream)].append(stream)

    def _schedule_ack(self, stream: Stream, now: float, again: bool = False) -> None:
        if stream.id not in self.streams:
            return
        if again or stream.receive.ack_urgent():
            self._acks[stream.id] = None
        elif stream.receive.ack_due():
            self._lazy(stream, now)

    def _acknowledge_again(self, stream: Stream) -> None:
        """Its last ACK may have gone down with a lane."""
        if stream.receive.next or not stream.mine:
            self._acks[stream.id] = None

    def _lazy(self, stream: Stream, now: float) -> None:
        if not self._lazy_acks:
            self._lazy_at = now + ACK_DELAY
        self._lazy_acks[stream.id] = None

    def _healthy_beside(self, lane: Lane, now: float) -> bool:
        return any(
            other is not lane and not other.suspect and not other.stalled(now)
            for other in self.lanes.values()
        )

    def _peer_goes_round(self, carrier: Lane, now: float) -> None:
        """What belongs to short messages came by a bulk lane: the peer takes its lane for them to
        be stalled. One that is as quiet here is: our answer would wait for our own PING."""
        for lane in self.lanes.values():
            if lane.kind is not carrier.kind and not lane.suspect and lane.quiet(now):
                self._suspect(lane)

    def _suspect(self, lane: Lane) -> None:
        lane.suspect = True
        self._go_round(lane.id)

    def _go_round(self, number: int) -> None:
        """What was under way on a lane must be sent again, by whatever lane there is."""
        self._acks[CONTROL_STREAM] = None  # if there is nothing else to say: the peer is to know
        for stream in self.streams.values():
            self._acknowledge_again(stream)
            again = stream.send.lane_lost(number)
            if stream.lane == number:
                stream.lane = None
                if stream.state is StreamState.RESETTING:
                    stream.reset_due = True
                elif stream.state is StreamState.OPENING:
                    stream.open_due = True
                again = True
            if again:
                self._enqueue(stream)

    def _probe(self, now: float) -> None:
        for stream in self.streams.values():
            waiting = stream.lane is not None or stream.send.unacked
            if not waiting:
                stream.probe_at = now
                continue
            patience = min(PROBE_AFTER * (1 << min(stream.probes, 8)), PROBE_CEILING)
            if now - stream.probe_at < patience:
                continue
            stream.probe_at = now
            stream.probes += 1
            if stream.state is StreamState.RESETTING:
                stream.reset_due = True
            elif stream.state is StreamState.OPENING:
                stream.lane, stream.open_due = None, True
                stream.send.probe()
            elif not stream.send.probe():
                continue
            self._enqueue(stream)

    def _drop_buffers(self, stream: Stream) -> None:
        self.buffered -= stream.send.buffered
        self._freed = True
        stream.send = SendSide(stream.send.limit)
        self._window_spent -= stream.receive.window - self.limits.window
        stream.receive.window = self.limits.window
        stream.paused = False
        self._paused.pop(stream.id, None)
        self._acks.pop(stream.id, None)
        self._lazy_acks.pop(stream.id, None)

    def _forget(self, stream: Stream) -> None:
        self._drop_buffers(stream)
        stream.state = StreamState.OVER
        del self.streams[stream.id]

    def _end(self, why: str) -> list[Event]:
        self._set_state(SessionState.ENDED)
        events: list[Event] = [
            StreamReset(stream.id, ResetReason.SESSION_ENDED, why)
            for stream in self.streams.values()
            if stream.id != CONTROL_STREAM and stream.state is not StreamState.RESETTING
        ]
        self.streams.clear()
        self._queues[False].clear()
        self._queues[True].clear()
        self._paused.clear()
        self._drained.clear()
        self.buffered = 0
        events.append(SessionEnded(why))
        return events
