"""Makes and removes the overlay: the interface, its address, the route and the rules.

Needs CAP_NET_ADMIN in the network namespace, and the commands `ip` and `nft`. Everything here may
be said again: what is there already stays.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.cluster.plan import in_loopback
from rayfwd.network import ruleset
from rayfwd.network.held_dials import HeldDials
from rayfwd.network.ruleset import Rules
from rayfwd.network.tables import OwnTables
from rayfwd.problems import ProblemError
from rayfwd.system import setting
from rayfwd.system.logs import get_logger

log = get_logger(__name__)

COMMAND_TIMEOUT = 20.0
"""Seconds for `ip` or `nft`; they take some milliseconds."""
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
"""Where the commands of the system are; never the caller's PATH."""
# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_GROUP_NFTABLES = 1 << 6
_TABLE_DELETED = 10 << 8 | 2
_NLMSGHDR = struct.Struct("=IHHII")
"""length, type, flags, sequence number, port id"""
_ON_THE_WAY = frozenset({"output", "postrouting", "prerouting", "input"})
"""The hooks that a packet passes which a machine sends to itself."""
_CHAIN = re.compile(r"\tchain (\S+) \{")
_COUNTER = re.compile(r"counter (\S+) \{\s+packets (\d+)")
_LEGACY_TABLES = Path("/proc/self/net/ip_tables_names")
_TRACKING = Path("/proc/sys/net/netfilter")
FULL_PART = 0.95
"""Part of the kernel's table of connections from which on it is the likely cause: a moment later
some are gone again."""
CAP_NET_ADMIN = 12
"""Its bit in /proc/self/status (capabilities(7))."""


class TableEvents:
    """Hears from the kernel that tables of nftables were deleted, ours or others'."""

    def __init__(self) -> None:
        """Raises OSError where the kernel does not tell."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER)
        try:
            self._sock.bind((0, _GROUP_NFTABLES))
        except OSError:
            self._sock.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def deleted(self) -> bool:
        """Whether one was since this was asked last; True too where events were missed."""
        found = False
        while True:
            try:
                data = self._sock.recv(1 << 16)
            except BlockingIOError:
                return found
            except OSError:  # ENOBUFS
                return True
            at = 0
            while at + _NLMSGHDR.size <= len(data):
                length, kind, *_ = _NLMSGHDR.unpack_from(data, at)
                found |= kind == _TABLE_DELETED
                at += max((length + 3) & ~3, _NLMSGHDR.size)


@dataclass(frozen=True, slots=True)
class Found:
    """What stands of the overlay."""

    interface: bool
    address: bool
    table: bool
    refused: dict[str, int]
    """Packets by the counters of the table."""
    refused_at: tuple[tuple[str, int, int], ...] = ()
    """Addresses and ports of other nodes that were refused in the last ten minutes, and how often
    since each is there."""

    def to_wire(self) -> dict[str, Any]:
        return {
            "interface": self.interface,
            "address": self.address,
            "table": self.table,
            "refused": dict(self.refused),
            "refused_at": [list(row) for row in self.refused_at],
        }


NOTHING = Found(False, False, False, {})


def capable() -> bool:
    """Whether this process may change its network."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> CAP_NET_ADMIN & 1)
    return False


def check_commands() -> None:
    """Raises ProblemError `overlay_impossible` where a command is missing."""
    for name, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(name, path=_PATH) is None:
            raise _impossible(f"the command {name} is missing", f"install the package {package}")


def check_tools() -> None:
    """Raises ProblemError `overlay_impossible` where a command or nftables is missing."""
    check_commands()
    try:
        _run(["nft", "list", "tables"])
    except OSError as exc:
        raise _impossible(
            f"nftables does not answer: {exc}",
            f"use a kernel with nf_tables, or set {setting.value('network.level', 'listeners')}",
        ) from exc


class OverlayMaker:
    """Makes an overlay and removes it. What it makes of nftables is its own where that can be."""

    def __init__(self, interface: str) -> None:
        self._interface = interface
        self._tables: OwnTables | None = None
        self._owned = False
        """A table that stands is of `_tables`."""
        self._stands = False
        self._tried = False
        self._copies_to: int | None = None
        """The group that gets copies of what dials a port that is not known to be open."""

    def up(self, wanted: Rules) -> None:
        """Make everything, or bring it up to date. Raises ProblemError `overlay_failed`."""
        check_unused(wanted)
        try:
            _make_interface(wanted)
            self._make_tables(wanted)
        except OSError as exc:
            raise _failed(str(exc)) from exc

    def hear_dials(self, group: int) -> HeldDials:
        """What dials a port that is not known to be open; the rules that are made next give copies
        of it to that group. Raises OSError where they cannot."""
        self._copies_to = None
        nft(ruleset.copying(self._interface, group))
        dials = HeldDials(group, time.monotonic)
        self._copies_to = group
        return dials

    def _make_tables(self, wanted: Rules) -> None:
        """Raises OSError."""
        if not self._tried:
            self._tried = True
            self._make_own_tables(wanted)
        else:
            stands = self._owned and self._stands
            self._run(ruleset.ruleset(wanted, self._owned, stands, self._copies_to))
        self._stands = True

    def _make_own_tables(self, wanted: Rules) -> None:
        """Find out whether a table may have an owner here. Raises OSError where there can be no
        table at all."""
        nft(ruleset.removal(self._interface, shut=False))  # one that was left, and is nobody's
        try:
            self._tables = OwnTables()
            self._tables.run(ruleset.ruleset(wanted, owned=True, group=self._copies_to))
            self._owned = True
        except OSError as exc:
            self._tables = None
            nft(ruleset.ruleset(wanted, group=self._copies_to))
            log.info("overlay_not_owned", cause=str(exc))

    def _run(self, text: str) -> None:
        if self._tables is None:
            nft(text)
        else:
            self._tables.run(text)

    def update(self, wanted: Rules) -> None:
        """Bring the sets of ports up to date. Raises ProblemError `overlay_failed`."""
        try:
            self._run(ruleset.update(wanted))
        except OSError as exc:
            raise _failed(str(exc)) from exc

    def down(self) -> None:
        """Remove everything that is there of it. Raises ProblemError `overlay_failed`."""
        mistakes = []
        try:
            self._run(ruleset.removal(self._interface, self._owned))
            self._stands = False
        except OSError as exc:
            mistakes.append(str(exc))
        try:
            if _has_interface(self._interface):
                _run(["ip", "link", "del", "dev", self._interface])
        except OSError as exc:
            mistakes.append(str(exc))
        if mistakes:
            raise _failed("; ".join(mistakes))


def nft(text: str) -> None:
    """One transaction. Raises OSError with what it said."""
    _run(["nft", "-f", "-"], text)


def found(wanted: Rules) -> Found:
    """What stands now."""
    rows = _shown(wanted.interface)
    listing, beside = _listing(wanted.interface), _listing(ruleset.shut_table(wanted.interface))
    counters = _COUNTER.findall(listing)
    return Found(
        interface=any("UP" in row.get("flags", ()) for row in rows),
        address=wanted.own in _addresses_of(rows),
        table=_chains_with_rules(listing) >= {"dial", "refuse", "refused", "unknown", "guard"}
        and _chains_with_rules(beside) >= {"out", "guard"},
        refused={name: int(packets) for name, packets in counters},
        refused_at=_refused_at(wanted.interface) if counters else (),
    )


def _listing(table: str) -> str:
    """A table as nft writes it; empty: there is none."""
    try:
        # Terse: the sets of open ports may be long. Not as JSON, which nft 1.0.6 writes wrongly of
        # a table that has an owner.
        return _run(["nft", "-t", "list", "table", "inet", table])
    except OSError:
        return ""


def _shown(interface: str) -> list[dict[str, Any]]:
    """The interface as `ip` knows it, or nothing."""
    try:
        argv = ["ip", "-j", "addr", "show", "dev", interface]
        rows: list[dict[str, Any]] = json.loads(_run(argv))
    except (OSError, ValueError):
        return []
    return rows


def _addresses_of(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    found = (a for row in rows for a in row.get("addr_info", ()))
    return {str(a.get("local")) for a in found if a.get("family") == "inet"}


def tracking_full() -> str | None:
    """That the kernel can remember no more connections, and so drops new ones; None: it can, or
    does not say."""
    try:
        count, most = (
            int((_TRACKING / f"nf_conntrack_{name}").read_text()) for name in ("count", "max")
        )
    except (OSError, ValueError):
        return None
    return f"{count} of {most}" if count >= FULL_PART * most else None


def orphaned(interface: str) -> bool:
    """Whether a keeper that was killed has left the way to other nodes shut. Raises OSError."""
    tables = _run(["nft", "list", "tables"]).splitlines()
    shut = f"table inet {ruleset.shut_table(interface)}"
    return shut in tables and f"table inet {interface}" not in tables


def _chains_with_rules(listing: str) -> set[str]:
    """Of a table as nft writes it, the chains that have rules."""
    found: set[str] = set()
    chain = None
    for line in listing.splitlines():
        if begin := _CHAIN.match(line):
            chain = begin[1]
        elif line == "\t}":
            chain = None
        elif chain is not None and line.strip() and not line.lstrip().startswith("type "):
            found.add(chain)
    return found


def beside(interface: str) -> list[str]:
    """Tables of others that see what this machine sends to itself: `ip nat`, by family and name,
    or `iptables-legacy nat`. Those that cannot be listed are left out."""
    return _nft_beside(interface) + _legacy_tables()


def _legacy_tables() -> list[str]:
    """Of iptables-legacy, which nft does not see. Root alone may read which there are."""
    try:
        names = _LEGACY_TABLES.read_text().split()
    except OSError:
        return []
    return sorted(f"iptables-legacy {name}" for name in names)


def _nft_beside(interface: str) -> list[str]:
    try:
        listing = json.loads(_run(["nft", "-j", "list", "chains"]))
        chains = [row["chain"] for row in listing["nftables"] if "chain" in row]
        own = {interface, ruleset.shut_table(interface)}
        return sorted(
            {
                f"{chain['family']} {chain['table']}"
                for chain in chains
                if chain.get("hook") in _ON_THE_WAY and chain["table"] not in own
            }
        )
    except (OSError, ValueError, KeyError):
        return []


def _refused_at(interface: str) -> tuple[tuple[str, int, int], ...]:
    """The elements of the set, with their counters; none where they cannot be read."""
    try:
        listing = json.loads(_run(["nft", "-j", "list", "set", "inet", interface, "refused_at"]))
        (found,) = [row["set"] for row in listing["nftables"] if "set" in row]
        elements = [row["elem"] for row in found.get("elem", ())]
        return tuple(
            (str(address), int(port), int(element["counter"]["packets"]))
            for element in elements
            for address, port in [element["val"]["concat"]]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _make_interface(wanted: Rules) -> None:
    interface = wanted.interface
    if not _has_interface(interface):
        try:
            _run(["ip", "link", "add", interface, "type", "dummy"])
        except OSError:
            # A kernel without `dummy`: one end of a pair serves as well.
            peer = f"{interface[:13]}-p"
            if _has_interface(peer):  # the other end has another name now, and our address
                _run(["ip", "link", "del", "dev", peer])
            _run(["ip", "link", "add", interface, "type", "veth", "peer", "name", peer])
            _run(["ip", "link", "set", "dev", peer, "up"])
    if _addresses_of(_shown(interface)) != {wanted.own}:
        _run(["ip", "addr", "flush", "dev", interface])
        _run(["ip", "addr", "add", f"{wanted.own}/32", "dev", interface])
    _run(["ip", "link", "set", "dev", interface, "up"])
    # As in the rest of 127/8, every address is this machine's own: a program may bind any of them.
    # What dials one without binding has this node's address. The route goes with the interface.
    route = ("local", wanted.network, "dev", interface, "src", wanted.own)
    _run(["ip", "route", "replace", *route])


def check_unused(wanted: Rules) -> None:
    """Raises ProblemError `overlay_refused` where the machine has a way to a part of the network:
    what it sends there would not arrive any more."""
    if in_loopback(wanted.network):
        return
    network = ipaddress.IPv4Network(wanted.network)
    try:
        rows = json.loads(_run(["ip", "-j", "-4", "route", "show", "table", "all"]))
    except (OSError, ValueError) as exc:
        raise _failed(f"the routes cannot be read: {exc}") from exc
    for row in rows:
        to = str(row.get("dst", "default"))
        if to == "default" or row.get("dev") == wanted.interface:
            continue
        if ipaddress.IPv4Network(to, strict=False).overlaps(network):
            raise codes.OVERLAY_REFUSED.error(
                f"the plan's network {network} is in use on this machine: a route to {to} leads "
                f"to {row.get('dev', 'another interface')}",
                f"on the head, set {setting.theirs('hub.network')} to a network to which no "
                "machine has a route",
            )


def _has_interface(name: str) -> bool:
    # Not by /sys, which may be of another network namespace than this process.
    return any(name == known for _, known in socket.if_nameindex())


def _run(argv: Sequence[str], text: str | None = None) -> str:
    """What the command wrote. Raises OSError with what it said."""
    command = shutil.which(argv[0], path=_PATH)
    if command is None:
        raise FileNotFoundError(f"{argv[0]}: no such command")
    try:
        ran = subprocess.run(
            [command, *argv[1:]],
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT,
            check=False,
            env={"PATH": _PATH, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as exc:
        raise OSError(f"{argv[0]} took more than {COMMAND_TIMEOUT:g} s") from exc
    if ran.returncode != 0:
        said = ran.stderr.strip().splitlines()
        raise OSError(f"{' '.join(argv[:3])}: {said[0] if said else ran.returncode}")
    return ran.stdout


def _impossible(cause: str, remedy: str) -> ProblemError:
    return codes.OVERLAY_IMPOSSIBLE.error(cause, remedy)


def _failed(cause: str) -> ProblemError:
    return codes.OVERLAY_FAILED.error(
        f"the overlay cannot be set up: {cause}",
        "check `nft list ruleset` and `ip addr`, or set "
        + setting.value("network.level", "listeners"),
    )
