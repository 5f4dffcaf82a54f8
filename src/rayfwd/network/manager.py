"""The daemon's half of the overlay: which level this node has, and that what stands stays so.

Two levels: at `overlay` every TCP port of every node is reached, through an interface and rules of
the kernel; at `listeners` those that rayfwd listens for. Which one a machine allows is found out
once, before the node says hello.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.cluster.plan import Level
from rayfwd.config import NetworkConfig
from rayfwd.network import overlay
from rayfwd.network.overlay_client import KEEPER, SOCKET, Child, OverlayClient, possible
from rayfwd.network.ruleset import PortRange, Rules
from rayfwd.problems import Problem, ProblemError
from rayfwd.system import setting
from rayfwd.system.logs import get_logger

log = get_logger(__name__)

LOOK_INTERVAL = 10.0
"""Seconds between looks whether interface and rules are still there."""
LOOK_AGAIN = 2.0
"""The same while the keeper does not answer: a restart of it takes a second."""
PROBE_TIMEOUT = 5.0
"""Seconds for a connection that the rules bring to this process: it takes a millisecond."""
GATHER_SECONDS = 0.05
"""Seconds in which changes of the plan are gathered into one."""

_PARTS = {"interface": "the interface", "address": "the address", "table": "the nftables table"}
"""What `found` tells of, in words."""
_TRIAL = ("127.77.0.0/16", "127.77.255.254")
"""Network and address with which it is tried whether interface and rules can be made."""
_CHILD_ENDED = (
    "nothing if this passes, as rayfwd starts that process again; otherwise read the "
    "lines above in the log"
)
"""What to do where the keeper that is our child does not answer."""


Ask = Callable[[str, int, Callable[[bool | None], None]], None]
"""Finds out whether a port of another node is open."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the plan asks of the overlay."""

    network: str
    own: str
    open_ports: Mapping[str, tuple[PortRange, ...]] = field(default_factory=dict)
    guarded: tuple[PortRange, ...] = ()
    friends: tuple[str, ...] = ()


class Overlay:
    """Owns the client of the overlay's keeper, and the keeper where that is our child."""

    def __init__(
        self,
        config: NetworkConfig,
        runtime_dir: Path,
        uids: Callable[[], frozenset[int]],
        on_change: Callable[[], None],
        on_refused: Callable[[str, int, int], None],
        env: Mapping[str, str] = os.environ,
        ask: Ask | None = None,
    ) -> None:
        """`uids`: who may dial. `on_change` is called when level or problem have changed,
        `on_refused` with address and port where the kernel has refused so many connections;
        `ask` with address and port of another node that are dialled, and what is to be called with
        the answer: whether the port is open, or None."""
        self.level: Level = "listeners"
        self.problem: Problem | None = None
        """Why the level is lower than what the file asks for, or what is wrong with the overlay."""
        self.why = setting.value("network.level", config.level)
        """Why the level is what it is."""
        self.left_out: Problem | None = None
        """Users who may not dial, though the file names them."""
        self.remedy: str | None = None
        """What would give this node the overlay, where it may have it and does not."""
        self.settled = False
        """It is known which level this machine allows."""
        self.refused: dict[str, int] = {}
        """Packets of connections that were refused by the kernel, by reason."""
        self._config = config
        self._runtime_dir = runtime_dir
        self._uids = uids
        self._on_change = on_change
        self._on_refused = on_refused
        self._ask = ask
        self._answers: list[tuple[str, int, bool]] = []
        self._answered = asyncio.Event()
        self._refused_at: dict[tuple[str, int], int] = {}
        self._env = env
        self._client: OverlayClient | None = None
        self._child: Child | None = None
        self._own_keeper = False
        """The keeper is our child, or is to be."""
        self._wanted: Wanted | None = None
        self._made: Rules | None = None
        self._changed = asyncio.Event()
        self._up = asyncio.Event()

    @property
    def interface(self) -> str | None:
        """The interface that has the node's address; None: there is none."""
        return self._config.interface if self.level == "overlay" else None

    @property
    def port(self) -> int | None:
        """Where connections to other nodes are redirected to, on 127.0.0.1."""
        return self._config.port if self.level == "overlay" else None

    @property
    def stands(self) -> bool:
        """What the plan asks for is there."""
        return self.level == "overlay" and self._up.is_set()

    # -- which level ---------------------------------------------------------------------

    async def settle(self) -> None:
        """Find out which level this machine allows."""
        if self._config.level != "listeners":
            try:
                await self._reach_keeper()
            except ProblemError as exc:
                self._fall_back(exc.problem)
            else:
                self.level = "overlay"
                self.why = "this machine allows it"
                log.info("network_level", level=self.level, cause=self.why)
        self.settled = True

    async def _reach_keeper(self) -> None:
        """Raises ProblemError where no overlay can be had."""
        path = self._env.get(KEEPER)
        if path:
            await asyncio.to_thread(overlay.check_commands)
            client = OverlayClient(Path(path))
        else:
            if (problem := await asyncio.to_thread(possible)) is not None:
                raise ProblemError(problem)
            self._own_keeper = True
            self._child = Child.inherited(os.environ) or await self._start_child()
            client = OverlayClient(self._runtime_dir / SOCKET, _CHILD_ENDED)
        try:
            await self._try_out(client)
        except ProblemError:
            await self._end_child()
            raise
        self._client = client

    async def _start_child(self) -> Child:
        """Raises ProblemError."""
        return await asyncio.to_thread(Child.start, self._runtime_dir, self._config.interface)

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await asyncio.to_thread(child.close)

    async def _try_out(self, client: OverlayClient) -> None:
        """See that interface and rules can be made, unless they stand: a kernel may lack a part.

        Raises ProblemError.
        """
        if (await client.found())["table"]:
            return
        network, own = _TRIAL
        config = self._config
        await client.up(Rules(config.interface, network, own, config.port, frozenset({0})))
        await client.down()

    def _fall_back(self, problem: Problem) -> None:
        """Take the next level, and say why."""
        self.level, self.why, self.remedy = "listeners", problem.cause, problem.remedy
        if self._config.level == "overlay":
            self.problem = problem
        log.info("network_level", level=self.level, cause=problem.cause, remedy=problem.remedy)
        self._on_change()

    # -- at work -------------------------------------------------------------------------

    def want(self, wanted: Wanted) -> None:
        """What is to stand from now on."""
        if wanted != self._wanted:
            self._wanted = wanted
            self._changed.set()

    async def made(self) -> None:
        """Until what the plan asks for stands. At the level `listeners` there is nothing to do."""
        if self.level == "overlay":
            await self._up.wait()

    async def run(self) -> None:
        """Keep what stands as it is wanted, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._interval()):
                    await self._changed.wait()
                await asyncio.sleep(GATHER_SECONDS)
            except TimeoutError:
                pass
            self._changed.clear()
            if self._client is not None and self._wanted is not None:
                await self._bring_up(self._client, self._wanted)

    def _interval(self) -> float:
        """Seconds until the next look."""
        absent = self.problem is not None and self.problem.code is codes.OVERLAY_KEEPER_ABSENT
        return LOOK_AGAIN if absent else LOOK_INTERVAL

    async def _bring_up(self, client: OverlayClient, wanted: Wanted) -> None:
        try:
            rules = self._rules(wanted)
            if self._made is None or _base(self._made) != _base(rules):
                await client.up(rules)
            elif self._made != rules:
                await client.update(rules)
            elif (gone := await self._look(client, rules)) is not None:
                self._set_problem(gone)  # until the next look finds everything there
                return
            else:
                await self._probe(client, rules)
        except ProblemError as exc:
            self._made = None
            self._up.clear()
            self._set_problem(exc.problem)
            if exc.problem.code is codes.OVERLAY_KEEPER_ABSENT and self._own_keeper:
                await self._replace_child()
            return
        self._made = rules
        self._up.set()
        self._set_problem(None)

    async def _replace_child(self) -> None:
        """Our keeper has ended, and took everything with it: have another one."""
        await self._end_child()
        try:
            self._child = await self._start_child()
        except (ProblemError, OSError) as exc:
            log.warning("overlay_child_failed", cause=str(exc))
        else:
            self._changed.set()

    async def _look(self, client: OverlayClient, rules: Rules) -> Problem | None:
        """See that it still stands; what is gone is made anew, and told. Raises ProblemError."""
        found = await client.found()
        self.refused = {str(k): int(v) for k, v in dict(found.get("refused", {})).items()}
        self._tell_refused(found.get("refused_at", ()))
        self._set_left_out(found.get("left_out"))
        gone = [part for part in ("interface", "address", "table") if not found.get(part)]
        if not gone:
            return None
        await client.up(rules)
        return codes.OVERLAY_GONE.problem(
            f"another program removed {_PARTS[gone[0]]} of the overlay; rayfwd makes it again",
            "find out which program resets the firewall or the network (`nft monitor`, "
            "`ip monitor`)",
        )

    def _set_left_out(self, said: Mapping[str, Any] | None) -> None:
        """An older keeper says it in its own log only."""
        problem = None
        if said:
            users = ", ".join(map(str, said["users"]))
            problem = codes.USERS_LEFT_OUT.problem(
                f"programs of {users} cannot connect to other nodes, although "
                f"{setting.key('listeners.users')} allows it: rayfwd-net does not take that from "
                f"this user, and {said['cause']}",
                f"name {users} in listeners.users of a file that only root can write (another "
                "one than /etc/rayfwd.toml is named by `--config` in rayfwd-net.service), then "
                "run `systemctl restart rayfwd-net rayfwd` as root",
            )
        if problem != self.left_out:
            self.left_out = problem
            self._on_change()

    def _tell_refused(self, rows: Iterable[tuple[str, int, int]]) -> None:
        """What the kernel has refused since the last look. Counts of the table begin anew with it,
        and when a port was not dialled for a while."""
        before, self._refused_at = self._refused_at, {(a, p): count for a, p, count in rows}
        for at, count in self._refused_at.items():
            known = before.get(at, 0)
            if more := count - known if count >= known else count:
                self._on_refused(*at, more)

    async def _probe(self, client: OverlayClient, rules: Rules) -> None:
        """See that what is dialled to other nodes comes here. Raises ProblemError."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                reader, writer = await asyncio.open_connection(rules.probe, rules.port)
                try:
                    await reader.read()
                except ConnectionResetError:
                    pass  # as `is_probe` has it
                else:
                    raise OSError("another program has answered")
                finally:
                    writer.transport.abort()
        except (OSError, TimeoutError) as exc:
            if (full := overlay.tracking_full()) is not None:
                raise codes.OVERLAY_BLOCKED.error(
                    "a connection to another node does not arrive at rayfwd, because the kernel's "
                    f"table of connections is full ({full}): it drops new connections of every "
                    "program on this machine",
                    "raise net.netfilter.nf_conntrack_max (as root: `sysctl -w "
                    "net.netfilter.nf_conntrack_max=…`), or find out which program opens so many "
                    "connections (`conntrack -L`)",
                ) from exc
            tables = ", ".join(await client.beside())
            raise codes.OVERLAY_BLOCKED.error(
                "the overlay's rules exist, but a connection to another node does not arrive at "
                f"rayfwd: {str(exc) or 'no answer'}"
                + (f"; other tables that could be in the way: {tables}" if tables else ""),
                "run `nft list ruleset`, and look for another table that drops or redirects "
                f"connections from this machine to {rules.network}, or connections to "
                f"127.0.0.1:{rules.port}",
            ) from exc

    # -- ports that are not known to be open -----------------------------------------------

    async def answer_dials(self) -> None:
        """Find out for the kernel whether the ports are open that are dialled and not known to be,
        until cancelled."""
        await self._up.wait()
        if self._client is not None and self._ask is not None:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._hear_dials(self._client, self._ask), name="dialled")
                group.create_task(self._tell_answers(self._client), name="answers")

    async def _hear_dials(self, client: OverlayClient, ask: Ask) -> None:
        while True:
            try:
                places = await client.dialled()
            except ProblemError:
                places = None  # `run` says what is wrong; one that is older knows no such verb
            if places is None:
                await asyncio.sleep(LOOK_AGAIN)
            for address, port in places or ():
                ask(address, port, partial(self._answer, address, port))

    def _answer(self, address: str, port: int, is_open: bool | None) -> None:
        """Without an answer, what the other node tells of itself decides."""
        if is_open is not None:
            self._answers.append((address, port, is_open))
            self._answered.set()

    async def _tell_answers(self, client: OverlayClient) -> None:
        while True:
            await self._answered.wait()
            self._answered.clear()
            answers, self._answers = self._answers, []
            with suppress(ProblemError):
                await client.decide(answers)

    def is_probe(self, address: str) -> bool:
        """Whether a connection that came here is our own, and goes nowhere."""
        return self._made is not None and address == self._made.probe

    def _rules(self, wanted: Wanted) -> Rules:
        """Raises ProblemError where the plan asks for something that cannot be."""
        try:
            return Rules(
                interface=self._config.interface,
                network=wanted.network,
                own=wanted.own,
                port=self._config.port,
                uids=self._uids(),
                open_ports=wanted.open_ports,
                guarded=wanted.guarded,
                friends=wanted.friends,
            )
        except ValueError as exc:
            raise codes.OVERLAY_FAILED.error(
                f"the overlay cannot be set up as the plan requires: {exc}",
                "run the same version of rayfwd on the head, or set "
                + setting.value("network.level", "listeners"),
            ) from exc

    def _set_problem(self, problem: Problem | None) -> None:
        if problem != self.problem:
            self.problem = problem
            if problem is not None:
                log.error(problem.code.event, cause=problem.cause, remedy=problem.remedy)
            self._on_change()

    # -- the end -------------------------------------------------------------------------

    async def close(self) -> None:
        """Remove everything: no other process comes after this one."""
        if self._client is None:
            return
        try:
            await self._client.down()
        except ProblemError as exc:
            log.warning("overlay_left", cause=exc.problem.cause, remedy=exc.problem.remedy)
        await self._end_child()

    def pass_on(self, env: MutableMapping[str, str]) -> None:
        """To the process that takes the place of this one by exec: what stands goes on."""
        if self._child is not None:
            self._child.pass_on(env)


def _base(rules: Rules) -> tuple[Any, ...]:
    """What an update of the sets does not change."""
    return (rules.interface, rules.network, rules.own, rules.port, rules.uids)
