"""One lane of a session: its PINGs, when it is overdue or dead, how much may be under way on it.

A lane is a reliable ordered byte stream until it dies. What is put on it waits in queues that
nobody sees (the SSH client's, the server's, the kernels'), and an urgent frame waits behind all of
it. So the bytes not yet confirmed by a PONG are limited: PONGs come back in order, hence one that
answers a PING confirms all that was sent before it.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Final

PING_IDLE: Final = 1.5
"""Seconds between PINGs on an idle lane."""
HUB_WAITS: Final = 0.25
"""Seconds by which a hub's PING is later than a worker's is due, a timer's grid at either end and
what a round trip varies by: while it hears those it knows all but how long a round trip takes, and
its workers may be many. More would be too much where a lane falls silent right after one of them:
it is to be found dead within 6 s."""
PING_HEARD: Final = 3.0
"""Seconds between a hub's PINGs on an idle lane while it hears the worker's: of three looks at
how long they take (`watch/links.py`) one PING decides two at the most."""
PING_BUSY: Final = 0.25
"""Seconds between PINGs while something is under way."""
RTT_RISE: Final = 0.2
RTT_FALL: Final = 0.5
"""How much of its distance from a sample the smoothed round-trip time goes. PINGs that a silence
held up say nothing of what comes after it, and would leave a lane unwatched for a while."""
OVERDUE_AFTER: Final = 0.4
"""Seconds that a PING may go unanswered, at the least, before other lanes take over. With those
before a busy lane's next PING and two timers' 0.1 s each, a lane that falls silent stalls nobody
for a second."""
DEAD_AFTER: Final = 4.0
"""Seconds without a byte while a PING is unanswered: the lane is dead."""
UNANSWERED_AFTER: Final = 8.0
"""Seconds without a PONG, while a PING is unanswered, though other bytes arrive: the lane is dead.
Where PONGs come, late as they may be, the lane is slow and not dead."""

WINDOW_START: Final = 1 << 20
WINDOW_FLOOR: Final = 1 << 16
WINDOW_CEILING: Final = 1 << 25
QUEUE_GOAL: Final = 0.1
"""Seconds of queue that a lane may build up before its window stops growing."""
QUEUE_BOUND: Final = 0.4
"""Seconds of queue from which its window shrinks."""


class LaneClass(Enum):
    """What a lane is for: short messages, or everything that is long; or all of it, while no other
    lane is well."""

    INTERACTIVE = "interactive"
    BULK = "bulk"
    RESERVE = "reserve"


class Lane:
    """The state of one lane; owned by its session."""

    __slots__ = (
        "_limited", "_of_hub", "_pinged_at", "_pings", "_token", "answered_at", "base_rtt",
        "bytes_in", "bytes_out", "confirmed", "heard", "id", "lane_class", "newest_rtt", "pongs",
        "rtt", "sent", "sidelined", "spoke", "window",
    )  # fmt: skip

    def __init__(
        self, number: int, lane_class: LaneClass, now: float, of_hub: bool = False
    ) -> None:
        """`of_hub`: the end of it that is the hub's."""
        self.id = number
        self.lane_class = lane_class
        self.heard = now
        """When bytes last came in."""
        self.bytes_in = 0
        self.bytes_out = 0
        self.sent = 0
        """Bytes of streams put on the lane; PINGs, PONGs and ACKs do not count."""
        self.spoke = False
        """Since the last PING there was an ACK or a GONE, which an overdue lane must not keep."""
        self.confirmed = 0
        """Of `sent`: what has certainly arrived."""
        self.answered_at = now
        """When the last PONG came, and `confirmed` with it."""
        self.window = WINDOW_START
        self.rtt: float | None = None
        """Smoothed round-trip time in seconds."""
        self.newest_rtt: float | None = None
        """The last one measured, in seconds."""
        self.base_rtt: float | None = None
        """The least round-trip time seen, in seconds."""
        self.sidelined = False
        """It is overdue while others are not: nothing new is put on it."""
        self.pongs: deque[int] = deque()
        """Tokens of the peer's PINGs, to be answered."""
        self._pings: deque[tuple[int, int, float]] = deque()
        self._pinged_at = now - PING_IDLE
        self._of_hub = of_hub
        self._token = 0
        self._limited = False

    def has_room(self) -> bool:
        """Bytes of streams may be put on it now. A no is noted: it lets the window grow."""
        if self.sent - self.confirmed < self.window:
            return True
        self._limited = True
        return False

    def wants_ping(self, now: float) -> bool:
        """A PING is due: by time, or because much is under way behind the last one."""
        marked = self._pings[-1][1] if self._pings else self.confirmed
        if self.sent - marked >= self.window >> 2:
            return True
        # Asked before and after each write: most often the last one was just now.
        return now >= self._pinged_at + PING_BUSY and now >= self._next_ping()

    def _next_ping(self) -> float:
        # A sidelined lane is used again when it answers: it must have been asked.
        busy = self.sent > self.confirmed or self.spoke or self.sidelined
        if busy and not self._pings:
            return self._pinged_at + PING_BUSY
        due = self._pinged_at + PING_IDLE
        if not self._of_hub or self._pings or self.rtt is None:
            return due
        return max(due, min(self.heard + PING_IDLE + HUB_WAITS, self._pinged_at + PING_HEARD))

    def ping(self, now: float) -> int:
        """Note a PING that is put on the lane now; returns its token."""
        self._token += 1
        self._pings.append((self._token, self.sent, now))
        self._pinged_at = now
        self.spoke = False
        return self._token

    def pong(self, token: int, now: float) -> None:
        """Take in a PONG; one that answers no PING does nothing."""
        if not self._pings or not self._pings[0][0] <= token <= self._pings[-1][0]:
            return
        while True:
            number, position, sent_at = self._pings.popleft()
            if number == token:
                break
        sample = max(now - sent_at, 1e-6)
        self.newest_rtt = sample
        before = sample if self.rtt is None else self.rtt
        self.rtt = before + (RTT_RISE if sample > before else RTT_FALL) * (sample - before)
        self.base_rtt = sample if self.base_rtt is None else min(self.base_rtt, sample)
        queue = sample - self.base_rtt
        if queue > QUEUE_BOUND:
            self.window = max(WINDOW_FLOOR, int(self.window * 0.7))
        elif self._limited and queue <= QUEUE_GOAL:
            self.window = min(WINDOW_CEILING, self.window + position - self.confirmed)
        self.confirmed = position
        self.answered_at = now
        self._limited = False
        self.sidelined = False

    def _waiting_since(self, now: float) -> float | None:
        """Since when the peer owes an answer; None if it owes none."""
        if self._pings:
            return max(self._pings[0][2], self.answered_at)
        # A transport that takes no more bytes takes no PING either: the time at which one was
        # due counts, else a lane that stops at such a moment would never be found dead.
        due = self._next_ping()
        return due if now >= due else None

    def _overdue_from(self, since: float) -> float:
        """When it is overdue, if nothing comes until then; it owes an answer since `since`."""
        timeout = max(OVERDUE_AFTER, 4 * (self.rtt or 0.0))
        return max(since + timeout, self.heard + OVERDUE_AFTER)

    def _dead_from(self, since: float) -> float:
        return min(since + UNANSWERED_AFTER, max(since, self.heard) + DEAD_AFTER)

    def unheard(self, now: float) -> bool:
        """Nothing was heard of it for as long as makes a lane overdue that owes an answer."""
        return now - self.heard >= OVERDUE_AFTER

    def overdue(self, now: float) -> bool:
        """An answer is owed for far longer than a round trip."""
        since = self._waiting_since(now)
        return since is not None and now >= self._overdue_from(since)

    def dead(self, now: float) -> bool:
        """The lane is dead: the peer is gone, or one direction is."""
        since = self._waiting_since(now)
        return since is not None and now >= self._dead_from(since)

    def deadline(self, now: float) -> float:
        """When this lane wants to be looked at again."""
        due = self._next_ping()
        since = self._waiting_since(now)
        if since is None:
            return due
        look = self._dead_from(since)
        if due > now:
            look = min(look, due)
        if not self.sidelined:
            # Overdue already, it is no worse than the lanes beside it: that may change.
            overdue = self._overdue_from(since)
            look = min(look, overdue if overdue > now else now + PING_BUSY)
        return look
