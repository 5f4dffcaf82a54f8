"""Who has, had or may have a session with the hub."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from rayfwd.cluster.plan import NodePlan
from rayfwd.session.handshake import Hello
from rayfwd.session.target import Target
from rayfwd.system.budget import Budget
from rayfwd.system.seldom import Seldom
from rayfwd.transport.linkstats import LinkStats
from rayfwd.transport.mux import Mux
from rayfwd.transport.relay import SocketRelay

PLAN_CHANGES, PLAN_CHANGE_SECONDS = 4, 30.0
"""Other plans that a node may ask for at once, and seconds until it may ask for one more."""

TELLINGS, TELLING_SECONDS = 4, 60.0
"""How often a node that was restarted is told all again at once, and then."""

SHED_AGAIN = 30.0
"""Seconds after which it is logged again that a peer gave up streams."""


Payer = tuple[int, str]
"""A user, or one SSH key of that user's where it is known; of who has not come since the daemon
began, -1 and its name."""


@dataclass(slots=True)
class HubPeer:
    """Who is at the other end of a session, which may be up, parked or gone."""

    name: str
    mux: Mux | None = None
    session: str = ""
    hello: Hello | None = None
    since: float = field(default_factory=time.time)
    """Wall-clock seconds of the last change between up, parked and down."""
    link_stats: LinkStats = field(default_factory=LinkStats)
    lost: str | None = None
    """Why there is no session, where it did not end in order; None: there is one, or it did."""
    uid: int = -1
    """As whom it came last; -1: not since the daemon began."""
    key: str = ""
    """By which SSH key, or by which node's; empty: not known."""
    memory: int = 0
    """Bytes that are kept for it, as the ledger was last told; the rest are counts for it too."""
    messages: int = 0
    roster_writes: int = 0
    seconds: float = 0.0
    shed: int = 0
    shed_logged: Seldom = field(default_factory=lambda: Seldom(SHED_AGAIN))

    @property
    def label(self) -> str:
        """What it is called in the log."""
        return self.name

    @property
    def payer(self) -> Payer:
        """Who answers for what it costs."""
        return (self.uid, self.key) if self.uid >= 0 else (self.uid, self.name)

    @property
    def ports(self) -> int:
        """For how many every other machine has a listener."""
        return 0

    @property
    def state(self) -> str:
        """`up`, `parked` or `down`."""
        if self.mux is None or self.mux.ended:
            return "down"
        return "up" if self.mux.lanes else "parked"


@dataclass(slots=True)
class HubNode(HubPeer):
    """A worker as the hub knows it."""

    plan: NodePlan = field(kw_only=True)
    left: bool = False
    """It has said that it leaves, and has not come back."""
    changes: Budget = field(
        default_factory=lambda: Budget(PLAN_CHANGES, 1 / PLAN_CHANGE_SECONDS, time.monotonic)
    )
    """Of its plan, each of which is written to the disk and told to everybody."""
    tellings: Budget = field(
        default_factory=lambda: Budget(TELLINGS, 1 / TELLING_SECONDS, time.monotonic)
    )
    """Of all that the head knows, again."""
    waiting: list[tuple[Target, SocketRelay]] = field(default_factory=list)
    """Connections that came before the node did, after a restart of the hub."""
    knows_all: Mux | None = None
    """The session in which it was told of all nodes, so that changes are enough."""
    joined: float = -math.inf
    """When its name was new, by the loop's clock; minus infinity: before the daemon began."""
    ended: float = math.inf
    """When its last session ended; infinity: it has one, or had none since the daemon began."""

    @property
    def ports(self) -> int:
        return self.plan.listeners


@dataclass(slots=True)
class HubClient(HubPeer):
    """A client: known by its key for as long as it has a session, and then forgotten."""

    key_sha256: str = field(kw_only=True)
    """Of its key, with a word before it where that is proven."""
    user: str = field(kw_only=True)
    """The login name that it came as."""

    @property
    def label(self) -> str:
        return f"client {self.name}"
