"""The side that is dialled: a socket where other workers' lanes arrive, and the sessions they make.

A session begins by a lane through the hub, which says whose it is. A lane by SSH joins the session
that it names, and proves the key that came by the first lane; it can begin none.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rayfwd import __version__, codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.direct.dialled import KEY, SIGNATURE, DirectOwner
from rayfwd.direct.reserve import joined, release
from rayfwd.hub.connection import HubConnection
from rayfwd.hub.ledger import Ledger
from rayfwd.hub.peers import HubPeer
from rayfwd.hub.pending import Pending
from rayfwd.problems import Problem, ProblemError
from rayfwd.session.checks import CheckReply
from rayfwd.session.events import Parked, Resumed, SessionEnded
from rayfwd.session.handshake import Hello, Vouch, Welcome
from rayfwd.session.lane import LaneClass
from rayfwd.session.proof import Claim, NodeKey
from rayfwd.session.session import MOST_LANES, Limits, Session
from rayfwd.session.snapshot import SnapshotError, Tree
from rayfwd.system import unixsocket
from rayfwd.system.accepting import close_server
from rayfwd.system.logs import get_logger
from rayfwd.system.passing import Listening
from rayfwd.transport.linkstats import Ending, record
from rayfwd.transport.mux import Mux, MuxStream
from rayfwd.transport.refused import RefusedStreams
from rayfwd.transport.relay import SocketRelay

log = get_logger(__name__)


@dataclass(slots=True)
class TakenPeer(HubPeer):
    """A worker that has dialled this one."""

    theirs: str = ""
    """The key that it proves on every lane of its session."""
    key_pair: NodeKey = field(default_factory=NodeKey.make)
    """By which it knows this node."""


class Taken:
    """Owns the socket, the lanes, and a session for each worker that has dialled."""

    def __init__(
        self,
        own: str,
        path: Path,
        ride_through: float,
        owner: DirectOwner,
        ledger: Ledger,
        refused: RefusedStreams,
    ) -> None:
        self.peers: dict[str, TakenPeer] = {}
        self._own = own
        self._path = path
        self._ride_through = ride_through
        self._owner = owner
        self._ledger = ledger
        self._refused = refused
        self._relays: set[SocketRelay] = set()
        """Of the lanes through the hub."""
        self._pending = Pending()
        self._server: asyncio.Server | None = None
        self._closing = False

    async def listen(self) -> None:
        """Raises ProblemError."""
        sock = Listening.instead_of(unixsocket.bind(self._path))
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: HubConnection(self, sock.passed), sock=sock
        )

    def end(self) -> None:
        """Take no more lanes."""
        self._closing = True
        server, self._server = self._server, None
        if server is not None:
            close_server(server)
            self._path.unlink(missing_ok=True)
        self._pending.close()

    def close(self, why: str) -> None:
        """End every session in order."""
        self.end()
        for peer in list(self.peers.values()):
            if peer.mux is not None:
                peer.mux.close(why)

    def take_stream(self, stream: MuxStream, node: NodePlan) -> SocketRelay:
        """A stream through the hub that is to be a lane of that node's."""
        return joined(stream, lambda: HubConnection(self, {}, node.name), self._relays)

    def keep_only(self, nodes: Callable[[str], bool]) -> None:
        """End the sessions of nodes that are no more."""
        for peer in list(self.peers.values()):
            if peer.mux is not None and not nodes(peer.name):
                peer.mux.close(f"{peer.name} is no node of the cluster any more")

    # -- as the lanes' owner ---------------------------------------------------------------------

    def came(self, lane: HubConnection) -> None:
        self._pending.came(lane)
        if self._closing:
            lane.close()
        elif lane.uid not in {0, os.geteuid()}:
            log.warning("direct_stranger", uid=lane.uid)
            lane.abort("it is another user's")
        else:
            self._pending.bound()

    def challenged(self, lane: HubConnection) -> None:
        self._pending.challenged(lane)

    def went(self, lane: HubConnection) -> None:
        self._pending.went(lane)

    def vouched(self, vouch: Vouch) -> bool:
        """No line of authorized_keys says here whose a key is."""
        del vouch
        return False

    def asked(self, lane: HubConnection, hello: Hello, claim: Claim) -> None:
        """A doctor asks who is here. Nothing comes of it: no session, no lane."""
        try:
            if hello.role != "peer" or not claim.proven or lane.by_hub is not None:
                raise ProblemError(_no_peer())
            self._pending.asks(lane)
        except ProblemError as exc:
            lane.refuse(exc.problem)
            return
        ride_through = min(self._ride_through, hello.ride_through)
        welcome = Welcome(__version__, {"name": self._own}, (), "-", ride_through)
        log.info("direct_asked", node=hello.node, version=hello.version)
        lane.examine(CheckReply(welcome, time.time()), None)

    def refused(self, lane: HubConnection, refusal: Problem) -> None:
        self._pending.went(lane)
        if refusal.code is not codes.SESSION_UNKNOWN:
            log.warning("direct_refused", node=lane.node, code=refusal.code.name)

    def lane_lost(self, lane: HubConnection, why: str) -> None:
        if self._closing:
            return
        log.warning("lane_lost", node=lane.node, lane=lane.lane_class, cause=why)
        if lane.peer is not None:
            lane.peer.link_stats.lane_lost(lane.lane_class, why)
        asyncio.get_running_loop().call_soon(self._owner.direct_changed)

    def greeted(self, lane: HubConnection, hello: Hello, claim: Claim) -> None:
        try:
            if hello.role != "peer" or not claim.proven:
                raise ProblemError(_no_peer())
            peer = self._peer_of(lane.by_hub, hello, claim)
        except ProblemError as exc:
            lane.refuse(exc.problem)
            return
        mux = peer.mux
        assert mux is not None, "it has a session"
        if len(mux.lanes) >= MOST_LANES:
            lane.refuse(
                codes.LANES_FULL.problem(
                    f"the session already has {MOST_LANES} lanes, which is the limit",
                    "nothing if it passes by itself",
                )
            )
            return
        lane.welcome(self._welcome(lane, peer, mux), peer, mux, hello)
        log.info("lane_up", node=peer.name, lane=hello.lane.value)
        self._owner.direct_changed()

    def _peer_of(self, by_hub: str | None, hello: Hello, claim: Claim) -> TakenPeer:
        """Whose lane it is, with a session: one that it has, or by the hub's word a new one.
        Raises ProblemError."""
        if by_hub is not None and by_hub != hello.node:
            raise ProblemError(_no_peer())
        if (hello.lane is LaneClass.RESERVE) is (by_hub is None):
            raise ProblemError(_no_peer())
        peer = self.peers.get(hello.node)
        if peer is not None and (peer.session, peer.theirs) == (hello.session, claim.key):
            return peer
        if by_hub is None:
            raise codes.DIRECT_UNKNOWN.error(
                f"{hello.node} has no such session here",
                "nothing if it comes by itself; otherwise check that the [[direct]] names the "
                "node that its ssh leads to",
            )
        if hello.resumes:
            raise codes.SESSION_UNKNOWN.error(
                "this node does not know the session: it was restarted, or gave it up",
                "nothing: a new session begins by itself",
            )
        return self._start(hello, claim)

    def _start(self, hello: Hello, claim: Claim) -> TakenPeer:
        before = self.peers.pop(hello.node, None)
        if before is not None and before.mux is not None:
            before.mux.close("replaced by a new session of the same node")
        now = asyncio.get_running_loop().time()
        ride_through = min(self._ride_through, hello.ride_through)
        peer = TakenPeer(hello.node, theirs=claim.key)
        self._begin(peer, Session("hub", ride_through, Limits(), now), hello.session)
        log.info("session_started", node=peer.name, version=hello.version)
        return peer

    def _begin(self, peer: TakenPeer, core: Session, session: str) -> Mux:
        mux = Mux(
            core,
            lambda stream, target: self._owner.accept(stream, target, peer.name),
            lambda _: None,
            lambda event: self._changed(peer, mux, event),
            peer.name,
            lambda by: self._ledger.changed(peer, by),
            self._refused,
        )
        peer.mux, peer.session, peer.uid = mux, session, os.geteuid()
        peer.link_stats.began()
        self.peers[peer.name] = peer
        return mux

    def _welcome(self, lane: HubConnection, peer: TakenPeer, mux: Mux) -> Welcome:
        said = {KEY: peer.key_pair.public}
        if lane.by_hub is None:
            proven = lane.proven
            assert proven is not None, "it has proved its key"
            signed = peer.key_pair.prove(proven.frame, proven.challenge)
            said = {SIGNATURE: signed.signature}
        ride_through = mux.stats().ride_through
        return Welcome(__version__, said, (), "-", ride_through)

    def _changed(self, peer: TakenPeer, mux: Mux, event: Parked | Resumed | SessionEnded) -> None:
        if peer.mux is not mux:
            return
        ending: Ending = "unsaid" if self._closing else "lost"
        peer.since = record(event, peer.link_stats, mux, peer.name, log, ending)
        if isinstance(event, SessionEnded):
            peer.mux, peer.session = None, ""
            if self.peers.get(peer.name) is peer:
                del self.peers[peer.name]
        self._owner.direct_changed()

    # -- for a process that comes after this one -------------------------------------------------

    def hand_over(self) -> list[Tree]:
        self.end()
        trees: list[Tree] = []
        for peer in self.peers.values():
            mux, peer.mux = peer.mux, None
            core = mux.stop() if mux is not None else None
            if core is not None:
                keys = {"key": peer.key_pair.to_text(), "theirs": peer.theirs}
                trees.append({"node": peer.name, "session": peer.session, "core": core, **keys})
        release(self._relays)
        return trees

    def take_over(self, tree: Tree) -> None:
        """Raises SnapshotError."""
        try:
            peer = TakenPeer(
                tree["node"], theirs=tree["theirs"], key_pair=NodeKey.from_text(tree["key"])
            )
            core = Session.from_snapshot(tree["core"], asyncio.get_running_loop().time())
            mux = self._begin(peer, core, str(tree["session"]))
        except (KeyError, TypeError, ValueError) as exc:
            raise SnapshotError(f"a direct way that does not fit: {exc!r}") from exc
        peer.link_stats.parked(peer.since, mux.now())
        mux.flush()  # sets its clock


def _no_peer() -> Problem:
    return codes.HELLO_MALFORMED.problem(
        "what connected to this worker's socket for direct ways is not another worker",
        "run the same rayfwd on both workers",
    )
