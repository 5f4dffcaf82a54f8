"""The head: roster, hub, listeners to the workers, Ray's head node, and a watch on the cluster."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config
from rayfwd.daemon import advertise, handover
from rayfwd.daemon.runtime import SAY_AGAIN, Daemon
from rayfwd.daemon.views import (
    client_row,
    declared_resources,
    link_seen,
    mux_status,
    parked_problem,
    roster_rows,
    streams_status,
)
from rayfwd.daemon.watches import LINK
from rayfwd.hub import Hub, HubNode
from rayfwd.hub.roster import Roster
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import token
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.ray.commandline import MARGIN, given_up_after
from rayfwd.ray.install import RayInstall, find
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.token import RayAuth
from rayfwd.session.session import Limits
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.session.target import Target
from rayfwd.system.logs import get_logger
from rayfwd.transport.linkstats import LinkStats
from rayfwd.transport.mux import Mux
from rayfwd.transport.relay import SocketRelay
from rayfwd.watch.canary import alive_nodes
from rayfwd.watch.cluster_watch import ClusterWatch, DashboardWatch
from rayfwd.watch.conditions import Seen
from rayfwd.watch.flapping import flapping
from rayfwd.watch.interruptions import Interruptions
from rayfwd.watch.links import LinkSeen
from rayfwd.watch.reach import Peer

log = get_logger(__name__)

FIND_SECONDS = 5.0
"""Seconds that the hub waits to learn Ray's version, so that the first worker hears all at once."""


class HeadDaemon(Daemon):
    """The daemon of the head."""

    _hub: Hub | None = None
    _watch: ClusterWatch | None = None
    _listening = False
    _told_versions: tuple[str | None, str | None] = (None, None)
    _told_phase = ""

    def __init__(self, config: Config) -> None:
        self._workers_ray: dict[str, dict[str, Any]] = {}
        self._dial_back = advertise.DialBack()
        self._interruptions = Interruptions(time.time())
        self._known: set[str] = set()
        """Nodes that were there once."""
        self._heard: dict[str, str] = {}
        """The session in which a worker was last told of all conditions."""
        super().__init__(config)

    async def serve(self) -> None:
        config = self.config
        own = config.own_head_plan()
        roster = Roster(config.roster_file, own, config.hub.network, config.hub.port_base)
        self.own = own
        self._roster = roster
        self._hub = hub = Hub(
            path=config.hub_socket,
            roster=roster,
            users=config.hub.users,
            network=config.hub.network,
            ride_through=config.ride_through,
            limits=Limits(),
            accept=self.accept,
            head_versions=self._versions,
            on_message=self._message,
            on_change=self._hub_changed,
        )
        listening = self._inherited_socket()
        await self.go_on()
        self._hub_changed()
        hub.features = frozenset({advertise.FEATURE})
        services = own.head_services
        hub.client_ports = frozenset({services["dashboard"], services["client"], *config.expose})
        self.ray.before_start = self._before_start
        with suppress(ProblemError, TimeoutError):
            # Where Ray cannot be found now, or not soon, the start of Ray decides.
            async with asyncio.timeout(FIND_SECONDS):
                install = await find(config.ray.command, os.environ)
                await self._settle_auth(install.versions.ray)
        if self.auth is None:
            self._set_auth(token.kept_auth(config.state_dir) or RayAuth("off"))
        await hub.start(listening)
        self._listening = True
        self._set_plan()
        self.changed()
        self._watch = ClusterWatch(
            config.ray,
            own,
            self.ray,
            self.board,
            roster.plans,
            self._up,
            self._declared,
            self._interruptions,
            config.ride_through + 2 * MARGIN,
            self._report,
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch.run(), name="cluster watch")
            dashboard = DashboardWatch(own, self.ray, self.board)
            group.create_task(dashboard.run(), name="dashboard watch")

    def _set_plan(self) -> None:
        if self.own is not None:
            ride_through = self.config.ride_through
            self.ray.set_plan(self.own, self.own, None, ride_through, auth=self.auth)

    async def _settle_auth(self, version: str) -> None:
        """Decide whether Ray asks for a token. Raises ProblemError."""
        config = self.config
        env = {**os.environ, **config.ray.env}
        auth = await asyncio.to_thread(
            token.decide, config.ray.auth, version, env, config.state_dir
        )
        await asyncio.to_thread(token.provide, auth, os.environ, config.state_dir)
        self._set_auth(auth)

    def _set_auth(self, auth: RayAuth) -> None:
        assert self._hub is not None, "the hub is made first"
        if auth != self.auth:
            self.auth = auth
            self._hub.ray_auth = auth.to_wire()
            self._hub.tell_all({"type": "ray_auth", **auth.to_wire()}, clients=True)
            log.info("ray_auth_settled", mode=auth.mode)

    async def _before_start(self, own: NodePlan, install: RayInstall) -> None:
        await self._settle_auth(install.versions.ray)
        self._set_plan()

    async def end(self) -> None:
        await self._dial_back.close()
        if self._hub is not None:
            await self._hub.close("the head's rayfwd was stopped")

    # -- for a process that comes after this one ---------------------------------

    def muxes(self) -> dict[str, Mux]:
        return {} if self._hub is None else self._hub.muxes()

    def waiting(self) -> list[tuple[Target, SocketRelay]]:
        return [] if self._hub is None else self._hub.waiting

    def stop_accepting(self) -> socket.socket | None:
        return None if self._hub is None else self._hub.stop_accepting()

    def hand_over(self) -> Tree:
        hub = self._hub
        if hub is None:
            return {"path": "", "splices": [], "nodes": []}
        return {"path": str(hub.path), "splices": hub.splices(), "nodes": hub.hand_over()}

    def _inherited_socket(self) -> socket.socket | None:
        """The hub's, where an earlier process listened in the place that is asked for now."""
        path, arrival = self.config.hub_socket, self._arrival
        if arrival is None or arrival.tree["sessions"]["path"] != str(path) or not path.is_socket():
            return None
        return arrival.listening()

    def take_over(self, tree: Tree) -> None:
        assert self._hub is not None, "the hub is made first"
        for each in tree["nodes"]:
            try:
                self._hub.take_over(each).send_message(SAY_AGAIN)
            except SnapshotError as exc:
                log.error("handover_refused", cause=str(exc), remedy=handover.RESET)

    def take_over_splices(self, tree: Tree) -> None:
        assert self._hub is not None, "the hub is made first"
        for each in tree["splices"]:
            self._hub.splice(each)

    def _hub_changed(self) -> None:
        """A node came, went or changed."""
        self.nodes = self._roster.plans()
        there = {self.config.name}
        there |= {n.plan.name for n in self._nodes_of_hub() if n.state != "away"}
        self._dial_back.keep(there)
        self._known |= there
        gone = self._known - there
        for name in gone:
            self.watches.unheard(name)
        self.board.drop(gone, but=(LINK,))
        self._interruptions.look((plan.name for plan in self._up()), time.time())
        self.plan_changed()
        self._tell_newcomers()  # what is so now that they are here

    def _nodes_of_hub(self) -> list[HubNode]:
        return list(self._hub.nodes.values()) if self._hub is not None else []

    def _versions(self) -> tuple[str | None, str | None]:
        versions = self.ray.state.versions
        return (versions.ray, versions.python) if versions else (None, None)

    def _declared(self) -> dict[str, dict[str, float]]:
        """What the configurations of the nodes say that they bring, by address."""
        nodes = self._nodes_of_hub()
        told = {n.plan.address: dict(n.hello.resources) for n in nodes if n.hello is not None}
        own = {self.own.address: declared_resources(self.config)} if self.own is not None else {}
        return told | own

    def _up(self) -> list[NodePlan]:
        """The nodes whose own rayfwd has Ray up, with a link that is up."""
        return [
            node.plan
            for node in self._nodes_of_hub()
            if node.state == "up" and self._phase(node.plan.name) == "up"
        ]

    def _phase(self, name: str) -> str | None:
        return (self._workers_ray.get(name) or {}).get("phase")

    def _report(self, report: ClusterReport) -> None:
        self.cluster = report
        plans = {n.plan.address: n.plan for n in self._nodes_of_hub() if n.state != "away"}
        patience = given_up_after(self.config.ride_through)
        found = flapping(report.nodes, plans, time.time(), patience, self._interruptions)
        self.board.put("flapping", found)
        self._tell_report()
        self.changed()

    def _tell_report(self) -> None:
        if self._hub is not None and self.cluster is not None:
            self._hub.tell_all({"type": "cluster", "report": self.cluster.to_wire()})

    def board_changed(self) -> None:
        """Workers hear of what was found of every node."""
        super().board_changed()
        if self._hub is not None and (told := self.watches.message(all_of_them=True)) is not None:
            self._hub.tell_all(told)

    def _tell_newcomers(self) -> None:
        """A worker with a new session has heard nothing yet."""
        told = self.watches.told
        for node in self._nodes_of_hub():
            if node.session != self._heard.get(node.plan.name, ""):
                self._heard[node.plan.name] = node.session
                if node.mux is not None:
                    node.mux.send_message(self._phase_message())
                    if told is not None:
                        node.mux.send_message(told)

    def _message(self, node: str, message: dict[str, Any]) -> None:
        """A worker says how its Ray is, or asks to be dialled; the rest is for a later version."""
        try:
            self._message_of_check(node, message)
            if message.get("type") == "conditions":
                self.watches.heard(message, node, speaks_for_all=False)
        except ValueError as exc:
            log.warning("message_malformed", node=node, cause=str(exc))
        if message.get("type") == "say_again":
            self._say_again(node)
        if message.get("type") == "ray":
            self._workers_ray[node] = {
                key: None if message.get(key) is None else str(message[key])[:64]
                for key in ("phase", "version", "python")
            }
            self._interruptions.look((plan.name for plan in self._up()), time.time())
            if self._watch is not None:
                self._watch.look_soon()
            self.changed()

    def _say_again(self, name: str) -> None:
        """A worker was restarted, and has kept its session."""
        self._heard.pop(name, None)
        self._tell_newcomers()
        self._tell_report()

    def _message_of_check(self, name: str, message: dict[str, Any]) -> None:
        node = self._hub.nodes.get(name) if self._hub is not None else None
        if node is None or node.mux is None:
            return
        mux = node.mux

        def send(answer: dict[str, Any]) -> bool:
            mux.send_message(answer)
            return not mux.session.ended

        if message.get("type") == "dial_back":
            self._dial_back.asked(node.plan, message, send)

    def changed(self) -> None:
        if self._hub is not None and self._versions() != self._told_versions:
            self._told_versions = ray, python = self._versions()
            self._hub.tell_all({"type": "head_versions", "ray": ray, "python": python})
        if self._hub is not None and self.ray.state.phase != self._told_phase:
            self._told_phase = self.ray.state.phase
            self._hub.tell_all(self._phase_message())
        super().changed()

    def _phase_message(self) -> dict[str, Any]:
        """How the head's Ray is: while it is not up, nobody is to wonder at its silence."""
        return {"type": "head_ray", "phase": self.ray.state.phase}

    def peers(self) -> dict[str, Peer]:
        if self._hub is None or self.cluster is None or self.ray.state.phase != "up":
            return {}
        alive = {node.address for node in self.cluster.nodes if node.state == "ALIVE"}
        return {
            node.plan.name: Peer(node.plan, (node.session, node.cuts))
            for node in self._hub.nodes.values()
            if node.state == "up"
            and node.plan.address in alive
            and self._phase(node.plan.name) == "up"
        }

    async def canary_targets(self) -> list[NodeSeen]:
        assert self.own is not None, "a canary is sent once the plan is there"
        return await alive_nodes(self.own, self.ray.environment or {})

    def route(self, target: Target, relay: SocketRelay) -> None:
        if self._hub is None:
            relay.refuse()
        else:
            self._hub.open(target, relay)

    async def forget(self, args: dict[str, Any]) -> dict[str, Any]:
        assert self._hub is not None, "the control socket opens after the hub is made"
        return {"forgotten": self._hub.forget(str(args.get("name", "")))}

    def link_problems(self) -> list[Problem]:
        if self._listening:
            return []
        return [codes.HUB_STARTING.problem("the hub does not listen yet", "nothing: this is brief")]

    def link_conditions(self) -> list[Seen]:
        found = []
        for node in self._nodes_of_hub():
            name, mux = node.plan.name, node.mux
            if node.state == "parked" and mux is not None:
                found.append(Seen(name, parked_problem(f"{name}'s link", mux)))
            elif node.state == "away" and node.lost is not None:
                found.append(
                    Seen(
                        name,
                        codes.LINK_DOWN.problem(
                            f"{name}'s link is down, and what it carried is lost: {node.lost}",
                            f"nothing, if it comes back; else see `rayfwd status` on {name}, "
                            "whether that machine is up, and this machine's sshd",
                        ),
                    )
                )
        for name, refusal in self._hub.refused_lately() if self._hub is not None else ():
            problem = refusal.code.problem(f"turned away: {refusal.cause}", refusal.remedy)
            # Another machine, perhaps: the node of that name may be well.
            found.append(Seen(name or self.config.name, problem, explains=False))
        return found

    def links_seen(self) -> Mapping[str, LinkSeen]:
        return {
            n.plan.name: link_seen(n.mux, n.link_stats)
            for n in self._nodes_of_hub()
            if n.state != "away"
        }

    def take_config(self, config: Config) -> None:
        super().take_config(config)
        if self._watch is not None:
            self._watch.take_config(config.ray)

    def link_stats(self) -> Mapping[str, LinkStats]:
        nodes = self._hub.nodes if self._hub is not None else {}
        return {name: node.link_stats for name, node in nodes.items()}

    def role_status(self) -> dict[str, Any]:
        hub = self._hub
        nodes = [] if hub is None else list(hub.nodes.values())
        states = {node.plan.name: node.state for node in nodes} | {self.config.name: "up"}
        return {
            "link": None,
            "workers": [
                {
                    "name": node.plan.name,
                    "state": node.state,
                    "since": node.since,
                    **node.link_stats.to_wire(),
                    **streams_status([(node.mux, node.link_stats)]),
                    "ray": self._workers_ray.get(node.plan.name),
                    "declares": dict(node.hello.resources) if node.hello else {},
                    "lanes": mux_status(node.mux),
                }
                for node in nodes
            ],
            "clients": [] if hub is None else [client_row(c) for c in hub.clients.values()],
            **streams_status((node.mux, node.link_stats) for node in nodes),
            "roster": roster_rows(self.nodes, states, self.listeners),
        }
