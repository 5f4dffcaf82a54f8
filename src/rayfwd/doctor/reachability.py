"""A machine's way to the hub, as its doctor goes it: what a worker and a client have in common.

One SSH connection serves all of it, and is closed before this machine's own checks begin.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import get_args

from rayfwd import __version__, codes
from rayfwd.cluster.identity import Identity
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config, HeadConfig
from rayfwd.doctor import judgements, observe
from rayfwd.doctor.common_checks import Emit, Examination
from rayfwd.doctor.hub_probe import HubProbe
from rayfwd.doctor.rows import Row, failed, passed, skipped, warned
from rayfwd.problems import Problem, ProblemError, Stage
from rayfwd.ray.install import Versions
from rayfwd.session.checks import CheckReply
from rayfwd.session.handshake import Hello
from rayfwd.ssh.asyncssh_carrier import SshConnection
from rayfwd.ssh.carriers import carrier_for
from rayfwd.ssh.openssh_carrier import OpensshConnection
from rayfwd.system.addresses import is_address

NOT_REACHED = "not reached yet"
STAGES = get_args(Stage)


class WayExamination(Examination):
    """Of a machine that dials the head."""

    after_hub: tuple[str, ...] = ()
    """Checks that `answered` makes of the hub's answer."""

    def __init__(self, config: Config, control: Path, env: Mapping[str, str], emit: Emit) -> None:
        super().__init__(config, control, env, emit)
        assert config.head is not None, f"a {config.role}'s configuration has a head"
        self._head: HeadConfig = config.head
        self._later: dict[str, Row] = {}
        """Rows that are known before their turn."""
        self._versions: Versions | None = None
        """Of the head's Ray."""

    # -- what a role adds --------------------------------------------------------

    @abstractmethod
    def hello(self) -> Hello:
        """What the hub is asked about."""

    @cached_property
    def identity(self) -> Identity:
        """Whose key the hub is told."""
        return Identity.make()

    def ways(self) -> tuple[HeadConfig, ...]:
        """How the hub is reached; where the first is none, the next is tried."""
        return (self._head,)

    def leads_on(self, problem: Problem) -> bool:
        """Whether the next way may be one where this one was not."""
        del problem
        return False

    def answered(self, answer: CheckReply) -> None:
        """Say the rows that follow from it."""

    async def further(self, hub_probe: HubProbe, answer: CheckReply) -> None:
        """Ask for what else there is. Raises ProblemError."""

    # -- the way --------------------------------------------------------

    async def way(self) -> None:
        """Dial, ask, measure; say the rows of the way, and keep those of later checks."""
        if not self._head.ssh:
            self._awaited()
            return
        carrier = carrier_for(self._head)
        began = time.monotonic()
        try:
            connection = await carrier.dial(asyncio.Event())
        except ProblemError as exc:
            hop = carrier.stopped_at
            self._stopped(exc.problem, self._head.ssh if hop is None else hop.called)
            carrier.close()
            return
        try:
            self._connected(connection, time.monotonic() - began)
            await self._ask(connection)
        finally:
            connection.abort()
            carrier.close()

    def _awaited(self) -> None:
        """The head dials: what there is to see here, the daemon has seen."""
        link = None if self.status is None else self.status.link
        if link is not None and link.state == "up":
            self.emit(passed("ssh", "the head dials this machine, and the link is up"))
        elif link is not None:
            self.emit(failed("ssh", _not_dialled(self.config.link_socket)))
        else:
            self.emit(skipped("ssh", "the head dials this machine when the daemon runs here"))
        for stage in (*STAGES[1:], *self.after_hub):
            self.emit(
                skipped(
                    stage, "the head dials this machine; `rayfwd doctor` on the head shows `dial`"
                )
            )

    async def _ask(self, connection: SshConnection | OpensshConnection) -> None:
        stopped: tuple[HeadConfig, Problem] | None = None
        for head in self.ways():
            self._head = head
            hub_probe = HubProbe()
            try:
                answer = await self.open(connection, hub_probe)
            except ProblemError as exc:
                # That `rayfwd` is not found there says less than why the first was no way.
                if stopped is None or exc.problem.code != codes.HUB_CLOSED:
                    stopped = head, exc.problem
                if self.leads_on(exc.problem):
                    continue
                break
            self.emit(passed("channel", self._channel_kind()))
            self.emit(self.hub(answer))
            self.answered(answer)
            await self._measure_all(hub_probe, answer)
            return
        assert stopped is not None, "there is a way"
        self._head, problem = stopped
        if problem.code != codes.HUB_OLDER:
            self._stopped(problem, self._head.ssh)
            return
        self.emit(passed("channel", self._channel_kind()))
        self.emit(warned("hub", problem))
        for check in self.after_hub:
            self.emit(skipped(check, "the head's rayfwd does not say"))

    async def open(
        self, connection: SshConnection | OpensshConnection, hub_probe: HubProbe
    ) -> CheckReply:
        """Reach the hub by the way whose turn it is, and ask. Raises ProblemError."""
        pipe = await hub_probe.opened(connection.by(self._head).open(hub_probe))
        return await hub_probe.begin(pipe, self.hello(), self.identity)

    def _stopped(self, problem: Problem, target: str) -> None:
        """The way ends at a stage of a hop: what was before is well, what comes after is not
        known."""
        at = STAGES.index(problem.code.stage)
        whose = "the head's host key" if target == self._head.ssh else f"the host key of {target}"
        well = {
            "ssh": f"{target} answers",
            "host_key": f"{whose} is known and correct",
            "auth": f"{target} accepts this machine's key",
            "channel": self._channel_kind(),
        }
        done = {row.check for row in self.rows}
        for index, stage in enumerate((*STAGES, *self.after_hub)):
            if stage in done:
                continue
            if index == at:
                self.emit(failed(stage, problem))
            elif index > at or problem.code.before_dialling:
                self.emit(skipped(stage, NOT_REACHED))
            else:
                self.emit(passed(stage, well[stage]))

    def _channel_kind(self) -> str:
        if self._head.via == "exec":
            return f"a session that runs `{self._head.attach_command}` (via = exec)"
        return f"a stream to {self._head.socket} (via = socket)"

    def _connected(self, made: SshConnection | OpensshConnection, seconds: float) -> None:
        if isinstance(made, OpensshConnection):
            self._connected_by_openssh(made, seconds)
            return
        connection = made.ssh
        key = connection.get_server_host_key()
        version = str(connection.get_extra_info("server_version", "")).removeprefix("SSH-2.0-")
        cipher = str(connection.get_extra_info("send_cipher", ""))
        user = str(connection.get_extra_info("username", ""))
        target = self._head.ssh
        self.emit(passed("ssh", f"{target} answers: {version}", server=version, cipher=cipher))
        known = "none" if key is None else f"{key.get_algorithm()} {key.get_fingerprint()}"
        self.emit(passed("host_key", f"{known} is known", fingerprint=known))
        self._logged_in(user, seconds, f"logged in as {user} in {seconds:.2f} s")

    def _connected_by_openssh(self, connection: OpensshConnection, seconds: float) -> None:
        target, hop = self._head.ssh, connection.hops[-1]
        self.emit(passed("ssh", f"{target} answers, to the system's ssh (transport = openssh)"))
        self.emit(passed("host_key", "the system's ssh has checked it strictly"))
        said = f"logged in as {hop.user} in {seconds:.2f} s"
        if connection.shared:
            said = f"an open connection of {hop.user} (ControlMaster) is used"
        self._logged_in(hop.user, seconds, said)

    def _logged_in(self, user: str, seconds: float, said: str) -> None:
        slow = judgements.judge_login(self._head.ssh, seconds)
        if slow is not None:
            self.emit(warned("auth", slow, seconds=round(seconds, 3)))
        else:
            self.emit(passed("auth", said, user=user, seconds=round(seconds, 3)))

    def hub(self, answer: CheckReply) -> Row:
        """What the hub says of itself."""
        welcome = answer.welcome
        self.network = welcome.network
        if welcome.ray is not None and welcome.python is not None:
            self._versions = Versions(welcome.ray, welcome.python)
        try:
            self.nodes = tuple(NodePlan.from_wire(node) for node in welcome.nodes)
        except ValueError as exc:
            remedy = "run the same rayfwd on both sides"
            return failed(
                "hub",
                codes.PLAN_MALFORMED.problem(f"the hub's answer is not a plan: {exc}", remedy),
            )
        problem = judgements.judge_version(__version__, welcome.version)
        if problem is not None:
            return warned("hub", problem, version=welcome.version)
        said = f"rayfwd {welcome.version} answers and knows {len(self.nodes)} nodes"
        return passed("hub", said, version=welcome.version, nodes=len(self.nodes))

    async def _measure_all(self, hub_probe: HubProbe, answer: CheckReply) -> None:
        try:
            await self._measure(hub_probe)
            await self.further(hub_probe, answer)
        except ProblemError as exc:
            for check in ("clock", "link"):
                self._later.setdefault(check, failed(check, exc.problem))

    async def _measure(self, hub_probe: HubProbe) -> None:
        """Raises ProblemError."""
        ticks = await hub_probe.ticks()
        ahead, doubt = judgements.offset(ticks)
        trip = sorted(tick.trip for tick in ticks)[len(ticks) // 2]
        values = {"seconds_behind": round(ahead, 4), "doubt": round(doubt, 4)}
        problem = judgements.judge_clock(ahead, doubt)
        if problem is not None:
            self._later["clock"] = warned("clock", problem, **values)
        else:
            within = max(abs(ahead) + doubt, 0.001)
            said = f"the head's clock is the same within {within:.3f} s"
            self._later["clock"] = passed("clock", said, **values)
        down, up = await hub_probe.rates(trip)
        values = {"rtt_ms": round(trip * 1000, 3), "down": round(down), "up": round(up)}
        problem = judgements.judge_link(trip, down, up)
        if problem is not None:
            self._later["link"] = warned("link", problem, **values)
            return
        said = (
            f"a round trip takes {trip * 1000:.1f} ms; one connection moves "
            f"{judgements.shown_rate(down)} from the head and {judgements.shown_rate(up)} to it"
        )
        self._later["link"] = passed("link", said, **values)

    def later(self, check: str, otherwise: str = NOT_REACHED) -> Row:
        """A row that was to be known by now; `otherwise` says why it is not."""
        return self._later.get(check) or skipped(check, otherwise)

    async def names(self) -> Row:
        """How soon the head's name is found."""
        if not self._head.ssh:
            return skipped("names", "this machine dials nobody")
        try:
            host, port, direct = await carrier_for(self._head).place()
            if not direct:
                return skipped("names", f"a jump host or a command looks up {host}")
            if is_address(host):
                return passed("names", f"{host} is an address, so nothing is looked up")
            seconds, addresses = await observe.resolve(host, port)
        except ProblemError as exc:
            return failed("names", exc.problem)
        problem = judgements.judge_names(host, seconds)
        if problem is not None:
            return warned("names", problem, seconds=round(seconds, 3))
        said = f"{host} is {', '.join(addresses)}, found in {seconds:.2f} s"
        return passed("names", said, seconds=round(seconds, 3))


def _not_dialled(path: Path) -> Problem:
    return codes.LINK_AWAITED.problem(
        f"the head has not dialled this worker, which waits at {path}",
        "check that sshd runs here and accepts the head's key, that the head's file has a "
        "[[hub.dial]] for this machine, and what `rayfwd doctor` says on the head",
    )
