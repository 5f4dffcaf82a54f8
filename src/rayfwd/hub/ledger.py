"""What each peer of the hub costs it, by peer and by user, and the bounds that hold for it.

Memory is what is kept for a peer that does not take it, and what came of it that nobody has taken
yet. Of what passes between two workers both have it in their accounts, as either may be at fault.
Beyond a bound the greediest gives up its greediest streams; everybody else goes on.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable

from rayfwd.cluster.accounts import PeerAccount, UserAccount
from rayfwd.hub.peers import HubPeer, Payer
from rayfwd.system import descriptors
from rayfwd.system.logs import get_logger, lines_about
from rayfwd.system.users import user_name

log = get_logger(__name__)

PEER_MEMORY = 1 << 28
"""Bytes that one peer may have kept, at most; from three quarters on it opens no more streams."""
LEAST_MEMORY = 1 << 29
"""Bytes that all of them may, at least: else a quarter of the machine's memory."""
LAST = 0.97
"""The part of all descriptors from which on who has most lanes loses one for each that comes: what
else there is leaves a tenth to them (`system/descriptors.py`)."""
AFTERWARDS = 0.75
"""What is left of a bound by who has gone beyond it."""


class Ledger:
    """The accounts of one hub."""

    def __init__(self, peers: Callable[[], Iterable[HubPeer]], clock: Callable[[], float]) -> None:
        """`peers` are all that the hub knows; `clock` is the loop's."""
        self.most_memory = max(LEAST_MEMORY, _machine_memory() // 4)
        self.most_lanes = max(64, descriptors.limit() // 2)
        """Lanes of all peers together: descriptors that they may take."""
        self.most_listeners = descriptors.for_listeners()
        """Of all nodes together on this machine: descriptors again."""
        self.memory = 0
        """Bytes of all of them, by the last that each told of."""
        self._peers = peers
        self._clock = clock

    def changed(self, peer: HubPeer, by: int) -> None:
        """What is kept for a peer has become more or less; sheds what is beyond a bound."""
        self.memory += by
        peer.memory += by
        if peer.memory > PEER_MEMORY:
            self._shed(peer, int(PEER_MEMORY * AFTERWARDS))
        while self.memory > self.most_memory and (greediest := self._greediest()) is not None:
            before = greediest.memory
            self._shed(greediest, int(before * AFTERWARDS))
            if greediest.memory >= before:
                return  # it has nothing that it could give up

    def is_crowded(self, peer: HubPeer) -> bool:
        """It has so much kept that it opens no further streams."""
        return peer.memory > PEER_MEMORY * AFTERWARDS

    def lane_to_close(self) -> HubPeer | None:
        """Whose newest lane must go, as there are too many of all; None: nobody's."""
        lanes = sum(len(peer.mux.lanes) for peer in self._peers() if peer.mux is not None)
        if lanes <= self.most_lanes and not descriptors.scarce(LAST):
            return None
        return self._greediest(lambda peer: 0 if peer.mux is None else len(peer.mux.lanes))

    def accounts(self) -> tuple[PeerAccount, ...]:
        """Of every peer that has a session or ever cost anything, the greediest first."""
        rows = [_account(peer) for peer in self._peers()]
        return tuple(sorted(rows, key=lambda row: (-row.memory, -row.lanes, row.name)))

    def users(self) -> tuple[UserAccount, ...]:
        """The same by user, the greediest first."""
        found: dict[str, list[PeerAccount]] = defaultdict(list)
        for account in self.accounts():
            found[account.user].append(account)
        rows = [
            UserAccount(
                user=user,
                peers=len(mine),
                memory=sum(account.memory for account in mine),
                lanes=sum(account.lanes for account in mine),
                listeners=sum(account.listeners for account in mine),
                streams=sum(account.streams for account in mine),
            )
            for user, mine in found.items()
        ]
        return tuple(sorted(rows, key=lambda row: (-row.memory, -row.lanes, row.user)))

    def _greediest(self, of: Callable[[HubPeer], int] | None = None) -> HubPeer | None:
        """Of the user, or the key, that has most, the peer that has most: of memory, or of what is
        said."""
        measure = of or (lambda peer: peer.memory)
        by_payer: dict[Payer, list[HubPeer]] = defaultdict(list)
        for peer in self._peers():
            if measure(peer) > 0:
                by_payer[peer.payer].append(peer)
        if not by_payer:
            return None
        return max(max(by_payer.values(), key=lambda peers: sum(map(measure, peers))), key=measure)

    def _shed(self, peer: HubPeer, most: int) -> None:
        if peer.mux is None:
            return
        before = peer.memory
        given_up = peer.mux.shed(most)
        peer.shed += given_up
        if given_up and peer.shed_logged.due(self._clock()):
            log.warning(
                "streams_shed",
                node=peer.label,
                user=user_name(peer.uid),
                streams=given_up,
                bytes=before,
                most=most,
            )


def _account(peer: HubPeer) -> PeerAccount:
    mux = peer.mux
    return PeerAccount(
        name=peer.label,
        user=user_name(peer.uid) if peer.uid >= 0 else "",
        key=peer.key,
        memory=0 if mux is None else mux.session.memory,
        lanes=0 if mux is None else len(mux.lanes),
        listeners=peer.ports,
        streams=0 if mux is None else max(len(mux.session.streams) - 1, 0),
        messages=peer.messages + (0 if mux is None else mux.messages),
        log_lines=lines_about(peer.label),
        roster_writes=peer.roster_writes,
        seconds=round(peer.seconds, 3),
        shed=peer.shed,
    )


def _machine_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
