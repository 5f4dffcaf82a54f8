"""A worker: the link to the head, listeners to every other node, and Ray once the link stands."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rayfwd import __version__, codes, status
from rayfwd.cluster import identity
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config
from rayfwd.daemon.advertise import AdvertiseCheck
from rayfwd.daemon.handover import Arrival
from rayfwd.daemon.history import LinkNow
from rayfwd.daemon.metrics import HEAD
from rayfwd.daemon.node import LINK, Makers, Node, Work
from rayfwd.daemon.role import RoleStatus
from rayfwd.daemon.views import (
    declared_resources,
    direct_absent,
    direct_row,
    lanes_of,
    last_cut,
    link_now,
    link_seen,
    parked_problem,
    roster_rows,
    streams_of,
    volume_of,
)
from rayfwd.daemon.worker_ray import WorkerRay
from rayfwd.direct.ways import DirectWays
from rayfwd.network.announced import change_of
from rayfwd.problems import Severity
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.ray.install import RayInstall, Versions
from rayfwd.ray.nodes import NodeSeen
from rayfwd.session import messages
from rayfwd.session.frames import MAX_PAYLOAD, Frame, ProtocolError, first_frame
from rayfwd.session.handshake import (
    CHANGES,
    DIRECT,
    OVERLAY,
    PROOF,
    SOURCE,
    Challenge,
    Hello,
    Proof,
    Welcome,
)
from rayfwd.session.messages import Message
from rayfwd.session.session import Limits
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening, Target
from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.system.control import Verb
from rayfwd.system.files import replace_file
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.logs import get_logger
from rayfwd.transport.awaited import Awaited
from rayfwd.transport.carrier import Carrier
from rayfwd.transport.connector import LocalConnector
from rayfwd.transport.link import Link
from rayfwd.transport.linkstats import LinkStats
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.mux import Mux, MuxStream, StreamOwner
from rayfwd.transport.relay import SocketRelay
from rayfwd.watch.canary_watch import alive_nodes
from rayfwd.watch.cluster_view import ClusterView
from rayfwd.watch.conditions import Finding
from rayfwd.watch.links import LinkSeen
from rayfwd.watch.reach import Peer

log = get_logger(__name__)

CLAIM_INTERVAL = 5.0
"""Seconds between two looks at whether a network that another cluster has here is free."""


class WorkerRole:
    """A worker, as the runtime runs it. Owner of its node and of its link."""

    def __init__(self, config: Config, makers: Makers) -> None:
        """Raises ProblemError where the node's key cannot be had."""
        assert config.head is not None, "a worker's configuration has a head"
        self._identity = identity.kept(config.state_dir / identity.KEY_FILE)
        self._proved = False
        """The hub knows this node by its public key."""
        self._kept_plan = b""
        self._cluster: ClusterReport | None = None
        self._sent_ray: messages.Ray | None = None
        self._sent_ports: frozenset[int] | None = None
        """Open ports of this node that the head knows of; None: it was told nothing."""
        self._hub_features: frozenset[str] = frozenset()
        self._told_nodes: tuple[NodePlan, ...] = ()
        """Of the hub's plan, whether this node may listen for them or not."""
        self._advertise = AdvertiseCheck(self._send, lambda: self._hub_features)
        self._handlers = (
            messages.Handlers[[]]()
            .on(messages.Nodes, self._hear_nodes)
            .on(messages.NodesChanged, self._hear_changes)
            .on(messages.HeadVersions, self._hear_versions)
            .on(messages.HeadRay, self._hear_head_ray)
            .on(messages.Auth, self._hear_auth)
            .on(messages.Conditions, self._hear_conditions)
            .on(messages.Cluster, self._hear_cluster)
            .on(messages.DialledBack, self._advertise.answered)
            .on(messages.OpenPortsOf, self._hear_open_ports)
            .on(messages.DialRefused, self._hear_dial_refused)
            .on(messages.SayAgain, self._hear_say_again)
        )
        """What the hub says."""
        view = ClusterView(config.hub.network, config.ride_through)
        self._node = Node(config, self, view, makers)
        self._ray = WorkerRay(self._node, self._advertise, self.link_stands)
        head = config.head
        carrier: Carrier | None = makers.carrier(head) if head.ssh else None
        self._awaited: Awaited | None = None
        if head.dialled:
            carrier = self._awaited = Awaited(config.link_socket, carrier)
            # How many there are is the head's to say.
            head = head.model_copy(update={"extra_lanes": 0})
        assert carrier is not None, "a head that does not dial is dialled"
        self._link = Link(self, head, carrier, Limits())
        self._direct = DirectWays(config, makers.carrier, self, self._link.refused)

    @property
    def node(self) -> Node:
        return self._node

    @property
    def cluster(self) -> ClusterReport | None:
        return self._cluster

    # -- life ----------------------------------------------------------------------------

    async def serve(self, arrival: Arrival | None) -> None:
        await self._node.overlay.settle()
        if arrival is not None:
            await arrival.take_over(self)
        if self._awaited is not None:
            await self._awaited.listen()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.run(), name="link")
            group.create_task(self._direct.run(), name="direct ways")

    def leaving(self) -> None:
        self._send(messages.Leaving())

    async def end(self) -> None:
        why = "the worker's rayfwd was stopped"
        await asyncio.gather(self._direct.end(why), self._link.close(why))
        if self._awaited is not None:
            self._awaited.end()

    def watchers(self) -> dict[str, Work]:
        return {"claim": self._watch_claim}

    async def _watch_claim(self) -> None:
        """Whether the other cluster of this machine, whose the network is, has gone."""
        while True:
            await sleep_coalesced(CLAIM_INTERVAL)
            if self._node.claim.problem is not None:
                self._set_view(replace(self._node.view, nodes=self._told_nodes))

    def loops(self) -> list[Heartbeat]:
        return [*(slot.heartbeat for slot in self._link.slots), *self._direct.loops()]

    def take_config(self, config: Config) -> None:
        self._node.take_config(config)

    def verbs(self) -> Mapping[str, Verb]:
        return {}

    # -- for a process that comes after this one -----------------------------------------

    @property
    def listeners(self) -> Listeners:
        return self._node.listeners

    @property
    def connector(self) -> LocalConnector:
        return self._node.connector

    def muxes(self) -> dict[str, Mux]:
        own = {} if self._link.mux is None else {HEAD: self._link.mux}
        return own | self._direct.muxes()

    def waiting(self) -> Iterable[tuple[Target, SocketRelay]]:
        return ()

    def stop_accepting(self) -> socket.socket | None:
        return None

    def hand_over(self) -> Tree:
        welcome: bytes | None = None
        view = self._node.view
        if view.own is not None:
            versions = view.head_versions
            welcome = Welcome(
                version=__version__,
                node=view.own.to_wire(),
                nodes=tuple(node.to_wire() for node in view.nodes[:1]),
                network=view.network,
                ride_through=view.ride_through,
                ray=versions.ray if versions else None,
                python=versions.python if versions else None,
                features=self._hub_features,
                ray_auth=view.auth.to_wire() if view.auth else None,
            ).encode()
        if self._awaited is not None:
            self._awaited.end()
        nodes = [node.to_wire() for node in view.nodes]
        direct, link = self._direct.hand_over(), self._link.hand_over()
        return {"welcome": welcome, "nodes": nodes, "link": link, "direct": direct}

    def take_over(self, tree: Tree) -> None:
        welcome, link = tree["welcome"], tree["link"]
        if welcome is not None:
            frame = first_frame(bytearray(welcome), MAX_PAYLOAD)
            if frame is None:
                raise SnapshotError("the plan is not whole")
            try:
                self.welcomed(Welcome.decode(frame))
                if tree.get("nodes"):
                    self._hear_nodes(messages.Nodes(tuple(tree["nodes"])))
            except (ProtocolError, ValueError) as exc:
                raise SnapshotError(str(exc)) from exc
        if link is not None and self._asks_for_another_plan():
            # A session keeps the plan that it began with. Ray is started anew in any case.
            log.info("session_ended", node=HEAD, cause="this node asks for another plan now")
        elif link is not None:
            self._link.take_over(link).send_message(messages.SayAgain())
        self._direct.take_over(tree.get("direct") or {})
        self.link_changed()

    def _asks_for_another_plan(self) -> bool:
        """By its file, or by the level that it has, than the one that it had before a restart."""
        own, config = self._node.view.own, self._node.config
        if own is None:
            return False
        # A hub that knows of no levels would give the same plan again.
        level = self._node.overlay.level if OVERLAY in self._hub_features else own.level
        return not own.suits(config.worker_ports, config.ray.advertise, level)

    def take_over_splices(self, tree: Tree) -> None: ...

    # -- as the link's owner -------------------------------------------------------------

    def hello(self) -> Hello:
        config, versions = self._node.config, self._node.ray.now.versions
        hello = hello_of(config, self._identity.public)
        if self._node.overlay.level == "overlay":
            hello = replace(hello, features=hello.features | {OVERLAY})
        if self._direct.on:
            hello = replace(hello, features=hello.features | {DIRECT})
        return replace(
            hello,
            ray=versions.ray if versions else None,
            python=versions.python if versions else None,
            resources=declared_resources(config),
        )

    def prove(self, greeting: Frame, challenge: Challenge) -> Proof:
        self._proved = True
        return self._identity.prove(greeting, challenge)

    def _forget_older(self) -> None:
        """The hub goes by the public key from now on: what an earlier version sent is of no use."""
        if self._proved and self._identity.older is not None:
            self._identity = replace(self._identity, older=None)
            path = self._node.config.state_dir / identity.KEY_FILE
            with suppress(OSError):  # it is of no use there either
                replace_file(path, self._identity.to_text().encode())

    def welcomed(self, welcome: Welcome) -> None:
        self._forget_older()
        try:
            own = NodePlan.from_wire(welcome.node)
            nodes = plans_of(welcome.nodes)
        except ValueError as exc:
            log.error("plan_malformed", cause=str(exc), remedy="run the same rayfwd on both sides")
            return
        view = self._node.view
        if CHANGES in welcome.features:
            # All are told of in a moment, or were just before.
            nodes = changed(self._told_nodes or view.nodes, nodes, ())
        versions, auth = view.head_versions, view.auth
        if welcome.ray is not None and welcome.python is not None:
            versions = Versions(welcome.ray, welcome.python)
        self._hub_features = welcome.features
        try:
            auth = self._ray.take_token(welcome.ray_auth)
        except ValueError as exc:
            log.warning("message_malformed", cause=str(exc))
        if own != view.own:
            log.info(
                "plan_received",
                address=own.address,
                ports=f"{own.base}-{own.last_worker_port}",
                nodes=[node.name for node in nodes],
            )
        network, ride_through = welcome.network, welcome.ride_through
        self._set_view(ClusterView(network, ride_through, own, nodes, auth, versions))

    def _set_view(self, view: ClusterView) -> None:
        """Where the network is another cluster's on this machine: without the nodes, so that
        nothing listens in it. So it is before the first WELCOME, which says what the network is."""
        if view.nodes:
            self._told_nodes = view.nodes
            if view.own is None or not self._node.claim.take(view.network):
                view = replace(view, nodes=())
        if view.own is not None and view.nodes:
            self._node.ray.set_plan(
                view.own,
                view.nodes[0],
                view.head_versions,
                view.ride_through,
                view.network,
                view.auth,
                None if view.own.advertised else self._node.overlay.interface,
            )
        self._keep_plan(view)
        self._node.set_view(view)
        self._direct.news()

    def _keep_plan(self, view: ClusterView) -> None:
        """For `rayfwd plan` while the daemon does not run."""
        plan = json.dumps(view.to_wire()).encode() + b"\n"
        if plan == self._kept_plan:
            return
        self._kept_plan = plan
        try:
            replace_file(self._node.config.plan_file, plan)
        except OSError as exc:
            log.warning("plan_not_kept", cause=str(exc))

    def message(self, message: Message) -> None:
        self._handlers(message)

    def _hear_nodes(self, message: messages.Nodes) -> None:
        """Raises ValueError, as those below do, and nothing has changed then."""
        nodes = plans_of(message.nodes)
        self._node.announced.keep([node.name for node in nodes])
        self._set_view(replace(self._node.view, nodes=nodes))

    def _hear_changes(self, message: messages.NodesChanged) -> None:
        view = self._node.view
        nodes = changed(self._told_nodes, map(NodePlan.from_wire, message.nodes), message.gone)
        for name in message.gone:
            self._node.announced.drop(name)
        self._set_view(replace(view, nodes=nodes))

    def _hear_versions(self, message: messages.HeadVersions) -> None:
        if message.ray and message.python:
            versions = Versions(message.ray, message.python)
            self._set_view(replace(self._node.view, head_versions=versions))

    def _hear_head_ray(self, message: messages.HeadRay) -> None:
        self._ray.hear(message)
        self.changed()

    def _hear_auth(self, message: messages.Auth) -> None:
        auth = self._ray.take_token(message.to_wire())
        self._set_view(replace(self._node.view, auth=auth))

    def _hear_conditions(self, message: messages.Conditions) -> None:
        self._node.exchange.receive(message, HEAD)

    def _hear_cluster(self, message: messages.Cluster) -> None:
        self._cluster = ClusterReport.from_wire(message.report)
        self.changed()

    def _hear_open_ports(self, message: messages.OpenPortsOf) -> None:
        """Ports have opened and closed on other nodes."""
        news = [self._node.announced.hear(name, said) for name, said in message.nodes.items()]
        if any(news):
            self._node.ports_changed_elsewhere()

    def _hear_dial_refused(self, message: messages.DialRefused) -> None:
        self._node.hear_refused(message.node, message.port, message.count)

    def _hear_say_again(self, _: messages.SayAgain) -> None:
        """The head was restarted, and has kept the session."""
        self._sent_ray = self._sent_ports = None
        self._node.exchange.begin_again()
        self.changed()
        self._tell_conditions()

    def accept_stream(self, stream: MuxStream, target: bytes) -> StreamOwner | None:
        try:
            opening = Opening.decode(target)
        except ValueError as exc:
            stream.reset(ResetReason.NOT_IN_PLAN, str(exc))
            return None
        if opening.lane:
            return self._direct.take_lane(stream, opening)
        return self._node.accept(stream, opening)

    def link_changed(self) -> None:
        if self._link.mux is None:
            self._sent_ray = self._sent_ports = None  # a new session knows nothing of it
            self._node.announced.forget()
            self._ray.forget()
            self._node.exchange.begin_again()
            self._node.exchange.drop(HEAD)
        self._direct.news()
        self._ray.let_start()
        if self._node.view.nodes:
            self._node.reach_others()
        self.changed()
        self._tell_conditions()

    # -- Ray -----------------------------------------------------------------------------

    async def before_start(self, own: NodePlan, install: RayInstall) -> None:
        await self._ray.before_start(own)

    def ray_waits(self) -> str:
        return self._ray.waits()

    # -- what the head is told -----------------------------------------------------------

    def _send(self, message: Message) -> bool:
        mux = self._link.mux
        if mux is None or mux.ended:
            return False
        mux.send_message(message)
        return True

    def board_changed(self) -> None:
        self._node.news.set()
        self._tell_conditions()

    def _tell_conditions(self) -> None:
        """The head hears of what was found here."""
        mux = self._link.mux
        if mux is not None and (message := self._node.exchange.message()) is not None:
            mux.send_message(message)

    def changed(self) -> None:
        self._ray.let_start()
        self._tell_head_of_ray()
        self._tell_open_ports()
        self._node.changed()

    def open_ports_changed(self) -> None:
        self._tell_open_ports()

    def dial_refused(self, node: str, port: int, count: int) -> None:
        self._send(messages.DialRefused(node, port, count))

    def reaches(self, name: str) -> bool:
        return self.link_stands()

    def _tell_open_ports(self) -> None:
        """The head hears what has opened and closed here since it was last told."""
        mux, ports = self._link.mux, self._node.open_ports
        if mux is None or mux.ended or ports is None or ports == self._sent_ports:
            return
        change = change_of(self._sent_ports, ports)
        assert change is not None, "it is known what is open"
        self._sent_ports = ports
        mux.send_message(change)

    def _tell_head_of_ray(self) -> None:
        """How our Ray is, for the head's status."""
        mux, ray = self._link.mux, self._node.ray.now
        versions = ray.versions
        message = messages.Ray(
            ray.state,
            versions.ray if versions else None,
            versions.python if versions else None,
        )
        if mux is not None and message != self._sent_ray:
            self._sent_ray = message
            mux.send_message(message)

    # -- as the node's owner -------------------------------------------------------------

    def route(self, target: Target, relay: SocketRelay) -> None:
        relay.open_stream(self._direct.mux_to(target.address) or self._link.mux, target)

    # -- as the owner of the direct ways -------------------------------------------------

    def view_now(self) -> ClusterView:
        return self._node.view

    def hub_mux(self) -> Mux | None:
        stands = self.link_stands() and DIRECT in self._hub_features
        return self._link.mux if stands else None

    def accept_opening(self, stream: MuxStream, opening: Opening) -> StreamOwner | None:
        return self._node.accept(stream, opening)

    def direct_changed(self) -> None:
        self.changed()

    def peers(self) -> dict[str, Peer]:
        """The head; how the other workers reach each other is seen by canaries of their own."""
        link, head = self._link, self._node.view.head
        if head is None or not self.link_stands() or self._node.ray.now.state != "up":
            return {}
        if self._ray.heads_is_down:
            return {}
        return {head.name: Peer(head, (link.since, link.link_stats.cuts))}

    async def canary_targets(self) -> list[NodeSeen]:
        """The head and this node itself: what the head's own canary sees from the other side."""
        view = self._node.view
        assert view.head is not None, "a canary is sent once the plan is there"
        assert view.own is not None
        both = {view.head.address, view.own.address}
        dashboard = self._node.way(view.head, view.head.services["dashboard"])
        alive = await alive_nodes(dashboard, self._node.ray.environment or {})
        return [node for node in alive if node.address in both]

    # -- how it is -----------------------------------------------------------------------

    def link_stands(self) -> bool:
        return self._link.state == "up"

    def link_findings(self) -> list[Finding]:
        link, own = self._link, self._node.config.name
        if self.link_stands():
            found = [
                Finding(f"{own}/{slot.name}", slot.problem, severity="warning", explains=False)
                for slot in link.slots
                if slot.problem is not None and slot.number is None
            ]
            found += [
                Finding(f"{own}/{name}", direct_absent(name, why), explains=False)
                for name, why in self._direct.problems()
            ]
            if (taken := self._node.claim.problem) is not None:
                found.append(Finding(own, taken, blocks_ready=True))
            return found
        found = []
        if link.problem is not None:
            # While streams are held, what keeps the link from coming back is a part of that.
            kept: Severity | None = "note" if link.state == "parked" else None
            found.append(Finding(own, link.problem, severity=kept, blocks_ready=True))
        if link.state == "parked" and link.mux is not None:
            parked = parked_problem(f"the link to {link.head.called}", link.mux)
            found.append(Finding(own, parked, blocks_ready=True))
        if not found:
            dialling = codes.LINK_STARTING.problem(
                f"dialling {link.head.ssh}"
                if link.head.ssh
                else "waiting for the head to dial this worker",
                "nothing: this takes a moment",
            )
            found.append(Finding(own, dialling, blocks_ready=True))
        return found

    def links_seen(self) -> Iterator[tuple[str, LinkSeen]]:
        yield self._node.config.name, link_seen(self._link.mux, self._link.link_stats)

    def link_stats(self) -> Mapping[str, LinkStats]:
        return {HEAD: self._link.link_stats}

    def links_now(self) -> Iterator[tuple[str, LinkNow]]:
        yield HEAD, link_now(self._link.mux, self._link.link_stats)

    def status(self) -> RoleStatus:
        link, node, ways = self._link, self._node, self._direct.seen()
        muxes = [way.mux for way in ways]
        volumes = [(way.mux, way.link_stats) for way in ways]
        return RoleStatus(
            link=status.Link(
                state=link.state,
                head=link.head.called,
                since=link.since,
                cuts=link.link_stats.cuts,
                ridden_through=link.link_stats.ridden_through,
                last_cut=last_cut(link.link_stats),
                conditions=node.board.ids_of(LINK),
                lanes=lanes_of(link.mux),
            ),
            direct=tuple(map(direct_row, ways)),
            streams=streams_of([link.mux, *muxes]),
            bytes=volume_of([(link.mux, link.link_stats), *volumes]),
            roster=roster_rows(node.view.nodes, None, node.listeners),
            refused=self._link.refused.last(),
        )


def plans_of(nodes: Iterable[Mapping[str, Any]]) -> tuple[NodePlan, ...]:
    """The plans that a hub tells of. Raises ValueError."""
    plans = tuple(map(NodePlan.from_wire, nodes))
    if not plans or plans[0].role != "head":
        raise ValueError("the first node is not the head")
    return plans


def changed(
    known: Iterable[NodePlan], plans: Iterable[NodePlan], gone: Iterable[str]
) -> tuple[NodePlan, ...]:
    """The nodes of which some are new or different and some are gone, the head first."""
    news = tuple(plans)
    head_too = any(node.role == "head" for node in news)  # it may have another name
    nodes = {node.name: node for node in known if node.role != "head" or not head_too}
    nodes |= {node.name: node for node in news}
    for name in gone:
        nodes.pop(name, None)
    return tuple(sorted(nodes.values(), key=lambda node: node.role != "head"))


def hello_of(config: Config, key: str) -> Hello:
    """What a worker of this configuration says to the hub, as far as the file has it; `key` is its
    public one."""
    return Hello(
        node=config.name,
        key=key,
        version=__version__,
        worker_ports=config.worker_ports,
        advertise=config.ray.advertise,
        ride_through=config.ride_through,
        features=frozenset({SOURCE, PROOF, CHANGES}),
        ephemeral=config.ephemeral,
    )
