"""The nftables rules of the overlay, as text for `nft -f` (pure).

A TCP connection to another node's address is redirected to one port of the daemon, which asks the
kernel for the original destination (SO_ORIGINAL_DST). Who may dial, and which ports are open, is
decided here, so that `connect()` fails as it would on a LAN: a port on which nothing listens is
refused, a node that is unknown is unreachable. A port may have opened a moment ago: so the first
packet to one that is not known to be open is dropped, and who keeps the rules gets a copy
(`held_dials`), asks, and sends it again with a mark that says whether the port is open. Where that
cannot be, the second one is dropped, too, and the third, which the kernel sends two or three
seconds after the first, decides by what is known then. What comes to Ray's ports from
other interfaces than loopback is dropped, unless it comes from a friend.

The table is replaced as a whole, in one transaction; the sets are updated in another. Beside it
stands a table that shuts the way to other nodes' addresses, which are this machine's own as well:
it drops what ought to be redirected and is not, and so has something to do only while the other
table is gone. What it drops is sent again, so that connections that stand outlive that. It guards
Ray's ports as well, so that they show to nobody meanwhile.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PortRange = tuple[int, int]
"""First and last port."""
LOWEST_PORT = 1024
"""Ports below it are root's services, and nobody's to dial."""

MOST_RANGES = 20_000
"""Ranges of open ports of all nodes together, at most."""
MOST_FRIENDS = 4096
"""Networks that reach the guarded ports, at most."""
MOST_REMEMBERED, REMEMBERED_DAYS = 262_144, 2
"""Connections of which it is remembered where they were to go, and for how long."""
MARK_OPEN, MARK_CLOSED = 0x1052, 0x1053
"""Of packets that are sent again, with the answer. Only who may change the network can set marks;
these bits are none that Kubernetes, Calico, Cilium or Tailscale have for their own."""
HOLD_SECONDS = 5
"""For how long it is remembered that a packet was dropped: the kernel sends the second one 1 s
after the first (TCP_TIMEOUT_INIT), and the third after 3 s, from Linux 6.5 on after 2 s
(tcp_syn_linear_timeouts). Two are dropped, because what has opened on another node is told here by
way of the head, and on busy machines that may take longer than a second."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the overlay of one node is to do."""

    interface: str
    """Also the name of the table."""
    network: str
    """The plan's network: connections to it are ours."""
    own: str
    """This node's address, which stays the machine's own business."""
    port: int
    """Where the daemon listens on 127.0.0.1."""
    uids: frozenset[int]
    """Users who may dial."""
    open_ports: Mapping[str, tuple[PortRange, ...]] = field(default_factory=dict)
    """The ports that may be dialled, by the address of each other node."""
    guarded: tuple[PortRange, ...] = ()
    """Ports of this machine that only loopback reaches, and `friends`."""
    friends: tuple[str, ...] = ()
    """Networks from which other machines may reach them as well."""

    def __post_init__(self) -> None:
        """Raises ValueError where it could do anything but that."""
        network = ipaddress.IPv4Network(self.network)
        if not _INTERFACE_NAME.issuperset(self.interface) or not 0 < len(self.interface) < 16:
            raise ValueError(f"interface {self.interface!r}: 1 to 15 of a-z, 0-9, _ and -")
        for address in (self.own, *self.open_ports):
            if ipaddress.IPv4Address(address) not in network:
                raise ValueError(f"{address} is not in the network {network}")
        ranges = [r for of in self.open_ports.values() for r in of]
        if len(ranges) > MOST_RANGES:
            raise ValueError(f"{len(ranges)} ranges of ports are over {MOST_RANGES}")
        for first, last in (*ranges, *self.guarded, (self.port, self.port)):
            if not 0 < first <= last < 65536:
                raise ValueError(f"ports {first} to {last} are out of range")
        if any(not 0 <= uid < 1 << 32 for uid in self.uids):
            raise ValueError("a user id is out of range")
        for friend in self.friends:
            ipaddress.IPv4Network(friend)
        if len(self.friends) > MOST_FRIENDS:
            raise ValueError(f"{len(self.friends)} networks are over {MOST_FRIENDS}")

    @property
    def probe(self) -> str:
        """An address that is no node's: what the daemon dials there must come back to it."""
        return str(ipaddress.IPv4Network(self.network).network_address)

    def to_wire(self) -> dict[str, Any]:
        """As a JSON object, for the privileged process."""
        return {
            "interface": self.interface,
            "network": self.network,
            "own": self.own,
            "port": self.port,
            "uids": sorted(self.uids),
            "open_ports": {address: list(of) for address, of in self.open_ports.items()},
            # A keeper that is older does not know of friends: it guards nothing rather than shut
            # them out.
            "guarded": [] if self.friends else list(self.guarded),
            "guarded_but_from": [list(self.friends), list(self.guarded)] if self.friends else None,
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Rules:
        """The inverse of `to_wire`. Raises ValueError on anything else."""
        try:
            friends, guarded = data.get("guarded_but_from") or ((), data["guarded"])
            return cls(
                interface=_text(data["interface"]),
                network=str(ipaddress.IPv4Network(_text(data["network"]))),
                own=_text(data["own"]),
                port=_whole(data["port"]),
                uids=frozenset(_whole(uid) for uid in data["uids"]),
                open_ports={
                    str(ipaddress.IPv4Address(_text(address))): _ranges(of)
                    for address, of in dict(data["open_ports"]).items()
                },
                guarded=_ranges(guarded),
                friends=tuple(str(ipaddress.IPv4Network(_text(friend))) for friend in friends),
            )
        except (KeyError, TypeError) as exc:
            raise ValueError(f"not the rules of an overlay: {exc!r}") from exc


def _ranges(value: Iterable[Any]) -> tuple[PortRange, ...]:
    return tuple((_whole(first), _whole(last)) for first, last in value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no whole number")
    return value


_INTERFACE_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")


def port_ranges(ports: Iterable[int]) -> tuple[PortRange, ...]:
    """The ports as ranges, ascending."""
    out: list[PortRange] = []
    for port in sorted(set(ports)):
        if out and port == out[-1][1] + 1:
            out[-1] = (out[-1][0], port)
        else:
            out.append((port, port))
    return tuple(out)


_CONNECTION = "ip daddr . tcp dport . tcp sport"
_HELD = f"""\
type ipv4_addr . inet_service . inet_service; size 65535; flags dynamic, timeout; \
timeout {HOLD_SECONDS}s;"""


_BACK = f"""\
    map back {{
        type ipv4_addr . inet_service : ipv4_addr . inet_service; size {MOST_REMEMBERED};
        flags dynamic, timeout; timeout {REMEMBERED_DAYS}d;
    }}
"""


def _remembered(which: str) -> str:
    """Where each connection was to go, for `_back`."""
    return f"""\
        {which} \
            update @back {{ ip saddr . tcp sport : ip daddr . tcp dport }}
"""


def _back(port: int) -> str:
    """A connection of which the kernel knows nothing any more, as its table of connections was
    flushed. When the program says something, it is redirected again; what rayfwd says goes where
    that program has it from."""
    return f"""\
    chain back {{
        type nat hook postrouting priority 100; policy accept;
        ip saddr 127.0.0.1 tcp sport {port} snat ip to ip daddr . tcp dport map @back
    }}
"""


_GUARDING = """\
    set guarded { type inet_service; flags interval; auto-merge; }
    set friends { type ipv4_addr; flags interval; auto-merge; }
"""


def _guard(network: str, priority: int, counter: str = "") -> str:
    """What comes to Ray's ports from other machines. Both tables have it. The last line is for what
    another table has taken out of the kernel's table of connections (`notrack`)."""
    return f"""\
    chain guard {{
        type filter hook input priority {priority}; policy accept;
        iifname "lo" accept
        ip daddr {network} drop
        ip saddr @friends accept
        tcp dport @guarded ct state new {counter}drop
        tcp dport @guarded tcp flags & (syn | ack) == syn {counter}drop
    }}
"""


def ruleset(
    rules: Rules, owned: bool = False, stands: bool = False, group: int | None = None
) -> str:
    """Text that replaces both tables, whether they were there or not. `owned`: the first one is to
    belong to who makes it (`tables.OwnTables`), and does so if it is there; a kernel that has this
    also has what keeps connections when its table of them is flushed. `stands`: that one is there,
    and is not made anew: what it remembers stays. `group`: of nfnetlink_log, which gets copies of
    what dials a port that is not known to be open; None: nobody does."""
    uids = ", ".join(map(str, sorted(rules.uids)))
    ours = f"ip daddr {rules.network} ip daddr != {rules.own}"
    known = f"{ours} meta skuid {{ {uids} }} ip daddr . tcp dport @open"
    answered = f"{ours} meta skuid {{ {uids} }} meta l4proto tcp meta mark {MARK_OPEN}"
    copied = "" if group is None else f"log group {group} queue-threshold 1 "
    shut, owner = shut_table(rules.interface), _owner(owned)
    renewed = f"table inet {shut}\ndelete table inet {shut}\nflush table inet {rules.interface}\n"
    before = renewed if stands else removal(rules.interface, owned)
    return f"""\
{before}\
table inet {shut} {{
{_GUARDING}\
    chain out {{
        type filter hook postrouting priority 200; policy accept;
        {ours} tcp flags & (syn | ack) == syn drop
        {ours} ct direction original ct status dnat drop
        {ours} ct direction reply ct status snat drop
        ip saddr 127.0.0.1 tcp sport {rules.port} ct status dnat drop
        ip saddr 127.0.0.1 tcp sport {rules.port} ct status snat drop
    }}
{_guard(rules.network, -9)}\
}}
table inet {rules.interface} {{{owner}
    set nodes {{ type ipv4_addr; }}
    set open {{ type ipv4_addr . inet_service; flags interval; auto-merge; }}
{_GUARDING}\
    set held {{ {_HELD} }}
    set held_again {{ {_HELD} }}
    set refused_at {{
        type ipv4_addr . inet_service; size 1024; flags dynamic, timeout; timeout 10m;
    }}
{_BACK if owned else ""}\
    counter refused_user {{ }}
    counter refused_port {{ }}
    counter refused_node {{ }}
    counter guarded_in {{ }}
    chain dial {{
        type nat hook output priority -100; policy accept;
{_remembered(known) + _remembered(answered) if owned else ""}\
        {known} redirect to :{rules.port}
        {answered} meta mark set 0 redirect to :{rules.port}
    }}
{_back(rules.port) if owned else ""}\
    chain refuse {{
        type filter hook output priority 0; policy accept;
        {ours} tcp flags & (syn | ack) != syn accept
        {ours} ct state new jump refused
    }}
    chain refused {{
        meta skuid != {{ {uids} }} counter name refused_user meta l4proto tcp reject with tcp reset
        ip daddr @nodes meta l4proto tcp jump unknown
        ip daddr @nodes reject
        counter name refused_node reject with icmp type host-unreachable
    }}
    chain unknown {{
        meta mark {MARK_CLOSED} goto closed
        tcp dport >= {LOWEST_PORT} {_CONNECTION} != @held \
            add @held {{ {_CONNECTION} }} {copied}drop
        tcp dport >= {LOWEST_PORT} {_CONNECTION} != @held_again \
            add @held_again {{ {_CONNECTION} }} {copied}drop
        goto closed
    }}
    chain closed {{
        counter name refused_port update @refused_at {{ ip daddr . tcp dport counter }} \
            reject with tcp reset
    }}
{_guard(rules.network, -10, "counter name guarded_in ")}\
}}
{update(rules)}"""


def copying(interface: str, group: int) -> str:
    """Text that does nothing, and fails where the kernel gives no copies of packets."""
    table = f"inet {interface}-try"
    return f"table {table} {{ chain try {{ log group {group} queue-threshold 1 ; }} ; }}\n" + (
        f"delete table {table}\n"
    )


def update(rules: Rules) -> str:
    """Text that brings the sets of a table that stands up to date; connections notice nothing."""
    own, shut = f"inet {rules.interface}", f"inet {shut_table(rules.interface)}"
    guarding = {"guarded": [_span(p) for p in rules.guarded], "friends": sorted(rules.friends)}
    return (
        _filled(own, {**_places(rules), **guarding})
        # Another program may have removed that table a moment ago.
        + f"table {shut} {{\n{_GUARDING}}}\n"
        + _filled(shut, guarding)
    )


def shut_table(interface: str) -> str:
    """The name of the table beside, which shuts the way."""
    return f"{interface}-shut"


def removal(interface: str, owned: bool = False, shut: bool = True) -> str:
    """Text that removes the tables, whether they are there or not; `shut`: both. `owned`: the
    first one belongs to who says this, if it is there."""
    beside = f"table inet {shut_table(interface)}\ndelete table inet {shut_table(interface)}\n"
    own = f"table inet {interface} {{{_owner(owned)}}}\ndelete table inet {interface}\n"
    return own + (beside if shut else "")


def _owner(owned: bool) -> str:
    return " flags owner; " if owned else ""


def _places(rules: Rules) -> dict[str, list[str]]:
    """Nodes, and what may be dialled of them, as elements of sets."""
    opened = [f"{rules.probe} . {rules.port}"] + [
        f"{address} . {_span(ports)}" for address, of in rules.open_ports.items() for ports in of
    ]
    return {"nodes": sorted(rules.open_ports), "open": opened}


def _filled(table: str, sets: Mapping[str, list[str]]) -> str:
    """Text by which these sets have these elements and no others."""
    flush = "".join(f"flush set {table} {name}\n" for name in sets)
    return flush + "".join(
        f"add element {table} {name} {{ {', '.join(elements)} }}\n"
        for name, elements in sets.items()
        if elements
    )


def _span(ports: PortRange) -> str:
    first, last = ports
    return str(first) if first == last else f"{first}-{last}"
