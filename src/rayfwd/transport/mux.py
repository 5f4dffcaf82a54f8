"""Runs one session on an event loop: bytes in and out of lanes, its clock, its streams' owners.

The session decides; this module carries out. It belongs to whoever made it (link or hub), who also
owns the lanes' transports and tells it when one is gone.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Protocol

from rayfwd.session import messages
from rayfwd.session.events import (
    DataReceived,
    EndReceived,
    Event,
    Gathered,
    LaneDead,
    MessageReceived,
    Parked,
    Resumed,
    SessionEnded,
    StreamFinished,
    StreamOpened,
    StreamReset,
    StreamWritable,
    gathered,
)
from rayfwd.session.frames import MAX_MESSAGE, Chunk, ProtocolError, encode_message
from rayfwd.session.lane import LaneClass
from rayfwd.session.messages import Message, NodesChanged
from rayfwd.session.numbers import CONTROL_STREAM
from rayfwd.session.session import Session
from rayfwd.session.snapshot import Tree
from rayfwd.session.stats import SessionStats
from rayfwd.session.stream import ResetReason
from rayfwd.system.budget import Budget
from rayfwd.system.logs import get_logger
from rayfwd.system.seldom import Seldom
from rayfwd.transport.readpacing import SHORT_MESSAGE, pace
from rayfwd.transport.refused import RefusedStreams
from rayfwd.transport.tracing import tracing

log = get_logger(__name__)

FLUSH_BYTES = 1 << 18
"""Bytes that are asked of the session for one write."""
TIMER_SLACK = 0.2
"""Seconds: a timer that comes by then is left as it is. What becomes due does so 0.1 s later at the
earliest (an ACK), and may come 0.1 s late."""
TIMER_GRID = 0.1
"""Seconds between the moments at which timers fire: the sessions of a hub wake it together."""
FULL_LOGGED_INTERVAL = 600.0
"""Seconds after which a session that is still full is told of again."""
LATE_SECONDS = 1.0
"""Seconds: a timer later than this says that the process did not run, not that lanes are silent."""
SHORT_BYTES = 1 << 12
"""Bytes that a stream sends at once, up to which they may wait for those of others."""
MANY_WAIT = 5
"""Callbacks that wait for their turn in this one of the loop, from which on short messages wait for
its end: many come at once then, and a write each would cost more than all that is done for them
here. A message that comes alone, or beside a long transfer, waits for nothing."""


CONTROL_BUFFER = 1 << 20
"""Bytes of messages that wait for the peer from which on further ones wait apart, the last of each
type only."""
MESSAGES_AT_ONCE, MESSAGES_A_SECOND = 64, 20
"""Messages of a peer that is not trusted which are heard at once, and then."""
MEMORY_GRAIN = 1 << 20
"""Bytes by which what a session holds changes before `on_memory` is told again."""


class LaneTransport(Protocol):
    """What carries a lane's bytes. It calls `Mux.flush` when it is no longer `paused`."""

    @property
    def paused(self) -> bool:
        """It takes no more bytes for now."""

    def write(self, chunks: Sequence[Chunk]) -> None: ...

    def close(self) -> None:
        """Send what was written, then close."""

    def abort(self, why: str) -> None:
        """Close at once."""


class StreamOwner(Protocol):
    """Who has the other side of a stream: a socket's relay, or another session's stream."""

    def stream_data(self, chunks: Sequence[Chunk]) -> None:
        """Bytes, in order. Answer with `MuxStream.consumed` when they have been passed on."""

    def stream_ended(self) -> None:
        """The peer sends no more bytes; the other direction lives on."""

    def stream_writable(self) -> None:
        """`MuxStream.send` had returned False; now there is room."""

    def stream_lost(self, reason: ResetReason, text: str) -> None:
        """The stream was reset; nothing follows."""

    def stream_finished(self) -> None:
        """Both directions ended and all arrived; nothing follows."""


class MuxStream:
    """A stream as its owner holds it."""

    __slots__ = ("_mux", "number")

    def __init__(self, mux: Mux, number: int) -> None:
        self._mux = mux
        self.number = number

    @property
    def mux(self) -> Mux:
        return self._mux

    @property
    def must_wait(self) -> bool:
        """No more, please, until the owner's `stream_writable`."""
        return self._mux.session.must_wait(self.number)

    @property
    def unread(self) -> tuple[int, bool]:
        """Bytes that came in and are not reported as consumed, and whether the end came behind
        them; only for a stream that is not over."""
        return self._mux.session.unread(self.number)

    def send(self, *chunks: Chunk) -> bool:
        """False: no more, please, until the owner's `stream_writable`."""
        size = 0
        for chunk in chunks:
            size += len(chunk)
            self._mux.session.send(self.number, chunk)
        self._mux.flush_sent(size)
        # Asked after the flush: it may have taken what was too much, and said so already.
        return not self._mux.session.must_wait(self.number)

    def end(self) -> None:
        self._mux.session.end(self.number)
        self._mux.flush()

    def reset(self, reason: ResetReason, text: str = "", of: str = "") -> None:
        """Give the stream up; the owner hears no more of it. `of`: the node that refused it."""
        self._mux.refused.note(self._mux.peer, of, reason, text)
        self._mux.drop_owner(self.number)
        self._mux.session.reset(self.number, reason, text)
        self._mux.flush()

    def consumed(self, size: int) -> None:
        self._mux.session.consumed(self.number, size, self._mux.now())
        self._mux.flush()


def framed(message: Message) -> bytes | None:
    """A message as any control stream carries it; None: it is too long, which is logged."""
    data = messages.encode(message)
    if len(data) > MAX_MESSAGE:
        log.error("message_too_long", type=message.TYPE, bytes=len(data), most=MAX_MESSAGE)
        return None
    return encode_message(data)


@dataclass(slots=True)
class MuxLane:
    """A lane's transport, and since when (wall-clock seconds are the owner's business)."""

    transport: LaneTransport
    lane_class: LaneClass
    since: float


class Mux:
    """One session with its lanes and the owners of its streams."""

    def __init__(
        self,
        session: Session,
        accept: Callable[[MuxStream, bytes], StreamOwner | None],
        on_message: Callable[[Message], None],
        on_change: Callable[[Parked | Resumed | SessionEnded], None],
        peer: str = "",
        on_memory: Callable[[int], None] | None = None,
        refused: RefusedStreams | None = None,
    ) -> None:
        """`accept` takes a stream that the peer opened, or resets it and returns None.
        `on_message` raises ValueError where what a message says is none; `peer` is who is at the
        other end, for the log and for whoever traces it. With `on_memory` the peer is not trusted:
        that is told by how many bytes what is held for it has changed, and so many of its messages
        are heard in a while. `refused` is told of ports that were dialled in vain."""
        self.session = session
        self.refused = refused or RefusedStreams()
        self.lanes: dict[int, MuxLane] = {}
        self._accept = accept
        self._on_message = on_message
        self._on_change = on_change
        self.peer = peer
        self._owners: dict[int, StreamOwner] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._depth = 0
        # Not in asyncio's documentation: of a loop that has no such attribute nothing is known.
        self._waiting: Sized = getattr(self._loop, "_ready", ())
        self._together: asyncio.Handle | None = None
        """Streams' bytes wait for the end of the loop's turn."""
        self._full_logged = Seldom(FULL_LOGGED_INTERVAL)
        self._to_tell: dict[str, Message] = {}
        """Messages that wait until the peer has taken others, by type: what a message says is how
        something is now, so that the last one is all that matters."""
        self._on_memory = on_memory
        self._memory_told = 0
        self._heard = Budget(MESSAGES_AT_ONCE, MESSAGES_A_SECOND, self._loop.time)
        self._to_hear: deque[MessageReceived] = deque()
        """Messages that came too fast; their bytes are the peer's credit, so that they are few."""
        self._hearing: asyncio.TimerHandle | None = None
        self.messages = 0
        """Messages that came, in all."""
        session.inbox.holds = on_memory is not None
        tracing.began(session, peer)

    def now(self) -> float:
        return self._loop.time()

    @property
    def ended(self) -> bool:
        """The session is over."""
        return self.session.ended

    def stats(self) -> SessionStats:
        """How the session is now; times are those of `now`."""
        return self.session.stats()

    # -- lanes ---------------------------------------------------------------------------------

    def add_lane(self, transport: LaneTransport, lane_class: LaneClass) -> int:
        """A lane that was welcomed. Returns its number."""
        number, events = self.session.lane_up(lane_class, self.now())
        self.lanes[number] = MuxLane(transport, lane_class, self.now())
        if lane_class is LaneClass.INTERACTIVE:
            # Asked first, also when it is the youngest: what any lane may carry is short.
            self.lanes = {number: self.lanes.pop(number), **self.lanes}
        self._run(events)
        return number

    def lane_data(self, number: int, *chunks: bytes | memoryview) -> None:
        """Bytes that came in on a lane, in as many chunks as they came."""
        events: list[Event] = []
        now = self.now()
        try:
            for data in chunks:
                events += self.session.receive(number, data, now)
        except ProtocolError as exc:
            log.error("session_broken", code=exc.code.name, cause=str(exc))
            self.close(f"{exc.code}: {exc}")
            return
        record = self.lanes.get(number)
        beside = len(self.lanes) > 1
        if beside and record is not None and record.lane_class is LaneClass.INTERACTIVE:
            self._look_for_short(events)
        self._run(events)

    def _look_for_short(self, events: list[Event]) -> None:
        """What came on the lane for short messages is one, unless it answers a long transfer, or
        begins one."""
        for event in events:
            if (
                isinstance(event, DataReceived)
                and len(event.data) <= SHORT_MESSAGE
                and self.session.is_short(event.stream)
            ):
                pace.short_message()
                return

    def lane_lost(self, number: int) -> None:
        """A lane's transport is gone."""
        if self.lanes.pop(number, None) is not None:
            self._run(self.session.lane_down(number, self.now()))

    # -- streams -------------------------------------------------------------------------------

    def has_room(self) -> bool:
        """Whether one more stream can be opened. That it cannot is told now and then."""
        if self.session.ended:
            return False
        if not self.session.full:
            return True
        if self._full_logged.due(self.now()):
            log.warning("session_full", streams=self.session.limits.streams)
        return False

    def open(self, target: bytes, owner: StreamOwner) -> MuxStream:
        """Open a stream for `owner`; there must be room."""
        number = self.session.open(target, self.now())
        self._owners[number] = owner
        self.flush()
        return MuxStream(self, number)

    def drop_owner(self, number: int) -> None:
        """No events of this stream are wanted any more."""
        self._owners.pop(number, None)

    @property
    def owners(self) -> Mapping[int, StreamOwner]:
        """Who has the streams, by their numbers."""
        return self._owners

    def has(self, number: int) -> bool:
        """A stream of that number is there, and is not being given up."""
        return self.session.has(number)

    def own(self, number: int, owner: StreamOwner) -> MuxStream:
        """Give a stream of a session that was restored its owner."""
        self._owners[number] = owner
        return MuxStream(self, number)

    def reset_unowned(self) -> int:
        """Give up the streams of a session that was restored which have found no owner."""
        unowned = [
            number
            for number in self.session.streams
            if number != CONTROL_STREAM and number not in self._owners and self.has(number)
        ]
        for number in unowned:
            self.session.reset(number, ResetReason.ABORTED, "its connection was not handed over")
        self.flush()
        return len(unowned)

    def stop(self) -> Tree | None:
        """Take every lane down, without a word to peer or owners, and give the session as it is
        then, for another process. None: it has ended. Nothing comes after this."""
        now = self.now()
        self._hear_all()
        self._tell(math.inf)
        while self.lanes:
            number, record = self.lanes.popitem()
            self.session.lane_down(number, now)
            record.transport.abort("handed over")
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._cancel_together()
        tracing.ended(self.session)
        return None if self.session.ended else self.session.snapshot()

    def send_message(self, message: Message) -> None:
        """A message to the peer's `on_message`; reliable, in order. One that is too long for the
        peer is left out, and that is logged: nothing that a node has to tell ends a daemon.

        To a peer that takes nothing only the last one of each type is told, when it does.
        """
        if self.session.ended:
            return
        self.tell(message)

    def tell(self, message: Message, data: bytes | None = None) -> None:
        """The same; `data` is what `framed` has made of it, which many sessions may share."""
        if self.session.ended:
            return
        if self._to_tell or self.session.control_buffered >= CONTROL_BUFFER:
            self._tell_later(message)
        elif (data := data or framed(message)) is not None:
            self.session.send_framed(data)
        self.flush()

    def _tell_later(self, message: Message) -> None:
        earlier = self._to_tell.pop(message.TYPE, None)
        if isinstance(message, NodesChanged) and isinstance(earlier, NodesChanged):
            message = message.after(earlier)
        self._to_tell[message.TYPE] = message

    def _tell(self, most: float) -> None:
        """Send messages as long as no more than `most` bytes wait for the peer."""
        while self._to_tell and self.session.control_buffered < most:
            message = self._to_tell.pop(next(iter(self._to_tell)))
            if (data := framed(message)) is not None:
                self.session.send_framed(data)

    def close(self, why: str) -> None:
        """End the session in order. Its streams are reset, its lanes closed."""
        self._run(self.session.close(why))

    def late(self) -> float:
        """Seconds since its timer should have come; 0: it is on time, or has no more to do."""
        if self.session.ended or self._timer is None:
            return 0.0
        return max(0.0, self.now() - self._timer.when())

    # -- at work -------------------------------------------------------------------------------

    def flush_sent(self, size: int) -> None:
        """A stream has `size` more bytes to send: at once, or with what others have in this turn of
        the loop."""
        if self._depth:
            return
        if size > SHORT_BYTES or len(self._waiting) < MANY_WAIT:
            self.flush()
        elif self._together is None:
            self._together = self._loop.call_soon(self._flush_together)

    def _flush_together(self) -> None:
        self._together = None
        self.flush()

    def _cancel_together(self) -> None:
        if self._together is not None:
            self._together.cancel()
            self._together = None

    def flush(self) -> None:
        """Give every lane what the session has for it, as far as the lane takes it."""
        if self._depth:
            return  # the outermost call does it, once
        now = self.now()
        if self._to_tell:
            self._tell(CONTROL_BUFFER)
        for number, record in list(self.lanes.items()):
            transport, took = record.transport, False
            # The word that it is over goes behind what waits: the peer would hold on for it.
            while not transport.paused or self.session.ended:
                chunks = self.session.data_to_send(number, FLUSH_BYTES, now)
                if not chunks:
                    break
                transport.write(chunks)
                took = True
            if took and record.lane_class is LaneClass.BULK:
                # Last next time: what waits in one queue while others are empty holds up a reader.
                self.lanes[number] = self.lanes.pop(number)
        if self._on_memory is not None:
            self._tell_memory(self._on_memory)
        if drained := self.session.drained():
            self._run(drained)
        else:
            self._schedule(now)

    def _tell_memory(self, on_memory: Callable[[int], None]) -> None:
        memory = self.session.memory
        changed = memory - self._memory_told
        if abs(changed) >= MEMORY_GRAIN or (not memory and changed):
            self._memory_told = memory
            on_memory(changed)

    def shed(self, most: int) -> int:
        """Give up the greediest streams until what is held is at most `most` bytes. Returns how
        many they were."""
        given_up = 0
        text = f"more than {most} bytes wait for it and for others of the same link"
        for number in self.session.memory_by_stream():
            if self.session.memory <= most:
                break
            given_up += 1
            owner = self._owners.pop(number, None)
            self.session.reset(number, ResetReason.TOO_MANY, text)
            if owner is not None:
                owner.stream_lost(ResetReason.TOO_MANY, text)
        self.flush()
        return given_up

    def _schedule(self, now: float) -> None:
        if self.session.ended:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            return
        if self._timer is not None and self._timer.when() <= now + TIMER_SLACK:
            return
        due = self.session.deadline(now)
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        on_grid = math.ceil(max(due, now + 0.01) / TIMER_GRID) * TIMER_GRID
        self._timer = self._loop.call_at(on_grid, self._tick)

    def _tick(self) -> None:
        assert self._timer is not None, "a timer that fires was set"
        late = self.now() - self._timer.when()
        self._timer = None
        if late > LATE_SECONDS:
            # The machine slept or the process was stopped. What came in meanwhile is still to be
            # read, and a PING that became due to be sent; only then is it known whether a lane is
            # silent.
            self._timer = self._loop.call_later(0.25, self._tick)
            self.flush()
            return
        self._run(self.session.tick(self.now()))

    def _run(self, events: list[Event]) -> None:
        """Do what the events say, then flush once."""
        self._depth += 1
        try:
            for event in gathered(events):
                self._do(event)
        finally:
            self._depth -= 1
        self.flush()
        if self.session.ended and not self._depth:
            for number in list(self.lanes):
                self.lanes.pop(number).transport.close()

    def _do(self, event: Event | Gathered) -> None:
        match event:
            case Gathered(number, chunks):
                owner = self._owners.get(number)
                if owner is not None:
                    owner.stream_data(chunks)
            case EndReceived(number):
                owner = self._owners.get(number)
                if owner is not None:
                    owner.stream_ended()
            case StreamWritable(number):
                owner = self._owners.get(number)
                if owner is not None:
                    owner.stream_writable()
            case StreamOpened(number, target):
                stream = MuxStream(self, number)
                owner = self._accept(stream, target)
                if owner is not None:
                    self._owners[number] = owner
            case StreamReset(number, reason, text):
                owner = self._owners.pop(number, None)
                if owner is not None:
                    owner.stream_lost(reason, text)
            case StreamFinished(number):
                owner = self._owners.pop(number, None)
                if owner is not None:
                    owner.stream_finished()
            case MessageReceived():
                self._to_hear.append(event)
                self._hear()
            case LaneDead(number):
                record = self.lanes.get(number)
                if record is not None:
                    record.transport.abort("no answer came in time")
                    self.lane_lost(number)
            case Parked() | Resumed():
                self._on_change(event)
            case SessionEnded():
                tracing.ended(self.session)
                self._over()
                self._on_change(event)

    def _hear(self) -> None:
        """Hear the messages that came, as far as there may be so many of them."""
        if self._hearing is not None:
            return
        while self._to_hear:
            if self._on_memory is not None and not self._heard.take():
                wait = max(self._heard.wait, TIMER_GRID)
                self._hearing = self._loop.call_later(wait, self._hear_again)
                return
            self._hear_next()

    def _hear_again(self) -> None:
        self._hearing = None
        self._depth += 1
        try:
            self._hear()
        finally:
            self._depth -= 1
        self.flush()

    def _hear_all(self) -> None:
        """However many they are; nothing is heard after that."""
        if self._hearing is not None:
            self._hearing.cancel()
        while self._to_hear:
            self._hear_next()

    def _hear_next(self) -> None:
        event = self._to_hear.popleft()
        self.messages += 1
        self._message(event.data)
        self.session.message_done(event, self.now())

    def _over(self) -> None:
        """Nothing is told or heard any more, and nothing is held."""
        self._cancel_together()
        self._to_tell.clear()
        self._to_hear.clear()
        if self._hearing is not None:
            self._hearing.cancel()
            self._hearing = None
        if self._on_memory is not None:
            self._on_memory(-self._memory_told)
            self._memory_told = 0

    def _message(self, data: bytes) -> None:
        try:
            message = messages.decode(data)
            if message is not None:
                self._on_message(message)
        except ValueError as exc:
            log.warning("message_malformed", node=self.peer, cause=str(exc))
