"""Examines a worker: its way to the hub, what the hub says of it, and its own Ray and ports."""

from __future__ import annotations

import asyncio
import secrets
from functools import cached_property

from rayfwd import codes
from rayfwd.cluster import probe
from rayfwd.cluster.identity import KEY_FILE, Identity
from rayfwd.daemon import advertise
from rayfwd.daemon.worker import hello_of
from rayfwd.doctor import direct_checks
from rayfwd.doctor.common_checks import plan_of
from rayfwd.doctor.hub_probe import HubProbe
from rayfwd.doctor.reachability import NOT_REACHED, WayExamination
from rayfwd.doctor.rows import Row, failed, passed, skipped
from rayfwd.problems import ProblemError
from rayfwd.ray.install import RayInstall
from rayfwd.ray.starter import check_versions
from rayfwd.session.checks import CheckReply
from rayfwd.session.handshake import Hello
from rayfwd.status import Status
from rayfwd.system import setting


class WorkerExamination(WayExamination):
    """Of a worker."""

    after_hub = ("place",)
    _key_is_known = True
    """False: the node's key is there, and may not be read."""

    async def run(self) -> None:
        self.emit(self.settings())
        self.emit(await self.daemon())
        self.emit(await self.keeper())
        await self.way()
        running = () if self.status is None else self.status.direct
        self.emit(await direct_checks.look(self.config, running))
        row, found = await self.ray()
        self.emit(row)
        self.emit(self._compared(found))
        self.emit(await self.ports())
        self.emit(await self.listeners())
        self.emit(await self.network_level())
        self.emit(await self.limits())
        self.emit(self.later("clock"))
        self.emit(await self.names())
        self.emit(self.proxies())
        self.emit(self.later("link"))
        why = (
            f"{setting.key('ray.advertise')} is not set"
            if self.config.ray.advertise is None
            else NOT_REACHED
        )
        for check in ("advertise", "advertise_self"):
            self.emit(self.later(check, why))

    # -- what the hub says of it --------------------------------------------------------

    def hello(self) -> Hello:
        return hello_of(self.config, self.identity.public)

    @cached_property
    def identity(self) -> Identity:
        """The node's, or one as the daemon would make it."""
        return self._read() or Identity.make()

    def _read(self) -> Identity | None:
        path = self.config.state_dir / KEY_FILE
        try:
            return Identity.from_text(path.read_text(encoding="ascii"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, UnicodeError):
            self._key_is_known = False
            return None

    def answered(self, answer: CheckReply) -> None:
        self.emit(self._place(answer))

    def _place(self, answer: CheckReply) -> Row:
        known = self._key_is_known
        if answer.refusal is not None and (known or answer.refusal.code != codes.NAME_TAKEN):
            refusal = answer.refusal
            return failed("place", refusal)
        plan = plan_of(answer.welcome.node)
        if plan is None:
            return skipped("place", f"{self.config.state_dir}/node.key cannot be read by this user")
        self.own = plan
        there = any(node.name == plan.name for node in self.nodes)
        span = f"{plan.base}-{plan.last_worker_port}"
        said = f"{plan.name} {'has' if there else 'will get'} {plan.address} and ports {span}"
        return passed("place", said, address=plan.address, ports=span)

    # -- an advertised address --------------------------------------------------------

    async def further(self, hub_probe: HubProbe, answer: CheckReply) -> None:
        """Raises ProblemError where the hub does not answer."""
        own = self.own
        if self.config.ray.advertise is None or own is None:
            return
        if self.status is not None:
            self._advertised_by_daemon(self.status)
            return
        if advertise.FEATURE not in answer.welcome.features:
            why = "the head's rayfwd is older and cannot check this"
            self._keep(skipped("advertise", why), skipped("advertise_self", why))
            return
        nonce, wanted = secrets.token_hex(16), probe.sample(own)
        try:
            async with probe.HeldPorts(own.address, wanted, nonce) as held:
                question = {"ask": "dial_back", "ports": wanted, "nonce": nonce}
                told, mine = await asyncio.gather(
                    hub_probe.ask(question), probe.dial_all(own.address, wanted, nonce)
                )
                translated = held.translated
        except ProblemError as exc:
            if exc.problem.code != codes.PORT_IN_USE:
                raise
            why = "its ports are not free"
            self._keep(skipped("advertise", why), skipped("advertise_self", why))
            return
        try:
            results = probe.read_results(told.get("results"), wanted)
        except ValueError as exc:
            cause = f"the hub's answer cannot be read: {exc}"
            raise codes.ADVERTISE_UNCHECKED.error(cause, "ask again") from None
        span = f"{own.address}, {len(wanted)} ports"
        back = probe.judge_dial_back(own, results)
        self_ = probe.judge_self_dial(own, mine, translated)
        self._keep(
            failed("advertise", back)
            if back is not None
            else passed("advertise", f"the head reaches {span}"),
            failed("advertise_self", self_)
            if self_ is not None
            else passed("advertise_self", f"this machine reaches {span}"),
        )

    def _advertised_by_daemon(self, status: Status) -> None:
        """The daemon has looked before it started Ray, and looks again while it does not."""
        for condition in status.conditions:
            check, problem = condition.code.check, condition.problem
            if check and condition.blocks_ready:
                (other,) = {"advertise", "advertise_self"} - {check}
                self._keep(failed(check, problem), skipped(other, "see the row above"))
                return
        if self.ray_state == "up" and self.config.ray.advertise_check:
            said = "the daemon checked it before it started Ray"
            self._keep(passed("advertise", said), passed("advertise_self", said))
        else:
            why = "the running daemon checks it before it starts Ray"
            self._keep(skipped("advertise", why), skipped("advertise_self", why))

    def _keep(self, *found: Row) -> None:
        self._later |= {row.check: row for row in found}

    # -- the rest --------------------------------------------------------

    def _compared(self, found: RayInstall | None) -> Row:
        if found is None:
            return skipped("versions", "no Ray was found here, so there is nothing to compare")
        if self._versions is None:
            why = "the head's rayfwd does not know its own Ray (yet)" if self.nodes else NOT_REACHED
            return skipped("versions", why)
        try:
            check_versions(found, self._versions, {**self.env, **self.config.ray.env})
        except ProblemError as exc:
            return failed("versions", exc.problem)
        head = self._versions
        return passed("versions", f"the same as the head's: Ray {head.ray}, Python {head.python}")
