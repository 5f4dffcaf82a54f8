"""How sessions and lanes look in the status, and to the rules that watch them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from rayfwd import codes, status
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config
from rayfwd.daemon.history import LinkNow
from rayfwd.direct.ways import WaySeen
from rayfwd.hub import Hub, HubClient, HubNode
from rayfwd.hub.ledger import PEER_MEMORY
from rayfwd.problems import Problem
from rayfwd.session.lane import LaneClass
from rayfwd.session.session import MOST_LANES, Limits
from rayfwd.transport.linkstats import LinkStats
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.mux import Mux
from rayfwd.watch.links import LinkSeen


def lanes_of(mux: Mux | None) -> tuple[status.Lane, ...]:
    """A session's lanes."""
    if mux is None:
        return ()
    offset = time.time() - mux.now()
    lanes = {lane.number: lane for lane in mux.stats().lanes}
    return tuple(
        status.Lane(
            lane=number,
            lane_class=lane.lane_class.value,
            state="sidelined" if lane.sidelined else "up",
            rtt_ms=None if lane.rtt is None else round(lane.rtt * 1000, 3),
            since=round(record.since + offset, 1),
            bytes_in=lane.bytes_in,
            bytes_out=lane.bytes_out,
        )
        for number, record in mux.lanes.items()
        if (lane := lanes.get(number)) is not None
    )


def last_cut(link_stats: LinkStats) -> status.Cut | None:
    """The last time that a link had no lane."""
    cut = link_stats.last_cut
    if cut is None:
        return None
    return status.Cut(
        began=round(cut.began, 1),
        seconds=None if cut.seconds is None else round(cut.seconds, 3),
        ridden_through=cut.ridden_through,
    )


def streams_of(muxes: Iterable[Mux | None]) -> status.Streams:
    """Of the present sessions. A stream is parked while its session has no lane."""
    counts = [(mux.stats().streams, bool(mux.lanes)) for mux in muxes if mux is not None]
    return status.Streams(
        open=sum(count for count, _ in counts),
        parked=sum(count for count, stands in counts if not stands),
    )


def volume_of(links: Iterable[tuple[Mux | None, LinkStats]]) -> status.Volume:
    """Of all sessions since the daemon began."""
    received = sent = 0
    for mux, link_stats in links:
        stats = None if mux is None else mux.stats()
        present = (0, 0) if stats is None else (stats.bytes_in, stats.bytes_out)
        moved = link_stats.bytes_moved(*present)
        received, sent = received + moved[0], sent + moved[1]
    return status.Volume(received=received, sent=sent)


def worker_row(node: HubNode, ray: status.RayOfWorker | None) -> status.Worker:
    """A worker's link, of the head's status; `ray` is what it said of its Ray."""
    return status.Worker(
        name=node.plan.name,
        state=node.state,
        since=node.since,
        cuts=node.link_stats.cuts,
        ridden_through=node.link_stats.ridden_through,
        last_cut=last_cut(node.link_stats),
        streams=streams_of([node.mux]),
        bytes=volume_of([(node.mux, node.link_stats)]),
        ray=ray,
        declares=dict(node.hello.resources) if node.hello else {},
        left=node.left,
        lanes=lanes_of(node.mux),
    )


def client_row(client: HubClient) -> status.Client:
    """A client that has a session, of the head's status."""
    return status.Client(
        name=client.name,
        user=client.user,
        version=None if client.hello is None else client.hello.version,
        state=client.state,
        since=client.since,
        cuts=client.link_stats.cuts,
        ridden_through=client.link_stats.ridden_through,
        last_cut=last_cut(client.link_stats),
        streams=streams_of([client.mux]),
        bytes=volume_of([(client.mux, client.link_stats)]),
        lanes=lanes_of(client.mux),
    )


def ledger_of(hub: Hub) -> status.Ledger:
    """What the hub's peers cost it."""
    ledger = hub.ledger
    return status.Ledger(
        memory=ledger.memory,
        bounds=status.Bounds(
            peer_memory=PEER_MEMORY,
            memory=ledger.most_memory,
            peer_lanes=MOST_LANES,
            lanes=ledger.most_lanes,
            listeners=ledger.most_listeners,
            peer_streams=Limits().streams,
        ),
        users=ledger.users(),
        peers=ledger.accounts(),
    )


def roster_rows(
    nodes: Iterable[NodePlan], states: Mapping[str, str] | None, listeners: Listeners
) -> tuple[status.RosterRow, ...]:
    """The nodes of the plan; `states` of the links by name, None where only the head knows."""
    counts = listeners.counts()
    return tuple(
        status.RosterRow(
            name=plan.name,
            role=plan.role,
            address=plan.address,
            ports=f"{plan.base}-{plan.last_worker_port}",
            advertised=plan.advertised,
            level=plan.level,
            state=None if states is None else states.get(plan.name, "down"),
            listeners=status.ListenerCount(open=is_open, blocked=blocked),
        )
        for plan in nodes
        for is_open, blocked in [counts.get(plan.address, (0, 0))]
    )


def declared_resources(config: Config) -> dict[str, float]:
    """What the configuration declares to Ray; what Ray finds by itself is not in it."""
    ray = config.ray
    declared = {str(name): float(amount) for name, amount in ray.resources.items()}
    if ray.num_cpus is not None:
        declared["CPU"] = float(ray.num_cpus)
    if ray.num_gpus is not None:
        declared["GPU"] = float(ray.num_gpus)
    return declared


def link_now(mux: Mux | None, link_stats: LinkStats) -> LinkNow:
    """A link as its history has it."""
    stats = None if mux is None else mux.stats()
    trips = [lane.rtt for lane in stats.lanes if lane.rtt is not None] if stats else []
    present = (0, 0) if stats is None else (stats.bytes_in, stats.bytes_out)
    received, sent = link_stats.bytes_moved(*present)
    return LinkNow(min(trips, default=None), received, sent)


def link_seen(mux: Mux | None, link_stats: LinkStats) -> LinkSeen:
    """A link as the rules of `watch/links.py` look at it."""
    stats = mux.stats() if mux is not None else None
    lanes = stats.lanes if stats is not None else ()
    trips = [
        lane.newest_rtt
        for lane in lanes
        if lane.lane_class is LaneClass.INTERACTIVE and lane.newest_rtt is not None
    ]
    # What is short and fits says nothing of what the link could carry.
    lanes = tuple(lane for lane in lanes if lane.lane_class is LaneClass.BULK) or lanes
    return LinkSeen(
        losses=dict(link_stats.lanes_lost),
        round_trip=min(trips, default=None),
        last_loss=link_stats.lane_loss,
        confirmed=sum(lane.confirmed for lane in lanes) if lanes else None,
        confirmed_at=sum(lane.answered_at for lane in lanes) / len(lanes) if lanes else None,
        backlog=stats is not None and stats.backlog,
    )


def direct_row(way: WaySeen) -> status.Direct:
    """A direct way."""
    stats = way.mux.stats() if way.stands and way.mux is not None else None
    trips = [
        lane.rtt
        for lane in (stats.lanes if stats is not None else ())
        if lane.rtt is not None and lane.lane_class is not LaneClass.RESERVE
    ]
    present = None if way.mux is None else way.mux.stats()
    received, sent = way.link_stats.bytes_moved(
        *((0, 0) if present is None else (present.bytes_in, present.bytes_out))
    )
    return status.Direct(
        node=way.node,
        way="direct" if way.stands else "hub",
        dialled=way.dialled_here,
        rtt_ms=round(min(trips) * 1000, 3) if trips else None,
        lanes=lanes_of(way.mux),
        streams=0 if present is None else present.streams,
        bytes=status.Volume(received=received, sent=sent),
        cuts=way.cuts,
        lost=sum(count for name, count in way.link_stats.lanes_lost.items() if name != "reserve"),
        why=None if way.why_not is None else way.why_not.cause,
    )


def direct_absent(node: str, why: Problem) -> Problem:
    """A direct way that the file tells of, and that does not stand."""
    return codes.DIRECT_ABSENT.problem(
        f"there is no direct way to {node}, and streams to it go through the head: {why.cause}",
        why.remedy,
    )


def parked_problem(link: str, mux: Mux) -> Problem:
    """A link without a lane whose streams are held."""
    stats = mux.stats()
    held = {0: "its session is held", 1: "its one stream is held"}.get(
        stats.streams, f"its {stats.streams} streams are held"
    )
    return codes.LINK_PARKED.problem(
        f"every lane of {link} is lost; {held} for {stats.ride_through:g} s",
        "nothing if it comes back within that time; otherwise check the network between "
        "the two machines",
    )
