"""Which network of loopback addresses belongs to which rayfwd on this machine.

Two clusters with one network on one machine would take each other's Ray for their own. So each
daemon holds a name of its network (`held_names.py`), which says the network and the user.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from rayfwd.system import sockdiag
from rayfwd.system.held_names import HeldName, NameHolder, holders_of_names
from rayfwd.system.users import user_name

_PREFIX = "rayfwd-network-"
_NAME = re.compile(rb"rayfwd-network-([0-9.]{7,15})-([0-9]{1,2})-.{1,64}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class NetworkHolder:
    """Who has a network."""

    network: str
    by: NameHolder

    @property
    def counts(self) -> bool:
        """Whether nobody but a rayfwd of root's or of this user's can say so."""
        return self.by.counts

    def __str__(self) -> str:
        who = "another user" if self.by.uid is None else f"user {user_name(self.by.uid)}"
        program = sockdiag.programs([self.by.inode]).get(self.by.inode)
        return who if program is None else f"{who}, pid {program.pid}"


class NetworkLock:
    """A network that is this process's until `close`."""

    def __init__(self, network: str) -> None:
        """Raises OSError where a process of root's or of this user's has just taken it."""
        self.network = network
        name = f"{_PREFIX}{network.replace('/', '-')}-{os.geteuid()}"
        self._held = HeldName(name, lambda: [h.by for h in holders_of(network) if h.counts])

    def close(self) -> None:
        self._held.close()


def holders_of(network: str) -> list[NetworkHolder]:
    """Who has a network that overlaps this one, those that count first."""
    return overlapping(network, holders())


def overlapping(network: str, among: Iterable[NetworkHolder]) -> list[NetworkHolder]:
    """Those of them who have a network that overlaps this one, those that count first."""
    wanted = ipaddress.IPv4Network(network)
    found = [holder for holder in among if ipaddress.IPv4Network(holder.network).overlaps(wanted)]
    return sorted(found, key=lambda holder: not holder.counts)


def holders() -> list[NetworkHolder]:
    """Of every network."""
    found = (_holder(holder) for holder in holders_of_names(_PREFIX))
    return [holder for holder in found if holder is not None]


def _holder(by: NameHolder) -> NetworkHolder | None:
    """None: it is for something else."""
    said = _NAME.fullmatch(by.name)
    if said is None:
        return None
    try:
        network = ipaddress.IPv4Network(f"{said[1].decode()}/{said[2].decode()}")
    except ValueError:
        return None
    return NetworkHolder(str(network), by)
