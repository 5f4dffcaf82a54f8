"""Dials a node's ports to see whether they can be reached, and says in words which cannot, and why.

Before Ray runs on a node that others reach directly, its block is empty: `HeldPorts` holds the
ports for that moment and answers with a nonce, so that a stranger's program is not taken for the
node. While Ray runs, `greets` tells whether one of its servers is behind a port: gRPC servers
speak first.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.problems import Problem
from rayfwd.session.messages import MOST_PORTS, read_dial
from rayfwd.system import setting
from rayfwd.system.accepting import close_server
from rayfwd.system.tcp import cut

DIAL_TIMEOUT = 3.0
"""Seconds for a connection, and as many for its first bytes: enough for two further SYNs after a
lost one."""

ANSWERED, REFUSED, DROPPED, UNROUTABLE, STRANGER, RESET, SILENT = (
    "answered",
    "refused",
    "dropped",
    "unroutable",
    "stranger",
    "reset",
    "silent",
)
"""How a dial went: the node itself answered; the connection was refused; nobody said anything; the
network has no way there; another program answered; the connection was made and reset, or was made
and brought nothing."""

OUTCOMES = frozenset({ANSWERED, REFUSED, DROPPED, UNROUTABLE, STRANGER})
"""Those that `dial` can have."""


_PURPOSES = {
    "gcs": "the GCS",
    "dashboard": "the dashboard",
    "client": "Ray Client",
    "node_manager": "the raylet",
    "object_manager": "the object manager",
    "dashboard_agent_http": "the dashboard agent's HTTP",
    "dashboard_agent_grpc": "the dashboard agent's gRPC",
    "metrics_export": "metrics",
    "runtime_env_agent": "the runtime-env agent",
    "autoscaler_metrics": "the autoscaler's metrics",
    "dashboard_metrics": "the dashboard's metrics",
}


def sample(plan: NodePlan) -> list[int]:
    """The ports of the node's block that are dialled: all, or of a large block `MOST_PORTS`, spread
    evenly."""
    services = [port for name, port in plan.services.items() if name not in plan.head_services]
    workers = range(plan.first_worker_port, plan.last_worker_port + 1)
    room = MOST_PORTS - len(services)
    if len(workers) > room:
        step = (len(workers) - 1) / (room - 1)
        return sorted({*services, *(workers[round(i * step)] for i in range(room))})
    return sorted({*services, *workers})


def read_request(plan: NodePlan, message: Mapping[str, Any]) -> tuple[list[int], str]:
    """Ports and nonce that a node asks to be dialled with. Raises ValueError.

    Only ports that the plan gives to that very node, at the address that it advertises.
    """
    ports, nonce = read_dial(message)
    check_ports(plan, ports)
    return list(ports), nonce


def check_ports(plan: NodePlan, ports: Iterable[int]) -> None:
    """Raises ValueError unless the node has these ports at an address that it advertises."""
    if not plan.advertised or not set(plan.ports).issuperset(ports):
        raise ValueError(f"not ports that {plan.name} advertises")


async def dial(address: str, port: int, nonce: str) -> str:
    """One of `OUTCOMES`. Leaves no connection in TIME_WAIT: Ray binds these ports next."""

    async def identified(reader: asyncio.StreamReader) -> str:
        received = await reader.readexactly(len(nonce))
        return ANSWERED if hmac.compare_digest(received, nonce.encode()) else STRANGER

    outcome = await _hear(address, port, DIAL_TIMEOUT, identified)
    return STRANGER if outcome in {RESET, SILENT} else outcome


async def dial_all(address: str, ports: Iterable[int], nonce: str) -> dict[int, str]:
    """`dial` to all ports at once."""
    wanted = list(ports)
    outcomes = await asyncio.gather(*(dial(address, port, nonce) for port in wanted))
    return dict(zip(wanted, outcomes, strict=True))


async def greets(address: str, port: int, seconds: float = DIAL_TIMEOUT) -> str:
    """ANSWERED where a server speaks first, as gRPC's do; else how the attempt ended."""

    async def spoke(reader: asyncio.StreamReader) -> str:
        return ANSWERED if await reader.read(64) else RESET

    return await _hear(address, port, seconds, spoke)


async def _hear(
    address: str,
    port: int,
    seconds: float,
    judge: Callable[[asyncio.StreamReader], Awaitable[str]],
) -> str:
    """What `judge` makes of the first bytes, or why there were none (DROPPED, REFUSED, UNROUTABLE,
    RESET, SILENT). The connection has that many `seconds`, and so have the bytes."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(address, port, limit=256)
    except TimeoutError:
        return DROPPED
    except OSError as exc:
        return _failure(exc)
    try:
        async with asyncio.timeout(seconds):
            return await judge(reader)
    except TimeoutError:
        return SILENT
    except (OSError, asyncio.IncompleteReadError):
        return RESET
    finally:
        cut(writer.transport)


def _failure(exc: OSError) -> str:
    if isinstance(exc, ConnectionRefusedError):
        return REFUSED
    if exc.errno in {errno.EPERM, errno.EACCES}:  # a local firewall's way to drop what goes out
        return DROPPED
    return UNROUTABLE


class _Answer(asyncio.Protocol):
    """Says the nonce, and waits for the other side to go."""

    def __init__(self, owner: HeldPorts) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._owner.open.add(self)
        self._transport.write(self._owner.nonce.encode())

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.open.discard(self)

    def cut(self) -> None:
        assert self._transport is not None, "it has been made"
        cut(self._transport)


class HeldPorts:
    """Holds ports for a moment and answers each connection with a nonce. An async context.

    They listen on `address`, and where no interface of this machine has it (behind a NAT) on all.
    """

    def __init__(self, address: str, ports: Sequence[int], nonce: str) -> None:
        self.nonce = nonce
        self.open: set[_Answer] = set()
        self.translated = False
        """No interface of this machine has the address."""
        self._address = address
        self._ports = ports
        self._servers: list[asyncio.Server] = []

    async def __aenter__(self) -> HeldPorts:
        """Raises ProblemError (port_in_use)."""
        try:
            for port in self._ports:
                await self._listen(port)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _listen(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._bind(sock, port)
            self._servers.append(await loop.create_server(lambda: _Answer(self), sock=sock))
        except OSError as exc:
            sock.close()
            raise codes.PORT_IN_USE.error(
                f"port {port} cannot be opened to check {setting.key('ray.advertise')}: "
                f"{exc.strerror}",
                "stop the program that uses it, or move this cluster's ports: "
                + setting.theirs("hub.port_base"),
            ) from None

    def _bind(self, sock: socket.socket, port: int) -> None:
        if not self.translated:
            try:
                sock.bind((self._address, port))
            except OSError as exc:
                if exc.errno != errno.EADDRNOTAVAIL:
                    raise
                self.translated = True
        if self.translated:
            sock.bind(("0.0.0.0", port))

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            close_server(server)
        await asyncio.sleep(0)  # then who was accepted is among the open
        for answer in list(self.open):
            answer.cut()
        await asyncio.sleep(0)


def purposes(plan: NodePlan, ports: Iterable[int]) -> str:
    """Ports in short, with what they are for: `20046 (the raylet), 20054-20093 (workers)`."""
    names = {port: _PURPOSES.get(name, name) for name, port in plan.services.items()}
    named: list[str] = []
    workers: list[int] = []
    for port in sorted(set(ports)):
        if port in names:
            named.append(f"{port} ({names[port]})")
        else:
            workers.append(port)
    if workers:
        span = f"{workers[0]}-{workers[-1]}" if len(workers) > 1 else f"{workers[0]}"
        whole = len(workers) == workers[-1] - workers[0] + 1
        named.append(f"{span} (workers)" if whole else f"{len(workers)} of {span} (workers)")
    return ", ".join(named)


def read_results(data: Any, ports: Iterable[int]) -> dict[int, str]:
    """The hub's `results` for the ports that were asked for. Raises ValueError."""
    if not isinstance(data, dict):
        raise ValueError("results is no object")
    found = {int(port): outcome for port, outcome in data.items()}
    wanted = set(ports)
    known = all(isinstance(o, str) and o in OUTCOMES for o in found.values())
    if found.keys() != wanted or not known:
        raise ValueError("results are not of the ports asked for")
    return found


def judge_dial_back(plan: NodePlan, results: Mapping[int, str]) -> Problem | None:
    """What is wrong where the head dialled the ports of a node that advertises its address."""
    bad = {port: outcome for port, outcome in results.items() if outcome != ANSWERED}
    if not bad:
        return None
    block = f"{plan.base}-{plan.last_worker_port}"
    where = f"the head cannot reach {plan.name} at {plan.address}, which it advertises"
    override = f"{setting.value('ray.advertise_check', False)} starts Ray without this check"
    counts = {outcome: sum(o == outcome for o in bad.values()) for outcome in set(bad.values())}
    most = max(sorted(counts), key=lambda o: (o == STRANGER, counts[o]))
    what = purposes(plan, (p for p, o in bad.items() if o == most))
    some = "" if len(bad) == len(results) else f"; {len(results) - len(bad)} other ports answer"
    if most == STRANGER:
        return codes.ADVERTISE_WRONG_MACHINE.problem(
            f"{where}: another program or machine answers there, on {what}{some}",
            f"correct {setting.key('ray.advertise')}: it must be the address at which the other "
            f"nodes reach this machine, and no other program may use its ports; {override}",
        )
    rule = (
        f"let the other nodes in: allow inbound TCP to ports {block} of {plan.address} in this "
        f"machine's firewall and in the cloud's; or remove {setting.key('ray.advertise')}, so "
        f"that everything goes through the link; {override}"
    )
    if most == DROPPED:
        return codes.ADVERTISE_DROPPED.problem(
            f"{where}: packets to {what} are dropped (no answer in {DIAL_TIMEOUT:.0f} s){some}",
            rule,
        )
    if most == REFUSED:
        return codes.ADVERTISE_REFUSED.problem(
            f"{where}: connections to {what} are refused{some}", rule
        )
    return codes.ADVERTISE_UNROUTABLE.problem(
        f"{where}: no route leads there{some}",
        f"correct {setting.key('ray.advertise')}, or the head's routes; {override}",
    )


def judge_self_dial(
    plan: NodePlan, results: Mapping[int, str], translated: bool = False
) -> Problem | None:
    """What is wrong where a machine dialled its own advertised address."""
    bad = {port: outcome for port, outcome in results.items() if outcome != ANSWERED}
    if not bad:
        return None
    block = f"{plan.base}-{plan.last_worker_port}"
    outcome = max(sorted(set(bad.values())), key=lambda o: sum(b == o for b in bad.values()))
    how = {
        DROPPED: f"packets are dropped (no answer in {DIAL_TIMEOUT:.0f} s)",
        REFUSED: "connections are refused",
        STRANGER: "another program or machine answers",
    }.get(outcome, "there is no route")
    nat = (
        "; no interface of this machine has that address, so the packets pass a NAT"
        if translated
        else ""
    )
    return codes.ADVERTISE_SELF_UNREACHABLE.problem(
        f"{plan.name} cannot reach its own advertised address {plan.address} on "
        f"{purposes(plan, bad)}: {how}{nat}. Ray's agent and raylet reach each other by that "
        "address",
        "add a rule to this machine's firewall and to the cloud's: allow inbound TCP from "
        f"{plan.address}/32 to ports {block} (nftables: `ip saddr {plan.address} tcp dport "
        f"{block} accept` in the input chain); or remove {setting.key('ray.advertise')}; "
        f"{setting.value('ray.advertise_check', False)} starts Ray without this check",
    )
