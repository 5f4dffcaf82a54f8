"""Who has, had or may have a session with the hub."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rayfwd.cluster.plan import NodePlan
from rayfwd.session.handshake import Hello
from rayfwd.session.target import Target
from rayfwd.transport.linkstats import LinkStats
from rayfwd.transport.mux import Mux
from rayfwd.transport.relay import SocketRelay


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

    @property
    def label(self) -> str:
        """What it is called in the log."""
        return self.name

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
    waiting: list[tuple[Target, SocketRelay]] = field(default_factory=list)
    """Connections that came before the node did, after a restart of the hub."""
    knows_all: Mux | None = None
    """The session in which it was told of all nodes, so that changes are enough."""


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
