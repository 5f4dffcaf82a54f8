"""A worker that others reach directly beside one behind a firewall, in one cluster.

The first has no firewall, but the overlay, whose guard lets in the machines that its file names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import Cluster
from tests.lab.machines import Lab, Machine

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    w1 = module_lab.machine("w1")
    friends = [module_lab.machine(name).address for name in ("head", "w2")]
    cluster = Cluster(module_lab, w1={"ray.advertise": w1.address, "network.guard_from": friends})
    cluster.start(["head", "w2"])
    w1.nft("table inet firewall\ndelete table inet firewall\n")
    cluster.start_node("w1", net_admin=True)
    cluster.wait_ready()
    yield cluster
    cluster.stop()


WAYS = ("small_tasks", "large_results", "large_arguments")
"""From that node to each, with data both ways; what else there is goes the same ways."""
AMONG = (*WAYS, "nested_tasks", "worker_to_worker")
"""And between each two of the others."""


@pytest.mark.parametrize(("driver", "checks"), [("head", WAYS), ("w1", AMONG), ("w2", WAYS)])
def test_essential_work(cluster: Cluster, driver: str, checks: Sequence[str]) -> None:
    addresses = {node["name"]: node["address"] for node in cluster.head.status()["roster"]}
    assert addresses["w1"] == cluster.lab.machine("w1").address
    lines = cluster.driver(driver, ["--checks", ",".join(checks)])
    verify(lines, driver, list(addresses.values()), checks)


def test_nobody_has_listeners_for_it(cluster: Cluster) -> None:
    block = ports(cluster, "w1")
    assert len(block) == 46
    for name in ("head", "w2"):
        assert not block & listening(cluster.lab.machine(name))
    assert ports(cluster, "w2") <= listening(cluster.lab.machine("head")), "w2's listeners"


def test_others_reach_it_without_the_link(cluster: Cluster) -> None:
    """Connections of the head's and of w2's Ray go to it themselves."""
    w1 = cluster.lab.machine("w1")
    for name in ("head", "w2"):
        machine = cluster.lab.machine(name)
        to = machine.network_command("ss", "-Htn", "state", "established", "dst", w1.address)
        dialled = {int(line.split()[3].rpartition(":")[2]) for line in to.splitlines()}
        assert dialled & ports(cluster, "w1"), f"{name} has no connection to w1: {to}"


DIAL = """
import socket, sys
for port in map(int, sys.argv[3:]):
    with socket.socket() as sock:
        sock.settimeout(2)
        sock.bind((sys.argv[1], 0))
        try:
            sock.connect((sys.argv[2], port))
            print("open")
        except OSError as exc:
            print(type(exc).__name__)
"""


def test_its_guard_knows_the_cluster_and_nobody_else(cluster: Cluster) -> None:
    """The same machine dials by the address that the file names, and by another one."""
    w1, w2 = cluster.worker("w1"), cluster.lab.machine("w2")
    network = w1.status()["network"]
    assert (network["level"], network["interface"]) == ("overlay", None)
    assert network["guard"] is True
    assert network["guard_from"] == [f"{m.address}/32" for m in (cluster.lab.machine("head"), w2)]
    stranger = w2.address.rpartition(".")[0] + ".99"
    w2.network_command("ip", "addr", "add", f"{stranger}/24", "dev", "eth0")
    opened = sorted(ports(cluster, "w1") & listening(w1.machine))[:4]
    assert len(opened) == 4
    for source, said in ((w2.address, "open"), (stranger, "TimeoutError")):
        argv = [str(w2.ray_python("2.60.0")), "-c", DIAL, source, w1.machine.address]
        assert w2.run([*argv, *map(str, opened)]).stdout.split() == [said] * 4
    assert w1.status()["conditions"] == []


def ports(cluster: Cluster, name: str) -> set[int]:
    row = next(node for node in cluster.head.status()["roster"] if node["name"] == name)
    first, last = row["ports"].split("-")
    return set(range(int(first), int(last) + 1)) - unused(int(first))


def unused(first: int) -> set[int]:
    """A block keeps eight ports for the services of a node, of which a worker has six."""
    return {first + 6, first + 7}


def listening(machine: Machine) -> set[int]:
    lines = machine.network_command("ss", "-Hltn").splitlines()
    return {int(line.split()[3].rpartition(":")[2]) for line in lines}
