"""The check of an advertised address before Ray is started there: dial-back and self-dial.

The worker holds the ports of its block for a moment, dials them itself, and has the hub dial them;
Ray is not started while one of the two fails.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from rayfwd import codes
from rayfwd.cluster import probe
from rayfwd.cluster.plan import NodePlan
from rayfwd.problems import Problem, ProblemError
from rayfwd.session import messages
from rayfwd.session.messages import Message
from rayfwd.system import setting
from rayfwd.system.logs import get_logger

log = get_logger(__name__)

FEATURE = "dial_back"
"""What a hub that dials back says of itself in its WELCOME."""

ANSWER_WAIT = 6.0
"""Seconds that a worker waits for the hub's results: its patience, and the link's way."""

Send = Callable[[Message], bool]
"""Sends a control message; False: there is no session."""


class AdvertiseCheck:
    """Of a worker. `run` is awaited before each `ray start`."""

    def __init__(self, send: Send, hub_features: Callable[[], frozenset[str]]) -> None:
        self._send = send
        self._hub_features = hub_features
        self._asked = 0
        self._answer: asyncio.Future[Mapping[int, str]] | None = None

    async def run(self, own: NodePlan) -> None:
        """Raises ProblemError where the address cannot be reached."""
        if FEATURE not in self._hub_features():
            log.warning(
                "advertise_not_checked",
                cause="the head's rayfwd is older than this one and cannot check "
                f"{setting.key('ray.advertise')}",
                remedy="run the same version of rayfwd on both sides",
            )
            return
        problem = await self._check(own)
        if problem is not None:
            raise ProblemError(problem)
        log.info("advertise_checked", address=own.address)

    async def _check(self, own: NodePlan) -> Problem | None:
        nonce = secrets.token_hex(16)
        ports = probe.sample(own)
        async with probe.HeldPorts(own.address, ports, nonce) as held:
            results, mine = await asyncio.gather(
                self._dial_back(ports, nonce), probe.dial_all(own.address, ports, nonce)
            )
            if results is None:
                return codes.ADVERTISE_UNCHECKED.problem(
                    f"the head did not say within {ANSWER_WAIT:.0f} s whether it reaches "
                    f"{own.address}",
                    "nothing if the link comes back, as the head is then asked again; "
                    f"{setting.value('ray.advertise_check', False)} starts Ray without this check",
                )
            return probe.judge_dial_back(own, results) or probe.judge_self_dial(
                own, mine, held.translated
            )

    async def _dial_back(self, ports: list[int], nonce: str) -> dict[int, str] | None:
        self._asked += 1
        self._answer = asyncio.get_running_loop().create_future()
        try:
            if not self._send(messages.DialBack(self._asked, tuple(ports), nonce)):
                return None
            async with asyncio.timeout(ANSWER_WAIT):
                return probe.read_results(await self._answer, ports)
        except TimeoutError:
            return None
        except ValueError as exc:
            log.warning("message_malformed", cause=repr(exc))
            return None
        finally:
            self._answer = None

    def answered(self, message: messages.DialledBack) -> None:
        """The hub has dialled."""
        answer = self._answer
        if answer is not None and not answer.done() and message.id == self._asked:
            answer.set_result(message.results)


class DialBackAttempts:
    """Of a head. Owns one attempt a node; a newer one takes its place."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def asked(self, plan: NodePlan, message: messages.DialBack, send: Send) -> None:
        """A worker asks to be dialled. Raises ValueError where it asks for more than its own.

        Only the address and the ports that the plan gives to that very node are dialled.
        """
        probe.check_ports(plan, message.ports)
        self.forget(plan.name)
        self._tasks[plan.name] = asyncio.create_task(
            self._dial(plan.address, message, send), name=f"dial back {plan.name}"
        )

    async def _dial(self, address: str, message: messages.DialBack, send: Send) -> None:
        results = await probe.dial_all(address, message.ports, message.nonce)
        send(messages.DialledBack(message.id, results))

    def forget(self, name: str) -> None:
        """End the node's attempt, if there is one."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    def keep(self, names: Collection[str]) -> None:
        """The other nodes have gone."""
        for name in [n for n in self._tasks if n not in names]:
            self.forget(name)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for name in list(self._tasks):
            self.forget(name)
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
