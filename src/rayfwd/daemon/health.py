"""How the daemon is, made of the one list of conditions: ready or not, the one line, the status.

Nothing else says what is wrong. It keeps two facts of the runtime.
"""

from __future__ import annotations

import os
import time
from collections import Counter

from rayfwd import __version__, codes, status
from rayfwd.daemon import page
from rayfwd.daemon.node import LISTENERS, RAY
from rayfwd.daemon.role import Role
from rayfwd.network.dials import Place
from rayfwd.network.own_name import missing_line
from rayfwd.status import Status
from rayfwd.system import build
from rayfwd.watch.conditions import Condition, worst

MOST_PORTS_SHOWN = 20
"""Ports that were dialled or refused, in the status."""


def _counted(places: Counter[Place]) -> tuple[status.PortCount, ...]:
    return tuple(
        status.PortCount(node=node, port=port, connections=count)
        for (node, port), count in places.most_common(MOST_PORTS_SHOWN)
    )


class Health:
    """Of one role. The runtime sets `ready_said` and `stopping`."""

    def __init__(self, role: Role) -> None:
        self.ready_said = False
        """The service manager was told READY."""
        self.stopping = False
        self._role = role
        self._started = time.time()

    def waiting_for(self) -> list[Condition]:
        """What keeps this node from being ready, roots first."""
        return [c for c in self._role.node.board.conditions if c.blocks_ready]

    def state(self) -> str:
        """`starting`, `waiting`, `ready` or `stopping`."""
        if self.stopping:
            return "stopping"
        waits = self.waiting_for()
        if not waits:
            return "ready"
        first_start = not self.ready_said and all(c.code is codes.RAY_STARTING for c in waits)
        return "starting" if first_start else "waiting"

    def summary(self) -> str:
        """One line in plain words, for systemd and for people."""
        if self.stopping:
            return "stopping"
        if waits := self.waiting_for():
            return f"waiting: {waits[0].problem.cause}"
        node = self._role.node
        bad = worst(node.board.conditions)
        if bad is not None and bad.severity != "note":
            return f"ready, but: {bad.problem.cause}"
        note = f"; {bad.problem.cause}" if bad is not None else ""
        nodes, listeners = len(node.view.nodes), node.listeners.open
        plural = "s" * (nodes != 1)
        return f"ready: {nodes} node{plural} in the plan, {listeners} listeners{note}"

    def now(self) -> Status:
        """The whole of it, now."""
        role, node = self._role, self._role.node
        part = role.status()
        return Status(
            version=__version__,
            code=build.code(),
            python=build.python(),
            role=node.config.role,
            name=node.config.name,
            pid=os.getpid(),
            uptime=round(time.time() - self._started, 1),
            state=self.state(),
            summary=self.summary(),
            conditions=node.board.conditions,
            node=node.view.own,
            link=part.link,
            direct=part.direct,
            workers=part.workers,
            clients=part.clients,
            ledger=part.ledger,
            streams=part.streams,
            bytes=part.bytes,
            listeners=self._listeners(),
            network=self._network(),
            ray=self._ray(),
            cluster=role.cluster,
            canary=node.canary.last,
            roster=part.roster,
            refused=tuple(
                status.RefusedPort(
                    by=refused.by or node.config.name,
                    of=refused.of or node.config.name,
                    reason=refused.reason.name.lower(),
                    cause=refused.text,
                    times=refused.times,
                    last=round(refused.last, 1),
                )
                for refused in part.refused
            ),
            page=None if node.page is None else page.url(str(node.page)),
        )

    def _listeners(self) -> status.Listeners:
        node = self._role.node
        listeners = node.listeners
        return status.Listeners(
            open=listeners.open,
            blocked=len(listeners.blocked),
            conditions=node.board.ids_of(LISTENERS),
            refused=tuple(
                status.RefusedUser(user=user, connections=count)
                for user, count in listeners.admission.refused.most_common()
            ),
        )

    def _network(self) -> status.Network:
        node = self._role.node
        overlay, dials = node.overlay, node.dials
        guard, guard_from = node.guard()
        return status.Network(
            level=overlay.level,
            why=overlay.why,
            remedy=overlay.remedy,
            hosts_line=self._hosts_line(),
            interface=node.interface,
            guard=guard,
            guard_from=guard_from,
            refused=overlay.refused,
            open=None if node.open_ports is None else tuple(sorted(node.open_ports)),
            dialled=_counted(dials.made),
            refused_there=_counted(dials.refused["there"]),
            refused_here=_counted(dials.refused["here"]),
        )

    def _hosts_line(self) -> str | None:
        """What gloo needs in /etc/hosts where nothing else tells it this node's address."""
        node = self._role.node
        own = node.view.own
        if node.overlay.level == "overlay" or own is None or own.advertised:
            return None
        return missing_line(own.address)

    def _ray(self) -> status.Ray:
        node = self._role.node
        ray = node.ray.now
        return status.Ray(
            state=ray.state,
            since=ray.since,
            version=ray.versions.ray if ray.versions else None,
            python=ray.versions.python if ray.versions else None,
            pid=ray.pid,
            adopted=ray.adopted,
            restarts=ray.restarts,
            conditions=node.board.ids_of(RAY),
            command=ray.command,
        )
