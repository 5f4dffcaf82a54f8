"""Makes and removes the overlay: the interface, its address, the route and the rules.

Needs CAP_NET_ADMIN in the network namespace, and the commands `ip` and `nft`. Everything here may
be said again: what is there already stays.
"""

from __future__ import annotations

import ipaddress
import json
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayfwd import codes
from rayfwd.network import ruleset
from rayfwd.network.ruleset import Rules
from rayfwd.problems import ProblemError

COMMAND_TIMEOUT = 20.0
"""Seconds for `ip` or `nft`; they take some milliseconds."""
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
"""Where the commands of the system are; never the caller's PATH."""
LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")
CAP_NET_ADMIN = 12
"""Its bit in /proc/self/status (capabilities(7))."""


@dataclass(frozen=True, slots=True)
class Found:
    """What stands of the overlay."""

    interface: bool
    address: bool
    table: bool
    refused: dict[str, int]
    """Packets by the counters of the table."""

    def to_wire(self) -> dict[str, Any]:
        return {
            "interface": self.interface,
            "address": self.address,
            "table": self.table,
            "refused": dict(self.refused),
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
            raise _impossible(f"the command {name} is not there", f"install the package {package}")


def check_tools() -> None:
    """Raises ProblemError `overlay_impossible` where a command or nftables is missing."""
    check_commands()
    try:
        _run(["nft", "list", "tables"])
    except OSError as exc:
        raise _impossible(
            f"nftables does not answer: {exc}", "use a kernel with nf_tables, or the level below"
        ) from exc


def up(wanted: Rules) -> None:
    """Make everything, or bring it up to date. Raises ProblemError `overlay_failed`."""
    try:
        _make_interface(wanted)
        _run(["nft", "-f", "-"], ruleset.ruleset(wanted))
    except OSError as exc:
        raise _failed(str(exc)) from exc


def update(wanted: Rules) -> None:
    """Bring the sets of ports up to date. Raises ProblemError `overlay_failed`."""
    try:
        _run(["nft", "-f", "-"], ruleset.update(wanted))
    except OSError as exc:
        raise _failed(str(exc)) from exc


def down(interface: str) -> None:
    """Remove everything that is there of it. Raises ProblemError `overlay_failed`."""
    mistakes = []
    for argv, text in (
        (["nft", "-f", "-"], ruleset.removal(interface)),
        (["ip", "link", "del", "dev", interface], None),
    ):
        try:
            if argv[0] == "nft" or _has_interface(interface):
                _run(argv, text)
        except OSError as exc:
            mistakes.append(str(exc))
    if mistakes:
        raise _failed("; ".join(mistakes))


def found(wanted: Rules) -> Found:
    """What stands now."""
    try:
        rows = json.loads(_run(["ip", "-j", "addr", "show", "dev", wanted.interface]))
    except (OSError, ValueError):
        rows = []
    addresses = {a.get("local") for row in rows for a in row.get("addr_info", ())}
    try:
        listing = json.loads(_run(["nft", "-j", "list", "table", "inet", wanted.interface]))
        counters = [row["counter"] for row in listing["nftables"] if "counter" in row]
        chains = {row["chain"]["name"] for row in listing["nftables"] if "chain" in row}
    except (OSError, ValueError, KeyError):
        counters, chains = [], set()
    return Found(
        interface=any("UP" in row.get("flags", ()) for row in rows),
        address=wanted.own in addresses,
        table=chains >= {"dial", "refuse", "guard"},
        refused={row["name"]: int(row["packets"]) for row in counters},
    )


def _make_interface(wanted: Rules) -> None:
    interface = wanted.interface
    if not _has_interface(interface):
        try:
            _run(["ip", "link", "add", interface, "type", "dummy"])
        except OSError:
            # A kernel without `dummy`: one end of a pair serves as well.
            peer = ("peer", "name", f"{interface[:13]}-p")
            _run(["ip", "link", "add", interface, "type", "veth", *peer])
            _run(["ip", "link", "set", "dev", f"{interface[:13]}-p", "up"])
    _run(["ip", "addr", "flush", "dev", interface])
    _run(["ip", "addr", "add", f"{wanted.own}/32", "dev", interface])
    _run(["ip", "link", "set", "dev", interface, "up"])
    network = ipaddress.IPv4Network(wanted.network)
    if not network.subnet_of(LOOPBACK):
        # As in 127/8, every address is this machine's own: a program may bind any of them.
        route = ["local", str(network), "dev", "lo", "src", wanted.own]
        _run(["ip", "route", "replace", *route])


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
        f"the overlay cannot be made: {cause}",
        'see `nft list ruleset` and `ip addr`, or set network.level = "listeners"',
    )
