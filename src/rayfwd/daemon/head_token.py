"""The token of the cluster's Ray, of which the head decides: whether there is one, who is told of
it, and that another takes its place when a node that knows it is forgotten.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rayfwd.daemon.forgotten import KEPT, NAMED, OFF, TURNED, Forgotten
from rayfwd.daemon.node import Node
from rayfwd.hub import Hub
from rayfwd.hub.roster import Roster
from rayfwd.ray import token
from rayfwd.ray.token import RayAuth
from rayfwd.session import messages
from rayfwd.system.logs import get_logger

log = get_logger(__name__)


class HeadToken:
    """Keeps it in the node's view. `restart_ray` is called where another takes its place."""

    def __init__(
        self,
        node: Node,
        hub: Hub,
        roster: Roster,
        restart_ray: Callable[[], None],
        by_hand: Callable[[str], bool],
    ) -> None:
        """`by_hand`: whether a worker's Ray was started by hand."""
        self._node = node
        self._hub = hub
        self._roster = roster
        self._restart_ray = restart_ray
        self._by_hand = by_hand
        self._settling = asyncio.Lock()
        """Held while it is decided, or another takes its place."""

    async def settle(self, version: str) -> None:
        """Decide whether Ray, of that version, asks for one. Raises ProblemError."""
        config = self._node.config
        here = config.home_environment(os.environ)
        env = {**here, **config.ray.env}
        async with self._settling:
            auth = await asyncio.to_thread(
                token.decide, config.ray.auth, version, env, config.state_dir
            )
            await asyncio.to_thread(token.provide, auth, here, config.state_dir)
            self._set(auth)

    def settle_without_ray(self) -> None:
        """Where Ray was not found, what was decided last holds until it is."""
        if self._node.view.auth is None:
            self._set(token.kept_auth(self._node.config.state_dir) or RayAuth("off"))

    async def forget_verb(self, args: dict[str, Any]) -> dict[str, Any]:
        """`forgotten`: what came of it; None: there is no such worker. Raises ProblemError, with
        nothing changed."""
        name = str(args.get("name", ""))
        async with self._settling:
            if not self._roster.knows(name):
                return {"forgotten": None}
            forgotten = self._forget(name, keep=args.get("keep_token") is True)
        return {"forgotten": forgotten.to_wire()}

    def _set(self, auth: RayAuth) -> None:
        if auth != self._node.view.auth:
            self._node.set_view(replace(self._node.view, auth=auth))
            self._tell(auth)
            log.info("ray_auth_settled", mode=auth.mode)

    def _tell(self, auth: RayAuth) -> None:
        """Whoever is away is told by WELCOME, or when its session is resumed."""
        self._hub.tell_all(messages.Auth(auth.mode, auth.token or None), clients=True)

    def _forget(self, name: str, keep: bool) -> Forgotten:
        """In one go: whoever is forgotten hears nothing of the new token."""
        config, auth = self._node.config, self._node.view.auth
        variable = token.named_by({**os.environ, **config.ray.env})
        if auth is None or auth.mode == "off":
            self._hub.forget(name)
            return Forgotten(node=name, token=OFF)
        if keep or variable is not None:
            self._hub.forget(name)
            return Forgotten(node=name, token=KEPT if keep else NAMED, variable=variable)
        turned = token.turn_over(config.home_environment(os.environ), config.state_dir)
        self._hub.forget(name)
        return self._turn_over(name, turned)

    def _turn_over(self, name: str, auth: RayAuth) -> Forgotten:
        """Restart Ray everywhere with another token: first here, so that a worker's, which comes
        back in a moment, waits until the head's knows the token, too."""
        self._node.set_view(replace(self._node.view, auth=auth))
        self._restart_ray()
        self._tell(auth)
        forgotten = self._restarts(name)
        log.warning(
            "ray_token_turned",
            forgotten=name,
            restarted=forgotten.restarted,
            away=forgotten.away,
            by_hand=forgotten.by_hand,
        )
        return forgotten

    def _restarts(self, name: str) -> Forgotten:
        """Whose Ray a new token restarts."""
        own, nodes = self._node.config.name, self._hub.nodes.values()
        there = [node.plan.name for node in nodes if node.state == "up"]
        by_hand = {worker for worker in there if self._by_hand(worker)}
        by_hand |= {own} if self._node.ray.by_hand else set()
        return Forgotten(
            node=name,
            token=TURNED,
            restarted=tuple(n for n in (own, *there) if n not in by_hand),
            away=tuple(node.plan.name for node in nodes if node.state != "up"),
            by_hand=tuple(n for n in (own, *there) if n in by_hand),
        )
