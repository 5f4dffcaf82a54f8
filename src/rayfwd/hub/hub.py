"""The hub itself: the sessions of workers and clients, and what becomes of them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from pathlib import Path

from rayfwd.hub.connection import HubConnection
from rayfwd.hub.gate import Gate
from rayfwd.hub.hub_socket import HubSocket
from rayfwd.hub.ledger import Ledger
from rayfwd.hub.offer import HubOwner
from rayfwd.hub.peers import HubClient, HubNode
from rayfwd.hub.plan_news import PlanNews
from rayfwd.hub.roster import Roster
from rayfwd.hub.router import Router
from rayfwd.hub.telling import Teller
from rayfwd.session.events import Parked, Resumed, SessionEnded
from rayfwd.session.handshake import Hello
from rayfwd.session.messages import Message
from rayfwd.session.session import Limits, Session
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.system.logs import get_logger
from rayfwd.system.users import allowed_uids
from rayfwd.transport.linkstats import Ending, record
from rayfwd.transport.mux import Mux

log = get_logger(__name__)


class Hub:
    """Owns its socket, its gate, and the workers' and the clients' sessions."""

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
        workers = [plan for plan in roster.plans() if plan.role == "worker"]
        self.nodes = {plan.name: HubNode(plan.name, plan=plan) for plan in workers}
        self._teller = Teller()
        self._news = news = PlanNews(roster, self.nodes, self._teller)
        self.clients: dict[str, HubClient] = {}
        """Those that have a session, by the SHA-256 of their keys."""
        self._roster = roster
        roster.most_listeners = self._most_listeners
        uids = allowed_uids(users, "hub.users")
        self.socket = HubSocket(path, len(uids) > 1 and bool(tuple(users)))
        self._ride_through = ride_through
        self._limits = limits
        self._owner = owner
        self._closed = asyncio.Event()
        self._closing = False
        self.ledger = Ledger(lambda: [*self.nodes.values(), *self.clients.values()], self._now)
        self.router = Router(owner, roster, self.nodes, self.ledger)
        self.gate = Gate(owner, self, roster, news, uids, network, ride_through)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    # -- life ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, where an earlier process did if there is a socket of it. Raises ProblemError."""
        await self.socket.listen(lambda passed: HubConnection(self.gate, passed))
        self.router.begin_waiting(self._ride_through)
        log.info("hub_listening", socket=str(self.socket.path), nodes=len(self.nodes))

    async def close(self, why: str) -> None:
        """End every session in order and stop listening."""
        self._closing = True
        self.gate.close()
        self.socket.accept_no_more()
        self._tell_rest()
        self.router.end_waiting()
        for peer in [*self.nodes.values(), *self.clients.values()]:
            if peer.mux is not None:
                peer.mux.close(why)
        await asyncio.sleep(0)
        self.socket.remove()
        self._closed.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    # -- for a process that comes after this one -----------------------------------------

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
        # Who is not let in yet may be of a session, which is the next process's.
        self.gate.close()
        self.socket.close()
        self._tell_rest()
        self.router.hand_over()
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

    def _most_listeners(self) -> int | None:
        return self.ledger.most_listeners if self._owner.offer().listens else None

    # -- sessions ------------------------------------------------------------------------

    def start_session(self, peer: HubNode | HubClient, hello: Hello) -> None:
        """A new one, in place of the one that it may have."""
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
            lambda stream, target: self.router.route(peer, stream, target),
            lambda message: self._heard(peer, message),
            lambda event: self._changed(peer, mux, event),
            peer.label,
            lambda by: self.ledger.changed(peer, by),
            self.router.refused,
        )
        if isinstance(peer, HubClient):
            self.clients[peer.key_sha256] = peer
        else:
            peer.ended = math.inf
        peer.mux, peer.session, peer.lost = mux, session, None
        # Whoever was turned away under this name is in, or is turned away again soon.
        self.gate.refusals.forget(peer.label)
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
            self.drop(node.name)
            log.info("node_given_back", node=node.name)

    def give_back(self, name: str) -> None:
        """The name of a worker that was away for long."""
        node = self.nodes.get(name)
        if node is not None:
            self._give_back(node)

    def forget(self, name: str) -> bool:
        """Drop a node from the roster and end its session. False if there is none."""
        if not self.drop(name):
            return False
        log.info("node_forgotten", node=name)
        return True

    def drop(self, name: str, why: str = "the node was forgotten on the head") -> bool:
        """As `forget`, without a word in the log; `why` is what its session ends with."""
        if not self._roster.forget(name):
            return False
        node = self.nodes.pop(name, None)
        if node is not None and node.mux is not None:
            node.mux.close(why)
        if node is not None:
            self.router.remove(node)
        self._news.changed(name)
        self._news.tell_changes()
        self._owner.hub_changed()
        return True
