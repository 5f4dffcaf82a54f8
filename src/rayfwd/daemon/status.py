"""How the daemon is: whether it is ready, the one line, and the document of `rayfwd status`.

Made of the role and of what its node knows when it is asked; it keeps two facts of the runtime.
"""

from __future__ import annotations

import os
import time
from typing import Any

from rayfwd import __version__, codes
from rayfwd.daemon.role import Role
from rayfwd.problems import Problem, Severity
from rayfwd.watch.conditions import worst

STATUS_SCHEMA = 1
"""Raised when a key of the status changes its meaning or goes; new keys may come."""


class NodeStatus:
    """Of one role. The runtime sets `ready_said` and `stopping`."""

    def __init__(self, role: Role) -> None:
        self.ready_said = False
        """The service manager was told READY."""
        self.stopping = False
        self._role = role
        self._started = time.time()

    def waiting_for(self) -> list[Problem]:
        """What keeps this node from being ready."""
        waits = self._role.link_problems()
        ray = self._role.node.ray.state
        if not waits and ray.phase not in {"up", "by_hand"}:
            waits.append(
                ray.problem
                or codes.RAY_STARTING.problem(self._role.ray_waits(), "nothing: this takes a while")
            )
        return waits

    def summary(self) -> str:
        """One line in plain words, for systemd and for people."""
        if self.stopping:
            return "stopping"
        waits = self.waiting_for()
        if waits:
            return f"waiting: {waits[0].cause}"
        node = self._role.node
        bad = worst(node.board.conditions)
        if bad is not None and bad.severity != "note":
            return f"ready, but: {bad.cause}"
        note = f"; {bad.cause}" if bad is not None else ""
        nodes, listeners = len(node.view.nodes), node.listeners.open
        return f"ready: {nodes} nodes in the plan, {listeners} listeners{note}"

    def problems(self) -> list[dict[str, Any]]:
        """Every condition, here and elsewhere, but what `waiting_for` has; roots first."""
        waits = {p.code for p in self.waiting_for()}
        node = self._role.node
        own = node.config.name
        return [
            c.to_wire()
            for c in node.board.conditions
            if not (c.code in waits and c.subject == own and c.seen_by == own)
        ]

    def _severity(self, waited_for: Problem) -> Severity:
        """A link that is parked is not as bad as one that is down, for the same reason."""
        node = self._role.node
        code, own = waited_for.code, node.config.name
        shown = (c.severity for c in node.board.conditions if (c.code, c.subject) == (code, own))
        return next(shown, code.severity)

    def state(self) -> str:
        """`starting`, `waiting`, `ready` or `stopping`."""
        if self.stopping:
            return "stopping"
        if not self.waiting_for():
            return "ready"
        if self.ready_said or self._role.link_problems() or self._role.node.ray.state.problem:
            return "waiting"
        return "starting"

    def to_wire(self) -> dict[str, Any]:
        """The whole of `rayfwd status --json`."""
        role, node = self._role, self._role.node
        ray = node.ray.state
        versions = ray.versions
        return {
            "schema": STATUS_SCHEMA,
            "version": __version__,
            "role": node.config.role,
            "name": node.config.name,
            "pid": os.getpid(),
            "uptime": round(time.time() - self._started, 1),
            "state": self.state(),
            "summary": self.summary(),
            "waiting_for": [
                {**p.to_wire(), "severity": self._severity(p)} for p in self.waiting_for()
            ],
            "problems": self.problems(),
            "node": None if node.view.own is None else node.view.own.to_wire(),
            **role.role_status(),
            "listeners": {
                "open": node.listeners.open,
                "blocked": [p.to_wire() for p in node.listeners.blocked],
                "refused": [
                    {"user": user, "connections": count}
                    for user, count in node.listeners.admission.refused.most_common()
                ],
            },
            "ray": {
                "phase": ray.phase,
                "since": ray.since,
                "version": versions.ray if versions else None,
                "python": versions.python if versions else None,
                "pid": ray.pid,
                "adopted": ray.adopted,
                "restarts": ray.restarts,
                "problem": ray.problem.to_wire() if ray.problem else None,
                "command": ray.command,
            },
            "cluster": role.cluster.to_wire() if role.cluster else None,
            "canary": node.canary.last.to_wire() if node.canary.last else None,
        }
