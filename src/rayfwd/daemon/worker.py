"""A worker: the link to the head, listeners to every other node, and Ray once the link stands."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

from rayfwd import __version__
from rayfwd.cluster import identity
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config
from rayfwd.daemon.advertise import AdvertiseCheck
from rayfwd.daemon.handover import Arrival
from rayfwd.daemon.metrics import HEAD
from rayfwd.daemon.node import LINK, Makers, Node, Work
from rayfwd.daemon.role import RoleStatus
from rayfwd.daemon.to_head import ToHead
from rayfwd.daemon.views import (
    declared_resources,
    direct_row,
    roster_rows,
    streams_of,
    volume_of,
)
from rayfwd.daemon.worker_links import WorkerLinks
from rayfwd.daemon.worker_plan import WorkerPlan
from rayfwd.daemon.worker_ray import WorkerRay
from rayfwd.direct.ways import DirectWays
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.ray.install import RayInstall
from rayfwd.ray.nodes import NodeSeen
from rayfwd.session import messages
from rayfwd.session.frames import Frame
from rayfwd.session.handshake import (
    ASKED,
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
from rayfwd.session.snapshot import Tree
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening, Target
from rayfwd.system.control import Verb
from rayfwd.system.files import replace_file
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.logs import get_logger
from rayfwd.transport.awaited import Awaited
from rayfwd.transport.carrier import Carrier
from rayfwd.transport.connector import LocalConnector
from rayfwd.transport.link import Link
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.mux import Mux, MuxStream, StreamOwner
from rayfwd.transport.question import Question
from rayfwd.transport.relay import SocketRelay
from rayfwd.watch.canary_watch import alive_nodes
from rayfwd.watch.cluster_view import ClusterView
from rayfwd.watch.reach import Peer

log = get_logger(__name__)


class WorkerRole:
    """A worker, as the runtime runs it. Owner of its node and of its link."""

    def __init__(self, config: Config, makers: Makers) -> None:
        """Raises ProblemError where the node's key cannot be had."""
        assert config.head is not None, "a worker's configuration has a head"
        self._identity = identity.kept(config.state_dir / identity.KEY_FILE)
        self._proved = False
        """The hub knows this node by its public key."""
        self._cluster: ClusterReport | None = None
        view = ClusterView(config.hub.network, config.ride_through)
        self._node = node = Node(config, self, view, makers)
        head = config.head
        carrier: Carrier | None = makers.carrier(head) if head.ssh else None
        self._awaited: Awaited | None = None
        if head.dialled:
            carrier = self._awaited = Awaited(config.link_socket, carrier)
            # How many there are is the head's to say.
            head = head.model_copy(update={"extra_lanes": 0})
        assert carrier is not None, "a head that does not dial is dialled"
        self._link = Link(self, head, carrier, Limits())
        self._to_head = ToHead(node, self._link)
        advertise = AdvertiseCheck(self._to_head.send, lambda: self._plan.hub_features)
        self._ray = WorkerRay(node, advertise)
        self._direct = DirectWays(config, makers.carrier, self, self._link.refused)
        self._plan: WorkerPlan = WorkerPlan(node, self._ray, self._direct.news)
        self.links = WorkerLinks(config.name, self._link, self._direct, node.claim)
        self._handlers = (
            messages.Handlers[[]]()
            .on(messages.Nodes, self._plan.hear_nodes)
            .on(messages.NodesChanged, self._plan.hear_changes)
            .on(messages.HeadVersions, self._plan.hear_versions)
            .on(messages.HeadRay, self._hear_head_ray)
            .on(messages.Auth, self._plan.hear_auth)
            .on(messages.Conditions, self._hear_conditions)
            .on(messages.Cluster, self._hear_cluster)
            .on(messages.DialledBack, advertise.answered)
            .on(messages.OpenPortsOf, self._hear_open_ports)
            .on(messages.DialRefused, self._hear_dial_refused)
            .on(messages.SayAgain, self._hear_say_again)
        )
        """What the hub says."""

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
        self._to_head.send(messages.Leaving())

    async def end(self) -> None:
        why = "the worker's rayfwd was stopped"
        await asyncio.gather(self._direct.end(why), self._link.close(why))
        if self._awaited is not None:
            self._awaited.end()

    def watchers(self) -> dict[str, Work]:
        return {"claim": self._plan.watch_claim}

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
        welcome = self._plan.hand_over()
        if self._awaited is not None:
            self._awaited.end()
        nodes = [node.to_wire() for node in self._node.view.nodes]
        direct, link = self._direct.hand_over(), self._link.hand_over()
        return {"welcome": welcome, "nodes": nodes, "link": link, "direct": direct}

    def take_over(self, tree: Tree) -> None:
        welcome, link = tree["welcome"], tree["link"]
        if welcome is not None:
            self._plan.take_over(welcome, tree.get("nodes") or ())
        if link is not None and self._plan.asks_for_another():
            # A session keeps the plan that it began with. Ray is started anew in any case.
            log.info("session_ended", node=HEAD, cause="this node asks for another plan now")
        elif link is not None:
            self._link.take_over(link).send_message(messages.SayAgain())
        self._direct.take_over(tree.get("direct") or {})
        self.link_changed()

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
        self._plan.welcomed(welcome)

    def message(self, message: Message) -> None:
        self._handlers(message)

    def _hear_head_ray(self, message: messages.HeadRay) -> None:
        self._ray.hear(message)
        self.changed()

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
        self._to_head.begin_again()
        self.changed()
        self._to_head.conditions()

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
            self._to_head.begin_again()
            self._node.announced.forget()
            self._ray.forget()
            self._node.exchange.drop(HEAD)
        self._direct.news()
        self._ray.let_start()
        if self._node.view.nodes:
            self._node.reach_others()
        self.changed()
        self._to_head.conditions()

    # -- Ray -----------------------------------------------------------------------------

    async def before_start(self, own: NodePlan, install: RayInstall) -> None:
        await self._ray.before_start(own)

    def ray_waits(self) -> str:
        return self._ray.waits()

    # -- what the head is told -----------------------------------------------------------

    def board_changed(self) -> None:
        self._node.news.set()
        self._to_head.conditions()

    def changed(self) -> None:
        self._ray.let_start()
        self._to_head.ray()
        self._to_head.ports()
        self._node.changed()

    def open_ports_changed(self) -> None:
        self._to_head.ports()

    def dial_refused(self, node: str, port: int, count: int) -> None:
        self._to_head.send(messages.DialRefused(node, port, count))

    def ask(self, target: Target, question: Question) -> None:
        if ASKED in self._plan.hub_features:
            question.put(self._link.mux, Opening(target))
        else:
            question.unanswered()

    def reaches(self, name: str) -> bool:
        return self.links.stand()

    # -- as the node's owner -------------------------------------------------------------

    def route(self, target: Target, relay: SocketRelay) -> None:
        relay.open_stream(self._direct.mux_to(target.address) or self._link.mux, target)

    # -- as the owner of the direct ways -------------------------------------------------

    def view_now(self) -> ClusterView:
        return self._node.view

    def hub_mux(self) -> Mux | None:
        stands = self.links.stand() and DIRECT in self._plan.hub_features
        return self._link.mux if stands else None

    def accept_opening(self, stream: MuxStream, opening: Opening) -> StreamOwner | None:
        return self._node.accept(stream, opening)

    def direct_changed(self) -> None:
        self.changed()

    def peers(self) -> dict[str, Peer]:
        """The head; how the other workers reach each other is seen by canaries of their own."""
        link, head = self._link, self._node.view.head
        if head is None or not self.links.stand() or self._node.ray.now.state != "up":
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
        dashboard = self._node.endpoint(view.head, view.head.services["dashboard"])
        alive = await alive_nodes(dashboard, self._node.ray.environment or {})
        return [node for node in alive if node.address in both]

    # -- how it is -----------------------------------------------------------------------

    def status(self) -> RoleStatus:
        link, node, ways = self._link, self._node, self._direct.seen()
        muxes = [way.mux for way in ways]
        volumes = [(way.mux, way.link_stats) for way in ways]
        return RoleStatus(
            link=self.links.row(node.board.ids_of(LINK)),
            direct=tuple(map(direct_row, ways)),
            streams=streams_of([link.mux, *muxes]),
            bytes=volume_of([(link.mux, link.link_stats), *volumes]),
            roster=roster_rows(node.view.nodes, None, node.listeners),
            refused=self._link.refused.last(),
        )


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
        features=frozenset({ASKED, SOURCE, PROOF, CHANGES}),
        ephemeral=config.ephemeral,
    )
