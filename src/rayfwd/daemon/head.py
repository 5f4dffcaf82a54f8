"""The head: roster, hub, doors to the workers, Ray's head node, and a watch on the cluster."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rayfwd.config import Config
from rayfwd.daemon import advertise
from rayfwd.daemon.base import Daemon
from rayfwd.daemon.views import mux_status, roster_rows, streams_status
from rayfwd.doors import Pump, Target
from rayfwd.history import History
from rayfwd.hub import Hub, HubNode
from rayfwd.logs import get_logger
from rayfwd.plan import NodePlan, PlanError
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import token
from rayfwd.ray.cluster import ClusterReport
from rayfwd.ray.install import RayInstall, find
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.token import RayAuth
from rayfwd.roster import Roster
from rayfwd.session.session import Limits
from rayfwd.watch.canary import alive_nodes
from rayfwd.watch.cluster import ClusterWatch
from rayfwd.watch.flapping import flapping
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

    def __init__(self, config: Config) -> None:
        self._workers_ray: dict[str, dict[str, Any]] = {}
        self._dial_back = advertise.DialBack()
        super().__init__(config)

    async def serve(self) -> None:
        config = self.config
        try:
            own = config.own_head_plan()
        except PlanError as exc:
            cause, _, remedy = str(exc).partition("; ")
            raise ProblemError(Problem("plan_full", cause, remedy)) from exc
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
        self._hub_changed()
        hub.features = frozenset({advertise.FEATURE})
        self.ray.before_start = self._before_start
        with suppress(ProblemError, TimeoutError):
            # Where Ray cannot be found now, or not soon, the start of Ray decides.
            async with asyncio.timeout(FIND_SECONDS):
                install = await find(config.ray.command, os.environ)
                await self._settle_auth(install.versions.ray)
        if self.auth is None:
            self._set_auth(token.kept_auth(config.state_dir) or RayAuth("off"))
        await hub.start()
        self._listening = True
        self._set_plan()
        self.changed()
        self._watch = ClusterWatch(
            config.ray, own, self.ray, roster.plans, self._report, self._declared
        )
        await self._watch.run()

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
            self._hub.tell_all({"type": "ray_auth", **auth.to_wire()})
            log.info("ray_auth_settled", mode=auth.mode)

    async def _before_start(self, own: NodePlan, install: RayInstall) -> None:
        await self._settle_auth(install.versions.ray)
        self._set_plan()

    async def end(self) -> None:
        await self._dial_back.close()
        if self._hub is not None:
            await self._hub.close("the head's rayfwd was stopped")

    def _hub_changed(self) -> None:
        """A node came, went or changed."""
        self.nodes = self._roster.plans()
        there = {self.config.name}
        there |= {n.plan.name for n in self._nodes_of_hub() if n.state != "away"}
        self._dial_back.keep(there)
        self.board.keep(there)
        self.plan_changed()

    def _nodes_of_hub(self) -> list[HubNode]:
        return list(self._hub.nodes.values()) if self._hub is not None else []

    def _versions(self) -> tuple[str | None, str | None]:
        versions = self.ray.state.versions
        return (versions.ray, versions.python) if versions else (None, None)

    def _declared(self) -> dict[str, dict[str, float]]:
        """What the configurations of the nodes say that they bring, by address."""
        nodes = self._nodes_of_hub()
        return {n.plan.address: dict(n.hello.resources) for n in nodes if n.hello is not None}

    def _report(self, report: ClusterReport) -> None:
        self.cluster = report
        plans = {n.plan.address: n.plan for n in self._nodes_of_hub() if n.state != "away"}
        self.board.put("flapping", flapping(report.nodes, plans, time.time()))
        self._tell_report()
        self.changed()

    def _tell_report(self) -> None:
        """Workers hear of what was found of every node."""
        if self._hub is not None and self.cluster is not None:
            found = self.cluster.problems + self.board.problems
            report = replace(self.cluster, problems=found)
            self._hub.tell_all({"type": "cluster", "report": report.to_wire()})

    def board_changed(self) -> None:
        self._tell_report()
        super().board_changed()

    def _message(self, node: str, message: dict[str, Any]) -> None:
        """A worker says how its Ray is, or asks to be dialled; the rest is for a later version."""
        try:
            self._message_of_check(node, message)
        except ValueError as exc:
            log.warning("message_malformed", node=node, cause=str(exc))
        if message.get("type") == "ray":
            self._workers_ray[node] = {
                key: None if message.get(key) is None else str(message[key])[:64]
                for key in ("phase", "version", "python")
            }
            if self._watch is not None:
                self._watch.look_soon()
            self.changed()

    def _message_of_check(self, name: str, message: dict[str, Any]) -> None:
        node = self._hub.nodes.get(name) if self._hub is not None else None
        if node is None or node.mux is None:
            return
        mux = node.mux

        def send(answer: dict[str, Any]) -> bool:
            mux.send_message(answer)
            return not mux.session.ended

        match message.get("type"):
            case "dial_back":
                self._dial_back.asked(node.plan, message, send)
            case "advertise":
                self.board.put_one("advertise", name, advertise.read_verdict(message))

    def changed(self) -> None:
        if self._hub is not None and self._versions() != self._told_versions:
            self._told_versions = ray, python = self._versions()
            self._hub.tell_all({"type": "head_versions", "ray": ray, "python": python})
        super().changed()

    def peers(self) -> dict[str, Peer]:
        if self._hub is None or self.cluster is None or self.ray.state.phase != "up":
            return {}
        alive = {node.address for node in self.cluster.nodes if node.state == "ALIVE"}
        return {
            node.plan.name: Peer(node.plan, (node.session, node.cuts))
            for node in self._hub.nodes.values()
            if node.state == "up"
            and node.plan.address in alive
            and (self._workers_ray.get(node.plan.name) or {}).get("phase") == "up"
        }

    async def canary_targets(self) -> list[NodeSeen]:
        assert self.own is not None, "a canary is sent once the plan is there"
        return await alive_nodes(self.own, self.ray.environment or {})

    def route(self, target: Target, pump: Pump) -> None:
        if self._hub is None:
            pump.refuse()
        else:
            self._hub.open(target, pump)

    async def forget(self, args: dict[str, Any]) -> dict[str, Any]:
        assert self._hub is not None, "the control socket opens after the hub is made"
        return {"forgotten": self._hub.forget(str(args.get("name", "")))}

    def link_problems(self) -> list[Problem]:
        if self._listening:
            return []
        return [Problem("hub_starting", "the hub does not listen yet", "nothing: this is brief")]

    def histories(self) -> Mapping[str, History]:
        nodes = self._hub.nodes if self._hub is not None else {}
        return {name: node.history for name, node in nodes.items()}

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
                    **node.history.to_wire(),
                    **streams_status([(node.mux, node.history)]),
                    "ray": self._workers_ray.get(node.plan.name),
                    "declares": dict(node.hello.resources) if node.hello else {},
                    "lanes": mux_status(node.mux),
                }
                for node in nodes
            ],
            **streams_status((node.mux, node.history) for node in nodes),
            "roster": roster_rows(self.nodes, states, self.doors),
        }
