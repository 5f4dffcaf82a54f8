"""What nodes tell each other of what is wrong: a worker the head of its finds, the head all of all.

No loop and no socket: `message` gives what is to be sent, `receive` takes what came.
"""

from __future__ import annotations

from collections.abc import Collection

from rayfwd.daemon.cuts import Cuts
from rayfwd.session.messages import Conditions
from rayfwd.watch import conditions
from rayfwd.watch.board import Board
from rayfwd.watch.conditions import Finding, node_of


class ConditionExchange:
    """Of the node named `own`. `speaks_for_all`: it is the head."""

    def __init__(self, own: str, board: Board, speaks_for_all: bool) -> None:
        self.last_sent: Conditions | None = None
        """The last message to the others."""
        self._own = own
        self._board = board
        self._speaks_for_all = speaks_for_all
        self._cuts = Cuts()
        self._heard: set[str] = set()
        """Nodes whose word counts now."""

    def message(self) -> Conditions | None:
        """What the others are told of; None: they know already."""
        message, left_out = conditions.message(
            c
            for c in self._board.conditions
            if not c.code.untold
            and (
                self._speaks_for_all
                or (c.seen_by == self._own and not c.code.both_ends and c.severity != "note")
            )
        )
        self._cuts.log(message, left_out)
        if message == self.last_sent:
            return None
        self.last_sent = message
        return message

    def begin_again(self) -> None:
        """Somebody is there who has heard nothing yet."""
        self.last_sent = None

    def receive(self, message: Conditions, node: str) -> None:
        """What another node tells; the head tells of all."""
        own, board = self._own, self._board
        self._heard.add(node)
        findings = conditions.from_message(message, node if self._speaks_for_all else None)
        news = [
            seen
            for seen in findings
            if seen.seen_by != own
            and not (node_of(seen.subject) == own and seen.problem.code.both_ends)
        ]
        # Of a hundred nodes each need not log what is wrong with the ninety-eight others.
        near = {own, board.head}
        if self._speaks_for_all:
            near = {node_of(seen.subject) for seen in news}
        self._put(node, [seen for seen in news if node_of(seen.subject) in near], quiet=False)
        self._put(node, [seen for seen in news if node_of(seen.subject) not in near], quiet=True)

    def _put(self, node: str, found: list[Finding], quiet: bool) -> None:
        self._board.put_all(_watcher(node, quiet), found, quiet=quiet)

    def drop(self, node: str) -> None:
        """Its link is down: what it told of counts no more."""
        self._heard.discard(node)
        for quiet in (False, True):
            self._board.leave(_watcher(node, quiet))

    def keep(self, nodes: Collection[str]) -> None:
        """The links of all others are down."""
        for node in self._heard.difference(nodes):
            self.drop(node)


def _watcher(node: str, quiet: bool) -> str:
    """As the board knows it."""
    return f"{'quiet' if quiet else 'told'}:{node}"
