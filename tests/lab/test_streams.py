"""TCP connections of every kind through rayfwd: the same bytes and endings as without it.

Ray is not started. Each part's client is run twice, on the server's own machine and through a
listener of another machine, and both transcripts, the server's and the client's, are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.cluster import Cluster
from tests.lab.conversation import FAST, PARTS, SLOW
from tests.lab.machines import Lab
from tests.lab.process import until
from tests.lab.talk import BASE, LISTENER, Talk, forwards

WAYS = [("w1", "head"), ("head", "w1"), ("w1", "w2")]


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    ports = [BASE + i for i in range(len(PARTS))]
    own: dict[str, Any] = {name: {"forward": forwards(name)} for name in LISTENER}
    cluster = Cluster(module_lab, every={"ray.start": False, "expose": ports}, **own)
    cluster.start(["head"])
    cluster.head.wait_event("hub_listening")  # a worker that comes sooner says that it is absent
    cluster.start(["w1", "w2"])
    cluster.wait_ready()
    for daemon in cluster.daemons:
        daemon.wait_status(lambda s: not s["conditions"] and len(s["roster"]) == 3, 30)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def talk(cluster: Cluster) -> Talk:
    return Talk(cluster.lab)


@pytest.fixture(params=WAYS, ids=["worker-to-head", "head-to-worker", "worker-to-worker"])
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    pair: tuple[str, str] = request.param
    return pair


def compare(
    talk: Talk, way: tuple[str, str], part: str, client: str = "", connections: int = 1
) -> list[list[Any]]:
    """Both transcripts are the same as without rayfwd between; the client's."""
    source, target = way
    index = PARTS.index(part)
    machine = talk.lab.machine
    name = client or part
    direct = talk.both(machine(target), target, BASE + index, name, connections)
    through = talk.both(machine(source), target, LISTENER[target] + index, name, connections)
    assert through == direct
    return through[0]


def test_server_speaks_first(talk: Talk, way: tuple[str, str]) -> None:
    script = compare(talk, way, "server_first")
    assert [line[1] for line in script] == [100_000, 0]
    assert script[-1][-1] == "end"


def test_client_half_closes(talk: Talk, way: tuple[str, str]) -> None:
    script = compare(talk, way, "client_half_closes")
    assert [line[1] for line in script] == [300_000]


def test_server_half_closes(talk: Talk, way: tuple[str, str]) -> None:
    script = compare(talk, way, "server_half_closes")
    assert [line[1] for line in script] == [50_000]


def test_reset_by_server(talk: Talk, way: tuple[str, str]) -> None:
    script = compare(talk, way, "reset_by_server")
    assert script[-1][-1] == "reset"


def test_reset_by_client(talk: Talk, way: tuple[str, str]) -> None:
    script = compare(talk, way, "reset_by_client")
    assert script[-1][-1] == "silence"
    last = json.loads(talk.served(way[1])[-1])
    assert last["server"][-1][-1] == "reset"


def test_slow_reader_does_not_hold_up_a_fast_one(talk: Talk, way: tuple[str, str]) -> None:
    script = compare(talk, way, "source", connections=2)
    sizes = [(line[0], line[2]) for line in script]
    assert sizes == [("slow", 10), ("fast", FAST), ("slow", SLOW - 10)]


def test_1000_short_connections_in_a_row(talk: Talk, way: tuple[str, str]) -> None:
    script = compare(talk, way, "echo", "short", 1000)
    assert script == [["end, same bytes", 1000]]


def test_500_connections_open_at_once(talk: Talk, way: tuple[str, str]) -> None:
    script = compare(talk, way, "echo", "many", 500)
    assert script == [["end after 0 more bytes", 500], ["goes on, same bytes", 500]]


def test_refused(talk: Talk, way: tuple[str, str]) -> None:
    """A listener has accepted before the far end can refuse: the client is reset at once."""
    source, target = way
    index = PARTS.index("refused")
    assert talk.call(talk.lab.machine(target), BASE + index, "refused") == [["refused"]]
    found = talk.call(talk.lab.machine(source), LISTENER[target] + index, "refused")
    assert [(line[1], line[-1]) for line in found] == [(0, "reset")]


def test_a_port_that_is_not_exposed_is_reset(cluster: Cluster, talk: Talk) -> None:
    """A worker cannot reach a service of another machine that its file does not name."""
    head, w1 = cluster.lab.machine("head"), cluster.lab.machine("w1")
    argv = [talk.python, talk.script, "serve", "17000"]
    server = head.popen(argv)
    until(lambda: "listening" in server.log.read_text(), 20, lambda: "the server")
    listeners = [{"listen": "127.0.0.1:17000", "to": "head:17000"}, *forwards("w1")]
    cluster.configs["w1"]["forward"] = listeners
    cluster.worker("w1").stop()
    cluster.start_node("w1").wait_ready()
    found = talk.call(w1, 17000, "refused")
    assert [(line[1], line[-1]) for line in found] == [(0, "reset")]
    assert len(server.log.read_text().splitlines()) == 1, "the server was reached"


def test_nothing_is_left_open(cluster: Cluster, talk: Talk) -> None:
    """The last test of the file: no stream of all these outlives its connection."""
    for daemon in cluster.daemons:
        daemon.wait_status(lambda s: s["streams"] == {"open": 0, "parked": 0}, 30)
        assert not [e for e in daemon.events() if e.get("level") == "error"]
