"""How the head's links to its workers are: what is wrong with them, and their figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rayfwd import codes
from rayfwd.daemon.dialling import Dialling
from rayfwd.daemon.history import LinkNow
from rayfwd.daemon.views import link_now, link_seen, parked_problem
from rayfwd.hub import Hub
from rayfwd.problems import Severity
from rayfwd.transport.linkstats import LinkStats
from rayfwd.watch.conditions import Finding
from rayfwd.watch.links import LinkSeen

if TYPE_CHECKING:
    from rayfwd.ssh.meeting import Meeting  # it loads AsyncSSH


class HeadLinks:
    """Looks at the hub, at the dialling of workers and at the meeting places."""

    def __init__(self, own: str, hub: Hub, dialling: Dialling, meetings: Sequence[Meeting]) -> None:
        """`own`: the head's name."""
        self._own = own
        self._hub = hub
        self._dialling = dialling
        self._meetings = meetings

    def stand(self) -> bool:
        """The hub listens."""
        return self._hub.socket.started

    def findings(self) -> list[Finding]:
        """What is wrong. While the hub does not listen, one finding blocks readiness."""
        return [
            *self._of_hub(),
            *self._of_nodes(),
            *self._of_dialling(),
            *self._of_meetings(),
            *self._of_refused(),
        ]

    def _of_hub(self) -> Iterable[Finding]:
        if not self.stand():
            starting = codes.HUB_STARTING.problem(
                "the hub does not listen yet", "nothing: this takes a moment"
            )
            yield Finding(self._own, starting, blocks_ready=True)

    def _of_nodes(self) -> Iterable[Finding]:
        for node in self._hub.nodes.values():
            name, mux = node.plan.name, node.mux
            if node.state == "parked" and mux is not None:
                yield Finding(name, parked_problem(f"{name}'s link", mux))
            elif node.state == "down" and node.lost is not None and not node.left:
                yield Finding(
                    name,
                    codes.LINK_DOWN.problem(
                        f"{name}'s link is down, and its connections are lost: {node.lost}",
                        "nothing if it comes back; otherwise check `rayfwd status` on "
                        f"{name}, whether that machine is up, and this machine's sshd",
                    ),
                )

    def _of_dialling(self) -> Iterable[Finding]:
        for called, kept in self._dialling.problems():
            # One that has come by its own dialling is there all the same.
            named = self._hub.nodes.get(called)
            there: Severity | None = "note" if named and named.state == "up" else None
            yield Finding(called, kept, severity=there, explains=False)

    def _of_meetings(self) -> Iterable[Finding]:
        for meeting in self._meetings:
            if (problem := meeting.problem) is not None:
                yield Finding(meeting.called, problem, explains=False)

    def _of_refused(self) -> Iterable[Finding]:
        for name, refusal in self._hub.gate.refusals.lately():
            problem = refusal.code.problem(f"turned away: {refusal.cause}", refusal.remedy)
            # Another machine, perhaps: the node of that name may be well.
            yield Finding(name or self._own, problem, explains=False)

    def seen(self) -> Iterator[tuple[str, LinkSeen]]:
        """Those that are not down, by the worker's name."""
        for node in list(self._hub.nodes.values()):
            if node.state != "down":
                yield node.plan.name, link_seen(node.mux, node.link_stats)

    def stats(self) -> Mapping[str, LinkStats]:
        """What each has been through."""
        return {name: node.link_stats for name, node in self._hub.nodes.items()}

    def now(self) -> Iterator[tuple[str, LinkNow]]:
        """How each is at the moment."""
        for name, node in list(self._hub.nodes.items()):
            yield name, link_now(node.mux, node.link_stats)
