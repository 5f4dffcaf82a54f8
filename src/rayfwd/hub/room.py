"""Which node yields its place in the plan, where there is none left for one that is new.

Places are what a stolen key, or one of the SSH users, can use up by names without number: ports of
the plan, and descriptors for the listeners that stand for them on every other machine. Who was here
before keeps its place. It yields only if it came for a moment and has gone, or is new itself, and
the newest of a user, or a key, that has more places than the one who comes would have with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from rayfwd import codes
from rayfwd.hub.peers import HubNode, Payer

NO_ROOM = frozenset({codes.PLAN_FULL, codes.LISTENERS_FULL})
"""Why a node is refused for which another may yield."""
YIELDS, YIELDS_A_SECOND = 16, 1.0
"""Nodes that yield at once, and then: each is written to the disk and told to everybody."""
MOMENT = 60.0
"""Seconds: who was here for less since its name was new, and has been away for as long, yields."""
SETTLED = 3600.0
"""Seconds after which a name is no new one any more, and keeps its place whoever comes."""


def who_yields(nodes: Iterable[HubNode], payer: Payer, needed: int, now: float) -> HubNode | None:
    """Of `nodes`, the oldest first, for one of `payer` that needs so many ports; None: nobody.

    `now` is the loop's time.
    """
    listening = [node for node in nodes if node.ports]
    gone = next((node for node in listening if _was_here_for_a_moment(node, now)), None)
    return gone or _newest_of_the_greediest(listening, payer, needed, now)


def _was_here_for_a_moment(node: HubNode, now: float) -> bool:
    return node.ended - node.joined < MOMENT and now - node.ended >= MOMENT


def _newest_of_the_greediest(
    nodes: Iterable[HubNode], payer: Payer, needed: int, now: float
) -> HubNode | None:
    places: dict[Payer, list[HubNode]] = defaultdict(list)
    for node in nodes:
        places[node.payer].append(node)
    mine = sum(node.ports for node in places.pop(payer, []))
    if not places:
        return None
    greediest = max(places.values(), key=_ports)
    newest = greediest[-1]
    has_more = _ports(greediest) - newest.ports >= mine + needed
    return newest if has_more and now - newest.joined < SETTLED else None


def _ports(nodes: Iterable[HubNode]) -> int:
    return sum(node.ports for node in nodes)
