"""The head: roster, hub, listeners to the workers, Ray's head node, and a watch on the cluster."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config
from rayfwd.daemon import advertise, handover
from rayfwd.daemon.dialling import Dialling
from rayfwd.daemon.handover import Arrival
from rayfwd.daemon.head_links import HeadLinks
from rayfwd.daemon.head_ports import HeadPorts
from rayfwd.daemon.head_token import HeadToken
from rayfwd.daemon.names import Names
from rayfwd.daemon.node import LINK, Makers, Node, Work
from rayfwd.daemon.role import RoleStatus
from rayfwd.daemon.to_workers import ToWorkers
from rayfwd.daemon.views import (
    client_row,
    declared_resources,
    ledger_of,
    roster_rows,
    streams_of,
    volume_of,
    worker_row,
)
from rayfwd.hub import Hub, HubOffer
from rayfwd.hub.roster import Roster
from rayfwd.hub.splices import splice, splices
from rayfwd.problems import ProblemError
from rayfwd.ray.cluster_report import ClusterReport, Told
from rayfwd.ray.install import RayInstall, find
from rayfwd.ray.nodes import NodeSeen
from rayfwd.session import messages
from rayfwd.session.handshake import ASKED, DIRECT, OVERLAY
from rayfwd.session.messages import Message
from rayfwd.session.session import Limits
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.session.target import Opening, Target
from rayfwd.status import RayOfWorker
from rayfwd.system.control import Verb
from rayfwd.system.gathering import Gathering
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.logs import get_logger
from rayfwd.transport.connector import LocalConnector
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.mux import Mux, MuxStream, StreamOwner
from rayfwd.transport.question import Question
from rayfwd.transport.relay import SocketRelay
from rayfwd.watch.canary_watch import alive_nodes
from rayfwd.watch.cluster_view import ClusterView
from rayfwd.watch.cluster_watch import ClusterWatch, DashboardWatch
from rayfwd.watch.flapping import flapping
from rayfwd.watch.interruptions import Interruptions
from rayfwd.watch.reach import Peer

if TYPE_CHECKING:
    from rayfwd.ssh.meeting import Meeting

log = get_logger(__name__)

FIND_SECONDS = 5.0
"""Seconds that the hub waits to learn Ray's version, so that the first worker hears all at once."""
GATHER_SECONDS = 0.2
"""Seconds for which changes of the hub are gathered before they are seen to."""


class HeadRole:
    """The head, as the runtime runs it. Owner of its node and of its hub."""

    def __init__(self, config: Config, makers: Makers) -> None:
        """Raises ProblemError where the file leaves no room for the plan, or the roster is none."""
        own = config.own_head_plan()
        hub = config.hub
        self._roster = Roster(config.roster_file, own, hub.network, hub.port_base)
        view = ClusterView(hub.network, config.ride_through, own, self._roster.plans())
        self._own = own
        self._cluster: ClusterReport | None = None
        self._workers_ray: dict[str, RayOfWorker] = {}
        self._dial_back = advertise.DialBackAttempts()
        self._interruptions = Interruptions(time.time())
        self._known: set[str] = set()
        """Nodes of the roster that were there once."""
        self._gathering = Gathering(GATHER_SECONDS, self._hub_changed)
        self._node = node = Node(config, self, view, makers)
        self._hub = Hub(
            self,
            path=config.hub_socket,
            roster=self._roster,
            users=hub.users,
            network=hub.network,
            ride_through=config.ride_through,
            limits=Limits(),
        )
        self._ports = HeadPorts(node, self._hub)
        self._to_workers = ToWorkers(node, self._hub, self._ports)
        self._names = Names(node, self._roster, self._hub.give_back, self._here)
        self._token = HeadToken(
            node,
            self._hub,
            self._roster,
            self._tell_ray,
            lambda worker: self._state_of_ray(worker) == "by_hand",
        )
        self._dialling = Dialling(
            config,
            lambda dial: makers.carrier(dial.way()),
            self.changed,
            self._hub.socket.vouch_for,
        )
        self._meetings: list[Meeting] = []
        if hub.meet:
            from rayfwd.ssh.meeting import meetings  # noqa: PLC0415  # it loads AsyncSSH

            self._meetings = meetings(config, self.changed)
        self.links = HeadLinks(config.name, self._hub, self._dialling, self._meetings)
        self._cluster_watch = ClusterWatch(
            config.ray, own, node.ray, node.board, self._interruptions, self, node.endpoint
        )
        self._dashboard_watch = DashboardWatch(own, node.ray, node.board, node.endpoint)
        self._handlers = (
            messages.Handlers[[str]]()
            .on(messages.Ray, self._hear_ray)
            .on(messages.Conditions, self._hear_conditions)
            .on(messages.DialBack, self._hear_dial_back)
            .on(messages.OpenPorts, self._ports.hear)
            .on(messages.DialRefused, self._ports.hear_refused)
            .on(messages.SayAgain, self._to_workers.again)
            .on(messages.Leaving, self._hear_leaving)
        )
        """What a worker says, and its name."""

    @property
    def node(self) -> Node:
        return self._node

    @property
    def view(self) -> ClusterView:
        return self._node.view

    @property
    def cluster(self) -> ClusterReport | None:
        return self._cluster

    # -- life ----------------------------------------------------------------------------

    async def serve(self, arrival: Arrival | None) -> None:
        """Raises ProblemError where the hub cannot listen, or the network is another cluster's."""
        config = self._node.config
        claim = self._node.claim
        if not claim.take(config.hub.network) and claim.problem is not None:
            raise ProblemError(claim.problem)
        await self._node.overlay.settle()
        if (problem := self._node.network_problem()) is not None:
            raise ProblemError(problem)
        self._roster.set_own_level(self._node.overlay.level)
        self._own = self._roster.own
        self._node.set_view(replace(self.view, own=self._own, nodes=self._roster.plans()))
        if arrival is not None:
            self._inherit_socket(arrival)
            await arrival.take_over(self)
        self.hub_changed()
        with suppress(ProblemError, TimeoutError):
            # Where Ray cannot be found now, or not soon, the start of Ray decides.
            async with asyncio.timeout(FIND_SECONDS):
                install = await find(config.ray.command, os.environ)
                await self._token.settle(install.versions.ray)
        self._token.settle_without_ray()
        await self._hub.start()
        self._tell_ray()
        self.changed()
        async with asyncio.TaskGroup() as group:
            dialling = [group.create_task(self._dialling.run(), name="dialling")]
            dialling += [
                group.create_task(meeting.run(), name=f"meet at {meeting.called}")
                for meeting in self._meetings
            ]
            await self._hub.wait_closed()
            await self._dialling.drained()
            for meeting in self._meetings:
                meeting.close()  # what workers were told last has gone that way
            for task in dialling:
                task.cancel()

    def leaving(self) -> None:
        """The workers see the hub close; their Ray waits for this one's for a while."""

    async def end(self) -> None:
        self._ports.close()
        await self._dial_back.close()
        self._dialling.end()
        await self._hub.close("the head's rayfwd was stopped")
        await self._dialling.drained()
        self._gathering.stop()

    def watchers(self) -> dict[str, Work]:
        return {
            "cluster": self._cluster_watch.run,
            "dashboard": self._dashboard_watch.run,
            "names": self._names.run,
        }

    def _here(self) -> set[str]:
        return {n.plan.name for n in self._hub.nodes.values() if n.state != "down"}

    def loops(self) -> Iterable[Heartbeat]:
        return ()

    def take_config(self, config: Config) -> None:
        self._node.take_config(config)
        self._cluster_watch.take_config(config.ray)

    def verbs(self) -> Mapping[str, Verb]:
        return {
            "forget": self._token.forget_verb,
            "dial": self._dialling.dial_verb,
            "undial": self._dialling.undial_verb,
        }

    # -- Ray -----------------------------------------------------------------------------

    def _tell_ray(self) -> None:
        view = self.view
        self._node.ray.set_plan(
            self._own,
            self._own,
            None,
            view.ride_through,
            auth=view.auth,
            interface=self._node.overlay.interface,
        )

    async def before_start(self, own: NodePlan, install: RayInstall) -> None:
        await self._token.settle(install.versions.ray)
        self._tell_ray()
        await self._node.overlay.made()

    def ray_waits(self) -> str:
        return self._node.ray_in_words()

    # -- for a process that comes after this one -----------------------------------------

    @property
    def listeners(self) -> Listeners:
        return self._node.listeners

    @property
    def connector(self) -> LocalConnector:
        return self._node.connector

    def muxes(self) -> dict[str, Mux]:
        return self._hub.muxes()

    def waiting(self) -> list[tuple[Target, SocketRelay]]:
        return self._hub.router.waiting

    def stop_accepting(self) -> socket.socket | None:
        return self._hub.socket.hand_over()

    def hand_over(self) -> Tree:
        hub = self._hub
        self._dialling.close()
        for meeting in self._meetings:
            meeting.close()
        self._gathering.stop()
        return {
            "path": str(hub.socket.path),
            "splices": splices(hub.muxes()),
            "nodes": hub.hand_over(),
        }

    def _inherit_socket(self, arrival: Arrival) -> None:
        """The hub's, where an earlier process listened in the place that is asked for now."""
        path = self._hub.socket.path
        if arrival.tree["sessions"]["path"] == str(path) and path.is_socket():
            listening = arrival.listening()
            if listening is not None:
                self._hub.socket.inherit(listening)

    def take_over(self, tree: Tree) -> None:
        for each in tree["nodes"]:
            try:
                self._hub.take_over(each).send_message(messages.SayAgain())
            except SnapshotError as exc:
                log.error("handover_refused", cause=str(exc), remedy=handover.RESET)

    def take_over_splices(self, tree: Tree) -> None:
        for each in tree["splices"]:
            splice(self._hub.muxes(), each)

    # -- as the hub's owner --------------------------------------------------------------

    def offer(self) -> HubOffer:
        auth, services = self.view.auth, self._own.head_services
        ray, python = self._to_workers.versions
        return HubOffer(
            ray=ray,
            python=python,
            features=frozenset({advertise.FEATURE, ASKED, DIRECT, OVERLAY}),
            ray_auth=None if auth is None else auth.to_wire(),
            client_ports=frozenset(
                {services["dashboard"], services["client"], *self._node.config.expose}
            ),
            listens=self._node.overlay.port is None,
            page=self._node.page,
        )

    def accept(self, stream: MuxStream, opening: Opening) -> StreamOwner | None:
        return self._node.accept(stream, opening)

    def hub_changed(self) -> None:
        """A node came, went or changed. What follows is seen to at once, and again after a while
        where more has changed by then: a thousand nodes may come together. None of them stays a
        moment longer than the roster has it."""
        self._gathering.news(pressing=self._one_is_gone())

    def _one_is_gone(self) -> bool:
        plans, nodes = self._roster.plans(), self.view.nodes
        return plans is not nodes and not {n.name for n in nodes} <= {p.name for p in plans}

    def _hub_changed(self) -> None:
        there = {self._node.config.name} | self._here()
        self._dial_back.keep(there)
        self._node.exchange.keep(there)
        self._known |= there
        self._node.board.drop(self._known - there, but=(LINK,))
        self._keep_only(there.union(self._hub.nodes))
        self._look_for_interruptions()
        self._ports.settle()
        if (plans := self._roster.plans()) is self.view.nodes:
            self.changed()
        else:
            self._names.plan_changed()
            self._node.set_view(replace(self.view, nodes=plans))
        self._to_workers.newcomers()  # what is so now that they are here

    def _keep_only(self, names: set[str]) -> None:
        """There are no other nodes any more: a cluster may have had any number of names."""
        self._known &= names
        self._interruptions.keep(names)
        self._ports.keep(names)
        self._to_workers.keep(names)
        for name in self._workers_ray.keys() - names:
            del self._workers_ray[name]

    def _look_for_interruptions(self) -> None:
        self._interruptions.sample((plan.name for plan in self.up()), time.time())

    # -- as the cluster watch's owner ----------------------------------------------------

    def declared(self) -> dict[str, dict[str, float]]:
        resources = {
            n.plan.address: dict(n.hello.resources)
            for n in self._hub.nodes.values()
            if n.hello is not None
        }
        return resources | {self._own.address: declared_resources(self._node.config)}

    def up(self) -> list[NodePlan]:
        return [
            node.plan
            for node in self._hub.nodes.values()
            if node.state == "up" and self._state_of_ray(node.plan.name) == "up"
        ]

    def _state_of_ray(self, name: str) -> str | None:
        return None if (ray := self._workers_ray.get(name)) is None else ray.state

    def reported(self, report: ClusterReport, told: Told) -> None:
        self._cluster = report
        plans = {n.plan.address: n.plan for n in self._hub.nodes.values() if n.state != "down"}
        found = flapping(
            report.nodes, plans, time.time(), self.view.gives_up_after, self._interruptions
        )
        self._node.board.put("flapping", found)
        self._to_workers.reported(told)
        self.changed()

    # -- what the workers are told -------------------------------------------------------

    def changed(self) -> None:
        self._to_workers.changed()
        self._node.changed()

    def board_changed(self) -> None:
        """Workers hear of what was found of every node."""
        self._node.news.set()
        self._to_workers.conditions()

    def open_ports_changed(self) -> None:
        self._ports.settle()

    def dial_refused(self, node: str, port: int, count: int) -> None:
        self._ports.dial_refused(node, port, count)

    def ask(self, target: Target, question: Question) -> None:
        self._hub.router.ask(target, question)

    def reaches(self, name: str) -> bool:
        node = self._hub.nodes.get(name)
        return node is not None and node.state == "up"

    # -- what the workers say ------------------------------------------------------------

    def message(self, node: str, message: Message) -> None:
        self._handlers(message, node)

    def _hear_ray(self, message: messages.Ray, node: str) -> None:
        """How a worker's Ray is."""
        self._workers_ray[node] = RayOfWorker(
            state=message.phase, version=message.version, python=message.python
        )
        self._look_for_interruptions()
        self._cluster_watch.scan_soon()
        self.changed()

    def _hear_conditions(self, message: messages.Conditions, node: str) -> None:
        self._node.exchange.receive(message, node)

    def _hear_leaving(self, _: messages.Leaving, name: str) -> None:
        self._hub.leaving(name)

    def _hear_dial_back(self, message: messages.DialBack, name: str) -> None:
        """Raises ValueError where it asks for more than its own."""
        node = self._hub.nodes.get(name)
        if node is None or node.mux is None:
            return
        mux = node.mux

        def send(answer: Message) -> bool:
            mux.send_message(answer)
            return not mux.ended

        self._dial_back.asked(node.plan, message, send)

    # -- as the node's owner -------------------------------------------------------------

    def route(self, target: Target, relay: SocketRelay) -> None:
        self._hub.router.open(target, relay)

    def peers(self) -> dict[str, Peer]:
        if self._cluster is None or self._node.ray.now.state != "up":
            return {}
        alive = {node.address for node in self._cluster.nodes if node.state == "ALIVE"}
        return {
            node.plan.name: Peer(node.plan, (node.session, node.link_stats.cuts))
            for node in self._hub.nodes.values()
            if node.state == "up"
            and node.plan.address in alive
            and self._state_of_ray(node.plan.name) == "up"
        }

    async def canary_targets(self) -> list[NodeSeen]:
        dashboard = self._node.endpoint(self._own, self._own.services["dashboard"])
        return await alive_nodes(dashboard, self._node.ray.environment or {})

    # -- how it is -----------------------------------------------------------------------

    def status(self) -> RoleStatus:
        nodes = list(self._hub.nodes.values())
        links = [(node.mux, node.link_stats) for node in nodes]
        states = {node.plan.name: node.state for node in nodes}
        states[self._node.config.name] = "up"
        return RoleStatus(
            workers=tuple(worker_row(n, self._workers_ray.get(n.plan.name)) for n in nodes),
            clients=tuple(client_row(client) for client in self._hub.clients.values()),
            ledger=ledger_of(self._hub),
            streams=streams_of(mux for mux, _ in links),
            bytes=volume_of(links),
            roster=roster_rows(self._roster.plans(), states, self._node.listeners),
            refused=self._hub.router.refused.last(),
        )
