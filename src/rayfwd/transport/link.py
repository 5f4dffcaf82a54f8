"""The worker's side of the link: one task a lane dials, says hello, and redials when it is lost.

Beside the lanes that always stand there are extra ones, made while a transfer fills those: they
stay until they are lost.

The session outlives its lanes. It is made by the first lane that is welcomed and ended by
ride-through, by the hub's word, or by `Link.close`; then the next lane makes a new one.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Code, Problem, ProblemError
from rayfwd.session.events import Parked, Resumed, SessionEnded
from rayfwd.session.frames import Frame
from rayfwd.session.handshake import PROOF, Challenge, Hello, Proof, Welcome
from rayfwd.session.lane import LaneClass
from rayfwd.session.messages import Message
from rayfwd.session.session import Limits, Session
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.system.backoff import Backoff
from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.logs import get_logger
from rayfwd.transport.carrier import Carrier, Connection, Pipe
from rayfwd.transport.hubanswer import limited
from rayfwd.transport.kept import Kept
from rayfwd.transport.link_lane import CLOSE_TIMEOUT, LinkLane, LinkRefusedError
from rayfwd.transport.linkstats import Ending, LinkStats, record
from rayfwd.transport.mux import Mux, MuxStream, StreamOwner
from rayfwd.transport.refused import RefusedStreams
from rayfwd.transport.saturation import Saturation
from rayfwd.transport.urgency import AdaptiveTimeout, rest, time_limit

log = get_logger(__name__)
Made = TypeVar("Made")

HANDSHAKE_TIMEOUT = 15.0
"""Seconds between HELLO and the hub's answer, and before that for the channel to the hub."""
URGENT_HANDSHAKE = 3.0
"""The same at first while streams wait."""
REDIAL_FIRST = 0.2
REDIAL_PARKED = 1.0
"""Seconds between attempts, at most, while streams wait for a lane."""
REDIAL_LAST = 15.0
"""Seconds between attempts, at most, otherwise."""
REDIAL_COUNTED = {
    codes.SSH_AUTH_REFUSED: 30.0,
    codes.SSH_SIGNING_FAILED: 30.0,
    codes.SSH_TICKET_UNUSABLE: 30.0,
    codes.SSH_TURNED_AWAY: 5.0,
    codes.SSH_LIMITED: 35.0,
}
"""Seconds between attempts, at least, after what servers and firewalls count, and bar for: keys
that were refused (fail2ban), connections without a login (MaxStartups, PerSourcePenalties), new
connections (`ufw limit`: 6 in 30 s, and those that it drops count too)."""
REDIAL_UNANSWERED = 20.0
"""The same after an attempt that had no answer at all, unless streams wait: each is four packets to
a firewall that counts what it drops."""
REDIAL_SPREAD = 0.3
"""Part of that which comes on top at random: workers behind one address take turns."""
LIMITED_AFTER, LIMITED_SECONDS = 3, 5.0
"""Attempts that fail in a row while another lane stands, or the seconds that one goes unanswered,
from which it is a limit that is met there."""
DIALLING_TIMEOUT = 300.0
"""Seconds that dialling may take, through every jump, before the watchdog takes it for dead."""
LASTED_SECONDS = 10.0
"""Seconds after which a lane that is lost counts as having been a good one."""
DEMAND_EVERY, DEMAND_IDLE = 0.25, 1.0
"""Seconds between two looks at whether the lanes are full; while little moves."""
EXTRA_INTERVAL = 30.0
"""Seconds between two attempts at the extra lanes, at least."""


class LinkOwner(Protocol):
    """Who holds a link, and is told of it."""

    def hello(self) -> Hello:
        """What is said of this node; session, resumption and class are filled in."""

    def prove(self, greeting: Frame, challenge: Challenge) -> Proof:
        """That this is who its `hello` says, which was said as `greeting`."""

    def accept_stream(self, stream: MuxStream, target: bytes) -> StreamOwner | None:
        """Take a stream that the hub opened, or reset it and return None."""

    def welcomed(self, welcome: Welcome) -> None:
        """A lane stands; the plan as it is now."""

    def message(self, message: Message) -> None:
        """A control message of the hub's. Raises ValueError where what it says is none."""

    def link_changed(self) -> None:
        """State or problem of the link are others."""


@dataclass(slots=True)
class LaneTask:
    """A lane that there should be, and how it is."""

    name: str
    lane_class: LaneClass
    carrier: Carrier
    number: int | None = None
    up_since: float | None = None
    """Wall-clock seconds."""
    problem: Problem | None = None
    failures: int = 0
    """Attempts in a row that led to no lane."""
    unanswered: bool = False
    """The last attempt had no answer at all."""
    kept: Kept = field(default_factory=Kept)
    heartbeat: Heartbeat = field(init=False)

    def __post_init__(self) -> None:
        self.heartbeat = Heartbeat(f"lane {self.name}")


class Link:
    """The link to the head. `run` holds it up until it is cancelled; `close` ends it in order."""

    def __init__(
        self,
        owner: LinkOwner,
        head: HeadConfig,
        carrier: Carrier,
        limits: Limits,
        peer: str = "head",
    ) -> None:
        """Nothing is asked of the owner before `run` or `take_over`. `peer`: who is at the other
        end, for the log."""
        self.head = head
        self.peer = peer
        self.mux: Mux | None = None
        self.link_stats = LinkStats()
        self.refused = RefusedStreams()
        self.since = time.time()
        """Wall-clock seconds of the last change between up, parked and down."""
        self.slots = [LaneTask("interactive", LaneClass.INTERACTIVE, carrier)]
        self.slots += [self._bulk(i + 1, carrier) for i in range(head.bulk_lanes)]
        self._owner = owner
        self._carrier = carrier
        self._limits = limits
        self._session = ""
        self._connections: set[Connection] = set()
        self._lanes: set[LinkLane] = set()
        self._closing = False
        self._established = asyncio.Event()
        self._standing = asyncio.Event()
        """A lane stands: the others follow it."""
        self._urgent = asyncio.Event()
        """Streams wait for a lane."""
        self._handshake_timeout = AdaptiveTimeout(URGENT_HANDSHAKE, HANDSHAKE_TIMEOUT)
        self._on_memory: Callable[[int], None] | None = None
        """Of a peer that is not trusted as a head is (`Mux`)."""

    @staticmethod
    def _bulk(number: int, carrier: Carrier) -> LaneTask:
        return LaneTask(f"bulk-{number}", LaneClass.BULK, carrier)

    @property
    def state(self) -> str:
        """`up`, `parked` (streams wait for a lane) or `down` (there is no session)."""
        if self.mux is None or self.mux.ended:
            return "down"
        return "up" if self.mux.lanes else "parked"

    @property
    def problem(self) -> Problem | None:
        """What keeps the link from standing, if it does not stand."""
        if self.state == "up":
            return None
        return next((slot.problem for slot in self.slots if slot.problem is not None), None)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for slot in self.slots:
                group.create_task(self._hold(slot), name=f"lane {slot.name}")
            if self.head.extra_lanes and self.head.bulk_lanes:
                group.create_task(self._hold_extra(group), name="extra lanes")

    async def close(self, why: str) -> None:
        """End the session in order. Call `run`'s cancellation after it."""
        self._closing = True
        if self.mux is not None:
            self.mux.close(why)
        for lane in self._lanes:
            if lane.greeting:
                lane.take_back(why)
        if self._lanes:
            await asyncio.wait([lane.lost for lane in self._lanes], timeout=CLOSE_TIMEOUT)
        for connection in list(self._connections):
            connection.close()
        self._carrier.close()

    # -- for a process that comes after this one -----------------------------------------

    def hand_over(self) -> Tree | None:
        """Stop, and give the session as it is then. None: there is none. Nothing comes after it
        but `run`'s cancellation."""
        self._closing = True
        mux, self.mux = self.mux, None
        core = mux.stop() if mux is not None else None
        for connection in list(self._connections):
            connection.abort()
        self._carrier.close()
        return None if core is None else {"session": self._session, "core": core}

    def take_over(self, tree: Tree) -> Mux:
        """Go on with the session of an earlier process; before `run`. Raises SnapshotError."""
        try:
            number = str(tree["session"])
            core = Session.from_snapshot(tree["core"], asyncio.get_running_loop().time())
        except (KeyError, TypeError) as exc:
            raise SnapshotError(f"a link that does not fit: {exc!r}") from exc
        self._session = number
        mux = self._begin(core)
        self._urgent.set()
        self.link_stats.parked(self.since, mux.now())
        mux.flush()  # sets its clock
        return mux

    # -- one lane ------------------------------------------------------------------------

    async def _hold(self, slot: LaneTask) -> None:
        backoff = Backoff(REDIAL_FIRST, REDIAL_LAST, jitter=0.2)
        while not self._closing:
            await self._turn(slot)
            began = asyncio.get_running_loop().time()
            slot.unanswered = False
            slot.heartbeat.beat(DIALLING_TIMEOUT)
            try:
                await self._one_lane(slot)
                slot.failures = 0
                if asyncio.get_running_loop().time() - began > LASTED_SECONDS:
                    backoff.reset()
            except LinkRefusedError as exc:
                if self._begins_anew(exc):
                    backoff.reset()
                else:
                    self._set_problem(slot, self._worded(slot, exc.problem))
            except ProblemError as exc:
                slot.failures += 1
                seconds = asyncio.get_running_loop().time() - began
                slot.unanswered = unanswered(exc.problem, seconds)
                understood = self.understood(exc.problem, slot.failures, seconds)
                self._set_problem(slot, self._worded(slot, understood))
            await self._rest(slot, backoff)

    async def _turn(self, slot: LaneTask) -> None:
        """Until this lane may be dialled."""
        if slot is not self.slots[0]:
            slot.heartbeat.idle()
            # One lane finds out whether there is a way: the others would only find the same,
            # and servers and firewalls count connections.
            await self._standing.wait()

    def _worded(self, slot: LaneTask, problem: Problem) -> Problem:
        """A problem of a lane, as this link's owner is to read it."""
        del slot
        return problem

    def _longest(self, slot: LaneTask) -> float:
        """Seconds between attempts, at most."""
        del slot
        return REDIAL_PARKED if self._urgent.is_set() else REDIAL_LAST

    def understood(self, problem: Problem, failures: int, seconds: float) -> Problem:
        """What cannot be had while another lane stands is not away, but limited."""
        if self.state != "up" or problem.code not in {codes.SSH_UNREACHABLE, codes.SSH_TURNED_AWAY}:
            return problem
        if failures < LIMITED_AFTER and not unanswered(problem, seconds):
            return problem
        return limited(
            f"one connection stands, but a further one is not let through: {problem.cause}"
        )

    async def _rest(self, slot: LaneTask, backoff: Backoff) -> None:
        """Before the next attempt; from when streams wait, no longer than need be."""
        counted = counted_rest(None if slot.problem is None else slot.problem.code)
        seconds = max(counted, backoff.next(self._longest(slot)))
        if slot.unanswered and not self._urgent.is_set():
            seconds = max(seconds, spread(REDIAL_UNANSWERED))
        if slot.problem is not None and slot.problem.code is codes.LINK_AWAITED:
            seconds = REDIAL_FIRST  # nothing was dialled
        slot.heartbeat.beat(seconds + DIALLING_TIMEOUT)
        await rest(self._urgent, seconds, max(counted, min(seconds, REDIAL_FIRST)))

    async def _hold_extra(self, group: asyncio.TaskGroup) -> None:
        """Make the extra lanes when those that stand are full."""
        while not self._closing:
            await self._established.wait()
            if self.mux is not None:
                await self._watch_demand(group, self.mux)

    async def _watch_demand(self, group: asyncio.TaskGroup, mux: Mux) -> None:
        """The same while one session lasts."""
        stats = mux.stats()
        saturation = Saturation(mux.now(), (stats.bytes_in, stats.bytes_out))
        while not mux.ended:
            await sleep_coalesced(DEMAND_IDLE if saturation.idle else DEMAND_EVERY)
            stats = mux.stats()
            rtts = (lane.base_rtt for lane in stats.lanes if lane.base_rtt is not None)
            bulk = sum(lane.lane_class is LaneClass.BULK for lane in stats.lanes)
            moved = (stats.bytes_in, stats.bytes_out)
            if saturation.saturated(mux.now(), moved, min(rtts, default=math.inf), bulk):
                self._add_lanes(group)
                await asyncio.sleep(EXTRA_INTERVAL)

    def _add_lanes(self, group: asyncio.TaskGroup) -> None:
        standing = {slot.name for slot in self.slots}
        for i in range(self.head.bulk_lanes, self.head.bulk_lanes + self.head.extra_lanes):
            slot = self._bulk(i + 1, self._carrier)
            if slot.name not in standing:
                group.create_task(self._extra_lane(slot), name=f"lane {slot.name}")

    async def _extra_lane(self, slot: LaneTask) -> None:
        """A lane beside those that always stand; what stands goes on without it."""
        self.slots.append(slot)
        try:
            await self._one_lane(slot)
        except (LinkRefusedError, ProblemError) as exc:
            log.info(
                "extra_lane_failed",
                node=self.peer,
                lane=slot.name,
                code=exc.problem.code.name,
                cause=str(exc),
            )
        finally:
            self.slots.remove(slot)

    async def _one_lane(self, slot: LaneTask) -> None:
        """Dial, be welcomed, and stay until the lane is lost."""
        connection, to = await self._connection_for(slot), self.head.destination
        lane, kept = LinkLane(to), False
        try:
            pipe = await self._within_time(
                connection.open(lane),
                f"{to.name}'s sshd opened no channel",
                f"nothing if it comes back; otherwise check {to.name}'s load and its sshd log",
            )
            if self._closing:
                return
            session = self._current_session()
            resumes = self.mux is not None
            hello = replace(
                self._owner.hello(), session=session, resumes=resumes, lane=slot.lane_class
            )
            self._lanes.add(lane)
            welcome = await self._within_time(
                self._greet(pipe, lane, hello),
                f"{to.answerer} did not answer",
                f"read rayfwd's log on {to.name}",
            )
            self._check(slot, lane, welcome)
            self._join(slot, lane, welcome, session)
            tuning = asyncio.create_task(connection.tune(), name="tune the connection")
            slot.heartbeat.idle()  # its session's timer shows that it is alive
            try:
                why = await lane.lost
            finally:
                tuning.cancel()
        except asyncio.CancelledError:
            connection.close()
            raise
        except ProblemError as exc:
            kept = slot.kept.offer(connection, exc.problem, asyncio.get_running_loop().time())
            raise
        finally:
            self._lanes.discard(lane)
            if not kept:
                self._connections.discard(connection)
                connection.abort()
        self._lost(slot, why)

    async def _connection_for(self, slot: LaneTask) -> Connection:
        """The one that was kept, or a new one. Raises ProblemError."""
        connection = slot.kept.take()
        if connection is None:
            connection = await slot.carrier.dial(self._urgent)
            self._connections.add(connection)
            slot.kept.made(asyncio.get_running_loop().time())
        return connection

    async def _within_time(self, step: Awaitable[Made], silence: str, remedy: str) -> Made:
        return await within_time(step, self._urgent, self._handshake_timeout, silence, remedy)

    async def _greet(self, pipe: Pipe, lane: LinkLane, hello: Hello) -> Welcome:
        try:
            return await lane.greet(pipe, hello, self._owner.prove)
        except LinkRefusedError as exc:
            by_secret = PROOF in hello.features and not lane.challenged
            if not by_secret or exc.problem.code is not codes.NAME_TAKEN:
                raise
            raise ProblemError(_by_an_older_hub(exc.problem)) from exc

    def _check(self, slot: LaneTask, lane: LinkLane, welcome: Welcome) -> None:
        """Whether a welcome is to be believed. Raises ProblemError."""

    def _current_session(self) -> str:
        if self.mux is None and not self._session:
            # Larger for every new session of this node, also after a restart.
            self._session = f"{time.time_ns():016x}{random.getrandbits(32):08x}"
        return self._session

    def _join(self, slot: LaneTask, lane: LinkLane, welcome: Welcome, session: str) -> None:
        if self._closing:
            return  # what we said hello for was taken back
        if session != self._session:
            lane.abort("its session has ended")
            return
        if self.mux is None:
            loop = asyncio.get_running_loop()
            self._begin(Session("worker", welcome.ride_through, self._limits, loop.time()))
            log.info(
                "session_started",
                node=self.peer,
                head=self.head.called,
                hub_version=welcome.version,
            )
        assert self.mux is not None, "a session has just begun"
        slot.number = lane.join(self.mux, slot.lane_class)
        slot.up_since = time.time()
        slot.problem = None
        self._standing.set()
        log.info("lane_up", node=self.peer, lane=slot.name)
        self._owner.welcomed(welcome)
        self._owner.link_changed()

    def _begin(self, core: Session) -> Mux:
        owner = self._owner
        self.mux = Mux(
            core,
            owner.accept_stream,
            owner.message,
            self._changed,
            self.peer,
            self._on_memory,
            self.refused,
        )
        self._established.set()
        self.since = time.time()
        self.link_stats.began()
        return self.mux

    def _lost(self, slot: LaneTask, why: str) -> None:
        number, slot.number = slot.number, None
        up_since, slot.up_since = slot.up_since, None
        if number is not None and self.mux is not None:
            self.mux.lane_lost(number)
        if self._closing:
            return
        slot.problem = codes.LANE_LOST.problem(
            f"lane {slot.name} was lost: {why}", "nothing if it comes back"
        )
        self.link_stats.lane_lost(slot.name, why)
        up = None if up_since is None else round(time.time() - up_since, 1)
        log.warning("lane_lost", node=self.peer, lane=slot.name, cause=why, up_seconds=up)
        self._owner.link_changed()

    def _begins_anew(self, refused: LinkRefusedError) -> bool:
        """The hub does not know our session (any more): what it carried is lost, make another."""
        problem = refused.problem
        if not problem.code.new_session:
            return False
        if refused.session != self._session:
            return True  # another lane was told so before, and has begun anew already
        log.warning(problem.code.event, node=self.peer, cause=problem.cause)
        self._session = ""
        if self.mux is not None:
            self.mux.close(problem.cause)
        return True

    def _set_problem(self, slot: LaneTask, problem: Problem) -> None:
        """Say it once; the same again is no news."""
        if self._closing:
            return
        known = any(s.problem == problem for s in self.slots)
        slot.problem = problem
        if not known:
            # While streams are held, a head that does not answer is no news beside `link_parked`.
            say = log.warning if self.state != "down" else log.error
            self._say(say, slot, problem)
            self._owner.link_changed()

    def _say(self, say: Callable[..., object], slot: LaneTask, problem: Problem) -> None:
        fields = {"node": self.peer, "lane": slot.name}
        fields |= {"cause": problem.cause, "remedy": problem.remedy}
        if not problem.code.known:
            fields["code"] = problem.code.name
        say(problem.code.event, **fields)

    def _changed(self, event: Parked | Resumed | SessionEnded) -> None:
        if self.mux is None:
            return  # it was handed over
        if isinstance(event, Parked):
            self._standing.clear()
            self._urgent.set()
            # A jump host may be what has gone, in silence.
            self._carrier.close(parked=True)
        ending: Ending = "unsaid" if self._closing else "lost"
        self.since = record(event, self.link_stats, self.mux, self.peer, log, ending)
        match event:
            case Resumed():
                self._urgent.clear()
            case SessionEnded():
                self.mux = None
                self._session = ""
                self._established.clear()
                self._standing.clear()
                self._urgent.clear()
        self._owner.link_changed()


async def within_time(
    step: Awaitable[Made],
    urgent: asyncio.Event,
    adaptive: AdaptiveTimeout,
    silence: str,
    remedy: str,
) -> Made:
    """A step of the handshake. Raises what it raises, and HUB_SILENT."""
    began = asyncio.get_running_loop().time()
    try:
        async with time_limit(urgent, HANDSHAKE_TIMEOUT, adaptive):
            return await step
    except TimeoutError:
        seconds = asyncio.get_running_loop().time() - began
        raise codes.HUB_SILENT.error(f"{silence} in {seconds:.0f} s", remedy) from None


def counted_rest(code: Code | None) -> float:
    """Seconds that there are to be, at least, before another attempt after this."""
    return spread(0.0 if code is None else REDIAL_COUNTED.get(code, 0.0))


def spread(seconds: float) -> float:
    """So many, and up to REDIAL_SPREAD of them more."""
    return seconds * (1 + REDIAL_SPREAD * random.random())


def unanswered(problem: Problem, seconds: float) -> bool:
    """An attempt that took so long, and ended so, met silence."""
    return problem.code is codes.SSH_UNREACHABLE and seconds >= LIMITED_SECONDS


def _by_an_older_hub(refusal: Problem) -> Problem:
    """It knows nodes by secrets that they send it. Ours never leaves this machine."""
    return refusal.code.problem(
        f"{refusal.cause}: the head's rayfwd is older than this one, and may know this node by a "
        "secret that newer versions do not send",
        "upgrade rayfwd on the head (the head first, then the workers)",
    )
