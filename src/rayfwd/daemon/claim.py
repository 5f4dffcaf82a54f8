"""This node's hold on its plan's network, against other clusters on the same machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from rayfwd import codes
from rayfwd.problems import Problem
from rayfwd.system import network_lock, setting
from rayfwd.system.logs import get_logger
from rayfwd.system.network_lock import NetworkHolder, NetworkLock, holders_of, overlapping

log = get_logger(__name__)

NETWORKS = tuple(ipaddress.IPv4Network(f"127.{second}.0.0/16") for second in range(77, 120))
"""In the order in which a head without a file takes them."""
MOST_NAMED = 3
"""Other users' programs that are named, of those that say they have the network."""


class NetworkClaim(Protocol):
    """Holds one network at a time."""

    problem: Problem | None
    """Why the network that was asked for last is not held."""

    def take(self, network: str) -> bool:
        """Hold this one, and no other any more."""

    def close(self) -> None:
        """Hold none."""


class MachineClaim:
    """Asks the other daemons of this machine (`system/network_lock.py`)."""

    def __init__(self) -> None:
        self.problem: Problem | None = None
        self._lock: NetworkLock | None = None

    def take(self, network: str) -> bool:
        if self._lock is not None and self._lock.network == network:
            return True
        self.close()
        if (held := _Reserved.taken(network)) is not None:
            self._lock, self.problem = held, None
            return True
        holders = holders_of(network)
        if not holders or not holders[0].counts:
            with suppress(OSError):  # somebody was faster
                self._lock, self.problem = NetworkLock(network), None
                self._name_others(network, holders)
                return True
        who = f"another rayfwd ({holders[0]})" if holders else "another rayfwd"
        problem = codes.NETWORK_IN_USE.problem(
            f"{network}, this cluster's network, belongs to another cluster on this machine: "
            f"{who} has {holders[0].network if holders else network}",
            f"on the head of one of the two, set {setting.key('hub.network')} (for example "
            f"{_another(network)}), and set "
            + setting.keys("hub.port_base", "ray.port", "ray.dashboard_port", "ray.client_port")
            + " to ports that "
            "the other cluster does not have; `rayfwd head` finds free values for all of them",
        )
        if problem != self.problem:
            self.problem = problem
            log.error(problem.code.event, cause=problem.cause, remedy=problem.remedy)
        return False

    def _name_others(self, network: str, holders: Sequence[NetworkHolder]) -> None:
        """Other users say that they have it, which anybody may: where it is so, the ports that both
        want are taken, and each says whose they are."""
        for holder in holders[:MOST_NAMED]:
            log.warning("network_shared", network=network, theirs=holder.network, who=str(holder))

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def free_networks() -> tuple[list[str], list[str]]:
    """Those that nobody holds, the usual one first; and those that only others say they do."""
    free, shared, everybody = [], [], network_lock.holders()
    for network in map(str, NETWORKS):
        holders = overlapping(network, everybody)
        if not holders:
            free.append(network)
        elif not holders[0].counts:
            shared.append(network)
    return free, shared


class _Reserved:
    """What this process holds until its claim takes it."""

    lock: NetworkLock | None = None

    @classmethod
    def taken(cls, network: str) -> NetworkLock | None:
        lock, cls.lock = cls.lock, None
        if lock is not None and lock.network != network:
            lock.close()
            return None
        return lock


def reserve() -> str | None:
    """A network that nobody has, held from now on for this process's claim; None: there is none.

    Of several who look in one moment each has another: whoever sees somebody else's name beside
    its own goes on to the next network.
    """
    free, shared = free_networks()
    for network in (*free, *shared):
        try:
            lock = NetworkLock(network)
        except OSError:
            continue
        if network in free and len(holders_of(network)) > 1:
            lock.close()
            continue
        _Reserved.taken("")
        _Reserved.lock = lock
        return network
    return None


def _another(wanted: str) -> str:
    """One to have instead: whoever has the wanted one may be gone by now, and come back."""
    free, shared = free_networks()
    other = ipaddress.IPv4Network(wanted)
    for network in (*free, *shared):
        if not other.overlaps(ipaddress.IPv4Network(network)):
            return network
    return "127.120.0.0/16"
