"""How a worker's links are, to the head and to other workers: what is wrong with them, and their
figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rayfwd import codes, status
from rayfwd.daemon.claim import NetworkClaim
from rayfwd.daemon.history import LinkNow
from rayfwd.daemon.metrics import HEAD
from rayfwd.daemon.views import (
    direct_absent,
    lanes_of,
    last_cut,
    link_now,
    link_seen,
    parked_problem,
)
from rayfwd.direct.ways import DirectWays
from rayfwd.problems import Severity
from rayfwd.transport.link import Link
from rayfwd.transport.linkstats import LinkStats
from rayfwd.watch.conditions import Finding
from rayfwd.watch.links import LinkSeen


class WorkerLinks:
    """Looks at the link, at the direct ways and at the claim on the network."""

    def __init__(self, own: str, link: Link, direct: DirectWays, claim: NetworkClaim) -> None:
        """`own`: the worker's name."""
        self._own = own
        self._link = link
        self._direct = direct
        self._claim = claim

    def stand(self) -> bool:
        """The link to the head is up."""
        return self._link.state == "up"

    def findings(self) -> list[Finding]:
        """What is wrong. While the link is not up, one finding at least blocks readiness."""
        return list(self._while_it_stands() if self.stand() else self._while_it_does_not())

    def _while_it_stands(self) -> Iterator[Finding]:
        for slot in self._link.slots:
            if slot.problem is not None and slot.number is None:
                lane = f"{self._own}/{slot.name}"
                yield Finding(lane, slot.problem, severity="warning", explains=False)
        for name, why in self._direct.problems():
            yield Finding(f"{self._own}/{name}", direct_absent(name, why), explains=False)
        if (taken := self._claim.problem) is not None:
            yield Finding(self._own, taken, blocks_ready=True)

    def _while_it_does_not(self) -> Iterator[Finding]:
        link, parked = self._link, self._link.state == "parked"
        if link.problem is not None:
            # While streams are held, what keeps the link from coming back is a part of that.
            kept: Severity | None = "note" if parked else None
            yield Finding(self._own, link.problem, severity=kept, blocks_ready=True)
        if parked and link.mux is not None:
            held = parked_problem(f"the link to {link.head.called}", link.mux)
            yield Finding(self._own, held, blocks_ready=True)
        elif link.problem is None:
            dialling = codes.LINK_STARTING.problem(
                f"dialling {link.head.ssh}"
                if link.head.ssh
                else "waiting for the head to dial this worker",
                "nothing: this takes a moment",
            )
            yield Finding(self._own, dialling, blocks_ready=True)

    def seen(self) -> Iterator[tuple[str, LinkSeen]]:
        """The link, by this worker's name."""
        yield self._own, link_seen(self._link.mux, self._link.link_stats)

    def stats(self) -> Mapping[str, LinkStats]:
        """What it has been through."""
        return {HEAD: self._link.link_stats}

    def now(self) -> Iterator[tuple[str, LinkNow]]:
        """How it is at the moment."""
        yield HEAD, link_now(self._link.mux, self._link.link_stats)

    def row(self, conditions: tuple[str, ...]) -> status.Link:
        """The link in the status; `conditions`: the ids of those that concern it."""
        link = self._link
        return status.Link(
            state=link.state,
            head=link.head.called,
            since=link.since,
            cuts=link.link_stats.cuts,
            ridden_through=link.link_stats.ridden_through,
            last_cut=last_cut(link.link_stats),
            conditions=conditions,
            lanes=lanes_of(link.mux),
        )
