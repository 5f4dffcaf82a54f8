"""What every node has, head or worker: listeners, a connector, Ray, the board and its watches.

A role owns one and hands it what differs between the two (`NodeOwner`); the runtime runs its tasks.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from rayfwd import codes
from rayfwd.cluster.environment import library_environment
from rayfwd.cluster.plan import NodePlan, in_loopback
from rayfwd.config import Config, HeadConfig
from rayfwd.daemon.claim import MachineClaim, NetworkClaim
from rayfwd.daemon.exchange import ConditionExchange
from rayfwd.daemon.history import LinkNow
from rayfwd.daemon.openings import Openings
from rayfwd.daemon.watches import LinkWatch, MachineWatch
from rayfwd.network.announced import Announced
from rayfwd.network.apart import HeldPorts
from rayfwd.network.dials import Dials
from rayfwd.network.manager import Overlay
from rayfwd.network.open_ports import KernelPorts, Listening, OpenPortsWatch, listening
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import token
from rayfwd.ray.commandline import no_proxy
from rayfwd.ray.install import RayInstall
from rayfwd.ray.nodes import NodeSeen
from rayfwd.ray.starter import BeforeStart
from rayfwd.ray.supervisor import RaySupervisor
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening, Target
from rayfwd.ssh.carriers import carrier_for
from rayfwd.system import setting
from rayfwd.system.budget import Budget
from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.system.fdstore import FdStore
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.system.users import allowed_uids
from rayfwd.transport.admission import Admission
from rayfwd.transport.carrier import Carrier
from rayfwd.transport.connector import LocalConnector
from rayfwd.transport.endpoints import Endpoint, Endpoints
from rayfwd.transport.linkstats import LinkStats
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.mux import MuxStream
from rayfwd.transport.question import Question
from rayfwd.transport.relay import SocketRelay
from rayfwd.watch.board import Board
from rayfwd.watch.canary_watch import Canary, Situation
from rayfwd.watch.cluster_view import ClusterView
from rayfwd.watch.conditions import Finding
from rayfwd.watch.links import LinkSeen
from rayfwd.watch.reach import Peer, Reach

TOKEN_INTERVAL = 15.0
"""Seconds between two looks at Ray's token: two small requests to the head's dashboard."""

MOST_LISTENERS = 20
"""Listeners that have a condition of their own; all that are blocked are counted in the status."""

LINK = "link"
"""The watcher of the links, which says why a node is away when everybody else is silent on it."""

ASKED_AT_ONCE, ASKED_A_SECOND = 100, 50
"""Ports of other nodes about which is asked as they are dialled. Beyond that a program that dials
closed ports again and again waits for the news, as is told without a question."""
NOT_OPEN = "no program of Ray's user listens on that port there"
"""Why the kernel here has refused a connection to another node."""

RAY, LISTENERS = "ray", "listeners"
"""The watchers of this node's Ray and of its listeners."""

Work = Callable[[], Coroutine[Any, Any, None]]
"""Something that runs until it is cancelled."""


class RoleLinks(Protocol):
    """How the role's links are: the head's to its workers, a worker's to the head and to others."""

    def stand(self) -> bool:
        """The role's link or hub is up."""

    def findings(self) -> list[Finding]:
        """What is wrong with them; the link or the hub has logged it. While the role's own does not
        stand, one of them at least blocks readiness."""

    def seen(self) -> Iterator[tuple[str, LinkSeen]]:
        """Those that are up, by the worker's name."""

    def now(self) -> Iterator[tuple[str, LinkNow]]:
        """How they are at the moment, by the peer's name."""

    def stats(self) -> Mapping[str, LinkStats]:
        """What they have been through, by the peer's name in the metrics."""


class NodeOwner(Protocol):
    """The role, as far as what all nodes have asks it something. Nothing is asked before the role
    is built whole."""

    @property
    def links(self) -> RoleLinks:
        """The role's links."""

    def route(self, target: Target, relay: SocketRelay) -> None:
        """Find a stream for a connection that came to a listener."""

    async def before_start(self, own: NodePlan, install: RayInstall) -> None:
        """Awaited before Ray is started. Raises ProblemError where it is not to be yet."""

    def changed(self) -> None:
        """Something that status or readiness depend on has changed."""

    def open_ports_changed(self) -> None:
        """Programs of Ray's user listen on other ports of this machine than before."""

    def dial_refused(self, node: str, port: int, count: int) -> None:
        """Connections to another node's port were refused here, and that node is to hear of it."""

    def ask(self, target: Target, question: Question) -> None:
        """Ask the node whose port it is whether that is open."""

    def reaches(self, name: str) -> bool:
        """Whether that node's word arrives here now, as far as is known here."""

    def board_changed(self) -> None:
        """What is wrong has changed."""

    def ray_waits(self) -> str:
        """What Ray, which is not up, is about."""

    def peers(self) -> Mapping[str, Peer]:
        """The nodes whose Ray this one ought to reach now."""

    async def canary_targets(self) -> list[NodeSeen]:
        """The nodes that a canary is sent to. Raises ProblemError."""


class MakeRay(Protocol):
    """Makes what keeps Ray running."""

    def __call__(
        self,
        config: Config,
        network: str,
        on_change: Callable[[], None],
        *,
        before_start: BeforeStart,
    ) -> RaySupervisor: ...


@dataclass(frozen=True, slots=True)
class Makers:
    """How a node gets what reaches beyond this process: tests put others in their place."""

    ray: MakeRay = RaySupervisor
    listeners: Callable[
        [Callable[[Target, SocketRelay], None], Callable[[], None], Admission], Listeners
    ] = Listeners
    carrier: Callable[[HeadConfig], Carrier] = carrier_for
    claim: Callable[[], NetworkClaim] = MachineClaim
    listening: Listening = listening


class Node:
    """Built whole, in the order in which its parts need each other; nothing runs by itself."""

    def __init__(self, config: Config, owner: NodeOwner, view: ClusterView, makers: Makers) -> None:
        self.config = config
        """The one in force; `take_config` replaces it."""
        self.view = view
        """`set_view` replaces it."""
        self.news = asyncio.Event()
        """Set when something that status or readiness depend on has changed."""
        self._owner = owner
        name = config.name
        uids = listener_uids(config)
        self.dials = Dials()
        """Ports besides the plan's that were dialled, and those that were refused."""
        self.listeners = makers.listeners(self._route, owner.changed, Admission(uids))
        self.overlay = Overlay(
            config.network,
            config.runtime_dir,
            self._may_dial,
            owner.changed,
            self._refused_by_kernel,
            ask=self._ask,
        )
        self._endpoints = Endpoints(self.listeners, self._redirects)
        self.connector = LocalConnector()
        self.page: Target | None = None
        """Where the page in the browser is served; the runtime sets it."""
        self.claim = makers.claim()
        """Of the plan's network; the role takes it, before anything listens in it."""
        self.ray = makers.ray(config, view.network, owner.changed, before_start=owner.before_start)
        self.board = Board(owner.board_changed, name, _later)
        self.exchange = ConditionExchange(name, self.board, config.role == "head")
        self.canary = Canary(config.canary, config.ray, name, self.board, self)
        self.announced = Announced()
        """What other nodes say to be open."""
        self._may_be_dialled = KernelPorts(os.geteuid(), config.network.deny, self._arrives_by)
        self._open_ports = OpenPortsWatch(
            makers.listening,
            os.geteuid(),
            self._untold_ports,
            lambda: self.config.expose,
            self._open_ports_changed,
            self._arrives_by,
        )
        self._questions = Budget(ASKED_AT_ONCE, ASKED_A_SECOND, time.monotonic)
        self._had_open = frozenset[int]()
        """What was open here before the last change."""
        self._apart = HeldPorts()
        self._herald_of_ray = self._open_ports.herald(lambda: self.view.others_listen)
        """Called before what Ray's programs say is passed on; and the next, what others say."""
        self._herald_of_others = self._open_ports.herald(lambda: self.view.others_listen)
        self._reach = Reach(name, owner.peers, self.board, self.endpoint)
        self._links = LinkWatch(self.board, self._links_seen)
        self._machine = MachineWatch(
            config, lambda: self.view, self.board, self.listeners, self.ray
        )

    def hold_listeners(self, store: FdStore, held: Mapping[tuple[str, int], socket.socket]) -> None:
        """Have the listeners outlive a crash, and take those that outlived one."""
        self.listeners.keep = store.keep
        self.listeners.inherit({Target(*at): sock for at, sock in held.items()})

    # -- at work -------------------------------------------------------------------------

    def parts(self) -> dict[str, Work]:
        """The tasks that carry bytes or hold Ray: a fault of one is the daemon's."""
        return {
            "listeners": self.listeners.run,
            "overlay": self.overlay.run,
            "ray": self.ray.run,
        }

    def watchers(self) -> dict[str, Work]:
        """The tasks that only look: a fault of one is logged, and it is started again."""
        return {
            "canary": self.canary.run,
            "reach": self._reach.run,
            "token": self._watch_token,
            "links": self._links.run,
            "machine": self._machine.run,
            "open_ports": self._open_ports.run,
            "dials": self.overlay.answer_dials,
            "apart": self._apart.run,
        }

    def loops(self) -> Iterable[Heartbeat]:
        """The loops that the watchdog looks at."""
        return (self.ray.heartbeat, self._links.heartbeat)

    def changed(self) -> None:
        """What this node's parts know of what is wrong goes to the board; the others are told."""
        self._put_own()
        self.news.set()

    def link_stands(self) -> bool:
        """The role's link or hub is up."""
        return self._owner.links.stand()

    def _links_seen(self) -> Iterator[tuple[str, LinkSeen]]:
        return self._owner.links.seen()

    def take_config(self, config: Config) -> None:
        """What `reload.LIVE` has may be different now.

        Raises ProblemError, with everything as it was, where a user of the file is not known here.
        """
        self.listeners.admission.take_uids(listener_uids(config))
        self.config = config
        self.canary.take_config(config.canary)
        if self.view.nodes:
            self._want_listeners()
            self._owner.changed()

    # -- the plan ------------------------------------------------------------------------

    def set_view(self, view: ClusterView) -> None:
        """Know the cluster so from now on, and open the listeners that it asks for."""
        self.view = view
        own = view.own
        self._open_ports.address = None if own is None else own.address
        self.reach_others()
        self._owner.changed()

    def network_problem(self) -> Problem | None:
        """What is wrong where the network needs the overlay, and this node has none."""
        network, overlay = self.view.network, self.overlay
        if overlay.level == "overlay" or not overlay.settled or in_loopback(network):
            return None
        return codes.NETWORK_NEEDS_OVERLAY.problem(
            f"the plan's network {network} is outside of 127.0.0.0/8, and this node does not have "
            f"the overlay: {overlay.why}",
            f"give this node the overlay (docs/overlay.md), or set "
            f"{setting.theirs('hub.network')} on the head to a network inside 127.0.0.0/8",
        )

    def reach_others(self) -> None:
        """The plan, or what is open on other nodes, may have changed."""
        self._want_listeners()

    def ports_changed_elsewhere(self) -> None:
        """What is open on other nodes has changed."""
        self._open_ports.stir()
        self.reach_others()

    @property
    def open_ports(self) -> frozenset[int] | None:
        """Ports of this machine that others may dial besides the plan's; None: not known."""
        return self._open_ports.ports

    def _untold_ports(self) -> frozenset[int]:
        """Those that others know from the plan, and those that are for nobody."""
        own = self.view.own
        return frozenset({*self.config.network.deny, *(own.ports if own is not None else ())})

    def _open_ports_changed(self) -> None:
        before, self._had_open = self._had_open, self.open_ports or frozenset()
        self.listeners.freed(before - self._had_open)
        if self.overlay.port is not None and self.view.nodes:
            self._want_listeners()  # what is guarded has changed
        self._owner.open_ports_changed()

    def _want_listeners(self) -> None:
        openings = self._openings()
        if self.overlay.port is not None:
            of_user = self._open_ports.of_user if os.geteuid() else frozenset[int]()
            if (wanted := openings.overlay(of_user)) is not None:
                self.overlay.want(wanted)
        self.listeners.set_wanted(*openings.listeners(self.overlay.port))
        if (held := openings.held()) is not None:
            self._apart.want(*held)

    def _openings(self) -> Openings:
        return Openings(self.view, self.config, self.announced, self._owner.reaches)

    @property
    def interface(self) -> str | None:
        """The interface that has the node's address. None: there is none, or the address is one
        at which others reach this machine directly."""
        own = self.view.own
        return None if own is not None and own.advertised else self.overlay.interface

    def _arrives_by(self) -> int:
        """The number of the interface by which connections come to this node's address, as programs
        of this machine see it. 0: not known, as of an address that is advertised."""
        own = self.view.own
        if own is None or own.advertised:
            return 0
        try:
            return socket.if_nametoindex(self.interface or "lo")
        except OSError:
            return 0

    def guard(self) -> tuple[bool, tuple[str, ...]]:
        """Whether the kernel keeps other machines from Ray's ports here, and but for which."""
        openings = self._openings()
        if self.overlay.port is None or not openings.guards:
            return False, ()
        return True, openings.friends

    def _redirects(self) -> bool:
        port = self.overlay.port
        return (
            port is not None
            and self.overlay.stands
            and self.listeners.is_open(Target("127.0.0.1", port))
        )

    def _may_dial(self) -> frozenset[int]:
        return listener_uids(self.config) | {0, os.geteuid()}

    # -- connections ---------------------------------------------------------------------

    def _route(self, target: Target, relay: SocketRelay) -> None:
        """A connection that came to a listener: ports that the plan does not have are counted."""
        if self.overlay.is_probe(target.address):
            relay.refuse()
            return
        node = self.view.node_at(target.address)
        planned = node is not None and target.port in node.ports
        relay.when_read(self._herald_of_ray if planned else self._herald_of_others)
        if node is not None and not planned:
            self.dials.dialled(node.name, target.port)
            relay.when_not_in_plan(lambda why: self._refused_there(*target, why))
        self._owner.route(target, relay)

    def _refused_by_kernel(self, address: str, port: int, count: int) -> None:
        self._refused_there(address, port, NOT_OPEN, count)
        node = self.view.node_at(address)
        if node is not None:
            self._owner.dial_refused(node.name, port, count)

    def hear_refused(self, node: str, port: int, count: int) -> None:
        """Another node has refused to its programs what they dialled of this one."""
        cause = f"{node} connected to it, and no program of Ray's user listens there"
        self.dials.refuse("here", node, port, cause, count)

    def _refused_there(self, address: str, port: int, cause: str, count: int = 1) -> None:
        node = self.view.node_at(address)
        self.dials.refuse("there", address if node is None else node.name, port, cause, count)

    def accept(self, stream: MuxStream, opening: Opening) -> SocketRelay | None:
        """A stream to this machine: dial the port if the plan or `expose` has it, or if a program
        of Ray's user listens there now."""
        own, target = self.view.own, opening.target
        if opening.asks:
            self._answer(stream, target)
            return None
        if target == self.page:  # a client's: the hub lets no node dial 127.0.0.1
            return self.connector.accept(stream, opening)
        if own is not None and target.address == own.address:
            if target.port in own.ports:
                return self._connect(stream, opening, self._herald_of_ray)
            if self._may_be_dialled.has(target):
                return self._connect(stream, opening, self._herald_of_others)
            if target.port in self.config.expose:
                return self.connector.accept(stream, Opening(Target("127.0.0.1", target.port)))
        cause = (
            f"{target} is not a port that {self.config.name} offers: it offers Ray's ports, those "
            f"of {setting.key('expose')}, and those on which a program of Ray's user listens"
        )
        asker = self.view.node_at(opening.source or "")
        name = (opening.source or "(unknown)") if asker is None else asker.name
        self.dials.refuse("here", name, target.port, cause)
        stream.reset(ResetReason.NOT_IN_PLAN, cause)
        return None

    def _answer(self, stream: MuxStream, target: Target) -> None:
        """Whether a connection to it would be taken. All others are told of such a port first."""
        own = self.view.own
        if own is None or target.address != own.address:
            listens: bool | None = False
        elif target.port in own.ports:
            listens = True
        else:
            listens = self._may_be_dialled.listens(target)
            if not listens and target.port in self.config.expose:
                listens = self._may_be_dialled.exposed(target.port)
            if listens and target.port not in (self.open_ports or ()):
                self._open_ports.look()
        if listens is None:
            stream.reset(ResetReason.ABORTED, "the kernel does not tell what listens")
        else:
            stream.reset(ResetReason.LISTENS if listens else ResetReason.NOT_LISTENING)

    def _ask(self, address: str, port: int, answer: Callable[[bool | None], None]) -> None:
        """A program here dials a port of another node that is not known to be open."""
        node = self.view.node_at(address)
        if node is not None and not self._owner.reaches(node.name):
            answer(True)  # it is held, as all is that dials a node which is away
        elif node is not None and self._questions.take():
            self._owner.ask(Target(address, port), Question(answer))
        else:
            answer(None)

    def _connect(
        self, stream: MuxStream, opening: Opening, before_send: Callable[[int], None]
    ) -> SocketRelay:
        relay = self.connector.accept(stream, opening)
        relay.when_read(before_send)
        return relay

    # -- what is wrong -------------------------------------------------------------------

    def _put_own(self) -> None:
        """What the node's parts know themselves; most of them log it, too."""
        name, board, head = self.config.name, self.board, self.view.head
        board.head = head.name if head is not None else ""
        board.put_all(LINK, self._owner.links.findings(), quiet=True)
        board.put_all(RAY, self._ray_findings(), quiet=True)
        blocked = islice(self.listeners.blocked_at.items(), MOST_LISTENERS)
        found = [Finding(name, problem) for problem in self.listeners.problems]
        found += [
            Finding(f"{name}/{at}", problem, blocks_ready=self.listeners.for_a_node(at))
            for at, problem in blocked
        ]
        board.put_all(LISTENERS, found, quiet=True)
        board.put_all("forwards", self._unknown_forwards())
        wrong = (self.overlay.problem, self.overlay.left_out)
        board.put_all("overlay", [Finding(name, one) for one in wrong if one], quiet=True)
        problem = self.network_problem() if self.view.own is not None else None
        needs = [Finding(name, problem, blocks_ready=True)] if problem else []
        board.put_all("network", needs)

    def ray_in_words(self) -> str:
        """How far Ray is here, while it is not up."""
        state = self.ray.now.state
        return "Ray has not been started yet" if state == "waiting" else f"Ray is {state}"

    def _ray_findings(self) -> list[Finding]:
        """What keeps Ray from running. Of one that waits for the link, the link says why."""
        ray, name = self.ray.now, self.config.name
        wanted = ray.state != "by_hand"
        if ray.state == "up":
            return []
        if ray.problem is not None:
            return [Finding(name, ray.problem, blocks_ready=wanted)]
        if not wanted or not self.link_stands():
            return []
        why, remedy = self._owner.ray_waits(), "nothing: this takes a while"
        return [Finding(name, codes.RAY_STARTING.problem(why, remedy), blocks_ready=True)]

    def _unknown_forwards(self) -> list[Finding]:
        view = self.view
        return [
            Finding(
                f"{self.config.name}/{forward.listen}",
                codes.FORWARD_TARGET_UNKNOWN.problem(
                    f"[[forward]] to = {forward.to}: the plan has no node {forward.target()[0]}",
                    "correct the name in `to`; the listener opens by itself when the node joins",
                ),
            )
            for forward in (self._openings().forwards() if view.nodes else ())
            if view.node_named(forward.target()[0]) is None
        ]

    async def _watch_token(self) -> None:
        """Whether this node's Ray and its user's drivers have the token that the cluster wants."""
        while True:
            await sleep_coalesced(TOKEN_INTERVAL)
            found: Problem | None = None
            situation, head, auth = self.situation(), self.view.head, self.view.auth
            if situation is not None and head is not None and self.link_stands():
                with suppress(ProblemError):  # told by others
                    dashboard = self.endpoint(head, head.services["dashboard"])
                    found = await token.check(dashboard, situation.env)
            if found is None and auth is not None:
                found = await asyncio.to_thread(
                    token.provide,
                    auth,
                    self.config.home_environment(os.environ),
                    self.config.state_dir,
                )
            self.board.put("token", {} if found is None else {self.config.name: found})

    def driver_environment(self) -> dict[str, str]:
        """What a driver on this machine needs that Ray's processes are given. Raises ProblemError
        where there is no plan yet."""
        view = self.view
        if view.own is None or view.head is None:
            raise codes.RAY_NOT_UP.error(
                "this node has no plan yet, because it has not reached the head",
                "try again when `rayfwd status` shows an address for this node",
            )
        return {
            "RAY_ADDRESS": f"{view.head.address}:{view.head.services['gcs']}",
            **no_proxy(view.network, view.own.address, os.environ),
            **library_environment(view.own.address, self.interface, {}),
            **token.environment(view.auth, self.config.state_dir),
        }

    # -- as the canary's owner -----------------------------------------------------------

    def situation(self) -> Situation | None:
        """What a canary needs to know; None while this node's Ray is not up."""
        view, env = self.view, self.ray.environment
        if view.own is None or view.head is None or env is None or self.ray.now.state != "up":
            return None
        try:
            gcs = self.endpoint(view.head, view.head.services["gcs"])
        except ProblemError:
            return None
        return Situation(
            own=view.own,
            gcs=str(gcs),
            env=env,
            plans={node.address: node for node in view.nodes},
            targets=self._owner.canary_targets,
            endpoint=self.endpoint,
        )

    def endpoint(self, node: NodePlan, port: int) -> Endpoint:
        """Where a port of a node may be dialled from here. Raises ProblemError: nowhere now."""
        return self._endpoints.to(node, port, self.view.own)

    def peers(self) -> Mapping[str, Peer]:
        return self._owner.peers()

    def canary_back(self) -> None:
        self._owner.changed()


def listener_uids(config: Config) -> frozenset[int]:
    """Whom the listeners let in. Raises ProblemError."""
    return allowed_uids(config.listeners.users, "listeners.users")


def _later(seconds: float, function: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, function)
