"""What the page shows, as JSON: made of a status and the links' history (pure).

Only what is listed here leaves the daemon by the page. There is no command line, no environment and
no file's name in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rayfwd.status import Client, Cut, Lane, Link, Status, Streams, Volume, Worker

HEAD = "head"
"""The key of a worker's own link. Every other link has the worker's name, as its history."""
MOST_USERS = 20
"""Refused users that are shown."""


def page_data(status: Status, history: Mapping[str, Any], boot: str, now: float) -> dict[str, Any]:
    """`boot` names this run of the daemon; `now` is in seconds since the epoch."""
    return {
        "boot": boot,
        "now": round(now, 1),
        "version": status.version,
        "role": status.role,
        "name": status.name,
        "state": status.state,
        "summary": status.summary,
        "uptime": status.uptime,
        "machines": list(_machines(status)),
        "links": list(_links(status)),
        "conditions": [condition.to_wire() for condition in status.conditions],
        "refused": {
            "ports": [
                {
                    "by": refused.by,
                    "of": refused.of,
                    "reason": refused.reason,
                    "cause": refused.cause,
                    "times": refused.times,
                    "last": round(refused.last, 1),
                }
                for refused in status.refused
            ],
            "users": [
                {"user": refused.user, "connections": refused.connections}
                for refused in status.listeners.refused[:MOST_USERS]
            ],
            "kernel": dict(status.network.refused),
        },
        "history": dict(history),
    }


def _machines(status: Status) -> Iterable[dict[str, Any]]:
    """The nodes of the plan, then the clients."""
    workers = {worker.name for worker in status.workers or ()}
    rays = {w.name: w.ray for w in status.workers or () if w.ray is not None}
    left = {w.name for w in status.workers or () if w.left}
    for node in status.roster:
        own = node.name == status.name
        told = rays.get(node.name)
        yield {
            "name": node.name,
            "role": node.role,
            "address": node.address,
            "own": own,
            "direct": node.advertised,
            "ray": status.ray.state if own else told.state if told else None,
            "left": node.name in left,
            "link": HEAD if own and status.link else node.name if node.name in workers else None,
        }
    for index, client in enumerate(status.clients or ()):
        yield {
            "name": client.name,
            "role": "client",
            "address": None,
            "own": False,
            "direct": False,
            "ray": None,
            "left": False,
            "link": _client_key(index),
        }


def _links(status: Status) -> Iterable[dict[str, Any]]:
    if status.link is not None:
        yield {"key": HEAD, "peer": HEAD} | _link(status.link, status.streams, status.bytes)
    for worker in status.workers or ():
        name = {"key": worker.name, "peer": worker.name}
        yield name | _link(worker, worker.streams, worker.bytes)
    for index, client in enumerate(status.clients or ()):
        name = {"key": _client_key(index), "peer": client.name}
        yield name | _link(client, client.streams, client.bytes)


def _client_key(index: int) -> str:
    """Several clients may have the same name; a node's has no blank in it."""
    return f"client {index}"


def _link(link: Link | Worker | Client, streams: Streams, moved: Volume) -> dict[str, Any]:
    trips = [lane.rtt_ms for lane in link.lanes if lane.rtt_ms is not None]
    return {
        "state": link.state,
        "since": round(link.since, 1),
        "rtt_ms": min(trips, default=None),
        "lanes": [_lane(lane) for lane in link.lanes],
        "cuts": link.cuts,
        "ridden_through": link.ridden_through,
        "last_cut": _cut(link.last_cut),
        "streams": {"open": streams.open, "parked": streams.parked},
        "bytes": {"in": moved.received, "out": moved.sent},
    }


def _lane(lane: Lane) -> dict[str, Any]:
    return {"class": lane.lane_class, "state": lane.state, "rtt_ms": lane.rtt_ms}


def _cut(cut: Cut | None) -> dict[str, Any] | None:
    if cut is None:
        return None
    return {"began": cut.began, "seconds": cut.seconds, "ridden_through": cut.ridden_through}
