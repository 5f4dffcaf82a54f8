"""Ports that programs of several nodes look for: each node leaves another part to its own."""

from __future__ import annotations

import asyncio
import errno
import socket
from itertools import combinations

import pytest

from rayfwd.cluster.plan import Level, NodePlan
from rayfwd.config import MOST_APART, ConfigError, parse
from rayfwd.network.apart import MOST_PARTS, RETRY, HeldPorts, held_ports
from rayfwd.session.target import Target
from rayfwd.transport.listeners import _bound
from rayfwd.watch.cluster_view import ClusterView
from tests.unit.loops import run, run_on_fake_clock

NETWORK = "127.77.0.0/16"
NOBODY = "127.77.255.255"
PORTS = range(30000, 31000)


def addresses(count: int) -> list[str]:
    return [f"127.77.{n // 256}.{n % 256}" for n in range(1, count + 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, MOST_PARTS])
def test_each_node_has_a_part_of_its_own(count: int) -> None:
    nodes = addresses(count)
    left = {at: set(PORTS) - held_ports(PORTS, at, nodes, NETWORK) for at in nodes}
    assert all(left.values())
    assert not any(left[one] & left[other] for one, other in combinations(nodes, 2))


def test_a_program_finds_one_of_its_node_s_in_few_attempts() -> None:
    """Serve tries a hundred, from the lowest on."""
    nodes = addresses(1000)
    for at in nodes[:3]:
        assert min(set(PORTS) - held_ports(PORTS, at, nodes, NETWORK)) < 30000 + MOST_PARTS


def test_nodes_that_are_gone_leave_no_gap() -> None:
    """What decides is who is there, not how high their addresses are."""
    nodes = ["127.77.0.1", "127.77.3.2"]
    assert len(held_ports(PORTS, nodes[0], nodes, NETWORK)) == 500


@pytest.mark.parametrize(
    ("levels", "any_listens", "others_listen"),
    [
        (("overlay", "overlay"), False, False),
        (("listeners", "overlay"), True, False),
        (("overlay", "listeners"), True, True),
        (("listeners", "listeners"), True, True),
    ],
)
def test_who_has_listeners_for_whose_ports(
    levels: tuple[Level, Level], any_listens: bool, others_listen: bool
) -> None:
    """As the first of them sees it; a node whose own plan is not known yet has nobody's."""
    nodes = tuple(
        NodePlan(f"n{n}", "worker", at, 20000, 100, level=level)
        for n, (at, level) in enumerate(zip(addresses(2), levels, strict=True))
    )
    view = ClusterView(NETWORK, 60.0, nodes[0], nodes)
    assert (view.any_listens, view.others_listen) == (any_listens, others_listen)
    view = ClusterView(NETWORK, 60.0, None, nodes)
    assert (view.any_listens, view.others_listen) == (False, False)


def wildcard(port: int) -> socket.socket | None:
    """As Serve's replicas listen; None: the port is in use."""
    sock = socket.socket()
    try:
        sock.bind(("", port))
    except OSError as exc:
        sock.close()
        if exc.errno != errno.EADDRINUSE:
            raise
        return None
    sock.listen()
    return sock


def free_ports(count: int) -> range:
    """So many in a row."""
    for first in range(23000, 32000, count):
        socks = [wildcard(port) for port in range(first, first + count)]
        for sock in filter(None, socks):
            sock.close()
        if all(socks):
            return range(first, first + count)
    raise AssertionError("no free ports")


def test_what_is_held_is_in_use_for_all_addresses_and_no_other() -> None:
    async def main() -> None:
        ports = free_ports(8)
        held = HeldPorts()
        task = asyncio.create_task(held.run())
        held.want(NOBODY, frozenset(ports[::2]))
        while len(held.held) < 4:
            await asyncio.sleep(0.01)
        assert [wildcard(port) is None for port in ports[::2]] == [True] * 4
        with _bound(Target("127.77.0.2", ports[0]), shared=True) as listener:
            listener.listen()  # a listener for another node's
        own = wildcard(ports[1])
        assert own is not None
        own.close()
        held.want(NOBODY, frozenset(ports[1:2]))
        while held.held != {ports[1]}:
            await asyncio.sleep(0.01)
        again = wildcard(ports[0])
        assert again is not None
        again.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not held.held

    run(main)


def test_a_port_that_a_program_has_is_held_when_it_is_free() -> None:
    async def main() -> None:
        (port,) = free_ports(1)
        own = wildcard(port)
        assert own is not None
        held = HeldPorts()
        task = asyncio.create_task(held.run())
        held.want(NOBODY, frozenset({port}))
        await asyncio.sleep(2 * RETRY)
        assert not held.held
        own.close()
        await asyncio.sleep(RETRY)
        assert held.held == {port}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_on_fake_clock(main)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("30000", "two ports"),
        ("80-90", "two ports"),
        ("31000-30000", "two ports"),
        ("30000-70000", "two ports"),
        ("30000-39999", f"{MOST_APART} ports at most"),
    ],
)
def test_what_is_no_range(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse({"role": "head", "network": {"apart": [text]}})
