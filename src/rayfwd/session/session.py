"""The session: streams over lanes that come and go (pure: bytes and times in, bytes out).

Whoever drives a session tells it what happened (`lane_up`, `receive`, `lane_down`, `tick`), does
what its events say, and asks `data_to_send` for each lane that has room, and then `drained` for the
writers that may go on. It keeps no clock: `now` is monotonic, in seconds.

It conducts: what a stream is about is the stream's, whose turn it is the scheduler's, what is owed
for what came the answers', what may come yet the credit's, who must wait before it sends more the
writers', which messages are heard the inbox's, and which numbers are used the numbers'. Its own are
the lanes and its state.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from rayfwd import codes
from rayfwd.session.answers import LIMIT, Answers
from rayfwd.session.credit import Credit
from rayfwd.session.events import (
    DataReceived,
    EndReceived,
    Event,
    LaneDead,
    MessageReceived,
    Parked,
    Resumed,
    SessionEnded,
    StreamFinished,
    StreamOpened,
    StreamReset,
)
from rayfwd.session.frames import (
    HEADER_SIZE,
    MESSAGE_LENGTH,
    Chunk,
    Frame,
    FrameDecoder,
    Kind,
    ProtocolError,
    close_frame,
    encode_message,
    frame_header,
)
from rayfwd.session.inbox import Inbox
from rayfwd.session.lane import Lane, LaneClass
from rayfwd.session.numbers import CONTROL_STREAM, Side, StreamNumbers
from rayfwd.session.scheduler import Scheduler
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.session.states import (
    SessionEvent,
    SessionState,
    StreamEvent,
    StreamState,
    session_after,
)
from rayfwd.session.stats import LaneStats, SessionStats
from rayfwd.session.stream import (
    MAX_SENTENCE,
    PROBE_AFTER,
    ResetReason,
    SendSide,
    Stream,
)
from rayfwd.session.trace import (
    FrameTraced,
    LaneTraced,
    SessionTraced,
    StreamTraced,
    Trace,
    frames_out,
    message,
)
from rayfwd.session.writers import Writers

REFUSED_STREAMS: Final = 1 << 14
"""Streams over `Limits.streams` that are refused one by one; a peer that opens more is broken."""
MAX_PONGS: Final = 64
"""PINGs of a lane that wait for their PONG to be sent; further ones are dropped."""
SHORT_KINDS: Final = frozenset({Kind.OPEN, Kind.ACK, Kind.GONE, Kind.RESET})
"""Frames that go by the interactive lane while the sender trusts it."""


MOST_LANES: Final = 2 * (1 + 8 + 8)
"""Of a session at once: twice what a file allows, since lost ones count until that is noticed. Each
frame costs time for every lane."""


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


class Session:
    """One side of a session."""

    def __init__(self, side: Side, ride_through: float, limits: Limits, now: float) -> None:
        self.state = SessionState.FRESH
        self.ride_through = ride_through
        self.limits = limits
        self.lanes: dict[int, Lane] = {}
        self.streams: dict[int, Stream] = {CONTROL_STREAM: Stream.control(limits.window, now)}
        self.bytes_in = 0
        self.bytes_out = 0
        self.cuts = 0
        """How often the last lane went down."""
        self.trace: Trace | None = None
        """Told of every frame and of every change of state, where somebody wants to know."""
        self.inbox = Inbox()
        self._numbers = StreamNumbers(side, limits.streams)
        self._of_hub = side == "hub"
        self._scheduler = Scheduler(self.lanes)
        self._answers = Answers(self.streams)
        self._writers = Writers(self.streams, limits.stream_buffer, limits.session_buffer)
        self._credit = Credit(limits.window, limits.window_ceiling, limits.window_budget)
        self._decoders: dict[int, FrameDecoder] = {}
        self._next_lane = 1
        self._parked_at: float | None = now
        """Since when there is no lane."""
        self._probe_at = now
        self._closing: bytes | None = None

    @property
    def ended(self) -> bool:
        return self.state is SessionState.ENDED

    @property
    def buffered(self) -> int:
        """Bytes kept for sending, of all streams."""
        return self._writers.buffered

    @property
    def memory(self) -> int:
        """Bytes that it holds: kept for sending, and received and not yet taken by a reader."""
        return self._writers.buffered + self._credit.held

    @property
    def control_buffered(self) -> int:
        """Bytes of messages that the peer has not acknowledged."""
        stream = self.streams.get(CONTROL_STREAM)
        return 0 if stream is None else stream.send.buffered

    def memory_by_stream(self) -> dict[int, int]:
        """The same by stream, the greediest first; the control stream is left out."""
        found = {
            number: stream.send.buffered + stream.receive.memory
            for number, stream in self.streams.items()
            if number != CONTROL_STREAM and stream.state is not StreamState.RESETTING
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def stats(self) -> SessionStats:
        """How it is now."""
        return SessionStats(
            state=self.state,
            ride_through=self.ride_through,
            streams=max(len(self.streams) - 1, 0),  # one is the control stream
            buffered=self.buffered,
            held=self._credit.held,
            backlog=bool(self._scheduler.short or self._scheduler.bulk),
            cuts=self.cuts,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            lanes=tuple(map(LaneStats.of, self.lanes.values())),
        )

    @property
    def last_heard(self) -> float:
        """When the peer was last heard; without a lane, when the last one went."""
        if self._parked_at is not None:
            return self._parked_at
        return max(lane.heard for lane in self.lanes.values())

    # -- what the driver tells ---------------------------------------------------------------

    def lane_up(self, lane_class: LaneClass, now: float) -> tuple[int, list[Event]]:
        """A lane has been welcomed. Returns its number and what follows."""
        if self.ended:
            raise ValueError("a lane for a session that has ended")
        if len(self.lanes) >= MOST_LANES:
            raise ValueError(f"a session has {MOST_LANES} lanes at most")
        number = self._next_lane
        self._next_lane += 1
        self.lanes[number] = Lane(number, lane_class, now, self._of_hub)
        self._decoders[number] = FrameDecoder()
        self._trace_lane(self.lanes[number], "up")
        events: list[Event] = []
        if self.state is SessionState.PARKED and self._parked_at is not None:
            events.append(Resumed(now - self._parked_at))
        self._parked_at = None
        self._move(SessionEvent.LANE_UP)
        return number, events

    def lane_down(self, number: int, now: float) -> list[Event]:
        """A lane is gone: what was under way on it goes by others, or waits."""
        lane = self.lanes.pop(number, None)
        if lane is None or self.ended:
            return []
        del self._decoders[number]
        self._trace_lane(lane, "down")
        self._go_round(number)
        if self.lanes:
            return []
        self.cuts += 1
        self._parked_at = now
        self._move(SessionEvent.LAST_LANE_DOWN)
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
            if self.trace is not None:
                self._trace_frame(lane, frame)
            if not self._frame(lane, frame, now, events):
                break
        return events

    def tick(self, now: float) -> list[Event]:
        """Time has passed: what is due by now."""
        if self.ended:
            return []
        if self._parked_at is not None and now - self._parked_at >= self.ride_through:
            return self._end(SessionEvent.TIME_OVER, f"no lane for {now - self._parked_at:.0f} s")
        events: list[Event] = []
        for lane in self.lanes.values():
            if lane.dead(now):
                self._trace_lane(lane, "dead")
                events.append(LaneDead(lane.id))
            elif self._scheduler.to_sideline(lane, now):
                self._sideline(lane)
        self._answers.tick(now)
        if self.lanes and now >= self._probe_at:
            self._probe_at = now + PROBE_AFTER / 2
            for stream in self.streams.values():
                if stream.probe(now):
                    self._scheduler.enqueue(stream)
        return events

    def deadline(self, now: float) -> float:
        """When `tick` should be called next, if nothing else happens."""
        if self.ended:
            return now + 3600.0
        if self._parked_at is not None:
            return self._parked_at + self.ride_through
        due = min((lane.deadline(now) for lane in self.lanes.values()), default=now + 1.0)
        answers = self._answers.deadline()
        return due if answers is None else min(due, answers)

    # -- what the owner of a stream asks ------------------------------------------------------

    @property
    def full(self) -> bool:
        """The peer would refuse one more stream; the control stream is counted, as there."""
        return len(self.streams) >= self.limits.streams

    def open(self, target: bytes, now: float) -> int:
        """Open a stream. Bytes may follow at once. Whoever opens asks first whether it is `full`:
        of streams beyond `Limits.streams` a peer refuses some, and takes more for a fault."""
        if self.ended or self.full:
            raise ValueError("a stream in a session that has ended or is full")
        number = self._numbers.take()
        window = self.limits.window
        stream = Stream(number, True, target, window, window, now)
        self.streams[number] = stream
        self._scheduler.enqueue(stream)
        return number

    def has(self, number: int) -> bool:
        """The stream is there, and is not being given up."""
        return self._live(number) is not None

    def is_short(self, number: int) -> bool:
        """The stream is there, and what this side sends on it is no long transfer now."""
        stream = self.streams.get(number)
        return stream is not None and not stream.bulk

    def unread(self, number: int) -> tuple[int, bool]:
        """Bytes of a stream that is there which were received in order and not yet reported as
        consumed; and whether its end was received too, behind them."""
        receive = self.streams[number].receive
        return receive.unread, receive.complete

    def send(self, number: int, data: Chunk) -> bool:
        """Bytes to send. False: no more, please, until StreamWritable (or StreamReset)."""
        stream = self.streams.get(number)
        if stream is None or stream.state is StreamState.RESETTING:
            return True
        scheduler = self._scheduler
        stream.write(data, scheduler.bulk_above())
        if stream.bulk:
            scheduler.bulk_ids.add(number)
        scheduler.enqueue(stream)
        return self._writers.wrote(stream, len(data))

    def must_wait(self, number: int) -> bool:
        """The stream's writer was told to wait, and not yet to go on."""
        return number in self._writers.paused

    def end(self, number: int) -> None:
        """No more bytes will be sent on this stream."""
        stream = self._live(number)
        if stream is not None:
            stream.send.end()
            self._scheduler.enqueue(stream)

    def reset(self, number: int, reason: ResetReason, text: str = "") -> None:
        """Give a stream up, in both directions. No events of it follow."""
        stream = self._live(number)
        if stream is None:
            return
        self._drop_buffers(stream)
        before = stream.state
        stream.give_up(reason, text)
        self._trace_stream(stream, StreamEvent.RESET, before)
        self._scheduler.enqueue(stream)

    def consumed(self, number: int, size: int, now: float) -> None:
        """`size` bytes of a stream were passed on: the peer may send as many more."""
        stream = self.streams.get(number)
        if stream is None or stream.state is StreamState.RESETTING:
            return
        receive, credit = stream.receive, self._credit
        receive.consumed += size
        credit.held -= size
        round_trip = self._scheduler.round_trip()
        keeps_up = now - receive.mark_time >= round_trip
        if (
            keeps_up
            and self._writers.buffered + credit.held < 2 * self.limits.session_buffer
            and not (number == CONTROL_STREAM and self.inbox.holds)
        ):
            credit.widen(receive, round_trip, now)
        self._answers.after(stream, now)

    def message_done(self, event: MessageReceived, now: float) -> None:
        """The driver has heard it: the peer may send as much more."""
        if credit := self.inbox.done(event):
            self.consumed(CONTROL_STREAM, credit, now)

    def send_message(self, data: bytes) -> None:
        """Send a message to the peer: reliable, in order. Raises ValueError: it is too long."""
        self.send_framed(encode_message(data))

    def send_framed(self, framed: bytes) -> None:
        """As that, of what `encode_message` has made, which any number of sessions may share."""
        if self.trace is not None:
            self.trace(message("out", framed[MESSAGE_LENGTH.size :]))
        self.send(CONTROL_STREAM, framed)

    def close(self, why: str) -> list[Event]:
        """End the session in order; a CLOSE goes out on every lane that still takes it."""
        events = self._end(SessionEvent.CLOSED, why) if not self.ended else []
        self._closing = close_frame(why)
        return events

    # -- what the driver takes ----------------------------------------------------------------

    def data_to_send(self, number: int, budget: int, now: float) -> list[Chunk]:
        """About `budget` bytes for a lane, in order; empty when there is nothing for it."""
        lane = self.lanes.get(number)
        if lane is None:
            return []
        if self._closing is not None:
            del self.lanes[number]
            return self._traced(lane, [self._closing])
        answers, scheduler = self._answers, self._scheduler
        out: list[Chunk] = []
        if (
            not (lane.pongs or answers.urgent or answers.gone)
            and not (scheduler.short or scheduler.bulk)
            and not lane.wants_ping(now)
        ):
            return out  # most often so: each lane is asked after each message
        size = 0
        while lane.pongs:
            out.append(frame_header(Kind.PONG, 0, lane.pongs.popleft(), 0))
            size += HEADER_SIZE
        if not lane.sidelined and not scheduler.is_spared(lane):
            if answers.urgent or answers.gone:
                owed = answers.put(out, budget)
                if owed:
                    lane.spoke = True
                    size += owed
            size += scheduler.put(lane, budget - size, out)
            if scheduler.relieved:
                self._writers.taken(scheduler.relieved)
        if lane.wants_ping(now):
            out.append(frame_header(Kind.PING, 0, lane.ping(now), 0))
            size += HEADER_SIZE
        lane.bytes_out += size
        self.bytes_out += size
        return out if self.trace is None else self._traced(lane, out)

    def drained(self) -> list[Event]:
        """Writers that may go on since `data_to_send` took what they had written, or since a
        stream was given up whose bytes had filled the session."""
        return self._writers.drained()

    # -- frames in -----------------------------------------------------------------------------

    def _frame(self, lane: Lane, frame: Frame, now: float, events: list[Event]) -> bool:
        """Take in a frame. False: the session has ended with it."""
        kind = frame.kind
        if kind is Kind.DATA or kind is Kind.END:
            self._bytes(frame, now, events)
            return True
        if lane.lane_class is not LaneClass.INTERACTIVE and kind in SHORT_KINDS:
            for other in self._scheduler.gone_round(lane, now):
                self._sideline(other)
        if kind is Kind.ACK:
            self._ack(frame, now, events)
        elif kind is Kind.PING:
            if len(lane.pongs) < MAX_PONGS:
                lane.pongs.append(frame.offset)
        elif kind is Kind.PONG:
            lane.pong(frame.offset, now)
        elif kind is Kind.OPEN:
            self._open(frame, now, events)
        elif kind is Kind.RESET:
            self._reset(frame, events)
        elif kind is Kind.GONE:
            self._gone(frame, events)
        elif kind is Kind.CLOSE:
            why = frame.payload.decode(errors="replace")[:MAX_SENTENCE]
            events.extend(self._end(SessionEvent.CLOSE_IN, why))
            return False
        else:
            raise ProtocolError(codes.HANDSHAKE_LATE, f"{kind.name} on a lane that was welcomed")
        return True

    def _bytes(self, frame: Frame, now: float, events: list[Event]) -> None:
        """DATA or END."""
        stream = self.streams.get(frame.stream)
        if stream is None:
            self._numbers.check_used(frame)
            self._answers.over(frame.stream)
            return
        if stream.state is StreamState.RESETTING:
            return
        receive = stream.receive
        known = frame.offset + (frame.size or 1) <= receive.next
        was_complete, before, early = receive.complete, receive.next, receive.early_bytes
        held = receive.memory if early else before - receive.consumed
        came: list[Chunk] = []
        if frame.kind is Kind.DATA:
            came = receive.data(frame.offset, *(frame.chunks or (frame.payload,)))
        elif stream.id == CONTROL_STREAM:
            raise ProtocolError(codes.CONTROL_ENDED, "END of the control stream")
        else:
            receive.end(frame.offset)
        complete = receive.complete
        if early or receive.early_bytes:
            self._credit.held += receive.memory - held
        elif receive.next != before:
            self._credit.held += receive.next - before - (complete and not was_complete)
        for data in came:
            if stream.id == CONTROL_STREAM:
                if credit := self.inbox.take(data, events, self.trace):
                    self.consumed(CONTROL_STREAM, credit, now)
            else:
                events.append(DataReceived(stream.id, data))
        if complete and not was_complete:
            events.append(EndReceived(stream.id))
        # Bytes that come twice say that our acknowledgement was lost.
        self._answers.after(stream, now, again=known)
        if complete:
            self._finish(stream, events)

    def _open(self, frame: Frame, now: float, events: list[Event]) -> None:
        number = frame.stream
        if not self._numbers.is_peers(number):
            raise ProtocolError(
                codes.STREAM_NUMBER, f"OPEN of stream {number}, not the peer's to open"
            )
        if self._numbers.peer_used(number):
            if number in self.streams:
                self._answers.urgent[number] = None
            else:
                self._answers.over(number)
            return
        self._numbers.note_peers(number)
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
        self._answers.soon(stream, now)
        events.append(StreamOpened(number, frame.payload))

    def _ack(self, frame: Frame, now: float, events: list[Event]) -> None:
        if len(frame.payload) != LIMIT.size:
            raise ProtocolError(codes.ACK_MALFORMED, f"ACK with {len(frame.payload)} bytes")
        stream = self.streams.get(frame.stream)
        if stream is None or stream.state is StreamState.RESETTING:
            return
        (limit,) = LIMIT.unpack(frame.payload)
        before = stream.state
        self._writers.buffered -= stream.acknowledged(frame.offset, limit, now)
        if before is not stream.state:
            self._trace_stream(stream, StreamEvent.ANSWERED, before)
        if not stream.bulk:
            self._scheduler.bulk_ids.discard(frame.stream)
        if stream.send.ready:
            self._scheduler.enqueue(stream)
        if stream.send.complete:
            self._finish(stream, events)
        if self._writers.paused:
            self._writers.acknowledged(stream, events)

    def _reset(self, frame: Frame, events: list[Event]) -> None:
        number = frame.stream
        if number == CONTROL_STREAM:
            raise ProtocolError(codes.CONTROL_ENDED, "RESET of the control stream")
        if self._numbers.is_peers(number):
            self._numbers.note_peers(number)  # given up before its OPEN was sent, or came
        self._numbers.check_used(frame)
        self._answers.over(number)
        stream = self.streams.get(number)
        if stream is None:
            return
        given_up = stream.state is StreamState.RESETTING
        self._forget(stream, StreamEvent.RESET_IN)
        if not given_up:
            text = frame.payload.decode(errors="replace")[:MAX_SENTENCE]
            events.append(StreamReset(number, ResetReason.from_wire(frame.offset), text))

    def _gone(self, frame: Frame, events: list[Event]) -> None:
        """The peer has nothing of the stream any more."""
        stream = self.streams.get(frame.stream)
        if stream is None or stream.id == CONTROL_STREAM:
            return
        whole = stream.receive.complete and stream.send.end_sent
        given_up = stream.state is StreamState.RESETTING
        self._forget(stream, StreamEvent.GONE_IN)
        if given_up:
            return
        if whole:
            events.append(StreamFinished(stream.id))
        else:
            events.append(StreamReset(stream.id, ResetReason.ABORTED, "the peer forgot it"))

    def _finish(self, stream: Stream, events: list[Event]) -> None:
        """Forget a stream whose ENDs are both through."""
        if stream.finished:
            if stream.receive.ack_sent < stream.receive.next:
                self._answers.over(stream.id)  # says as much as the ACK would
            self._forget(stream, StreamEvent.ENDS_THROUGH)
            events.append(StreamFinished(stream.id))

    # -- bookkeeping -----------------------------------------------------------------------------

    def _move(self, event: SessionEvent) -> None:
        before, self.state = self.state, session_after(self.state, event)
        if self.trace is not None and before is not self.state:
            self.trace(SessionTraced(event, before, self.state))

    def _live(self, number: int) -> Stream | None:
        """The stream, if it is there and not being given up."""
        stream = self.streams.get(number)
        return None if stream is None or stream.state is StreamState.RESETTING else stream

    def _sideline(self, lane: Lane) -> None:
        lane.sidelined = True
        self._trace_lane(lane, "sidelined")
        self._go_round(lane.id)

    def _go_round(self, number: int) -> None:
        """What was under way on a lane must be sent again, by whatever lane there is."""
        # If there is nothing else to say: the peer is to know.
        self._answers.urgent[CONTROL_STREAM] = None
        for stream in self.streams.values():
            self._answers.again(stream)
            if stream.to_resend(number):
                self._scheduler.enqueue(stream)

    def _drop_buffers(self, stream: Stream) -> None:
        self._writers.dropped(stream)
        self._scheduler.bulk_ids.discard(stream.id)
        self._credit.drop(stream.receive)
        stream.send = SendSide(stream.send.limit)
        self._answers.forget(stream.id)

    def _forget(self, stream: Stream, event: StreamEvent) -> None:
        self._drop_buffers(stream)
        before = stream.state
        stream.over(event)
        self._trace_stream(stream, event, before)
        del self.streams[stream.id]

    def _end(self, event: SessionEvent, why: str) -> list[Event]:
        self._move(event)
        events: list[Event] = []
        for stream in self.streams.values():
            if stream.id != CONTROL_STREAM and stream.state is not StreamState.RESETTING:
                events.append(StreamReset(stream.id, ResetReason.SESSION_ENDED, why))
            before = stream.state
            stream.over(StreamEvent.SESSION_ENDED)
            self._trace_stream(stream, StreamEvent.SESSION_ENDED, before)
        self.streams.clear()
        self._scheduler.clear()
        self._answers.clear()
        self._writers.clear()
        self._credit.clear()
        events.append(SessionEnded(why))
        return events

    # -- for whoever traces it -------------------------------------------------------------------

    def _trace_frame(self, lane: Lane, frame: Frame) -> None:
        if self.trace is not None:
            self.trace(
                FrameTraced(
                    "in",
                    lane.id,
                    lane.lane_class,
                    frame.kind,
                    frame.stream,
                    frame.offset,
                    frame.size,
                )
            )

    def _traced(self, lane: Lane, out: list[Chunk]) -> list[Chunk]:
        if self.trace is not None:
            for each in frames_out(lane, out):
                self.trace(each)
        return out

    def _trace_lane(self, lane: Lane, what: str) -> None:
        if self.trace is not None:
            self.trace(LaneTraced(lane.id, lane.lane_class, what))

    def _trace_stream(self, stream: Stream, event: StreamEvent, before: StreamState) -> None:
        if self.trace is not None:
            self.trace(StreamTraced(stream.id, event, before, stream.state))

    # -- for tests, and for a process that comes after this one ----------------------------------

    def check_invariants(self) -> None:
        """What holds between any two calls. Raises AssertionError."""
        assert self._decoders.keys() >= self.lanes.keys()
        if self.ended:
            assert not self.streams
            assert not self.buffered
            return
        assert self._decoders.keys() == self.lanes.keys()
        assert bool(self.lanes) == (self.state is SessionState.UP)
        assert (self._parked_at is None) == (self.state is SessionState.UP)
        self._credit.check_invariants(self.streams)
        for number, stream in self.streams.items():
            assert stream.id == number
            assert number == CONTROL_STREAM or self._numbers.is_used(number)
            assert stream.state is not StreamState.OVER, "a stream that is over was kept"
            stream.check_invariants()
        self._numbers.check_invariants()
        self._scheduler.check_invariants(self.streams)
        self._answers.check_invariants()
        self._writers.check_invariants()

    def snapshot(self) -> Tree:
        """Everything that `from_snapshot` needs. Raises ValueError unless it is parked.

        What events have told is the driver's to keep: it is not told again. What the peer has no
        answer to is not here either, since it sends that again: bytes that came too early, OPENs
        and RESETs.
        """
        if self.state is not SessionState.PARKED:
            raise ValueError(f"a snapshot of a session that is {self.state.value}")
        return {
            **self._numbers.snapshot(),
            "ride_through": self.ride_through,
            "limits": asdict(self.limits),
            "parked_at": self._parked_at,
            "cuts": self.cuts,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "message": self.inbox.held,
            "streams": [stream.snapshot() for stream in self.streams.values()],
        }

    @classmethod
    def from_snapshot(cls, tree: Tree, now: float) -> Session:
        """The session of a snapshot, parked since it was taken; `now` is of the same clock.

        Raises SnapshotError.
        """
        try:
            session = cls(tree["side"], tree["ride_through"], Limits(**tree["limits"]), now)
            session.state = SessionState.PARKED  # where it is, and no change
            session._parked_at = float(tree["parked_at"])
            session.cuts = tree["cuts"]
            session.bytes_in, session.bytes_out = tree["bytes_in"], tree["bytes_out"]
            session._numbers = StreamNumbers.from_snapshot(tree, session.limits.streams)
            session.inbox = Inbox(tree["message"])
            for each in tree["streams"]:
                session._take_in(Stream.from_snapshot(each, now))
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            ProtocolError,
        ) as exc:
            raise SnapshotError(f"a session that does not fit: {exc!r}") from exc
        return session

    def _take_in(self, stream: Stream) -> None:
        self.streams[stream.id] = stream
        self._writers.restored(stream)
        self._credit.restored(stream.receive, stream.state is not StreamState.RESETTING)
        self._answers.again(stream)
        if stream.bulk and stream.state is not StreamState.RESETTING:
            self._scheduler.bulk_ids.add(stream.id)
        self._scheduler.enqueue(stream)
