"""How sessions and lanes look in the status, and to the rules that watch them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config
from rayfwd.hub import HubClient
from rayfwd.problems import Problem
from rayfwd.session.lane import LaneClass
from rayfwd.transport.linkstats import LinkStats
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.mux import Mux
from rayfwd.watch.links import LinkSeen


def mux_status(mux: Mux | None) -> list[dict[str, Any]]:
    """A session's lanes; times are wall-clock seconds, round trips milliseconds."""
    if mux is None:
        return []
    offset = time.time() - mux.now()
    lanes = {lane.number: lane for lane in mux.stats().lanes}
    return [
        {
            "lane": number,
            "class": lane.lane_class.value,
            "state": "sidelined" if lane.sidelined else "up",
            "rtt_ms": None if lane.rtt is None else round(lane.rtt * 1000, 3),
            "since": round(record.since + offset, 1),
            "bytes_in": lane.bytes_in,
            "bytes_out": lane.bytes_out,
        }
        for number, record in mux.lanes.items()
        if (lane := lanes.get(number)) is not None
    ]


def streams_status(links: Iterable[tuple[Mux | None, LinkStats]]) -> dict[str, Any]:
    """Streams of the present sessions, and the bytes of all since the daemon began.

    A stream is parked while its session has no lane.
    """
    streams = {"open": 0, "parked": 0}
    moved = {"in": 0, "out": 0}
    for mux, link_stats in links:
        received = sent = 0
        if mux is not None:
            stats = mux.stats()
            streams["open"] += stats.streams
            streams["parked"] += 0 if mux.lanes else stats.streams
            received, sent = stats.bytes_in, stats.bytes_out
        received, sent = link_stats.bytes_moved(received, sent)
        moved["in"] += received
        moved["out"] += sent
    return {"streams": streams, "bytes": moved}


def client_row(client: HubClient) -> dict[str, Any]:
    """A client that has a session, of the head's status."""
    return {
        "name": client.name,
        "user": client.user,
        "version": None if client.hello is None else client.hello.version,
        "state": client.state,
        "since": client.since,
        **client.link_stats.to_wire(),
        **streams_status([(client.mux, client.link_stats)]),
        "lanes": mux_status(client.mux),
    }


def roster_rows(
    nodes: Iterable[NodePlan], states: Mapping[str, str] | None, listeners: Listeners
) -> list[dict[str, Any]]:
    """The nodes of the plan; `states` of the links by name, None where only the head knows."""
    counts = listeners.counts()
    rows = []
    for plan in nodes:
        is_open, blocked = counts.get(plan.address, (0, 0))
        rows.append(
            {
                "name": plan.name,
                "role": plan.role,
                "address": plan.address,
                "ports": f"{plan.base}-{plan.last_worker_port}",
                "advertised": plan.advertised,
                "state": None if states is None else states.get(plan.name, "away"),
                "listeners": {"open": is_open, "blocked": blocked},
            }
        )
    return rows


def declared_resources(config: Config) -> dict[str, float]:
    """What the configuration declares to Ray; what Ray finds by itself is not in it."""
    ray = config.ray
    declared = {str(name): float(amount) for name, amount in ray.resources.items()}
    if ray.num_cpus is not None:
        declared["CPU"] = float(ray.num_cpus)
    if ray.num_gpus is not None:
        declared["GPU"] = float(ray.num_gpus)
    return declared


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
        said=link_stats.lane_loss,
        confirmed=sum(lane.confirmed for lane in lanes) if lanes else None,
        confirmed_at=mean(lane.answered_at for lane in lanes) if lanes else None,
        backlog=stats is not None and stats.backlog,
    )


def parked_problem(link: str, mux: Mux) -> Problem:
    """A link without a lane whose streams are held."""
    stats = mux.stats()
    return codes.LINK_PARKED.problem(
        f"every lane of {link} is lost; its {stats.streams} streams are held for "
        f"{stats.ride_through:g} s",
        "nothing, if it comes back within that time; else look at the network between the two",
    )
