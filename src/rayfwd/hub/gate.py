"""Who is let in: what connects to the hub's socket, until it is a lane of a session.

A node's first hello gives it its place in the plan; a client has none. A doctor asks, and is told
what would come of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from rayfwd import __version__, codes
from rayfwd.cluster.plan import RESERVED, Level, NodePlan, check_name
from rayfwd.hub.clash import check_renewal, check_session, is_live, session_unknown
from rayfwd.hub.connection import HubConnection
from rayfwd.hub.hub_socket import HubSocket
from rayfwd.hub.ledger import Ledger
from rayfwd.hub.offer import HubOwner
from rayfwd.hub.peers import HubClient, HubNode, Payer
from rayfwd.hub.pending import Pending
from rayfwd.hub.plan_news import PlanNews, shown
from rayfwd.hub.refusals import Refusals
from rayfwd.hub.room import NO_ROOM, YIELDS, YIELDS_A_SECOND, who_yields
from rayfwd.hub.roster import KEY_MINIMUM, Roster
from rayfwd.hub.router import Router
from rayfwd.problems import Problem, ProblemError
from rayfwd.session.checks import CheckReply
from rayfwd.session.handshake import CHANGES, OVERLAY, Hello, Vouch, Welcome
from rayfwd.session.proof import Claim
from rayfwd.session.session import MOST_LANES
from rayfwd.system import setting
from rayfwd.system.budget import Budget
from rayfwd.system.logs import get_logger
from rayfwd.system.users import user_name

log = get_logger(__name__)

MAX_CLIENTS = 64
"""Clients at a time, those whose links are parked included."""


class Sessions(Protocol):
    """The hub, as far as its gate needs it."""

    socket: HubSocket
    nodes: dict[str, HubNode]
    clients: dict[str, HubClient]
    router: Router
    ledger: Ledger

    def start_session(self, peer: HubNode | HubClient, hello: Hello) -> None:
        """A new one, in place of the one that it may have."""

    def drop(self, name: str, why: str) -> bool:
        """Take a node from the plan and end its session. Raises ProblemError."""


class Gate:
    """Owns what is not let in yet, and who was refused lately."""

    def __init__(
        self,
        owner: HubOwner,
        hub: Sessions,
        roster: Roster,
        news: PlanNews,
        uids: Collection[int],
        network: str,
        ride_through: float,
    ) -> None:
        """`uids`: the users who may use the hub. `ride_through` in seconds."""
        self._owner = owner
        self._hub = hub
        self._roster = roster
        self._news = news
        self._uids = uids
        self._network = network
        self._ride_through = ride_through
        self.pending = Pending()
        self._joining: list[tuple[HubConnection, Hello, Claim]] = []
        """Whose nodes are new, and are written down in a moment."""
        self._yields = Budget(YIELDS, YIELDS_A_SECOND, time.monotonic)
        self.refusals = Refusals(self._refusals_changed)
        self._closing = False

    def close(self) -> None:
        """Let nobody in any more."""
        self._closing = True
        self.pending.close()

    # -- as the owner of what connects ---------------------------------------------------

    def came(self, lane: HubConnection) -> None:
        """A connection; it has said nothing yet."""
        self.pending.came(lane)
        if self._closing:
            lane.close()
        elif lane.uid not in self._uids:
            name = user_name(lane.uid)
            lane.refuse(
                codes.USER_NOT_ALLOWED.problem(
                    f"the user {name} may not use the hub at {self._hub.socket.path}",
                    f"add {name} to {setting.key('hub.users')}, then restart rayfwd on the head",
                )
            )
        else:
            self.pending.bound()

    def vouched(self, vouch: Vouch) -> bool:
        return self._hub.socket.vouched(vouch)

    def challenged(self, lane: HubConnection) -> None:
        """It has to prove its key."""
        self.pending.challenged(lane)

    def went(self, lane: HubConnection) -> None:
        """It was greeted, or it is gone."""
        self.pending.went(lane)

    def refused(self, lane: HubConnection, refusal: Problem) -> None:
        """It is told so, and closed."""
        self.pending.went(lane)
        self.refusals.add(lane.node, lane.uid, refusal)

    def _refusals_changed(self) -> None:
        if not self._closing:
            self._owner.hub_changed()

    def lane_lost(self, lane: HubConnection, why: str) -> None:
        if not self._closing:
            log.warning("lane_lost", node=lane.node, lane=lane.lane_class, cause=why)
            if lane.peer is not None:
                lane.peer.link_stats.lane_lost(lane.lane_class, why)
            self._owner.hub_changed()

    def greeted(self, lane: HubConnection, hello: Hello, claim: Claim) -> None:
        """A hello: welcome the lane, or refuse it."""
        if hello.role == "peer":
            lane.refuse(_no_peers())
            return
        if hello.role == "client" or self._roster.knows(hello.node):
            self._let_in(lane, hello, claim)
            return
        lane.hold()
        if not self._joining:
            asyncio.get_running_loop().call_soon(self._join)
        self._joining.append((lane, hello, claim))

    def _join(self) -> None:
        """Nodes that are new: those that came together wait for the disk once."""
        joining = [each for each in self._joining if each[0].go_on()]
        self._joining = []
        if self._closing:
            return
        with suppress(ProblemError), self._roster.together():  # each meets it again, and is told
            for lane, hello, claim in joining:
                if not hello.resumes:
                    with suppress(ProblemError):
                        self._joined(hello, claim, lane)
        for each in joining:
            self._let_in(*each)

    def _let_in(self, lane: HubConnection, hello: Hello, claim: Claim) -> None:
        try:
            peer = self._peer_of(hello, claim, lane)
        except ProblemError as exc:
            lane.refuse(exc.problem)
            return
        assert peer.mux is not None, "it has a session"
        if len(peer.mux.lanes) >= MOST_LANES:
            lane.refuse(
                codes.LANES_FULL.problem(
                    f"the session of {peer.label} already has {MOST_LANES} lanes, which "
                    "is the limit",
                    "nothing if it passes by itself; otherwise lower "
                    f"{setting.theirs('head.bulk_lanes')} on {peer.label}",
                )
            )
            return
        peer.uid, peer.key = lane.uid, lane.key
        changes = isinstance(peer, HubNode) and CHANGES in hello.features
        page = self._owner.offer().page
        own, nodes = self._news.shown_to(peer, changes, {} if page is None else {"page": page.port})
        welcome = self._welcome(own, nodes, peer.mux.stats().ride_through)
        features = welcome.features | {CHANGES} if changes else welcome.features
        auth = self._owner.offer().ray_auth
        welcome = replace(welcome, ray_auth=auth, features=features)
        was = peer.state
        peer.hello = hello
        mux = peer.mux
        lane.welcome(welcome, peer, mux, hello)
        if was != "up":
            peer.since = time.time()
        log.info("lane_up", node=peer.label, lane=hello.lane.value)
        if isinstance(peer, HubNode):
            # What followed the hello may have ended the session.
            if changes and peer.mux is mux and peer.knows_all is not mux:
                self._news.tell_all(peer, mux)
            self._hub.router.serve_waiting(peer)
        self._close_a_lane()
        self._owner.hub_changed()

    def _peer_of(self, hello: Hello, claim: Claim, lane: HubConnection) -> HubNode | HubClient:
        """Who said a hello, with a session: the one that it has, or a new one. Raises ProblemError.

        What it asks for is looked at with a new session only, and settled, which is written down,
        when that may begin: a lane of a session that stands costs no more than its lane. The
        first lane after an upgrade from a version that sent a secret is an exception.
        """
        if hello.role == "client":
            client = self._client(hello, claim, lane.uid)
            if client.mux is None or client.session != hello.session:
                check_session(client, hello)
                self._hub.start_session(client, hello)
            return client
        node = self._hub.nodes.get(hello.node)
        renew = not self._roster.has(hello.node, claim) and self._is_by_its_ssh_key(lane, hello)
        if node is not None and renew:
            check_renewal(node, hello)
            log.info("node_key_renewed", node=node.label)
        elif node is not None:
            self._roster.check(hello.node, claim, is_live(node))
            if node.mux is not None and node.session == hello.session:
                self._roster.note_key(hello.node, claim)
                return node
            check_session(node, hello)
        elif hello.resumes:
            raise ProblemError(session_unknown())
        node = self._admit(hello, claim, renew, lane)
        self._hub.start_session(node, hello)
        return node

    def _is_by_its_ssh_key(self, lane: HubConnection, hello: Hello) -> bool:
        """Whether it came by the SSH key of the node that it says to be: then it is that machine,
        made anew where its own key is another than before."""
        return lane.vouched == hello.node or self._roster.came_by(hello.node, lane.ssh_key)

    def _close_a_lane(self) -> None:
        """Where all peers together have too many: the greediest's newest."""
        peer = self._hub.ledger.lane_to_close()
        if peer is not None and peer.mux is not None:
            if self.pending.may_say_crowded():
                lanes = len(peer.mux.lanes)
                log.warning(
                    "hub_lanes_shed", user=user_name(peer.uid), node=peer.label, lanes=lanes
                )
            newest = max(peer.mux.lanes)
            peer.mux.lanes[newest].transport.abort("the hub has more lanes than it may")

    def _client(self, hello: Hello, claim: Claim, uid: int) -> HubClient:
        """The client of a hello, one that is there or a new one. Raises ProblemError."""
        # Who only knows a public key is somebody else.
        digest = f"proven {claim.sha256}" if claim.proven else claim.sha256
        try:
            check_name(hello.node)
            if len(hello.key) < KEY_MINIMUM:
                raise ValueError(f"its key has fewer than {KEY_MINIMUM} characters")
        except ValueError as exc:
            cause = f"the client {hello.node[:63]!r} asked to connect: {exc}"
            raise codes.JOIN_BAD.error(cause, "correct that value on the client") from exc
        if (known := self._hub.clients.get(digest)) is not None:
            return known
        if len(self._hub.clients) >= MAX_CLIENTS:
            raise codes.CLIENTS_FULL.error(
                f"{MAX_CLIENTS} clients are connected, which is the limit of a head",
                "end a `rayfwd connect` that is not needed; `rayfwd status` on the head "
                "lists the clients",
            )
        return HubClient(hello.node, key_sha256=digest, user=user_name(uid))

    def asked(self, lane: HubConnection, hello: Hello, claim: Claim) -> None:
        """A doctor asks what would come of a hello. Nothing does: no session, no name, no plan."""
        if hello.role == "peer":
            lane.refuse(_no_peers())
            return
        try:
            self.pending.asks(lane)
        except ProblemError as exc:
            lane.refuse(exc.problem)
            return
        plan, refusal = None, None
        plans = self._roster.plans()
        try:
            if hello.role == "client":
                plans = plans[:1]  # as it would be told; no address is its own, to be dialled back
                self._client(hello, claim, lane.uid)
            else:
                ports = hello.worker_ports
                renew = self._is_by_its_ssh_key(lane, hello)
                plan = self._roster.preview(hello.node, claim, ports, hello.advertise, renew)
        except ProblemError as exc:
            refusal = exc.problem
        ride_through = min(self._ride_through, hello.ride_through)
        own = {} if plan is None else plan.to_wire()
        nodes = tuple(node.to_wire() for node in shown(plans, plan))
        answer = CheckReply(self._welcome(own, nodes, ride_through), time.time(), refusal)
        log.info("hub_asked", node=hello.node, uid=lane.uid, version=hello.version)
        lane.examine(answer, plan)

    def _welcome(
        self, own: dict[str, Any], nodes: tuple[dict[str, Any], ...], ride_through: float
    ) -> Welcome:
        """Without Ray's token."""
        offer = self._owner.offer()
        return Welcome(
            version=__version__,
            node=own,
            nodes=nodes,
            network=self._network,
            ride_through=ride_through,
            ray=offer.ray,
            python=offer.python,
            features=offer.features,
        )

    def _admit(self, hello: Hello, claim: Claim, renew: bool, lane: HubConnection) -> HubNode:
        """The node of a hello, in the roster from now on. `renew`: its key may be another than
        before. Raises ProblemError."""
        name = hello.node
        node = self._hub.nodes.get(name)
        if node is not None and self._roster.changes(name, *_asked(hello)):
            if not node.changes.take():
                raise codes.PLAN_CHANGES.error(
                    f"{node.label} asked for another address, other ports or another "
                    "level several times within a short time",
                    "nothing: it is accepted soon; if it goes on, check why rayfwd is restarted "
                    "there with other settings",
                )
            node.roster_writes += 1
        plan = self._place_for(hello, claim, renew, lane)
        if node is None:
            node = self._hub.nodes[name] = HubNode(
                name, plan=plan, roster_writes=1, joined=asyncio.get_running_loop().time()
            )
            log.info(
                "node_joined",
                node=plan.name,
                address=plan.address,
                ports=f"{plan.base}-{plan.last_worker_port}",
            )
            self._hub.router.add(node)
            self._news.changed(plan.name)
        elif node.plan != plan:
            self._hub.router.remove(node)
            node.plan = plan
            self._hub.router.add(node)
            self._news.changed(plan.name)
        return node

    def _joined(
        self, hello: Hello, claim: Claim, lane: HubConnection, renew: bool = False
    ) -> NodePlan:
        """In the roster. Raises ProblemError."""
        return self._roster.join(
            hello.node,
            claim,
            *_asked(hello),
            renew=renew,
            ephemeral=hello.ephemeral,
            ssh_key=lane.ssh_key,
        )

    def _place_for(self, hello: Hello, claim: Claim, renew: bool, lane: HubConnection) -> NodePlan:
        """In the roster; where none is left, that of a node which yields. Raises ProblemError."""
        payer: Payer = (lane.uid, lane.key)
        while True:
            try:
                return self._joined(hello, claim, lane, renew)
            except ProblemError as exc:
                if exc.problem.code not in NO_ROOM:
                    raise
                needed, others = RESERVED + hello.worker_ports, dict(self._hub.nodes)
                others.pop(hello.node, None)
                node = who_yields(others.values(), payer, needed, asyncio.get_running_loop().time())
                if node is None or not self._yields.take():
                    raise
                self._yield(node)

    def _yield(self, node: HubNode) -> None:
        """Raises ProblemError."""
        self._hub.drop(node.name, "its place in the plan is needed for others")
        log.warning("node_yielded", node=node.name, user=user_name(node.uid), key=node.key)


def _asked(hello: Hello) -> tuple[int, str | None, Level]:
    """What a node asks of the plan: so many worker ports, an address, and by its level ports of its
    own or not."""
    level: Level = "overlay" if OVERLAY in hello.features else "listeners"
    return hello.worker_ports, hello.advertise, level


def _no_peers() -> Problem:
    return codes.HELLO_MALFORMED.problem(
        "a worker tried to open a direct way to the head",
        "check that the [[direct]] of that worker names a worker, and not the head",
    )
