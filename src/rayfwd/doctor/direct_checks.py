"""Examines a worker's direct ways: logs in at each other worker, hop by hop as at the head, and
asks who answers there. Nothing joins by it, and what stands is left alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfwd import __version__, codes
from rayfwd.cluster.identity import Identity
from rayfwd.config import Config, DirectConfig
from rayfwd.doctor.common_checks import several
from rayfwd.doctor.hub_probe import HubProbe
from rayfwd.doctor.rows import Row, passed, skipped, warned
from rayfwd.problems import Problem, ProblemError
from rayfwd.session.handshake import PROOF, Hello
from rayfwd.ssh.asyncssh_carrier import SshConnection
from rayfwd.ssh.carriers import carrier_for
from rayfwd.ssh.openssh_carrier import OpensshConnection
from rayfwd.status import Direct
from rayfwd.system import setting

MOST_AT_ONCE = 8
"""Ways that are gone at a time."""


@dataclass(frozen=True, slots=True)
class Gone:
    """A way that was gone to its end."""

    user: str
    """Whom it was logged in as."""
    seconds: float
    """For the way up to the login."""
    version: str | None = None
    """Of rayfwd there; None: it is older, and does not say."""
    trip: float | None = None
    """A round trip, in seconds."""

    @property
    def said(self) -> str:
        login = f"logged in as {self.user} in {self.seconds:.2f} s"
        if self.version is None or self.trip is None:
            return f"{login}; rayfwd answers, and is older: it does not say more"
        trip = f"a round trip takes {self.trip * 1000:.1f} ms"
        return f"{login}; rayfwd {self.version} answers; {trip}"

    def to_wire(self) -> dict[str, Any]:
        trip = None if self.trip is None else round(self.trip * 1000, 3)
        seconds = round(self.seconds, 3)
        return {"user": self.user, "seconds": seconds, "version": self.version, "rtt_ms": trip}


async def look(config: Config, running: Sequence[Direct]) -> Row:
    """The row of all of them. `running`: those of the daemon, where one answers."""
    if config.network.direct == "off":
        return skipped(
            "direct", f"{setting.value('network.direct', 'off')}: this node has no direct ways"
        )
    if not config.direct:
        return _dialled_by_others(running)
    identity = Identity.make()  # nobody is known by it
    hello = Hello(
        node=config.name,
        key=identity.public,
        version=__version__,
        worker_ports=0,
        role="peer",
        ride_through=config.ride_through,
        features=frozenset({PROOF}),
    )
    turns = asyncio.Semaphore(MOST_AT_ONCE)
    found = await asyncio.gather(
        *(_in_turn(turns, _go(direct, hello, identity)) for direct in config.direct)
    )
    by_node = dict(zip((direct.node for direct in config.direct), found, strict=True))
    good = {name: way for name, way in by_node.items() if isinstance(way, Gone)}
    seen = {name: way.to_wire() for name, way in good.items()}
    wrong = [_of(name, way) for name, way in by_node.items() if isinstance(way, Problem)]
    if wrong:
        return warned("direct", several(wrong), ways=seen)
    return passed("direct", "; ".join(f"{n}: {w.said}" for n, w in good.items()), ways=seen)


def _dialled_by_others(running: Sequence[Direct]) -> Row:
    """What the daemon has seen of ways that others dial."""
    others = [way for way in running if not way.dialled]
    if not others:
        return skipped("direct", "this worker dials no other worker ([[direct]])")
    states = {"direct": "is up", "hub": "is down, and streams go through the head"}
    said = ", ".join(f"the way of {way.node}, which dials, {states[way.way]}" for way in others)
    return passed("direct", said)


def _of(node: str, problem: Problem) -> Problem:
    return problem.code.problem(f"the direct way to {node}: {problem.cause}", problem.remedy)


async def _in_turn(turns: asyncio.Semaphore, going: Awaitable[Gone | Problem]) -> Gone | Problem:
    async with turns:
        return await going


async def _go(direct: DirectConfig, hello: Hello, identity: Identity) -> Gone | Problem:
    """To the other worker's socket, and back; or why not, at which hop."""
    carrier, began = carrier_for(direct.way()), time.monotonic()
    try:
        connection = await carrier.dial(asyncio.Event())
        try:
            login = Gone(_user(connection), time.monotonic() - began)
            return await _ask(direct, connection, hello, identity, login)
        finally:
            connection.abort()
    except ProblemError as exc:
        return exc.problem
    finally:
        carrier.close()


def _user(connection: SshConnection | OpensshConnection) -> str:
    if isinstance(connection, OpensshConnection):
        return connection.hops[-1].user
    return str(connection.ssh.get_extra_info("username", ""))


async def _ask(
    direct: DirectConfig,
    connection: SshConnection | OpensshConnection,
    hello: Hello,
    identity: Identity,
    login: Gone,
) -> Gone:
    """Raises ProblemError."""
    probe = HubProbe(direct.way().destination)
    pipe = await probe.opened(connection.open(probe))
    try:
        answer = await probe.begin(pipe, hello, identity)
    except ProblemError as exc:
        if exc.problem.code is codes.HELLO_MALFORMED:
            return login  # what an older one says of a question
        raise
    _check_name(direct, answer.welcome.node)
    trips = sorted(tick.trip for tick in await probe.ticks())
    return Gone(login.user, login.seconds, answer.welcome.version, trips[len(trips) // 2])


def _check_name(direct: DirectConfig, node: Mapping[str, Any]) -> None:
    """Raises ProblemError where another one answers."""
    name, section = node.get("name"), direct.way().destination.section
    if name != direct.node:
        raise codes.DIRECT_WRONG.error(
            f"the rayfwd at {direct.ssh} is {name}, and not {direct.node}",
            f"correct node or ssh in {section}",
        )
