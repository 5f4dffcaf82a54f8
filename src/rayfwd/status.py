"""The status of a daemon, typed: what `rayfwd status` shows and Prometheus' metrics are made of.

An object everywhere within a process; `to_wire` and `from_wire` stand at the control socket.
docs/status.md describes the JSON, whose keys are the fields' names unless a field says otherwise.
Times are seconds since the epoch on the daemon's clock, sizes bytes, unless a field says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayfwd import codes
from rayfwd.cluster.accounts import PeerAccount, UserAccount
from rayfwd.cluster.plan import NodePlan
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.watch.canary_round import Round
from rayfwd.watch.conditions import Condition
from rayfwd.wire import fields_from_wire, fields_to_wire, key

SCHEMA = 2
"""Raised when a key changes its meaning or goes; new keys, with a default here, may come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A time in which a link had no lane."""

    began: float
    seconds: float | None
    """How long it took; None: it lasts."""
    ridden_through: bool | None
    """Whether the streams outlived it; None: it lasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """An SSH connection that is up."""

    lane: int
    """Its number in the session; one that comes back has a new one."""
    lane_class: str = key("class")
    """`interactive`, `bulk` or `reserve`."""
    state: str
    """`up`, or `sidelined`: its answers are late, and its streams go by others."""
    rtt_ms: float | None
    """Round-trip time in milliseconds; None: not measured yet."""
    since: float
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """TCP connections that are carried now."""

    open: int
    """All of them."""
    parked: int
    """Those that wait for a lane."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Bytes carried by all sessions since the daemon began, with the protocol's own."""

    received: int = key("in")
    sent: int = key("out")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    """What every link has."""

    state: str
    """`up`, `parked` (streams wait for a lane) or `down` (there is no session)."""
    since: float
    """When `state` last changed."""
    cuts: int
    """How often every lane was lost, since the daemon began."""
    ridden_through: int
    """How many of these the streams outlived."""
    last_cut: Cut | None
    lanes: tuple[Lane, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link(_Peer):
    """A worker's link to the head."""

    head: str
    """What the configuration has as `head.ssh`; "the head, which dials" where it has none."""
    conditions: tuple[str, ...]
    """Ids of what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Direct:
    """A way of a worker's to another one that need not pass the head."""

    node: str
    way: str
    """`direct`; or `hub`: it is down now, and streams go through the head."""
    dialled: bool
    """This node dials, and not the other one."""
    rtt_ms: float | None
    """The least round-trip time of its lanes, in milliseconds; None: not known, or it does not
    stand."""
    lanes: tuple[Lane, ...]
    """One of the class `reserve` goes through the hub."""
    streams: int
    bytes: Volume
    cuts: int
    """How often all of its lanes were lost, the one through the hub apart."""
    lost: int
    """How often one of its lanes was lost, the one through the hub apart."""
    why: str | None
    """Why it does not stand; None: it does, or the other node knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOfWorker:
    """What a worker last said of its Ray; None: not said."""

    state: str | None
    version: str | None
    python: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker(_Peer):
    """A worker's link as the head has it."""

    name: str
    streams: Streams
    bytes: Volume
    ray: RayOfWorker | None
    """None: nothing yet."""
    declares: Mapping[str, float]
    """What its configuration says that it brings, by resource."""
    left: bool = False
    """It has said that it leaves, and has not come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client(_Peer):
    """A machine that is connected and is no node."""

    name: str
    """What the machine calls itself; several may have the same."""
    user: str
    """The login name that it came as."""
    version: str | None
    """Of its rayfwd."""
    streams: Streams
    bytes: Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a head takes at most."""

    peer_memory: int
    """Bytes, of one peer."""
    memory: int
    """Bytes, of all of them."""
    peer_lanes: int
    lanes: int
    listeners: int = 0
    """That the head opens for all nodes; with an overlay it opens none."""
    peer_streams: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What a head's peers cost it, the greediest first."""

    memory: int
    """Bytes, of all of them."""
    bounds: Bounds
    users: tuple[UserAccount, ...]
    peers: tuple[PeerAccount, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerCount:
    """How many listeners stand for a node."""

    open: int
    blocked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedUser:
    """A user who may not use the listeners, and tried."""

    user: str
    """Login name, or number; `(closed)`: the program had closed it before it was looked at;
    `(others)`: beyond 100 users."""
    connections: int
    """Since the daemon began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedPort:
    """A port that was dialled over rayfwd and refused."""

    by: str
    """The node or client that dialled it; this node's own name: a program here."""
    of: str
    """The node that refused it."""
    reason: str
    """`refused` (nothing listens), `unreachable`, `not_in_plan` or `node_away`."""
    cause: str
    """Names the port, in the words of the node that refused it."""
    times: int
    """Since the daemon began; so `last`."""
    last: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners(ListenerCount):
    """The listeners that stand for other nodes' ports."""

    conditions: tuple[str, ...]
    """Ids of what is wrong with them; of those that are blocked, of the first twenty."""
    refused: tuple[RefusedUser, ...]
    """Whose connections were reset at once, the most first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortCount:
    """Connections to a port besides the plan's."""

    node: str
    """The node that has the port; of those that were refused here, the node that asked."""
    port: int
    """0: all beyond 200 ports together."""
    connections: int
    """Since the daemon began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How programs on this node reach the others."""

    level: str
    """`overlay`: every TCP port; `listeners`: those that rayfwd listens for."""
    why: str
    """Why it is this level, in words."""
    interface: str | None
    """What has the node's address; None: nothing does."""
    refused: Mapping[str, int]
    """Packets of connections that the kernel refused, by reason: `refused_user` (who may not dial),
    `refused_port`, `refused_node` (no such node), `guarded_in` (from another machine)."""
    remedy: str | None = None
    """What would give this node the overlay; None: it has it, or its file does not want it."""
    hosts_line: str | None = None
    """What /etc/hosts lacks, so that gloo finds this node's address; None: it needs nothing."""
    guard: bool = False
    """The kernel keeps other machines from Ray's ports here."""
    guard_from: tuple[str, ...] = ()
    """Networks that reach them all the same."""
    open: tuple[int, ...] | None = None
    """Ports of this node that others may dial besides the plan's; None: not known."""
    dialled: tuple[PortCount, ...] = ()
    """Ports of other nodes that the plan does not have and that were dialled here, the most first;
    so the next two."""
    refused_there: tuple[PortCount, ...] = ()
    """Those that were refused."""
    refused_here: tuple[PortCount, ...] = ()
    """Ports of this node that others have dialled, and that were refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ray:
    """Ray on this machine."""

    state: str
    """`off`, `waiting`, `starting`, `up`, `by_hand`, `failed` or `stopping`."""
    since: float
    """When `state` last changed."""
    version: str | None
    """None: not known yet; so `python`."""
    python: str | None
    pid: int | None
    """Of `ray start`, or of the raylet of a Ray that is not ours."""
    adopted: bool
    """It ran before this daemon did."""
    restarts: int
    conditions: tuple[str, ...]
    """Ids of what keeps it from running."""
    command: str | None
    """As a shell takes it, secrets blanked; None: there is none yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterRow:
    """A node of the plan."""

    name: str
    role: str
    address: str
    ports: str
    """First and last of its block: `20000-20077`."""
    advertised: bool
    level: str = "listeners"
    """How programs there reach others, as of `Network`."""
    state: str | None
    """Of its link, as of `Worker`; None on a worker, which does not know."""
    listeners: ListenerCount
    """Those here that stand for this node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The whole of it."""

    schema: int = SCHEMA
    version: str
    """rayfwd's."""
    code: str | None = None
    """`compiled` or `pure Python`; None: a daemon of an earlier version, which does not say."""
    python: str | None = None
    """Which Python runs the daemon, and whether it was built with optimizations."""
    role: str
    """`head` or `worker`."""
    name: str
    pid: int
    uptime: float
    """Seconds since the daemon began."""
    state: str
    """`starting`, `waiting`, `ready` or `stopping`."""
    summary: str
    """One line in plain words."""
    conditions: tuple[Condition, ...]
    """All that is wrong, here and elsewhere: roots first."""
    node: NodePlan | None
    """This node's plan; None on a worker that was never given one."""
    link: Link | None
    """None on a head; `workers`, `clients` and `ledger` are None on a worker."""
    direct: tuple[Direct, ...] = ()
    """Of a worker: its ways to other workers, as far as it has any to show."""
    workers: tuple[Worker, ...] | None
    clients: tuple[Client, ...] | None
    ledger: Ledger | None = None
    streams: Streams
    bytes: Volume
    listeners: Listeners
    network: Network = Network(level="listeners", why="", interface=None, refused={})
    ray: Ray
    cluster: ClusterReport | None
    """The head's last look at Ray's cluster; None before the first."""
    canary: Round | None
    """The last canary that this node sent; None: none yet."""
    roster: tuple[RosterRow, ...]
    refused: tuple[RefusedPort, ...] = ()
    """The last fifty, the newest first."""
    page: str | None = None
    """The URL of the page in the browser; None: it is not served."""

    def to_wire(self) -> dict[str, Any]:
        """The answer to `rayfwd status`."""
        return fields_to_wire(self)

    @classmethod
    def from_answer(cls, answer: Any) -> Status:
        """The same. Raises ProblemError `status_unreadable` for a daemon of another version."""
        try:
            return cls.from_wire(answer)
        except ValueError as exc:
            raise codes.STATUS_UNREADABLE.error(
                f"the daemon's status cannot be read: {exc}",
                "run the same installation of rayfwd as the daemon; `rayfwd status "
                "--json` prints the daemon's answer as it is",
            ) from exc

    @classmethod
    def from_wire(cls, data: Any) -> Status:
        """What a daemon answered; keys that are not known here are left out.

        Raises ValueError with the key where it is not as this schema has it.
        """
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"it has schema {schema!r}, and this rayfwd reads schema {SCHEMA}")
        return fields_from_wire(cls, data, "status")
