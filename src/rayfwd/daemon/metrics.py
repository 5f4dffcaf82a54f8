"""Metrics for Prometheus: made of what the daemon knows when they are asked for, and served.

`families` turns a status and the links' link_stats into metric families; nothing
is counted on the way of a byte. docs/metrics.md lists every metric.
"""

from __future__ import annotations

from asyncio.trsock import TransportSocket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from rayfwd import codes
from rayfwd.daemon.httpserver import Answer, Request
from rayfwd.problems import Problem
from rayfwd.status import Direct, Link, Network, Status, Streams, Volume, Worker
from rayfwd.system import setting
from rayfwd.system.logs import get_logger
from rayfwd.transport.linkstats import BUCKETS, LinkStats
from rayfwd.watch.canary_round import Round
from rayfwd.watch.conditions import Condition

log = get_logger(__name__)

HEAD = "head"
"""The label `peer` of a worker's link; a head's links have the workers' names."""

RESOURCES = 50
"""Of Ray's resources, how many have a series: users may make up any number of names."""
CODES = 100
"""Of the codes of conditions, how many have a series: some come from another version's hub."""

NODE_STATES = ("starting", "waiting", "ready", "stopping")
LINK_STATES = ("up", "parked", "down")
LEVELS = ("overlay", "listeners")
LANE_CLASSES = ("interactive", "bulk")
LANE_STATES = ("up", "sidelined")
RAY_STATES = ("off", "waiting", "starting", "up", "by_hand", "failed", "stopping")
STAGES = ("task", "to", "from")


# -- what is told ----------------------------------------------------------------------------------


def families(status: Status, link_stats: Mapping[str, LinkStats], now: float) -> Iterator[Metric]:
    """Every metric of rayfwd. `link_stats` are the links', by peer; `now` is their clock's."""
    yield InfoMetricFamily("rayfwd_build", "rayfwd itself.", {"version": status.version})
    yield _states(
        "rayfwd_node_state", "1 for the state of the node, else 0.", NODE_STATES, status.state
    )
    yield from _links(status, link_stats, now)
    yield from _direct(status.direct)
    yield from _ledger(status)
    yield from _listeners(status)
    yield from _network(status.network)
    yield from _ray(status)
    yield from _cluster(status)
    yield _conditions(status.conditions)
    yield from canary(status.canary)


def _states(name: str, text: str, states: Iterable[str], now: str) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["state"])
    for state in states:
        family.add_metric([state], float(state == now))
    return family


def _links(status: Status, link_stats: Mapping[str, LinkStats], now: float) -> Iterator[Metric]:
    peer = ["peer"]
    state = GaugeMetricFamily(
        "rayfwd_link_state", "1 for the state of the link, else 0.", labels=["peer", "state"]
    )
    lanes = GaugeMetricFamily(
        "rayfwd_link_lanes",
        "Lanes of the link, by class and state.",
        labels=["peer", "class", "state"],
    )
    trip = GaugeMetricFamily(
        "rayfwd_link_round_trip_seconds",
        "Round-trip time of the slowest lane of a class.",
        labels=["peer", "class"],
    )
    streams = GaugeMetricFamily(
        "rayfwd_link_streams", "TCP connections that the link carries.", labels=peer
    )
    parked = GaugeMetricFamily(
        "rayfwd_link_parked_streams", "TCP connections that wait for a lane.", labels=peer
    )
    received = CounterMetricFamily(
        "rayfwd_link_received_bytes", "Bytes received, including the protocol's own.", labels=peer
    )
    sent = CounterMetricFamily(
        "rayfwd_link_sent_bytes", "Bytes sent, including the protocol's own.", labels=peer
    )
    for name, link, carried, moved in _peers(status):
        for one in LINK_STATES:
            state.add_metric([name, one], float(one == link.state))
        for kind in LANE_CLASSES:
            mine = [lane for lane in link.lanes if lane.lane_class == kind]
            for one in LANE_STATES:
                count = sum(lane.state == one for lane in mine)
                lanes.add_metric([name, kind, one], float(count))
            if trips := [lane.rtt_ms for lane in mine if lane.rtt_ms is not None]:
                trip.add_metric([name, kind], max(trips) / 1000)
        streams.add_metric([name], carried.open)
        parked.add_metric([name], carried.parked)
        received.add_metric([name], moved.received)
        sent.add_metric([name], moved.sent)
    yield from (state, lanes, trip, streams, parked, received, sent)
    yield from _histories(link_stats, now)


def _peers(status: Status) -> Iterator[tuple[str, Link | Worker, Streams, Volume]]:
    """A worker's link, or a head's to every worker."""
    if status.link is not None:
        yield HEAD, status.link, status.streams, status.bytes
    for worker in status.workers or ():
        yield worker.name, worker, worker.streams, worker.bytes


def _histories(link_stats: Mapping[str, LinkStats], now: float) -> Iterator[Metric]:
    cuts = CounterMetricFamily(
        "rayfwd_link_cuts", "How often the link lost all of its lanes.", labels=["peer"]
    )
    sessions = CounterMetricFamily(
        "rayfwd_link_sessions", "Sessions that have begun.", labels=["peer"]
    )
    parked = CounterMetricFamily(
        "rayfwd_link_parked_seconds",
        "Time without any lane, while the streams were held.",
        labels=["peer"],
    )
    ridden = HistogramMetricFamily(
        "rayfwd_link_ride_through_seconds",
        "Cuts that the streams survived, by their length.",
        labels=["peer"],
    )
    for peer, one in link_stats.items():
        cuts.add_metric([peer], one.cuts)
        sessions.add_metric([peer], one.sessions)
        parked.add_metric([peer], one.parked_seconds(now))
        buckets, count = [], 0
        for bound, more in zip((*map(str, BUCKETS), "+Inf"), one.counts, strict=True):
            count += more
            buckets.append((bound, float(count)))
        ridden.add_metric([peer], buckets, one.ridden_seconds)
    yield from (cuts, sessions, parked, ridden)


def _direct(ways: Iterable[Direct]) -> Iterator[Metric]:
    """Of a worker: its ways to others. Two rows of one peer differ in who dials."""
    labels = ["peer", "dialled"]
    families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
        "up": GaugeMetricFamily(
            "rayfwd_direct_up", "1 if the direct way to the worker is up, else 0.", labels=labels
        ),
        "trip": GaugeMetricFamily(
            "rayfwd_direct_round_trip_seconds",
            "Shortest round-trip time of the lanes of a direct way.",
            labels=labels,
        ),
        "streams": GaugeMetricFamily(
            "rayfwd_direct_streams", "TCP connections that the direct way carries.", labels=labels
        ),
        "received": CounterMetricFamily(
            "rayfwd_direct_received_bytes",
            "Bytes received from the other worker, including the protocol's own.",
            labels=labels,
        ),
        "sent": CounterMetricFamily(
            "rayfwd_direct_sent_bytes",
            "Bytes sent to the other worker, including the protocol's own.",
            labels=labels,
        ),
        "cuts": CounterMetricFamily(
            "rayfwd_direct_cuts",
            "How often the direct way lost all of its lanes; streams went through the head then.",
            labels=labels,
        ),
    }
    for way in ways:
        values = {
            "up": float(way.way == "direct"),
            "trip": None if way.rtt_ms is None else way.rtt_ms / 1000,
            "streams": way.streams,
            "received": way.bytes.received,
            "sent": way.bytes.sent,
            "cuts": way.cuts,
        }
        for name, value in values.items():
            if value is not None:
                families[name].add_metric([way.node, "here" if way.dialled else "there"], value)
    yield from families.values()


def _ledger(status: Status) -> Iterator[Metric]:
    """Of a head: what each peer costs it. Clients are of any number and come and go: in their
    users' sums only."""
    ledger = status.ledger
    if ledger is None:
        return
    memory = GaugeMetricFamily(
        "rayfwd_peer_memory_bytes",
        "Bytes that this node keeps for a peer, in both directions.",
        labels=["peer"],
    )
    counters = {
        "messages": "Control messages from the peer.",
        "log_lines": "Lines of the log about the peer.",
        "roster_writes": "How often the peer's plan was written to the disk.",
        "shed_streams": "Streams of the peer that were reset, because too much was kept.",
    }
    counts = {
        name: CounterMetricFamily(f"rayfwd_peer_{name}", text, labels=["peer"])
        for name, text in counters.items()
    }
    listeners = GaugeMetricFamily(
        "rayfwd_peer_listeners",
        "Listeners that every other machine opens for the peer.",
        labels=["peer"],
    )
    seconds = CounterMetricFamily(
        "rayfwd_peer_cpu_seconds",
        "Processor time spent on the bytes from the peer.",
        labels=["peer"],
    )
    workers = {worker.name for worker in status.workers or ()}
    for row in ledger.peers:
        if row.name in workers:
            memory.add_metric([row.name], row.memory)
            listeners.add_metric([row.name], row.listeners)
            counts["messages"].add_metric([row.name], row.messages)
            counts["log_lines"].add_metric([row.name], row.log_lines)
            counts["roster_writes"].add_metric([row.name], row.roster_writes)
            counts["shed_streams"].add_metric([row.name], row.shed)
            seconds.add_metric([row.name], row.seconds)
    yield from (memory, listeners, *counts.values(), seconds)
    of_users = {
        "memory_bytes": "Bytes that this node keeps for the peers of a user.",
        "lanes": "Lanes of a user's peers; each takes a descriptor.",
        "listeners": "Listeners that every other machine opens for a user's nodes.",
        "streams": "Streams of a user's peers.",
    }
    for name, text in of_users.items():
        family = GaugeMetricFamily(f"rayfwd_user_{name}", text, labels=["user"])
        for user in ledger.users:
            family.add_metric([user.user], getattr(user, name.removesuffix("_bytes")))
        yield family


def _listeners(status: Status) -> Iterator[Metric]:
    is_open = GaugeMetricFamily("rayfwd_listeners", "Open listeners for a node.", labels=["node"])
    blocked = GaugeMetricFamily(
        "rayfwd_blocked_listeners", "Listeners for a node that cannot be opened.", labels=["node"]
    )
    for row in status.roster:
        is_open.add_metric([row.name], row.listeners.open)
        blocked.add_metric([row.name], row.listeners.blocked)
    refused = CounterMetricFamily(
        "rayfwd_refused_connections",
        "Connections to listeners that were reset, because their user may not use them.",
    )
    refused.add_metric([], sum(row.connections for row in status.listeners.refused))
    yield from (is_open, blocked, refused)


def _network(network: Network) -> Iterator[Metric]:
    level = GaugeMetricFamily(
        "rayfwd_network_level", "1 for the level of the node, else 0.", labels=["level"]
    )
    for one in LEVELS:
        level.add_metric([one], float(one == network.level))
    packets = CounterMetricFamily(
        "rayfwd_network_refused_packets",
        "First packets of connections that the kernel refused.",
        labels=["why"],
    )
    for why, count in network.refused.items():
        packets.add_metric([why], count)
    refused = CounterMetricFamily(
        "rayfwd_refused_dials",
        "Connections between nodes that were refused, because nobody serves the port.",
        labels=["side"],
    )
    for side, rows in (("there", network.refused_there), ("here", network.refused_here)):
        refused.add_metric([side], sum(row.connections for row in rows))
    yield from (level, packets, refused)
    if network.open is not None:
        yield GaugeMetricFamily(
            "rayfwd_open_ports",
            "Ports that other nodes may dial, in addition to the plan's.",
            value=len(network.open),
        )


def _ray(status: Status) -> Iterator[Metric]:
    ray = status.ray
    yield _states(
        "rayfwd_ray_state", "1 for the state of Ray on this node, else 0.", RAY_STATES, ray.state
    )
    restarts = CounterMetricFamily("rayfwd_ray_restarts", "How often Ray was restarted.")
    restarts.add_metric([], ray.restarts)
    yield restarts
    if ray.version is not None:
        yield InfoMetricFamily(
            "rayfwd_ray",
            "Ray on this node.",
            {"version": ray.version, "python": str(ray.python)},
        )


def _cluster(status: Status) -> Iterator[Metric]:
    """Of a head: what it saw of the whole cluster."""
    cluster = status.cluster
    if status.role != "head" or cluster is None:
        return
    alive = GaugeMetricFamily(
        "rayfwd_cluster_node_alive",
        "1 if Ray's node table has the node as ALIVE, else 0.",
        labels=["node"],
    )
    there = {node.address for node in cluster.nodes if node.state == "ALIVE"}
    for row in status.roster:
        alive.add_metric([row.name], float(row.address in there))
    used = GaugeMetricFamily(
        "rayfwd_cluster_resource_used", "The amount in use, as Ray reports it.", labels=["resource"]
    )
    capacity = GaugeMetricFamily(
        "rayfwd_cluster_resource_capacity",
        "The total amount, as Ray reports it.",
        labels=["resource"],
    )
    for name, (in_use, total) in sorted(cluster.totals.items())[:RESOURCES]:
        used.add_metric([name], in_use)
        capacity.add_metric([name], total)
    yield from (alive, used, capacity)
    if cluster.as_of is not None:
        yield GaugeMetricFamily(
            "rayfwd_cluster_report_timestamp_seconds",
            "Time of Ray's own report of its resources.",
            cluster.as_of,
        )


def _conditions(conditions: Iterable[Condition]) -> Metric:
    family = GaugeMetricFamily(
        "rayfwd_conditions",
        "Conditions that hold now, by code; root causes only.",
        labels=["code", "severity"],
    )
    counts = Counter((c.code.name, c.severity) for c in conditions if c.explained_by is None)
    for labels, count in sorted(counts.items())[:CODES]:
        family.add_metric(labels, count)
    return family


def canary(last: Round | None) -> Iterator[Metric]:
    """The last canary's results; None: it never flew, and there are no metrics of it.

    A node that was not `judged` (its link was down, say) has no success.
    """
    if last is None:
        return
    yield GaugeMetricFamily(
        "rayfwd_canary_timestamp_seconds", "When the last canary began.", last.began
    )
    ok = GaugeMetricFamily(
        "rayfwd_canary_success", "1 if the node passed the last canary, else 0.", labels=["node"]
    )
    took = GaugeMetricFamily(
        "rayfwd_canary_stage_seconds",
        "How long a stage of the last canary took.",
        labels=["node", "stage"],
    )
    for node in last.nodes:
        if node.judged:
            ok.add_metric([node.name], float(node.ok))
        for name in STAGES:
            stage = node.stages.get(name)
            if stage is not None and stage.seconds is not None:
                took.add_metric([node.name, name], stage.seconds)
    yield from (ok, took)


class _Now(Collector):
    def __init__(self, look: Callable[[], Iterable[Metric]]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        return self._look()

    def describe(self) -> Iterable[Metric]:
        return ()  # else the registry looks once when it is made, before there is anything


def registry(look: Callable[[], Iterable[Metric]]) -> CollectorRegistry:
    """A registry of our own: what `look` gives, and the process's descriptors, memory and CPU."""
    made = CollectorRegistry()
    made.register(_Now(look))
    ProcessCollector(registry=made)
    return made


# -- how it is served ------------------------------------------------------------------------------


class MetricsService:
    """Answers `GET /metrics`."""

    def __init__(self, look: Callable[[], Iterable[Metric]]) -> None:
        self._registry = registry(look)

    def blocked(self, listen: str, why: str) -> Problem:
        port = listen.rpartition(":")[2]
        return codes.METRICS_BLOCKED.problem(
            f"{setting.value('metrics.listen', listen)} cannot be opened: {why}",
            f"stop the program that listens on it (`ss -ltnp sport = :{port}`), or set "
            f"{setting.key('metrics.listen')} to another port",
        )

    def listening(self, listen: str) -> None:
        log.info("metrics_listening", listen=listen)

    def admits(self, connection: TransportSocket) -> bool:
        return True

    def gone(self, connection: TransportSocket) -> None: ...

    def answer(self, request: Request) -> Answer:
        if request.path != "/metrics":
            return Answer("404 Not Found", "text/plain", b"/metrics is here\n")
        encode, kind = choose_encoder(request.header("accept") or "")
        try:
            body = encode(self._registry)
        except Exception:  # a fault in a metric must not end what the metrics are about
            log.error("metrics_fault", exc_info=True)
            return Answer("500 Internal Server Error", "text/plain", b"see the log\n")
        return Answer("200 OK", kind, body)
