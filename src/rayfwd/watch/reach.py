"""Dials the servers of other nodes' Ray where this node's Ray dials them, and says which is dead.

A gRPC server speaks first, so a connection that brings nothing tells of a listener that is shut, a
port that is dead or a way that swallows packets, without Ray's help and before Ray gives up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from rayfwd import codes
from rayfwd.cluster import probe
from rayfwd.cluster.plan import NodePlan
from rayfwd.problems import Problem, ProblemError
from rayfwd.system.coalesce import sleep_coalesced
from rayfwd.transport.endpoints import Endpoint, EndpointOf
from rayfwd.watch.board import Board

REACH_INTERVAL = 20.0
"""Seconds between two looks; a look costs a node two or three connections that carry nothing."""

NEWCOMER_INTERVAL = 1.0
"""Seconds in which a peer that has not been looked at yet is seen."""

GREETING_TIMEOUT = 5.0
"""Seconds for a server's first bytes."""

CONFIRM_DELAY = 2.0
"""Seconds until what did not answer is asked once more."""

CONFIRM_TIMEOUT = 7.0
"""Seconds for the first bytes then. Ray gives up a node that it does not reach some 25 s after that
joined: all of a newcomer's look is to be over by then."""

MOST_WORKER_PORTS = 128
"""Worker ports that are dialled to find one that answers."""

WATCHER = "reach"


@dataclass(frozen=True, slots=True)
class Peer:
    """A node that ought to be reachable now: its Ray is up, and so is the way to it."""

    plan: NodePlan
    epoch: object = None
    """Whatever changes when the way was interrupted: what was seen across that counts for nothing.
    """


class Reach:
    """`run` looks until cancelled. `peers` gives, by name, who ought to be reachable at present."""

    def __init__(
        self,
        own_name: str,
        peers: Callable[[], Mapping[str, Peer]],
        board: Board,
        endpoint: EndpointOf,
        interval: float = REACH_INTERVAL,
    ) -> None:
        self._own_name = own_name
        self._peers = peers
        self._board = board
        self._endpoint = endpoint
        self._interval = interval
        self._looked: Mapping[str, Peer] = {}

    async def run(self) -> None:
        while True:
            self._board.put(WATCHER, await self.probe())
            await self._pause()

    async def _pause(self) -> None:
        """Until the next look is due: at once where somebody has come."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._interval
        while (left := due - loop.time()) > 0:
            if any(self._looked.get(name) != peer for name, peer in self._peers().items()):
                return
            await sleep_coalesced(min(left, NEWCOMER_INTERVAL))

    async def probe(self) -> dict[str, Problem]:
        """What is wrong now, by node; a failure is confirmed once before it counts."""
        before = self._looked = dict(self._peers())
        first = await self._dial(before, GREETING_TIMEOUT)
        if any(first.values()):
            await asyncio.sleep(CONFIRM_DELAY)
            again = {name: before[name] for name, bad in first.items() if bad}
            second = await self._dial(again, CONFIRM_TIMEOUT)
            now = self._peers()
            # What was asked again and is still a peer, by a way that stood all the time.
            return {
                name: explain(before[name].plan, bad, self._own_name)
                for name, bad in second.items()
                if bad and now.get(name) == before[name]
            }
        return {}

    async def _dial(self, peers: Mapping[str, Peer], seconds: float) -> dict[str, dict[int, str]]:
        bad = await asyncio.gather(
            *(
                dead_ports(peer.plan, servers(peer.plan), seconds, self._endpoint)
                for peer in peers.values()
            )
        )
        return dict(zip(peers, bad, strict=True))


def servers(plan: NodePlan) -> list[int]:
    """The ports on which a node's Ray always serves gRPC."""
    services = plan.services
    names = ("gcs", "node_manager", "object_manager")
    return [services[name] for name in names if name in services]


async def dead_ports(
    plan: NodePlan, ports: Iterable[int], seconds: float, endpoint: EndpointOf
) -> dict[int, str]:
    """Those of the ports that do not greet, and how the attempt ended. One that has no endpoint
    now is left out: what is wrong then is told by others."""
    found: dict[int, Endpoint] = {}
    for port in ports:
        with suppress(ProblemError):
            found[port] = endpoint(plan, port)
    outcomes = await asyncio.gather(*(probe.greets(*at, seconds) for at in found.values()))
    return {p: o for p, o in zip(found, outcomes, strict=True) if o != probe.ANSWERED}


async def dead_worker_ports(plan: NodePlan, endpoint: EndpointOf) -> dict[int, str]:
    """The worker ports, if not one of them answers although a worker must be there; else none.

    Which port has a process behind it only Ray knows. One that has none is refused by the node
    itself, which is no fault; so nothing is returned either where all are.
    """
    count = min(MOST_WORKER_PORTS, plan.worker_ports)
    step = (plan.worker_ports - 1) / max(count - 1, 1)
    ports = [plan.first_worker_port + round(i * step) for i in range(count)]
    dead = await dead_ports(plan, ports, GREETING_TIMEOUT, endpoint)
    unused = probe.REFUSED if plan.advertised else probe.RESET
    if len(dead) < len(ports) or all(outcome == unused for outcome in dead.values()):
        return {}
    return {port: outcome for port, outcome in dead.items() if outcome != unused}


def explain(plan: NodePlan, bad: Mapping[int, str], near: str) -> Problem:
    """What a node's dead ports mean, seen from node `near`."""
    outcome = max(sorted(set(bad.values())), key=lambda o: sum(b == o for b in bad.values()))
    what = probe.purposes(plan, bad)
    span = f"{min(bad)}-{max(bad)}" if len(bad) > 1 else f"{next(iter(bad))}"
    way = "" if plan.advertised else "the listener at "
    cause = f"{near} does not reach port {what} of {plan.name} by {way}{plan.address}: "
    for_what = _for_what(plan, bad)
    if plan.advertised:
        how = {
            probe.DROPPED: "packets are dropped",
            probe.REFUSED: "connections are refused",
            probe.RESET: "connections are reset",
            probe.SILENT: "connections are accepted, but nothing answers",
        }.get(outcome, "there is no route")
        remedy = (
            f"let {near} in: allow inbound TCP to ports {plan.base}-{plan.last_worker_port} of "
            f"{plan.address}; if they are open, check that {plan.name}'s Ray runs"
        )
    elif outcome in {probe.DROPPED, probe.REFUSED, probe.UNROUTABLE}:
        verb = "drops packets" if outcome == probe.DROPPED else "refuses connections"
        how = f"something on {near} itself {verb} to it"
        remedy = (
            f"check {near}'s firewall: programs on {near} must reach {plan.address} port {span} "
            "on the loopback interface (`nft list ruleset`); and check `rayfwd status` for "
            "blocked listeners"
        )
    elif outcome == probe.RESET:
        how = f"nothing listens on that port on {plan.name}"
        remedy = f"read raylet.out on {plan.name}; a restart of Ray there opens its ports again"
    else:
        how = f"connections reach {plan.name}'s side, but nothing answers"
        remedy = (
            f"check {plan.name}'s firewall: rayfwd there must reach {plan.address} port {span} on "
            "the loopback interface; if that is open, Ray's process hangs (`py-spy dump`)"
        )
    return codes.RAY_PORT_UNREACHABLE.problem(f"{cause}{how}. {for_what}", remedy)


def _for_what(plan: NodePlan, bad: Iterable[int]) -> str:
    """What does not work without these ports."""
    names = {port: name for name, port in plan.services.items()}
    needs = {
        "gcs": "without it, the node cannot join or stay",
        "node_manager": "without it, no task is placed there, and Ray gives the node up",
        "object_manager": "without it, no object over 100 KB is passed to or from the node",
    }
    found = list(dict.fromkeys(needs.get(names.get(port, ""), "") for port in sorted(bad)))
    lost = [need for need in found if need]
    if any(port not in names for port in bad):
        lost.append("without them, no task runs there, and no result comes back")
    return ". ".join(need[0].upper() + need[1:] for need in lost)
