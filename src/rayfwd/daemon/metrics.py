"""Metrics for Prometheus: made of what the daemon knows when they are asked for, and served.

`families` turns a status and the links' link_stats into metric families; nothing
is counted on the way of a byte. `MetricsServer` answers HTTP on loopback or on a Unix socket, on
the daemon's own loop. docs/metrics.md lists every metric.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

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
from rayfwd.config import split_host_port
from rayfwd.problems import Problem, ProblemError
from rayfwd.status import Link, Status, Streams, Volume, Worker
from rayfwd.system import unixsocket
from rayfwd.system.backoff import Backoff
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
LANE_CLASSES = ("interactive", "bulk")
LANE_STATES = ("up", "sidelined")
RAY_STATES = ("off", "waiting", "starting", "up", "by_hand", "failed", "stopping")
STAGES = ("task", "to", "from")

REQUEST_LIMIT = 16384
"""Bytes of a request's head."""
REQUEST_SECONDS = 10.0
CONNECTIONS = 16
RETRY_FIRST, RETRY_LAST = 1.0, 15.0
"""Seconds until a port that is taken is tried again."""


# -- what is told ----------------------------------------------------------------------------------


def families(status: Status, link_stats: Mapping[str, LinkStats], now: float) -> Iterator[Metric]:
    """Every metric of rayfwd. `link_stats` are the links', by peer; `now` is their clock's."""
    yield InfoMetricFamily("rayfwd_build", "rayfwd itself.", {"version": status.version})
    yield _states("rayfwd_node_state", "Whether the node is so.", NODE_STATES, status.state)
    yield from _links(status, link_stats, now)
    yield from _ledger(status)
    yield from _listeners(status)
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
        "rayfwd_link_state", "Whether the link is so.", labels=["peer", "state"]
    )
    lanes = GaugeMetricFamily(
        "rayfwd_link_lanes", "Lanes that are up.", labels=["peer", "class", "state"]
    )
    trip = GaugeMetricFamily(
        "rayfwd_link_round_trip_seconds",
        "Round-trip time of the slowest lane of a class.",
        labels=["peer", "class"],
    )
    streams = GaugeMetricFamily(
        "rayfwd_link_streams", "TCP connections that are carried.", labels=peer
    )
    parked = GaugeMetricFamily(
        "rayfwd_link_parked_streams", "TCP connections that wait for a lane.", labels=peer
    )
    received = CounterMetricFamily(
        "rayfwd_link_received_bytes", "Bytes that came in, the protocol's own too.", labels=peer
    )
    sent = CounterMetricFamily(
        "rayfwd_link_sent_bytes", "Bytes that went out, the protocol's own too.", labels=peer
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
        "rayfwd_link_cuts", "How often every lane was lost.", labels=["peer"]
    )
    sessions = CounterMetricFamily("rayfwd_link_sessions", "Sessions that began.", labels=["peer"])
    parked = CounterMetricFamily(
        "rayfwd_link_parked_seconds", "Time without a lane, held.", labels=["peer"]
    )
    ridden = HistogramMetricFamily(
        "rayfwd_link_ride_through_seconds",
        "Cuts that the streams outlived, by their length.",
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


def _ledger(status: Status) -> Iterator[Metric]:
    """Of a head: what each peer costs it. Clients are of any number and come and go: in their
    users' sums only."""
    ledger = status.ledger
    if ledger is None:
        return
    memory = GaugeMetricFamily(
        "rayfwd_peer_memory_bytes", "Bytes kept for a peer or of it.", labels=["peer"]
    )
    counters = {
        "messages": "Control messages that it sent.",
        "log_lines": "Lines of the log about it.",
        "roster_writes": "How often its plan was written down.",
        "shed_streams": "Streams that it had to give up, as too much was kept.",
    }
    counts = {
        name: CounterMetricFamily(f"rayfwd_peer_{name}", text, labels=["peer"])
        for name, text in counters.items()
    }
    listeners = GaugeMetricFamily(
        "rayfwd_peer_listeners",
        "Listeners that stand for it on every other machine.",
        labels=["peer"],
    )
    seconds = CounterMetricFamily(
        "rayfwd_peer_cpu_seconds", "Processor time for the bytes that it sent.", labels=["peer"]
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
        "memory_bytes": "Bytes kept for the peers of a user, or of them.",
        "lanes": "Lanes of a user's peers, each of which is a descriptor.",
        "listeners": "Listeners that stand for a user's nodes on every other machine.",
        "streams": "Streams of a user's peers.",
    }
    for name, text in of_users.items():
        family = GaugeMetricFamily(f"rayfwd_user_{name}", text, labels=["user"])
        for user in ledger.users:
            family.add_metric([user.user], getattr(user, name.removesuffix("_bytes")))
        yield family


def _listeners(status: Status) -> Iterator[Metric]:
    is_open = GaugeMetricFamily(
        "rayfwd_listeners", "Open listeners that stand for a node.", labels=["node"]
    )
    blocked = GaugeMetricFamily(
        "rayfwd_blocked_listeners", "Listeners for a node that cannot be opened.", labels=["node"]
    )
    for row in status.roster:
        is_open.add_metric([row.name], row.listeners.open)
        blocked.add_metric([row.name], row.listeners.blocked)
    refused = CounterMetricFamily(
        "rayfwd_refused_connections", "Connections to listeners that were reset at once."
    )
    refused.add_metric([], sum(row.connections for row in status.listeners.refused))
    yield from (is_open, blocked, refused)


def _ray(status: Status) -> Iterator[Metric]:
    ray = status.ray
    yield _states("rayfwd_ray_state", "Whether Ray on this node is so.", RAY_STATES, ray.state)
    restarts = CounterMetricFamily("rayfwd_ray_restarts", "How often Ray was started again.")
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
        "rayfwd_cluster_node_alive", "Whether Ray's node table has the node alive.", labels=["node"]
    )
    there = {node.address for node in cluster.nodes if node.state == "ALIVE"}
    for row in status.roster:
        alive.add_metric([row.name], float(row.address in there))
    used = GaugeMetricFamily(
        "rayfwd_cluster_resource_used", "In use, as Ray reports it.", labels=["resource"]
    )
    capacity = GaugeMetricFamily(
        "rayfwd_cluster_resource_capacity", "There in all, as Ray reports it.", labels=["resource"]
    )
    for name, (in_use, total) in sorted(cluster.totals.items())[:RESOURCES]:
        used.add_metric([name], in_use)
        capacity.add_metric([name], total)
    yield from (alive, used, capacity)
    if cluster.as_of is not None:
        yield GaugeMetricFamily(
            "rayfwd_cluster_report_timestamp_seconds",
            "Ray's own time stamp of its resources.",
            cluster.as_of,
        )


def _conditions(conditions: Iterable[Condition]) -> Metric:
    family = GaugeMetricFamily(
        "rayfwd_conditions", "What is wrong now, by code.", labels=["code", "severity"]
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
        "rayfwd_canary_success", "Whether a node passed the last canary.", labels=["node"]
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
    """Has the metrics served where the file says so, also after it has changed."""

    def __init__(
        self,
        listen: str | None,
        look: Callable[[], Iterable[Metric]],
        on_change: Callable[[], None],
    ) -> None:
        """`listen`: as `MetricsServer` has it; None: nowhere."""
        self._listen = listen
        self._look = look
        self._on_change = on_change
        self._server: MetricsServer | None = None
        self._moved = asyncio.Event()

    @property
    def problem(self) -> Problem | None:
        """What keeps the metrics from being asked for."""
        return self._server.problem if self._server is not None else None

    def move(self, listen: str | None) -> None:
        """Serve them there from now on."""
        if listen != self._listen:
            self._listen = listen
            self._moved.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._moved.clear()
            moved = asyncio.create_task(_set(self._moved), name="metrics moved")
            tasks = [moved]
            self._server = None
            if self._listen is not None:
                self._server = MetricsServer(self._listen, self._look, self._on_change)
                tasks.append(asyncio.create_task(self._server.run(), name="metrics server"))
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            self._on_change()


async def _set(event: asyncio.Event) -> None:
    await event.wait()


class MetricsServer:
    """Answers `GET /metrics`. One task, `run`, owns it; a port that is taken is tried again."""

    def __init__(
        self, listen: str, look: Callable[[], Iterable[Metric]], on_change: Callable[[], None]
    ) -> None:
        """`listen` is `host:port` on loopback or a socket's absolute path."""
        self.listen = listen
        self.problem: Problem | None = None
        """Why it does not listen."""
        self._registry = registry(look)
        self._on_change = on_change
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(RETRY_FIRST, RETRY_LAST)
        while True:
            try:
                server, path = await self._start()
            except ProblemError as exc:
                if exc.problem != self.problem:
                    log.error(
                        exc.problem.code.name, cause=exc.problem.cause, remedy=exc.problem.remedy
                    )
                self._set_problem(exc.problem)
                await asyncio.sleep(backoff.next())
                continue
            self._set_problem(None)
            log.info("metrics_listening", listen=self.listen)
            try:
                await asyncio.Event().wait()
            finally:
                server.close()
                for task in self._connections:
                    task.cancel()
                await asyncio.gather(*self._connections, return_exceptions=True)
                if path is not None:
                    path.unlink(missing_ok=True)

    def _set_problem(self, problem: Problem | None) -> None:
        if problem != self.problem:
            self.problem = problem
            self._on_change()

    async def _start(self) -> tuple[asyncio.Server, Path | None]:
        """Listen. Raises ProblemError."""
        if self.listen.startswith("/"):
            path = Path(self.listen)
            listener = unixsocket.bind(path, 0o600)
            server = await asyncio.start_unix_server(
                self._connected, sock=listener, limit=REQUEST_LIMIT
            )
            return server, path
        host, port = split_host_port(self.listen)
        try:
            server = await asyncio.start_server(
                self._connected, host, port, limit=REQUEST_LIMIT, family=socket.AF_INET
            )
        except OSError as exc:
            raise codes.METRICS_BLOCKED.error(
                f"metrics.listen = {self.listen} cannot be opened: "
                f"{os.strerror(exc.errno) if exc.errno else exc}",
                f"end what listens on it (see `ss -ltnp sport = :{port}`), or set another port",
            ) from exc
        return server, None

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._serve(reader, writer), name="metrics-connection")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                answer = self._answer(await reader.readuntil(b"\r\n\r\n"))
                writer.write(answer)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()  # no request, or nobody who reads the answer
        finally:
            writer.close()

    def _answer(self, request: bytes) -> bytes:
        first, *lines = request.decode("latin-1").split("\r\n")
        words = first.split(" ")
        method, target = (words[0], words[1]) if len(words) == 3 else ("", "")
        if method not in {"GET", "HEAD"}:
            return _response("405 Method Not Allowed", "text/plain", b"GET it\n", False)
        if target.partition("?")[0] != "/metrics":
            return _response("404 Not Found", "text/plain", b"/metrics is here\n", method == "HEAD")
        accept = next((x[7:].strip() for x in lines if x[:7].lower() == "accept:"), "")
        encode, kind = choose_encoder(accept)
        try:
            body = encode(self._registry)
        except Exception:  # a fault in a metric must not end what the metrics are about
            log.error("metrics_fault", exc_info=True)
            return _response("500 Internal Server Error", "text/plain", b"see the log\n", False)
        return _response("200 OK", kind, body, method == "HEAD")


def _response(status: str, kind: str, body: bytes, head_only: bool) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if head_only else body)
