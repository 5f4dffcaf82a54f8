"""When a worker's Ray may start, and with which token: that depends on the head's Ray, of which the
hub tells, and on whether its ports can be reached from here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.daemon.advertise import AdvertiseCheck
from rayfwd.daemon.node import Node
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import token
from rayfwd.ray.token import RayAuth
from rayfwd.session import messages
from rayfwd.system import setting
from rayfwd.system.logs import get_logger

log = get_logger(__name__)

NOT_UP = frozenset({"waiting", "starting", "stopping", "failed"})
"""Phases of the head's Ray in which it cannot be joined; the head says why, where that is news."""


class WorkerRay:
    """A worker's, whose Ray itself is the node's."""

    def __init__(self, node: Node, advertise: AdvertiseCheck) -> None:
        self._node = node
        self._advertise = advertise
        self._heads: str | None = None
        """Phase of the head's Ray; None: not told, in this session or by an older head."""

    @property
    def heads_is_down(self) -> bool:
        """The head's Ray cannot be joined, as the head has said."""
        return self._heads in NOT_UP

    def hear(self, message: messages.HeadRay) -> None:
        """How the head's Ray is."""
        self._heads = message.phase
        if message.phase == "up":
            self._node.ray.set_head_start(message.start)
        self.let_start()

    def forget(self) -> None:
        """A new session has been told nothing yet."""
        self._heads = None

    def let_start(self) -> None:
        """Ray gives up after half a minute where the head's does not answer: it waits for that.
        And it is never started towards a stranger, who has one of the head's ports here."""
        self._node.ray.set_link_up(
            self._node.link_stands() and not self.heads_is_down and not self._in_the_way()
        )

    def waits(self) -> str:
        """Why it has not started yet."""
        if self.heads_is_down:
            return f"Ray on this node waits for the head's Ray, whose state is: {self._heads}"
        waits = self._node.ray.now.state == "waiting"
        if waits and (problem := self._in_the_way()) is not None:
            return f"Ray on this node waits until it can reach the head's Ray: {problem.cause}"
        return self._node.ray_in_words()

    def _in_the_way(self) -> Problem | None:
        """What keeps from a service of the head's."""
        head = self._node.view.head
        if head is None:
            return None
        try:
            for port in head.head_services.values():
                self._node.endpoint(head, port)
        except ProblemError as exc:
            return exc.problem
        return None

    async def before_start(self, own: NodePlan) -> None:
        """Raises ProblemError where it would start in vain."""
        if (problem := self._node.network_problem()) is not None:
            raise ProblemError(problem)
        await self._node.overlay.made()
        await self._check_token()
        if own.advertised and self._node.config.ray.advertise_check:
            await self._advertise.run(own)

    async def _check_token(self) -> None:
        """Raises ProblemError where the head's Ray would refuse this node's."""
        view = self._node.view
        if self._node.config.ray.auth == "token" and (view.auth is None or view.auth.mode == "off"):
            raise codes.RAY_AUTH_DIFFERS.error(
                f"{setting.value('ray.auth', 'token')} on this node, and the head gives out no "
                "token",
                f"set {setting.theirs('ray.auth')} to token on the head, or "
                f"{setting.value('ray.auth', 'auto')} here",
            )
        if view.head is not None:
            env = self._node.ray.environment or {}
            dashboard = self._node.endpoint(view.head, view.head.services["dashboard"])
            problem = await token.check(dashboard, env)
            if problem is not None:
                raise ProblemError(problem)

    def take_token(self, data: Mapping[str, Any] | None) -> RayAuth | None:
        """Ray's token, which is kept, or that there is none; an older head does not say.

        Raises ValueError.
        """
        config = self._node.config
        if data is None or config.ray.auth == "off":
            return None if data is None else RayAuth("off")
        auth = RayAuth.from_wire(data)
        if auth != self._node.view.auth:
            before = token.kept_auth(config.state_dir)
            try:
                token.keep(auth, config.state_dir)
            except ProblemError as exc:
                log.error(
                    exc.problem.code.event, cause=exc.problem.cause, remedy=exc.problem.remedy
                )
            token.provide(auth, config.home_environment(os.environ), config.state_dir, before)
        return auth
