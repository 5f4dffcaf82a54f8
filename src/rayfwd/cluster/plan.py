"""Which address and which ports belong to which node (pure: no I/O, no clock).

Ray's gRPC servers bind the wildcard address, so on one machine a port belongs either to Ray or to
a listener, never to both. Hence every node has a contiguous block of ports of its own, and on every
*other* machine rayfwd opens listeners for it. A worker with the overlay has no listeners for the
others: all such workers may have the same block. Blocks lie below 32768, where Linux' ephemeral
ports begin (``net.ipv4.ip_local_port_range``), so that no outgoing connection can take one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rayfwd import codes
from rayfwd.system import setting

PORT_CEILING = 32768
"""First port that no block may reach: Linux takes ephemeral ports from here on."""

Role = Literal["head", "worker"]
Level = Literal["overlay", "listeners"]
"""How programs on a node reach the others: by the kernel's rules, or by listeners."""

NODE_SERVICES = (
    "node_manager",
    "object_manager",
    "dashboard_agent_http",
    "dashboard_agent_grpc",
    "metrics_export",
    "runtime_env_agent",
)
"""What every Ray node listens on besides its workers, in the order of the block."""

HEAD_METRICS = ("autoscaler_metrics", "dashboard_metrics")
"""What a head exports besides, on ports of its block."""

RESERVED = 8
"""Ports at the start of a block that are kept for the services above; worker ports follow."""


def may_be_advertised(address: ipaddress.IPv4Address) -> bool:
    """Whether a machine can be reached by others at it: no loopback, no group, nothing reserved."""
    wrong = address.is_loopback or address.is_multicast or address.is_reserved
    return not (wrong or address.is_link_local or address in _THIS_NETWORK)


LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")
"""All of it is every Linux machine's own."""
PRIVATE_NETWORKS = tuple(
    map(ipaddress.IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"))
)
"""Where a plan's network may lie besides, if every node has the overlay (RFC 1918, RFC 6598)."""


def in_loopback(network: str) -> bool:
    """Whether every machine has the network's addresses by itself."""
    return ipaddress.IPv4Network(network).subnet_of(LOOPBACK)


def ends_of(network: str) -> tuple[str, str]:
    """The first and the last address, which are no node's."""
    whole = ipaddress.IPv4Network(network)
    return str(whole.network_address), str(whole.broadcast_address)


_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")
"""No address of a machine (RFC 6890)."""


def name_from(host: str) -> str:
    """A node's name from a machine's own; empty: nothing of it can be one's."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", host.split(".", maxsplit=1)[0])
    return plain.strip("-_")[:63].rstrip("-_")


def check_name(name: str) -> str:
    """The node's name as given. Raises ValueError with what is allowed."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name):
        raise ValueError(
            "must be 1 to 63 letters, digits, '.', '_' or '-', and begin and end with a letter "
            "or digit"
        )
    return name


def default_worker_ports(cpus: int) -> int:
    """Worker ports for a node of `cpus` CPUs.

    Ray gives one port to every worker process and driver, and prestarts a worker a CPU; actors,
    I/O workers, drivers and job supervisors come on top. A range no larger than the CPUs hangs.
    """
    return 64 + 3 * cpus


@dataclass(frozen=True, slots=True)
class NodePlan:
    """A node's address and ports, the same on every machine of the cluster."""

    name: str
    role: Role
    address: str
    """What Ray is given as the node's address: of the plan's network, or the advertised one."""
    base: int
    """First port of the block."""
    worker_ports: int
    """How many ports workers and drivers have."""
    advertised: bool = False
    """Others reach `address` directly: there are no listeners for this node."""
    head_services: Mapping[str, int] = field(default_factory=dict)
    """Of a head: the ports of `gcs`, `dashboard` and `client`."""
    level: Level = "listeners"
    """As the node said when it joined last."""

    def suits(self, worker_ports: int, advertise: str | None, level: Level) -> bool:
        """A node that asks for these keeps this plan."""
        same = self.worker_ports == worker_ports and self.level == level
        return same and (self.address == advertise if self.advertised else advertise is None)

    @property
    def size(self) -> int:
        return RESERVED + self.worker_ports

    @property
    def listeners(self) -> int:
        """How many it makes necessary on every other machine."""
        return 0 if self.advertised else self.size

    @property
    def services(self) -> dict[str, int]:
        """Every named port of the node."""
        names = NODE_SERVICES + (HEAD_METRICS if self.role == "head" else ())
        return {**self.head_services, **{n: self.base + i for i, n in enumerate(names)}}

    @property
    def first_worker_port(self) -> int:
        return self.base + RESERVED

    @property
    def last_worker_port(self) -> int:
        return self.base + self.size - 1

    @property
    def ports(self) -> tuple[int, ...]:
        """Every port that other nodes may dial, ascending."""
        workers = range(self.first_worker_port, self.last_worker_port + 1)
        return tuple(sorted({*self.services.values(), *workers}))

    def to_wire(self) -> dict[str, Any]:
        """As a JSON object, for the link and for the roster's file."""
        return {
            "name": self.name,
            "role": self.role,
            "address": self.address,
            "base": self.base,
            "worker_ports": self.worker_ports,
            "advertised": self.advertised,
            "head_services": dict(self.head_services),
            "level": self.level,
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> NodePlan:
        """The inverse of `to_wire`. Raises ValueError on anything else."""
        try:
            plan = cls(
                name=str(data["name"]),
                role="head" if data["role"] == "head" else "worker",
                address=str(ipaddress.ip_address(data["address"])),
                base=int(data["base"]),
                worker_ports=int(data["worker_ports"]),
                advertised=bool(data["advertised"]),
                head_services={str(k): int(v) for k, v in dict(data["head_services"]).items()},
                level="overlay" if data.get("level") == "overlay" else "listeners",
            )
        except (KeyError, TypeError, OverflowError) as exc:
            raise ValueError(f"not a node's plan: {exc!r}") from exc
        if not (plan.base > 0 and plan.worker_ports > 0 and plan.base + plan.size <= PORT_CEILING):
            raise ValueError(f"node {plan.name}: ports {plan.base}+{plan.size} are out of range")
        if any(not 0 < port < 65536 for port in plan.head_services.values()):
            raise ValueError(f"node {plan.name}: a port of {plan.head_services} is out of range")
        return plan


def head_plan(
    name: str, network: str, port_base: int, worker_ports: int, head_services: Mapping[str, int]
) -> NodePlan:
    """The head's plan: first address of the network, first block."""
    address = str(ipaddress.ip_network(network)[1])
    plan = NodePlan(name, "head", address, port_base, worker_ports, False, dict(head_services))
    if plan.base + plan.size > PORT_CEILING:
        raise codes.PLAN_FULL.error(
            f"{setting.value('hub.port_base', port_base)}: {plan.size} ports do not fit "
            f"below {PORT_CEILING}",
            f"lower {setting.key('hub.port_base')} or {setting.key('ray.worker_ports')}",
        )
    return replace(plan, base=_first_fit(port_base, plan.size, [], head_services.values()))


def allocate(
    nodes: Iterable[NodePlan],
    name: str,
    network: str,
    port_base: int,
    worker_ports: int,
    advertise: str | None,
    level: Level = "listeners",
) -> NodePlan:
    """A plan for worker `name` beside the plans that exist.

    What the node already has is kept where it still fits, so that a restart of anything changes
    no address and no port. Raises ProblemError: `plan_full` when the network or the ports are used
    up, `address_taken`.
    """
    known = tuple(nodes)
    others = [n for n in known if n.name != name]
    mine = next((n for n in known if n.name == name), None)
    if advertise is not None:
        twin = next((n.name for n in others if n.address == advertise), None)
        if twin is not None:
            raise codes.ADDRESS_TAKEN.error(
                f"node {twin} already has the address {advertise}, and two nodes cannot "
                "share an address",
                f"correct {setting.theirs('ray.advertise')} on one of them",
            )
        address = advertise
    elif mine is not None and not mine.advertised and _address_fits(mine, others, network):
        address = mine.address
    else:
        address = _free_address(others, network)
    if (
        mine is not None
        and mine.worker_ports == worker_ports
        and _block_fits(replace(mine, level=level), others, port_base)
    ):
        base = mine.base
    else:
        apart = _apart(level, others)
        base = _first_fit(port_base, RESERVED + worker_ports, apart, _singles(apart))
    plan = NodePlan(name, "worker", address, base, worker_ports, advertise is not None)
    return replace(plan, level=level)


def _apart(level: Level, others: Iterable[NodePlan]) -> list[NodePlan]:
    """Those of the others whose ports a worker of this level may not have: where one of the two has
    listeners. The head's are its own in any case, so that its level moves nobody."""
    return [n for n in others if n.role == "head" or not level == n.level == "overlay"]


def bound(nodes: Sequence[NodePlan], port_base: int) -> str:
    """What bounds the number of nodes, in a sentence."""
    workers = [node for node in nodes if node.role == "worker"]
    apart = [node.name for node in workers if node.level != "overlay"]
    if not workers:
        return "no worker has joined yet"
    if not apart:
        return (
            "every worker has the overlay, so workers may have the same ports; the number of "
            "nodes is not bounded by ports"
        )
    taken = {port for n in nodes for port in range(n.base, n.base + n.size)}
    names = ", ".join(apart[:3]) + f" and {len(apart) - 3} more" * (len(apart) > 3)
    return (
        f"{len(taken)} of {PORT_CEILING - port_base} ports from {port_base} on are taken, because "
        f"workers at the level listeners need their own ports ({names})"
    )


def fits(node: NodePlan, others: Iterable[NodePlan], network: str, port_base: int) -> bool:
    """Whether worker `node` can keep its address and block beside `others`."""
    beside = tuple(others)
    if node.advertised:
        address = all(n.address != node.address for n in beside)
    else:
        address = _address_fits(node, beside, network)
    return address and _block_fits(node, beside, port_base)


def _address_fits(node: NodePlan, others: Iterable[NodePlan], network: str) -> bool:
    inside = ipaddress.ip_address(node.address) in ipaddress.ip_network(network)
    taken = {*ends_of(network), *(other.address for other in others)}
    return inside and node.address not in taken


def _block_fits(node: NodePlan, others: Iterable[NodePlan], port_base: int) -> bool:
    beside = _apart(node.level, others)
    end = node.base + node.size
    return (
        port_base <= node.base
        and end <= PORT_CEILING
        and not any(n.base < end and node.base < n.base + n.size for n in beside)
        and not any(node.base <= port < end for port in _singles(beside))
    )


def _singles(nodes: Iterable[NodePlan]) -> list[int]:
    return [port for n in nodes for port in n.head_services.values()]


def _free_address(nodes: Iterable[NodePlan], network: str) -> str:
    taken = {n.address for n in nodes}
    hosts = ipaddress.ip_network(network).hosts()
    next(hosts)  # the head's
    for host in hosts:
        if str(host) not in taken:
            return str(host)
    raise codes.PLAN_FULL.error(
        f"the network {network}: every address is in use",
        f"on the head, choose a wider {setting.theirs('hub.network')}, or run "
        "`rayfwd forget --keep-token NAME` for nodes that are gone",
    )


def _first_fit(base: int, size: int, nodes: Iterable[NodePlan], singles: Iterable[int]) -> int:
    """Lowest start at or above `base` of `size` free ports, below the ephemeral ones."""
    taken = [range(n.base, n.base + n.size) for n in nodes]
    taken += [range(port, port + 1) for port in singles]
    start = base
    for block in sorted(taken, key=lambda r: r.start):
        if block.stop <= start:
            continue
        if start + size <= block.start:
            break
        start = block.stop
    if start + size > PORT_CEILING:
        raise codes.PLAN_FULL.error(
            f"no {size} consecutive ports are free between {base} and {PORT_CEILING}",
            f"lower {setting.theirs('hub.port_base')} or {setting.theirs('ray.worker_ports')}; or "
            "run `rayfwd forget --keep-token NAME` on the head for nodes that are gone; or give "
            "all workers the overlay, with which they share their ports (docs/overlay.md)",
        )
    return start
