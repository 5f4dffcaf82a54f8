"""The hub itself: the listening socket, who is admitted, and the way of each stream."""

from __future__ import annotations

import asyncio
import hmac
import math
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rayfwd import __version__, codes
from rayfwd.cluster.plan import RESERVED, Level, NodePlan, check_name
from rayfwd.hub.connection import HubConnection
from rayfwd.hub.ledger import Ledger
from rayfwd.hub.peers import HubClient, HubNode, HubPeer, Payer
from rayfwd.hub.pending import Pending
from rayfwd.hub.plan_news import PlanNews, shown
from rayfwd.hub.refusals import Refusals
from rayfwd.hub.room import NO_ROOM, YIELDS, YIELDS_A_SECOND, who_yields
from rayfwd.hub.roster import KEY_MINIMUM, Roster
from rayfwd.hub.stream_relay import StreamRelay
from rayfwd.hub.telling import Teller
from rayfwd.problems import Problem, ProblemError
from rayfwd.session.checks import CheckReply
from rayfwd.session.events import Parked, Resumed, SessionEnded
from rayfwd.session.handshake import CHANGES, DIRECT, OVERLAY, SOURCE, Hello, Vouch, Welcome
from rayfwd.session.messages import Message
from rayfwd.session.proof import Claim
from rayfwd.session.session import MOST_LANES, Limits, Session
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Opening, Target
from rayfwd.system import unixsocket
from rayfwd.system.budget import Budget
from rayfwd.system.files import replace_file
from rayfwd.system.logs import get_logger
from rayfwd.system.passing import Listening
from rayfwd.system.paths import SECRET
from rayfwd.system.users import allowed_uids, user_name
from rayfwd.transport.linkstats import Ending, record
from rayfwd.transport.mux import Mux, MuxStream, StreamOwner
from rayfwd.transport.refused import RefusedStreams
from rayfwd.transport.relay import SocketRelay

log = get_logger(__name__)

IN_USE_SECONDS = 4.0
"""Seconds since a session was heard within which another of the same node is a clone of it, not a
restart: the old lanes of a restarted worker close at once, or fall silent."""

MAX_CLIENTS = 64
"""Clients at a time, those whose links are parked included."""


@dataclass(frozen=True, slots=True)
class HubOffer:
    """What the head offers to whoever is welcomed, the plan apart."""

    ray: str | None = None
    python: str | None = None
    """Version of the head's Ray, and of its Python; None: not known yet."""
    features: frozenset[str] = frozenset()
    """What this head can do besides."""
    ray_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    """Ray's token, as a WELCOME hands it over; None: not decided yet."""
    client_ports: frozenset[int] = frozenset()
    """The head's ports that clients may reach."""
    listens: bool = True
    """A listener stands here for every port of a node; False: the overlay does."""
    page: Target | None = None
    """Where the head's page in the browser is, which clients may see; None: nowhere."""


class HubOwner(Protocol):
    """The head, as far as its hub asks it something. Nothing is asked before `Hub.start` or
    `Hub.take_over`."""

    def offer(self) -> HubOffer:
        """As it is now."""

    def accept(self, stream: MuxStream, opening: Opening) -> StreamOwner | None:
        """Take a stream to the head itself, or reset it and return None."""

    def message(self, node: str, message: Message) -> None:
        """A worker's control message. Raises ValueError where what it says is none."""

    def hub_changed(self) -> None:
        """A node came, went or changed."""


class Hub:
    """Owns the listening socket, the lanes and the workers' sessions."""

    def __init__(
        self,
        owner: HubOwner,
        path: Path,
        roster: Roster,
        users: Iterable[str],
        network: str,
        ride_through: float,
        limits: Limits,
    ) -> None:
        self.path = path
        workers = [plan for plan in roster.plans() if plan.role == "worker"]
        self.nodes = {plan.name: HubNode(plan.name, plan=plan) for plan in workers}
        self._at = {node.plan.address: node for node in self.nodes.values()}
        """The nodes by their addresses."""
        self._teller = Teller()
        self._news = PlanNews(roster, self.nodes, self._teller)
        self.clients: dict[str, HubClient] = {}
        """Those that have a session, by the SHA-256 of their keys."""
        self._roster = roster
        roster.most_listeners = self._most_listeners
        self._yields = Budget(YIELDS, YIELDS_A_SECOND, time.monotonic)
        self._uids = allowed_uids(users, "hub.users")
        self._shared = len(self._uids) > 1 and bool(tuple(users))
        self._network = network
        self._ride_through = ride_through
        self._limits = limits
        self._owner = owner
        self.pending = Pending()
        self._joining: list[tuple[HubConnection, Hello, Claim]] = []
        """Whose nodes are new, and are written down in a moment."""
        self._server: asyncio.Server | None = None
        self._inherited: socket.socket | None = None
        self.started = False
        """The socket at `path` is, or was, this one's."""
        self._closed = asyncio.Event()
        self._grace: asyncio.TimerHandle | None = None
        self._closing = False
        self._secret = secrets.token_hex(32)
        self._refusals = Refusals(self._refusals_changed)
        self.refused_ports = RefusedStreams()
        """Ports that were dialled in vain, of all sessions."""
        self.ledger = Ledger(lambda: [*self.nodes.values(), *self.clients.values()], self._now)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    # -- life ----------------------------------------------------------------------------

    def inherit(self, listening: socket.socket) -> None:
        """Where an earlier process listened at our path, and `start` is to go on listening."""
        self._inherited = listening

    async def start(self) -> None:
        """Listen, where an earlier process did if there is a socket of it. Raises ProblemError."""
        loop = asyncio.get_running_loop()
        # Anyone may connect where several users are allowed: who may stay is decided by the
        # kernel's word on who is there, so that a stranger gets a sentence and not a riddle.
        mode = 0o666 if self._shared else 0o600
        sock = Listening.instead_of(self._inherited or unixsocket.bind(self.path, mode))
        if self._inherited is not None:
            self.path.chmod(mode)
        self.started = True
        self._write_secret()
        # Ours before the loop turns: who stops meanwhile hands it over, or closes it.
        self._server = await loop.create_unix_server(
            lambda: HubConnection(self, sock.passed), sock=sock, start_serving=False
        )
        self._inherited = None
        await self._server.start_serving()
        self._grace = loop.call_later(self._ride_through, self._grace_is_over)
        log.info("hub_listening", socket=str(self.path), nodes=len(self.nodes))

    async def close(self, why: str) -> None:
        """End every session in order and stop listening."""
        self._closing = True
        self._accept_no_more()
        self._tell_rest()
        if self._inherited is not None:
            self._inherited.close()
        if self._grace is not None:
            self._grace.cancel()
            self._grace_is_over()
        self.pending.close()
        for peer in [*self.nodes.values(), *self.clients.values()]:
            if peer.mux is not None:
                peer.mux.close(why)
        await asyncio.sleep(0)
        self._close_server()
        if self.started:
            self.path.unlink(missing_ok=True)
            self.path.with_name(SECRET).unlink(missing_ok=True)
        self._closed.set()

    def _write_secret(self) -> None:
        """For `rayfwd attach --node`, which shows by it that it is run by this hub's user."""
        path = self.path.with_name(SECRET)
        try:
            replace_file(path, self._secret.encode() + b"\n")
        except OSError as exc:
            log.warning("secret_not_written", file=str(path), cause=str(exc))

    def vouched(self, vouch: Vouch) -> bool:
        return hmac.compare_digest(vouch.secret, self._secret)

    async def wait_closed(self) -> None:
        await self._closed.wait()

    # -- for a process that comes after this one -----------------------------------------

    def stop_accepting(self) -> socket.socket | None:
        """The hub's socket, which goes on listening. Raises OSError. A connection that was accepted
        before is there a few turns of the loop later."""
        if self._server is None:
            inherited, self._inherited = self._inherited, None
            return inherited
        sock = self._server.sockets[0].dup()
        self._accept_no_more()
        return sock

    def _accept_no_more(self) -> None:
        """The server stays open for what it has accepted: asyncio makes the transport a turn of the
        loop later, and of one whose server is closed by then it loses the socket."""
        if self._server is not None:
            for sock in self._server.sockets:
                asyncio.get_running_loop().remove_reader(sock)

    def _close_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

    @property
    def waiting(self) -> list[tuple[Target, SocketRelay]]:
        """Connections of listeners that came before the node did."""
        return [each for node in self.nodes.values() for each in node.waiting]

    def muxes(self) -> dict[str, Mux]:
        """Every session, by a name of its own."""
        return {key: peer.mux for key, peer in self._peers().items() if peer.mux is not None}

    def _peers(self) -> dict[str, HubNode | HubClient]:
        # No node's name has a blank in it.
        clients = {f"client {key}": client for key, client in self.clients.items()}
        return {**self.nodes, **clients}

    def hand_over(self) -> list[Tree]:
        """Stop, and give the sessions as they are then; nothing comes after it."""
        self._closing = True
        self._close_server()
        self._tell_rest()
        if self._grace is not None:
            self._grace.cancel()
        # Their sessions are the next process's: this one would say that it knows none.
        self.pending.close()
        trees: list[Tree] = []
        for peer in self._peers().values():
            mux, peer.mux = peer.mux, None
            core = mux.stop() if mux is not None else None
            if core is not None:
                client = [peer.key_sha256, peer.user] if isinstance(peer, HubClient) else None
                names = {"name": peer.name, "client": client, "session": peer.session}
                trees.append({**names, "core": core})
        return trees

    def take_over(self, tree: Tree) -> Mux:
        """Go on with a session of an earlier process; before `start`. Raises SnapshotError."""
        peer: HubNode | HubClient | None
        try:
            name, client = tree["name"], tree["client"]
            core = Session.from_snapshot(tree["core"], asyncio.get_running_loop().time())
            number = str(tree["session"])
        except (KeyError, TypeError) as exc:
            raise SnapshotError(f"a session that does not fit: {exc!r}") from exc
        if client is None:
            peer = self.nodes.get(name)
        else:
            peer = HubClient(name, key_sha256=client[0], user=client[1])
        if peer is None:
            raise SnapshotError(f"no node {name} is in the roster")
        mux = self._begin(peer, core, number)
        peer.link_stats.parked(time.time(), mux.now())
        mux.flush()  # sets its clock
        return mux

    def _grace_is_over(self) -> None:
        self._grace = None
        for node in self.nodes.values():
            for _, relay in node.waiting:
                relay.refuse()
            node.waiting.clear()

    # -- lanes ---------------------------------------------------------------------------

    def came(self, lane: HubConnection) -> None:
        """A connection; it has said nothing yet."""
        self.pending.came(lane)
        if self._closing:
            lane.close()
        elif lane.uid not in self._uids:
            name = user_name(lane.uid)
            lane.refuse(
                codes.USER_NOT_ALLOWED.problem(
                    f"the user {name} may not use the hub at {self.path}",
                    f'add "{name}" to hub.users in the head\'s file, then restart rayfwd '
                    "on the head",
                )
            )
        else:
            self.pending.bound()

    def challenged(self, lane: HubConnection) -> None:
        """It has to prove its key."""
        self.pending.challenged(lane)

    def went(self, lane: HubConnection) -> None:
        """It was greeted, or it is gone."""
        self.pending.went(lane)

    def refused(self, lane: HubConnection, refusal: Problem) -> None:
        """It is told so, and closed."""
        self.pending.went(lane)
        self._refusals.add(lane.node, lane.uid, refusal)

    def refused_lately(self) -> list[tuple[str, Problem]]:
        """Those who were refused in the last while, by the names that they claimed."""
        return self._refusals.lately()

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
            for _, hello, claim in joining:
                if not hello.resumes:
                    with suppress(ProblemError):
                        self._roster.join(hello.node, claim, *_asked(hello))
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
                    "nothing if it passes by itself; otherwise lower head.bulk_lanes and "
                    f"head.extra_lanes on {peer.label}",
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
            self._serve_waiting(peer)
        self._close_a_lane()
        self._owner.hub_changed()

    def _peer_of(self, hello: Hello, claim: Claim, lane: HubConnection) -> HubNode | HubClient:
        """Who said a hello, with a session: the one that it has, or a new one. Raises ProblemError.

        What it asks for is looked at with a new session only, and settled, which is written down,
        when that may begin: a lane of a session that stands costs no more than its lane.
        """
        if hello.role == "client":
            client = self._client(hello, claim, lane.uid)
            if client.mux is None or client.session != hello.session:
                self._check_session(client, hello)
                self._start_session(client, hello)
            return client
        node = self.nodes.get(hello.node)
        renew = lane.vouched == hello.node and not self._roster.has(hello.node, claim)
        if node is not None and renew:
            self._check_renewal(node, hello)
        elif node is not None:
            self._roster.check(hello.node, claim)
            if node.mux is not None and node.session == hello.session:
                return node
            self._check_session(node, hello)
        elif hello.resumes:
            raise ProblemError(_session_unknown())
        node = self._admit(hello, claim, renew, (lane.uid, lane.key))
        self._start_session(node, hello)
        return node

    def _check_renewal(self, node: HubNode, hello: Hello) -> None:
        """Whether a machine with another key, which came by the SSH key of this node's line, may
        take its place. Raises ProblemError."""
        if _is_live(node):
            raise codes.NAME_IN_USE.error(
                f"another machine is connected as {node.label} with the same SSH key",
                "stop rayfwd on one of the two, or give it a key and a name of its own",
            )
        if hello.resumes or hello.session == node.session:
            raise ProblemError(_session_unknown())
        log.info("node_key_renewed", node=node.label)

    def _close_a_lane(self) -> None:
        """Where all peers together have too many: the greediest's newest."""
        peer = self.ledger.lane_to_close()
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
        if (known := self.clients.get(digest)) is not None:
            return known
        if len(self.clients) >= MAX_CLIENTS:
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
                renew = lane.vouched == hello.node
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

    def _admit(self, hello: Hello, claim: Claim, renew: bool, payer: Payer) -> HubNode:
        """The node of a hello, in the roster from now on. `renew`: its key may be another than
        before. Raises ProblemError."""
        name = hello.node
        node = self.nodes.get(name)
        if node is not None and self._roster.changes(name, *_asked(hello)):
            if not node.changes.take():
                raise codes.PLAN_CHANGES.error(
                    f"{node.label} asked for another address, other ports or another "
                    "level several times within a short time",
                    "nothing: it is let in soon; if it goes on, check why rayfwd is restarted "
                    "there with other settings",
                )
            node.roster_writes += 1
        plan = self._place_for(hello, claim, renew, payer)
        if node is None:
            node = self.nodes[name] = HubNode(name, plan=plan, roster_writes=1, joined=self._now())
            log.info(
                "node_joined",
                node=plan.name,
                address=plan.address,
                ports=f"{plan.base}-{plan.last_worker_port}",
            )
            self._at[plan.address] = node
            self._news.changed(plan.name)
        elif node.plan != plan:
            del self._at[node.plan.address]
            self._at[plan.address] = node
            node.plan = plan
            self._news.changed(plan.name)
        return node

    def _place_for(self, hello: Hello, claim: Claim, renew: bool, payer: Payer) -> NodePlan:
        """In the roster; where none is left, that of a node which yields. Raises ProblemError."""
        while True:
            try:
                return self._roster.join(hello.node, claim, *_asked(hello), renew=renew)
            except ProblemError as exc:
                if exc.problem.code not in NO_ROOM:
                    raise
                needed, others = RESERVED + hello.worker_ports, dict(self.nodes)
                others.pop(hello.node, None)
                node = who_yields(others.values(), payer, needed, self._now())
                if node is None or not self._yields.take():
                    raise
                self._yield(node)

    def _yield(self, node: HubNode) -> None:
        """Raises ProblemError."""
        self._drop(node.name, "its place in the plan is needed for others")
        log.warning("node_yielded", node=node.name, user=user_name(node.uid), key=node.key)

    def _most_listeners(self) -> int | None:
        return self.ledger.most_listeners if self._owner.offer().listens else None

    def _check_session(self, peer: HubNode | HubClient, hello: Hello) -> None:
        """Whether a session of it may begin in the place of the one that it has, if it has one.
        Raises ProblemError."""
        if hello.resumes:
            raise ProblemError(_session_unknown())
        refusal = self._clash(peer, hello)
        if refusal is not None:
            raise ProblemError(refusal)

    def _clash(self, peer: HubNode | HubClient, hello: Hello) -> Problem | None:
        """With the present one."""
        if peer.mux is None:
            return None
        # Its number says which of two is the later one only as long as the node's clock goes on;
        # after a while of silence the key alone says enough.
        older = int(hello.session, 16) < int(peer.session, 16)
        parked = not peer.mux.stats().lanes
        if (parked and not older) or not _is_live(peer):
            return None
        if older:
            return codes.SESSION_STALE.problem(
                "the hub has a newer session of this node, and heard from it just now",
                "nothing: if the node's clock was set back, it is let in soon",
            )
        return codes.NAME_IN_USE.problem(
            f"another rayfwd is connected as {peer.label} with the same key",
            "on one of the two machines, remove node.key from state_dir and set another name: they "
            "share one state directory (a cloned disk?)",
        )

    def _start_session(self, peer: HubNode | HubClient, hello: Hello) -> None:
        if peer.mux is not None:
            peer.mux.close("replaced by a new session of the same node")
        ride_through = min(self._ride_through, hello.ride_through)
        if hello.ride_through != self._ride_through and isinstance(peer, HubNode):
            log.warning(
                "ride_through_differs",
                node=peer.label,
                own=self._ride_through,
                theirs=hello.ride_through,
                used=ride_through,
            )
        core = Session("hub", ride_through, self._limits, asyncio.get_running_loop().time())
        self._begin(peer, core, hello.session)
        if isinstance(peer, HubNode):
            peer.left = False
        log.info("session_started", node=peer.label, version=hello.version)

    def _begin(self, peer: HubNode | HubClient, core: Session, session: str) -> Mux:
        mux = Mux(
            core,
            lambda stream, target: self._route(peer, stream, target),
            lambda message: self._heard(peer, message),
            lambda event: self._changed(peer, mux, event),
            peer.label,
            lambda by: self.ledger.changed(peer, by),
            self.refused_ports,
        )
        if isinstance(peer, HubClient):
            self.clients[peer.key_sha256] = peer
        else:
            peer.ended = math.inf
        peer.mux, peer.session, peer.lost = mux, session, None
        # Whoever was turned away under this name is in, or is turned away again soon.
        self._refusals.forget(peer.label)
        peer.link_stats.began()
        return mux

    def _changed(
        self, peer: HubNode | HubClient, mux: Mux, event: Parked | Resumed | SessionEnded
    ) -> None:
        if peer.mux is not mux:
            return
        if isinstance(event, SessionEnded):
            cut = peer.link_stats.last_cut
            peer.lost = event.why if cut is not None and cut.seconds is None else None
        in_order = isinstance(peer, HubNode) and peer.left
        ending: Ending = "unsaid" if self._closing else "in order" if in_order else "lost"
        peer.since = record(event, peer.link_stats, mux, peer.label, log, ending)
        if isinstance(event, SessionEnded):
            self._ended(peer, mux)
        self._owner.hub_changed()

    def _ended(self, peer: HubNode | HubClient, mux: Mux) -> None:
        peer.messages += mux.messages
        peer.mux, peer.session = None, ""
        if isinstance(peer, HubClient):
            del self.clients[peer.key_sha256]
            return
        peer.ended = self._now()
        if not self._closing and peer.hello is not None and peer.hello.ephemeral:
            # Not now: a newer session of the same node may be about to begin.
            asyncio.get_running_loop().call_soon(self._give_back, peer)

    # -- streams -------------------------------------------------------------------------

    def open(self, target: Target, relay: SocketRelay) -> None:
        """A listener of the head was used: find the relay a stream to the worker behind it."""
        node = self._node_at(target.address)
        if node is None:
            relay.refuse()
        elif node.mux is not None and not node.mux.ended:
            relay.open_stream(node.mux, self._opening(node, target, self._roster.own.address))
        elif self._grace is not None:
            node.waiting.append((target, relay))
        else:
            away = f"{target}: {node.plan.name} is away"
            self.refused_ports.note("", node.label, ResetReason.NODE_AWAY, away)
            relay.refuse()

    def _serve_waiting(self, node: HubNode) -> None:
        waiting, node.waiting = node.waiting, []
        for target, relay in waiting:
            self.open(target, relay)

    def _node_at(self, address: str) -> HubNode | None:
        return self._at.get(address)

    def _route(
        self, source: HubNode | HubClient, stream: MuxStream, data: bytes
    ) -> StreamOwner | None:
        """A worker opened a stream: to the head itself, or on to another worker. A client's leads
        to the head only, and there to the ports of the offer.
        """
        try:
            # Whose it is the session tells, not the worker.
            target, _, lane = Opening.decode(data)
        except ValueError as exc:
            stream.reset(ResetReason.NOT_IN_PLAN, str(exc))
            return None
        to_head = target.address == self._roster.own.address
        if isinstance(source, HubClient):
            offer = self._owner.offer()
            if to_head and offer.page is not None and target.port == offer.page.port:
                return self._owner.accept(stream, Opening(offer.page))
            allowed = offer.client_ports
            if not (to_head and target.port in allowed):
                ports = ", ".join(map(str, sorted(allowed)))
                stream.reset(
                    ResetReason.NOT_IN_PLAN,
                    f"clients may not connect to {target}; they may use these ports of "
                    f"the head: {ports}",
                )
                return None
        if to_head:
            return self._owner.accept(stream, Opening(target, self._address_of(source)))
        node = self._node_at(target.address)
        if node is None or node is source:
            stream.reset(ResetReason.NOT_IN_PLAN, f"no node has the address {target.address}")
            return None
        for peer in (source, node):
            if self.ledger.is_crowded(peer):
                stream.reset(
                    ResetReason.TOO_MANY, f"{peer.label} has too many bytes waiting already"
                )
                return None
        if node.mux is None or node.mux.ended:
            away = f"{target}: {node.plan.name} is away"
            stream.reset(ResetReason.NODE_AWAY, away, node.label)
            return None
        if lane and (node.hello is None or DIRECT not in node.hello.features):
            stream.reset(ResetReason.NOT_IN_PLAN, f"{node.plan.name} knows no direct way", "")
            return None
        if not node.mux.has_room():
            stream.reset(ResetReason.TOO_MANY, f"the node {node.plan.name} has no stream left")
            return None
        near, far = StreamRelay(), StreamRelay()
        near.other, far.other = far, near
        near.stream = stream
        opening = self._opening(node, target, self._address_of(source))
        far.stream = node.mux.open(opening._replace(lane=lane).encode(), far)
        return near

    def _address_of(self, peer: HubNode | HubClient) -> str | None:
        """The address in the plan's network; a client has none, nor one that is advertised."""
        if isinstance(peer, HubClient) or peer.plan.advertised:
            return None
        return peer.plan.address

    def _opening(self, node: HubNode, target: Target, source: str | None) -> Opening:
        """What a worker is told: also whose the stream is, if it understands that."""
        told = node.hello is not None and SOURCE in node.hello.features
        return Opening(target, source if told else None)

    # -- messages ------------------------------------------------------------------------

    def _heard(self, peer: HubNode | HubClient, message: Message) -> None:
        """Clients have nothing to say."""
        if isinstance(peer, HubNode):
            self._owner.message(peer.name, message)

    def tell_all(self, message: Message, clients: bool = False) -> None:
        """Send a message to every worker that has a session, and to clients if so said."""
        peers = [*self.nodes.values(), *(self.clients.values() if clients else ())]
        self._teller.tell(message, peers)

    def _tell_rest(self) -> None:
        """What nobody was told of yet."""
        self._news.tell_changes()
        self._teller.finish()

    def leaving(self, name: str) -> None:
        """A worker says that it stops for good."""
        node = self.nodes.get(name)
        if node is not None and not node.left:
            node.left = True
            log.info("node_leaving", node=name)
            self._owner.hub_changed()

    def _give_back(self, node: HubNode) -> None:
        """The name, address and ports of one that was there for a while only."""
        if node.mux is None and not self._closing and self.nodes.get(node.name) is node:
            self._drop(node.name)
            log.info("node_given_back", node=node.name)

    def give_back(self, name: str) -> None:
        """The name of a worker that was away for long."""
        node = self.nodes.get(name)
        if node is not None:
            self._give_back(node)

    def forget(self, name: str) -> bool:
        """Drop a node from the roster and end its session. False if there is none."""
        if not self._drop(name):
            return False
        log.info("node_forgotten", node=name)
        return True

    def _drop(self, name: str, why: str = "the node was forgotten on the head") -> bool:
        if not self._roster.forget(name):
            return False
        node = self.nodes.pop(name, None)
        if node is not None and node.mux is not None:
            node.mux.close(why)
        if node is not None:
            del self._at[node.plan.address]
        self._news.changed(name)
        self._news.tell_changes()
        self._owner.hub_changed()
        return True


def _is_live(peer: HubPeer) -> bool:
    """It was heard a moment ago."""
    mux = peer.mux
    return mux is not None and mux.now() - mux.session.last_heard < IN_USE_SECONDS


def _asked(hello: Hello) -> tuple[int, str | None, Level]:
    """What a node asks of the plan: so many worker ports, an address, and by its level ports of its
    own or not."""
    level: Level = "overlay" if OVERLAY in hello.features else "listeners"
    return hello.worker_ports, hello.advertise, level


def _no_peers() -> Problem:
    return codes.HELLO_MALFORMED.problem(
        "another worker's hello came to the head",
        "check that the [[direct]] of that worker names a worker, and not the head",
    )


def _session_unknown() -> Problem:
    return codes.SESSION_UNKNOWN.problem(
        "the hub does not know this session: it was restarted, or it gave the session up",
        "nothing: a new session begins by itself",
    )
