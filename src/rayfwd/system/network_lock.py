"""Which network of loopback addresses belongs to which rayfwd on this machine.

Two clusters with one network on one machine would take each other's Ray for their own. So each
daemon holds a name of its network: an abstract Unix socket, which lives in the network namespace
(what is one machine to Ray), is seen by every user, and is gone with its process however that ends.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rayfwd.system.ownership import peer_credentials
from rayfwd.system.users import user_name

_PREFIX = "rayfwd-network-"
_SOCKETS = Path("/proc/self/net/unix")
ASK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a network."""

    network: str
    pid: int
    """0: not known, or of another process namespace."""
    uid: int | None

    def __str__(self) -> str:
        who = "another user" if self.uid is None else f"user {user_name(self.uid)}"
        return f"{who}, pid {self.pid}" if self.pid else who


class NetworkLock:
    """A network that is this process's until `close`."""

    def __init__(self, network: str) -> None:
        """Raises OSError where somebody has it."""
        self.network = network
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(_name(network))
            self._socket.listen(8)
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()


def holder_of(network: str) -> Holder | None:
    """The first who has a network that overlaps this one, this process apart."""
    wanted = ipaddress.IPv4Network(network)
    for held in _held():
        if held.overlaps(wanted) and (found := _ask(str(held))) is not None:
            return found
    return None


def _held() -> Iterator[ipaddress.IPv4Network]:
    try:
        lines = _SOCKETS.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, at, name = line.rpartition(f"@{_PREFIX}")
        if at:
            try:
                yield ipaddress.IPv4Network(name.replace("-", "/"))
            except ValueError:
                continue


def _ask(network: str) -> Holder | None:
    """None: it is this process, or gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ASK_SECONDS)
        try:
            probe.connect(_name(network))
        except ConnectionRefusedError:
            return None
        except OSError:
            return Holder(network, 0, None)
        pid, uid = peer_credentials(probe)[:2]
    return None if pid == os.getpid() else Holder(network, pid, uid)


def _name(network: str) -> str:
    return "\0" + _PREFIX + network.replace("/", "-")
