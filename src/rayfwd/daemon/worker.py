"""A worker: the link to the head, listeners to every other node, and Ray once the link stands."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayfwd import __version__, codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config
from rayfwd.daemon.advertise import AdvertiseCheck
from rayfwd.daemon.metrics import HEAD
from rayfwd.daemon.runtime import SAY_AGAIN, Daemon
from rayfwd.daemon.views import (
    declared_resources,
    link_seen,
    mux_status,
    parked_problem,
    roster_rows,
    streams_status,
)
from rayfwd.problems import Problem, ProblemError, Severity
from rayfwd.ray import token
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.ray.install import RayInstall, Versions
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.token import RayAuth
from rayfwd.session.frames import MAX_PAYLOAD, ProtocolError, first_frame
from rayfwd.session.handshake import Hello, Welcome
from rayfwd.session.session import Limits
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Target
from rayfwd.system.files import replace_file
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.logs import get_logger
from rayfwd.transport.link import Link
from rayfwd.transport.linkstats import LinkStats
from rayfwd.transport.mux import Mux, MuxStream, StreamOwner
from rayfwd.transport.relay import SocketRelay
from rayfwd.watch.canary import alive_nodes
from rayfwd.watch.conditions import Seen
from rayfwd.watch.links import LinkSeen
from rayfwd.watch.reach import Peer

log = get_logger(__name__)

NOT_UP = frozenset({"waiting", "starting", "stopping", "failed"})
"""Phases of the head's Ray in which it cannot be joined; the head says why, where that is news."""


class WorkerDaemon(Daemon):
    """The daemon of a worker."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.head is not None, "a worker's configuration has a head"
        self._key = ""
        self._kept_plan = b""
        self._told_ray: dict[str, Any] | None = None
        self._head_versions: Versions | None = None
        self._head_ray: str | None = None
        """Phase of the head's Ray; None: not told, in this session or by an older head."""
        self._hub_features: frozenset[str] = frozenset()
        self._advertise = AdvertiseCheck(self._send, lambda: self._hub_features)
        self.ray.before_start = self._before_start
        self._network = config.hub.network
        self._ride_through = config.ride_through
        self._link = Link(
            head=config.head,
            hello=self._hello,
            accept=self._accept_bytes,
            on_welcome=self._welcomed,
            on_message=self._message,
            on_change=self._link_changed,
            limits=Limits(),
        )

    async def serve(self) -> None:
        self._key = node_key(self.config.state_dir / "node.key")
        await self.go_on()
        await self._link.run()

    async def end(self) -> None:
        await self._link.close("the worker's rayfwd was stopped")

    # -- for a process that comes after this one ---------------------------------

    def muxes(self) -> dict[str, Mux]:
        return {} if self._link.mux is None else {HEAD: self._link.mux}

    def hand_over(self) -> Tree:
        welcome: bytes | None = None
        if self.own is not None:
            versions = self._head_versions
            welcome = Welcome(
                version=__version__,
                node=self.own.to_wire(),
                nodes=tuple(node.to_wire() for node in self.nodes),
                network=self._network,
                ride_through=self._ride_through,
                ray=versions.ray if versions else None,
                python=versions.python if versions else None,
                features=self._hub_features,
                ray_auth=self.auth.to_wire() if self.auth else None,
            ).encode()
        return {"welcome": welcome, "link": self._link.hand_over()}

    def take_over(self, tree: Tree) -> None:
        welcome, link = tree["welcome"], tree["link"]
        if welcome is not None:
            frame = first_frame(bytearray(welcome), MAX_PAYLOAD)
            if frame is None:
                raise SnapshotError("the plan is not whole")
            try:
                self._welcomed(Welcome.decode(frame))
            except ProtocolError as exc:
                raise SnapshotError(str(exc)) from exc
        if link is not None:
            self._link.take_over(link).send_message(SAY_AGAIN)
        self._link_changed()

    # -- the link's words --------------------------------------------------------

    def _hello(self) -> Hello:
        versions = self.ray.state.versions
        return replace(
            hello_of(self.config, self._key),
            ray=versions.ray if versions else None,
            python=versions.python if versions else None,
            resources=declared_resources(self.config),
        )

    def _welcomed(self, welcome: Welcome) -> None:
        try:
            own = NodePlan.from_wire(welcome.node)
            nodes = tuple(NodePlan.from_wire(node) for node in welcome.nodes)
            if nodes[0].role != "head":
                raise ValueError("the first node is not the head")
        except (ValueError, IndexError) as exc:
            log.error("plan_malformed", cause=str(exc), remedy="run the same rayfwd on both sides")
            return
        if welcome.ray is not None and welcome.python is not None:
            self._head_versions = Versions(welcome.ray, welcome.python)
        self._hub_features = welcome.features
        try:
            self._take_auth(welcome.ray_auth)
        except ValueError as exc:
            log.warning("message_malformed", cause=str(exc))
        self._network = welcome.network
        self._ride_through = welcome.ride_through
        if own != self.own:
            log.info(
                "plan_received",
                address=own.address,
                ports=f"{own.base}-{own.last_worker_port}",
                nodes=[node.name for node in nodes],
            )
        self.own = own
        self._set_nodes(nodes)

    def _set_nodes(self, nodes: tuple[NodePlan, ...]) -> None:
        self.nodes = nodes
        self._tell_ray()
        self._keep_plan()
        self.plan_changed()

    def _tell_ray(self) -> None:
        if self.own is not None and self.nodes:
            self.ray.set_plan(
                self.own,
                self.nodes[0],
                self._head_versions,
                self._ride_through,
                self._network,
                self.auth,
            )

    def _keep_plan(self) -> None:
        """For `rayfwd plan` while the daemon does not run."""
        plan = json.dumps(self.plan_wire()).encode() + b"\n"
        if plan == self._kept_plan:
            return
        self._kept_plan = plan
        try:
            replace_file(self.config.plan_file, plan)
        except OSError as exc:
            log.warning("plan_not_kept", cause=str(exc))

    def plan_wire(self) -> dict[str, Any]:
        return super().plan_wire() | {
            "network": self._network,
            "ride_through": self._ride_through,
        }

    def _message(self, message: dict[str, Any]) -> None:
        try:
            match message.get("type"):
                case "nodes":
                    self._set_nodes(tuple(NodePlan.from_wire(n) for n in message["nodes"]))
                case "head_versions":
                    if message["ray"] and message["python"]:
                        self._head_versions = Versions(str(message["ray"]), str(message["python"]))
                        self._tell_ray()
                case "head_ray":
                    self._head_ray = str(message["phase"])[:64]
                    self._let_ray_start()
                    self.changed()
                case "ray_auth":
                    self._take_auth(message)
                    self._tell_ray()
                case "say_again":
                    self._told_ray = None
                    self.watches.forget_told()
                    self.changed()
                    self._tell_conditions()
                case "dialled_back":
                    self._advertise.answered(message)
                case "conditions":
                    self.watches.heard(message, HEAD, speaks_for_all=True)
                case "cluster":
                    self.cluster = ClusterReport.from_wire(message["report"])
                    self.changed()
        except (KeyError, TypeError, ValueError) as exc:
            log.warning("message_malformed", cause=repr(exc))

    def _take_auth(self, data: Mapping[str, Any] | None) -> None:
        """Ray's token, or that there is none; an older head does not say. Raises ValueError."""
        if data is None or self.config.ray.auth == "off":
            self.auth = None if data is None else RayAuth("off")
            return
        auth = RayAuth.from_wire(data)
        if auth != self.auth:
            self.auth = auth
            try:
                token.keep(auth, self.config.state_dir)
            except ProblemError as exc:
                log.error(exc.problem.code.name, cause=exc.problem.cause, remedy=exc.problem.remedy)
            token.provide(auth, os.environ, self.config.state_dir)

    async def _check_token(self) -> None:
        """Raises ProblemError where the head's Ray would refuse this node's."""
        if self.config.ray.auth == "token" and (self.auth is None or self.auth.mode == "off"):
            raise codes.RAY_AUTH_DIFFERS.error(
                'ray.auth = "token" on this node, and the head hands out no token',
                'set ray.auth = "token" on the head, or "auto" here',
            )
        head = self.node_named("head")
        if head is not None:
            env = self.ray.environment or {}
            problem = await token.check(head.address, head.services["dashboard"], env)
            if problem is not None:
                raise ProblemError(problem)

    async def _before_start(self, own: NodePlan, install: RayInstall) -> None:
        await self._check_token()
        if own.advertised and self.config.ray.advertise_check:
            await self._advertise.run(own)

    def _send(self, message: dict[str, Any]) -> bool:
        mux = self._link.mux
        if mux is None or mux.session.ended:
            return False
        mux.send_message(message)
        return True

    def _link_changed(self) -> None:
        if self._link.mux is None:
            self._told_ray = None  # a new session knows nothing of it
            self._head_ray = None
            self.watches.forget_told()
            self.watches.unheard(HEAD)
        self._let_ray_start()
        self.changed()
        self._tell_conditions()

    def _let_ray_start(self) -> None:
        """Ray gives up after half a minute where the head's does not answer: it waits for that."""
        self.ray.set_link_up(self._link.state == "up" and self._head_ray not in NOT_UP)

    def ray_waits(self) -> str:
        if self._head_ray in NOT_UP:
            return f"Ray here waits for the head's, which is {self._head_ray}"
        return super().ray_waits()

    def board_changed(self) -> None:
        super().board_changed()
        self._tell_conditions()

    def _tell_conditions(self) -> None:
        """The head hears of what was found here."""
        mux = self._link.mux
        if mux is not None and (told := self.watches.message(all_of_them=False)) is not None:
            mux.send_message(told)

    def changed(self) -> None:
        self._tell_head_of_ray()
        super().changed()

    def _tell_head_of_ray(self) -> None:
        """How our Ray is, for the head's status."""
        mux, ray = self._link.mux, self.ray.state
        told = {
            "type": "ray",
            "phase": ray.phase,
            "version": ray.versions.ray if ray.versions else None,
            "python": ray.versions.python if ray.versions else None,
        }
        if mux is not None and told != self._told_ray:
            self._told_ray = told
            mux.send_message(told)

    def peers(self) -> dict[str, Peer]:
        """The head; how the other workers reach each other is seen by canaries of their own."""
        link, head = self._link, self.node_named("head")
        if head is None or link.state != "up" or self.ray.state.phase != "up":
            return {}
        if self._head_ray in NOT_UP:
            return {}
        return {head.name: Peer(head, (link.since, link.cuts))}

    async def canary_targets(self) -> list[NodeSeen]:
        """The head and this node itself: what the head's own canary sees from the other side."""
        head = self.node_named("head")
        assert head is not None, "a canary is sent once the plan is there"
        assert self.own is not None
        both = {head.address, self.own.address}
        alive = await alive_nodes(head, self.ray.environment or {})
        return [node for node in alive if node.address in both]

    # -- streams --------------------------------------------------------

    def route(self, target: Target, relay: SocketRelay) -> None:
        relay.open_stream(self._link.mux, target)

    def _accept_bytes(self, stream: MuxStream, data: bytes) -> StreamOwner | None:
        try:
            target = Target.decode(data)
        except ValueError as exc:
            stream.reset(ResetReason.NOT_IN_PLAN, str(exc))
            return None
        return self.accept(stream, target)

    # -- how it is --------------------------------------------------------

    def link_problems(self) -> list[Problem]:
        link = self._link
        if link.state == "up":
            return []
        if link.problem is not None:
            return [link.problem]
        return [codes.LINK_STARTING.problem(f"dialling {link.head.ssh}", "nothing: this is brief")]

    def link_conditions(self) -> list[Seen]:
        link, own = self._link, self.config.name
        # While streams are held, what keeps the link from coming back is a part of that.
        kept: Severity | None = "note" if link.state == "parked" else None
        if link.state == "up":
            return [
                Seen(f"{own}/{slot.name}", slot.problem, severity="warning", explains=False)
                for slot in link.slots
                if slot.problem is not None and slot.number is None
            ]
        found = [Seen(own, link.problem, severity=kept)] if link.problem is not None else []
        if link.state == "parked" and link.mux is not None:
            found.append(Seen(own, parked_problem(f"the link to {link.head.ssh}", link.mux)))
        return found

    def links_seen(self) -> Mapping[str, LinkSeen]:
        return {self.config.name: link_seen(self._link.mux, self._link.link_stats)}

    def loops(self) -> list[Heartbeat]:
        return [*super().loops(), *(slot.heartbeat for slot in self._link.slots)]

    def link_stats(self) -> Mapping[str, LinkStats]:
        return {HEAD: self._link.link_stats}

    def role_status(self) -> dict[str, Any]:
        link = self._link
        problem = link.problem
        return {
            "link": {
                "state": link.state,
                "head": link.head.ssh,
                "since": link.since,
                **link.link_stats.to_wire(),
                "problem": problem.to_wire() if problem else None,
                "lanes": mux_status(link.mux),
            },
            "workers": None,
            "clients": None,
            **streams_status([(link.mux, link.link_stats)]),
            "roster": roster_rows(self.nodes, None, self.listeners),
        }


def hello_of(config: Config, key: str) -> Hello:
    """What a worker of this configuration says to the hub, as far as the file has it."""
    return Hello(
        node=config.name,
        key=key,
        version=__version__,
        worker_ports=config.worker_ports,
        advertise=config.ray.advertise,
        ride_through=config.ride_through,
    )


def node_key(path: Path) -> str:
    """The secret by which the hub knows this node again; made at the first start, mode 0600.

    Raises ProblemError.
    """
    try:
        if path.exists():
            key = path.read_text(encoding="ascii").strip()
            if len(key) >= 32:
                return key
        key = secrets.token_hex(32)
        replace_file(path, key.encode() + b"\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise codes.NODE_KEY_UNUSABLE.error(
            f"{path}: {exc}", "make it readable, or remove it"
        ) from exc
    return key
