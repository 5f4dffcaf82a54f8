"""Examines a worker: its way to the hub, what the hub says of it, and how quick the way is.

One SSH connection serves all of it, and is closed before this machine's own checks begin.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncssh

from rayfwd import __version__, probe
from rayfwd.config import Config
from rayfwd.daemon import advertise
from rayfwd.doctor import looks, rules
from rayfwd.doctor.base import Examination, Tell, is_address, plan_of
from rayfwd.doctor.rows import Row, failed, passed, skipped, warned
from rayfwd.doctor.visit import PATIENCE, Visit
from rayfwd.plan import NodePlan
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray.install import RayInstall, Versions
from rayfwd.ray.supervisor import check_versions
from rayfwd.session.checkup import Answer
from rayfwd.session.handshake import Hello
from rayfwd.session.lane import LaneClass
from rayfwd.ssh import Dialer

NOT_REACHED = "not got so far"
STAGES = ("ssh", "host_key", "auth", "channel", "hub")
_STAGE_OF = {
    "ssh_unreachable": "ssh",
    "ssh_turned_away": "ssh",
    "ssh_lost": "ssh",
    "ssh_failed": "ssh",
    "ssh_config_invalid": "ssh",
    "ssh_file_unreadable": "ssh",
    "host_key_mismatch": "host_key",
    "host_key_unknown": "host_key",
    "ssh_key_unusable": "auth",
    "ssh_auth_refused": "auth",
    "channel_refused": "channel",
}
"""At which stage of the way to the hub a problem is met; any other at the last."""
_BEFORE_DIALLING = frozenset({"ssh_key_unusable", "ssh_config_invalid", "ssh_file_unreadable"})


class WorkerExamination(Examination):
    """Of a worker."""

    def __init__(self, config: Config, control: Path, env: Mapping[str, str], tell: Tell) -> None:
        super().__init__(config, control, env, tell)
        assert config.head is not None, "a worker's configuration has a head"
        self._head = config.head
        self._later: dict[str, Row] = {}
        """Rows that are known before their turn."""
        self._versions: Versions | None = None

    async def run(self) -> None:
        self.say(self.settings())
        self.say(await self.daemon())
        await self._way()
        row, found = await self.ray()
        self.say(row)
        self.say(self._compared(found))
        self.say(await self.ports())
        self.say(await self.doors())
        self.say(await self.limits())
        self.say(self._later.get("clock") or skipped("clock", NOT_REACHED))
        self.say(await self._names())
        self.say(self.proxies())
        self.say(self._later.get("link") or skipped("link", NOT_REACHED))
        for check in ("advertise", "advertise_self"):
            why = "ray.advertise is not set" if self.config.ray.advertise is None else NOT_REACHED
            self.say(self._later.get(check) or skipped(check, why))

    # -- the way to the hub --------------------------------------------------------

    async def _way(self) -> None:
        """Dial, ask, measure; say the rows up to `place`, and keep those of later checks."""
        dialer = Dialer(self._head)
        began = time.monotonic()
        try:
            connection = await dialer.connect()
        except ProblemError as exc:
            self._stopped(exc.problem)
            return
        try:
            self._connected(connection, time.monotonic() - began)
            visit = await self._visit(dialer, connection)
            if visit is not None:
                await self._ask_all(visit)
        finally:
            connection.abort()

    def _stopped(self, problem: Problem) -> None:
        """The way ends at a stage: what was before is well, what comes after is not known."""
        at = STAGES.index(_STAGE_OF.get(problem.code, "hub"))
        target = self._head.ssh
        well = {
            "ssh": f"{target} answers",
            "host_key": "the head's host key is the one that is known",
            "auth": f"{target} takes this machine's key",
            "channel": self._channel_kind(),
        }
        done = {row.check for row in self.rows}
        for index, stage in enumerate((*STAGES, "place")):
            if stage in done:
                continue
            if index == at:
                self.say(failed(stage, problem))
            elif index > at or problem.code in _BEFORE_DIALLING:
                self.say(skipped(stage, NOT_REACHED))
            else:
                self.say(passed(stage, well[stage]))

    def _channel_kind(self) -> str:
        if self._head.via == "exec":
            return f"a session that runs `{self._head.attach_command}` (via = exec)"
        return f"a stream to {self._head.socket} (via = socket)"

    def _connected(self, connection: asyncssh.SSHClientConnection, seconds: float) -> None:
        key = connection.get_server_host_key()
        version = str(connection.get_extra_info("server_version", "")).removeprefix("SSH-2.0-")
        cipher = str(connection.get_extra_info("send_cipher", ""))
        user = str(connection.get_extra_info("username", ""))
        target = self._head.ssh
        self.say(passed("ssh", f"{target} answers: {version}", server=version, cipher=cipher))
        known = "none" if key is None else f"{key.get_algorithm()} {key.get_fingerprint()}"
        self.say(passed("host_key", f"{known} is known", fingerprint=known))
        slow = rules.judge_login(target, seconds)
        if slow is not None:
            self.say(warned("auth", slow, seconds=round(seconds, 3)))
        else:
            said = f"logged in as {user} in {seconds:.2f} s"
            self.say(passed("auth", said, user=user, seconds=round(seconds, 3)))

    async def _visit(
        self, dialer: Dialer, connection: asyncssh.SSHClientConnection
    ) -> Visit | None:
        visit = Visit()
        try:
            async with asyncio.timeout(PATIENCE):
                await dialer.open_channel(connection, lambda: visit)
        except ProblemError as exc:
            self._stopped(exc.problem)
            return None
        except TimeoutError:
            cause = f"the head's sshd opened no channel in {PATIENCE:.0f} s"
            self._stopped(Problem("hub_silent", cause, "see the head's load and its sshd log"))
            return None
        return visit

    async def _ask_all(self, visit: Visit) -> None:
        key, known = self._key()
        try:
            answer = await visit.begin(self._hello(key))
        except ProblemError as exc:
            if exc.problem.code != "hub_older":
                self._stopped(exc.problem)
                return
            self.say(passed("channel", self._channel_kind()))
            self.say(warned("hub", exc.problem))
            self.say(skipped("place", "the head's rayfwd does not say"))
            return
        self.say(passed("channel", self._channel_kind()))
        self.say(self._hub(answer))
        self.say(self._place(answer, known))
        try:
            await self._measure(visit)
            await self._advertise(visit, answer)
        except ProblemError as exc:
            for check in ("clock", "link"):
                self._later.setdefault(check, failed(check, exc.problem))

    def _key(self) -> tuple[str, bool]:
        """The node's key, or one as the daemon would make it; False: ours cannot be read."""
        path = self.config.state_dir / "node.key"
        try:
            return path.read_text(encoding="ascii").strip() or secrets.token_hex(32), True
        except (FileNotFoundError, NotADirectoryError):
            return secrets.token_hex(32), True
        except (OSError, UnicodeDecodeError):
            return secrets.token_hex(32), False

    def _hello(self, key: str) -> Hello:
        config = self.config
        return Hello(
            node=config.name,
            key=key,
            session="0",
            resumes=False,
            lane=LaneClass.INTERACTIVE,
            version=__version__,
            worker_ports=config.worker_ports,
            advertise=config.ray.advertise,
            ride_through=config.ride_through,
        )

    def _hub(self, answer: Answer) -> Row:
        welcome = answer.welcome
        self.network = welcome.network
        if welcome.ray is not None and welcome.python is not None:
            self._versions = Versions(welcome.ray, welcome.python)
        try:
            self.nodes = tuple(NodePlan.from_wire(node) for node in welcome.nodes)
        except ValueError as exc:
            remedy = "run the same rayfwd on both sides"
            return failed(
                "hub", Problem("plan_malformed", f"the hub's plan is none: {exc}", remedy)
            )
        problem = rules.judge_version(__version__, welcome.version)
        if problem is not None:
            return warned("hub", problem, version=welcome.version)
        said = f"rayfwd {welcome.version} answers, {len(self.nodes)} nodes are known"
        return passed("hub", said, version=welcome.version, nodes=len(self.nodes))

    def _place(self, answer: Answer, known: bool) -> Row:
        if answer.refusal is not None and (known or answer.refusal.code != "name_taken"):
            refusal = answer.refusal
            return failed("place", Problem(refusal.code, refusal.cause, refusal.remedy))
        plan = plan_of(answer.welcome.node)
        if plan is None:
            return skipped("place", f"{self.config.state_dir}/node.key cannot be read by this user")
        self.own = plan
        there = any(node.name == plan.name for node in self.nodes)
        span = f"{plan.base}-{plan.last_worker_port}"
        said = f"{plan.name} {'has' if there else 'will get'} {plan.address} and ports {span}"
        return passed("place", said, address=plan.address, ports=span)

    async def _measure(self, visit: Visit) -> None:
        """Raises ProblemError."""
        ticks = await visit.ticks()
        ahead, doubt = rules.offset(ticks)
        trip = sorted(tick.trip for tick in ticks)[len(ticks) // 2]
        values = {"seconds_behind": round(ahead, 4), "doubt": round(doubt, 4)}
        problem = rules.judge_clock(ahead, doubt)
        if problem is not None:
            self._later["clock"] = warned("clock", problem, **values)
        else:
            within = max(abs(ahead) + doubt, 0.001)
            said = f"the head's clock is the same within {within:.3f} s"
            self._later["clock"] = passed("clock", said, **values)
        down, up = await visit.rates(trip)
        values = {"rtt_ms": round(trip * 1000, 3), "down": round(down), "up": round(up)}
        problem = rules.judge_link(trip, down, up)
        if problem is not None:
            self._later["link"] = warned("link", problem, **values)
            return
        said = (
            f"a round trip takes {trip * 1000:.1f} ms; one connection moves "
            f"{rules.shown_rate(down)} from the head and {rules.shown_rate(up)} to it"
        )
        self._later["link"] = passed("link", said, **values)

    # -- an advertised address --------------------------------------------------------

    async def _advertise(self, visit: Visit, answer: Answer) -> None:
        """Raises ProblemError where the hub does not answer."""
        own = self.own
        if self.config.ray.advertise is None or own is None:
            return
        if self.status is not None:
            self._advertised_by_daemon(self.status)
            return
        if advertise.FEATURE not in answer.welcome.features:
            why = "the head's rayfwd does not dial back"
            self._keep(skipped("advertise", why), skipped("advertise_self", why))
            return
        nonce, wanted = secrets.token_hex(16), probe.sample(own)
        try:
            async with probe.Listeners(own.address, wanted, nonce) as listeners:
                question = {"ask": "dial_back", "ports": wanted, "nonce": nonce}
                told, mine = await asyncio.gather(
                    visit.ask(question), probe.dial_all(own.address, wanted, nonce)
                )
                translated = listeners.translated
        except ProblemError as exc:
            if exc.problem.code != "port_in_use":
                raise
            why = "its ports are not free"
            self._keep(skipped("advertise", why), skipped("advertise_self", why))
            return
        try:
            results = probe.read_results(told.get("results"), wanted)
        except ValueError as exc:
            cause = f"the hub's answer is none: {exc}"
            raise ProblemError(Problem("advertise_unchecked", cause, "ask again")) from None
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

    def _advertised_by_daemon(self, status: Mapping[str, Any]) -> None:
        """The daemon has looked before it started Ray, and looks again while it does not."""
        for waited in status.get("waiting_for", []):
            if str(waited["code"]).startswith("advertise_"):
                problem = Problem(waited["code"], waited["cause"], waited["remedy"])
                own_side = problem.code == "advertise_self_unreachable"
                check, other = ("advertise_self", "advertise")[:: 1 if own_side else -1]
                self._keep(failed(check, problem), skipped(other, "see the other"))
                return
        if self.phase == "up" and self.config.ray.advertise_check:
            said = "the daemon has seen it before it started Ray"
            self._keep(passed("advertise", said), passed("advertise_self", said))
        else:
            why = "the daemon that runs looks before it starts Ray"
            self._keep(skipped("advertise", why), skipped("advertise_self", why))

    def _keep(self, *found: Row) -> None:
        self._later |= {row.check: row for row in found}

    # -- the rest --------------------------------------------------------

    def _compared(self, found: RayInstall | None) -> Row:
        if found is None:
            return skipped("versions", "there is no Ray to compare")
        if self._versions is None:
            why = "the head's rayfwd does not know its own Ray (yet)" if self.nodes else NOT_REACHED
            return skipped("versions", why)
        try:
            check_versions(found, self._versions, {**self.env, **self.config.ray.env})
        except ProblemError as exc:
            return failed("versions", exc.problem)
        head = self._versions
        return passed("versions", f"the head's too: Ray {head.ray}, Python {head.python}")

    async def _names(self) -> Row:
        try:
            host, port, direct = await Dialer(self._head).place()
            if not direct:
                return skipped("names", f"a jump host or command finds {host}")
            if is_address(host):
                return passed("names", f"{host} is an address: nobody is asked")
            seconds, addresses = await looks.look_up(host, port)
        except ProblemError as exc:
            return failed("names", exc.problem)
        problem = rules.judge_names(host, seconds)
        if problem is not None:
            return warned("names", problem, seconds=round(seconds, 3))
        said = f"{host} is {', '.join(addresses)}, found in {seconds:.2f} s"
        return passed("names", said, seconds=round(seconds, 3))
