"""What the runtime asks of a role: the head's (`head.py`) or a worker's (`worker.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from rayfwd.config import Config
from rayfwd.daemon.handover import Arrival, Holder
from rayfwd.daemon.node import Node, RoleLinks, Work
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.status import Client, Direct, Ledger, Link, RosterRow, Streams, Volume, Worker
from rayfwd.system.control import Verb
from rayfwd.system.heartbeat import Heartbeat
from rayfwd.transport.refused import RefusedDial


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleStatus:
    """The keys of a status that a role fills; what they mean is in `status.Status`."""

    link: Link | None = None
    direct: tuple[Direct, ...] = ()
    workers: tuple[Worker, ...] | None = None
    clients: tuple[Client, ...] | None = None
    ledger: Ledger | None = None
    streams: Streams
    bytes: Volume
    roster: tuple[RosterRow, ...]
    refused: Iterable[RefusedDial] = ()
    """The newest first."""


class Role(Holder, Protocol):
    """Built whole by its constructor, where nothing listens or dials yet."""

    @property
    def node(self) -> Node:
        """What it has in common with the other role."""

    @property
    def links(self) -> RoleLinks:
        """How its links are."""

    @property
    def cluster(self) -> ClusterReport | None:
        """What was seen of the whole cluster last; None: nothing yet."""

    async def serve(self, arrival: Arrival | None) -> None:
        """The role's own work, until cancelled or ended, with what an earlier process has left.

        Raises ProblemError where it cannot begin.
        """

    def leaving(self) -> None:
        """This node stops for good: whoever is to know hears of it before Ray ends."""

    async def end(self) -> None:
        """End the role's own work in order."""

    def watchers(self) -> dict[str, Work]:
        """The tasks of the role that only look, by names that no watcher of the node has."""

    def loops(self) -> Iterable[Heartbeat]:
        """The loops of the role that the watchdog looks at."""

    def take_config(self, config: Config) -> None:
        """What `reload.LIVE` has may be different now."""

    def verbs(self) -> Mapping[str, Verb]:
        """What the control socket can be asked for besides."""

    def status(self) -> RoleStatus:
        """The role's part of the status."""
