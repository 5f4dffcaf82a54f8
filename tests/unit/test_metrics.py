"""The metrics: as documented, as the dashboard asks for them, and served over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from rayfwd import codes
from rayfwd.daemon import httpserver, metrics
from rayfwd.daemon.httpserver import HttpServer
from rayfwd.daemon.metrics import MetricsService, families, registry
from rayfwd.status import Direct, Status, Volume
from rayfwd.transport.linkstats import LinkStats
from rayfwd.watch.canary_round import NodeResult, Round, StageResult
from rayfwd.watch.conditions import Condition
from tests.exposition import dashboard_mistakes, documented, exposed, series
from tests.promql import Query, QueryError
from tests.unit.loops import until
from tests.unit.ports import free_port
from tests.unit.test_daemon import HEAD, NO_RAY, place  # noqa: F401  # a fixture

RECORDINGS = sorted((Path(__file__).parents[1] / "fixtures" / "status").glob("*.json"))

DIRECT = Direct(
    node="w2",
    way="direct",
    dialled=True,
    rtt_ms=0.5,
    lanes=(),
    streams=3,
    bytes=Volume(received=100, sent=200),
    cuts=2,
    lost=4,
    why=None,
)
DOWN = replace(DIRECT, dialled=False, way="hub", rtt_ms=None, cuts=0)

CANARY = Round(
    began=1000.0,
    seconds=3.0,
    nodes=(
        NodeResult("w1", "127.77.0.2", True, {"task": StageResult(True, 1.0, None)}, None, True),
        NodeResult("w2", "127.77.0.3", False, {"task": StageResult(False, None, "")}, None, True),
        NodeResult("w3", "127.77.0.4", False, {}, None, False),
    ),
    problem=None,
    cost={},
)


def past() -> LinkStats:
    link_stats = LinkStats()
    link_stats.began()
    for seconds in (0.7, 3.0, 3.5, 5000.0):
        link_stats.parked(100.0, 10.0)
        link_stats.resumed(seconds)
    link_stats.parked(100.0, 10.0)
    link_stats.ended(12.0, 0, 0)
    link_stats.parked(200.0, 20.0)
    return link_stats


def status_of(path: Path) -> Status:
    return Status.from_wire(json.loads(path.read_text())["status"])


def exposition(path: Path) -> str:
    status = status_of(path)
    refused = {"refused_user": 2, "refused_port": 3}  # as with an overlay
    status = replace(status, network=replace(status.network, refused=refused))
    if status.workers is not None:
        status = replace(status, canary=CANARY)
        link_stats = {worker.name: past() for worker in status.workers or ()}
    else:
        status = replace(status, direct=(DIRECT, DOWN))
        link_stats = {metrics.HEAD: past()}
    return generate_latest(registry(lambda: families(status, link_stats, 25.0))).decode()


def values(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name and the values of the labels, in the order of the labels' names."""
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def recording(name: str) -> Path:
    return next(path for path in RECORDINGS if path.stem == name)


def test_every_metric_is_documented_and_every_documented_one_is_there() -> None:
    found: dict[str, Any] = {}
    for path in RECORDINGS:
        for name, row in exposed(exposition(path)).items():
            assert found.setdefault(name, row) == row, f"{name} differs between nodes"
    assert found == documented()


def test_the_dashboard_asks_for_what_is_there() -> None:
    there = series(*(exposition(path) for path in RECORDINGS))
    assert dashboard_mistakes(there) == []


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("rayfwd_nothing", "no metric"),
        ('rayfwd_node_state{stat="up"}', "no label stat"),
        ('rayfwd_node_state{state="up"}', "never has"),
        ("rate(rayfwd_link_cuts_total)", "with a range"),
        ("rate(rayfwd_link_streams[$__range])", "no counter"),
        ("sum by (code) (rayfwd_link_streams)", "no such label"),
        ("rayfwd_link_streams / rayfwd_listeners", "never match"),
        ("sum(rayfwd_link_streams", "expected"),
        ("rayfwd_link_streams)", "not expected"),
        ("rayfwd_link_streams @@", "not PromQL"),
        ("foo(rayfwd_link_streams)", "no function"),
    ],
)
def test_a_wrong_query_is_found(query: str, why: str) -> None:
    with pytest.raises(QueryError, match=why):
        Query(query, series(exposition(recording("worker-ready"))))


def test_values_of_a_worker() -> None:
    text = values(exposition(recording("worker-parked")))
    assert text["rayfwd_link_state", ("head", "parked")] == 1
    assert text["rayfwd_link_state", ("head", "up")] == 0
    assert text["rayfwd_node_state", ("waiting",)] == 1
    assert text["rayfwd_link_parked_streams", ("head",)] > 0
    assert text["rayfwd_link_lanes", ("bulk", "head", "up")] == 0
    assert ("rayfwd_link_round_trip_seconds", ("bulk", "head")) not in text
    waits, parked = status_of(recording("worker-parked")).conditions
    assert waits.blocks_ready
    assert parked.explained_by == waits.id
    assert text["rayfwd_conditions", (waits.code.name, "note")] == 1
    assert ("rayfwd_conditions", (parked.code.name, "note")) not in text
    assert text["rayfwd_link_cuts_total", ("head",)] == 6
    assert text["rayfwd_direct_up", ("here", "w2")] == 1
    assert text["rayfwd_direct_up", ("there", "w2")] == 0
    assert text["rayfwd_direct_round_trip_seconds", ("here", "w2")] == 0.0005
    assert ("rayfwd_direct_round_trip_seconds", ("there", "w2")) not in text
    assert text["rayfwd_direct_sent_bytes_total", ("here", "w2")] == 200
    assert text["rayfwd_direct_cuts_total", ("here", "w2")] == 2
    assert text["rayfwd_link_parked_seconds_total", ("head",)] == pytest.approx(5007.2 + 2 + 5)
    bucket = "rayfwd_link_ride_through_seconds_bucket"
    assert [text[bucket, (le, "head")] for le in ("0.5", "1.0", "5.0", "1800.0", "+Inf")] == [
        0,
        1,
        3,
        3,
        4,
    ]
    assert text["rayfwd_link_ride_through_seconds_sum", ("head",)] == pytest.approx(5007.2)


def test_values_of_a_head() -> None:
    text = values(exposition(recording("head-ready")))
    assert text["rayfwd_cluster_resource_capacity", ("CPU",)] == 3
    assert text["rayfwd_cluster_node_alive", ("w1",)] == 1
    assert text["rayfwd_listeners", ("w1",)] == 46
    assert text["rayfwd_listeners", ("head",)] == 0
    assert 0 < text["rayfwd_link_round_trip_seconds", ("interactive", "w1")] < 1
    assert text["rayfwd_canary_success", ("w1",)] == 1
    assert text["rayfwd_canary_success", ("w2",)] == 0
    assert ("rayfwd_canary_success", ("w3",)) not in text
    down = values(exposition(recording("head-down")))
    assert down["rayfwd_link_state", ("w1", "down")] == 1


def test_labels_are_bounded() -> None:
    data = status_of(recording("head-ready"))
    assert data.cluster is not None
    many = (codes.named(f"c{i}").problem("cause", "remedy") for i in range(1000))
    data = replace(
        data,
        cluster=replace(data.cluster, totals={f"r{i}": (0.0, 1.0) for i in range(1000)}),
        conditions=tuple(Condition(p, "error", "w1", 0.0, "w1") for p in many),
    )
    text = values(generate_latest(registry(lambda: families(data, {}, 0.0))).decode())
    assert sum(name == "rayfwd_cluster_resource_used" for name, _ in text) == metrics.RESOURCES
    assert sum(name == "rayfwd_conditions" for name, _ in text) == metrics.CODES


# -- served ----------------------------------------------------------------------------------------


def serving(
    listen: str, body: Callable[[HttpServer], Awaitable[None]], look: Any = None
) -> HttpServer:
    """Run `body` beside a server."""

    async def run() -> HttpServer:
        server = HttpServer(MetricsService(look or (lambda: ())), [listen], changed.set)
        task = asyncio.create_task(server.run())
        await asyncio.sleep(0)
        try:
            await body(server)
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return server

    changed = asyncio.Event()
    return asyncio.run(run())


async def exchange(port_or_path: int | str, request: bytes) -> bytes:
    for _ in range(200):
        try:
            if isinstance(port_or_path, str):
                reader, writer = await asyncio.open_unix_connection(port_or_path)
            else:
                reader, writer = await asyncio.open_connection("127.0.0.1", port_or_path)
            break
        except (ConnectionRefusedError, FileNotFoundError):
            await asyncio.sleep(0.02)
    writer.write(request)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def test_what_is_answered() -> None:
    port = free_port()

    async def body(server: HttpServer) -> None:
        head, _, text = (await exchange(port, GET)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Content-Type: text/plain; version=0.0.4" in head
        assert f"Content-Length: {len(text)}".encode() in head
        assert "process_open_fds" in exposed(text.decode())
        asked = GET.replace(b"Host", b"Accept: application/openmetrics-text;version=1.0.0\r\nHost")
        head, _, text = (await exchange(port, asked)).partition(b"\r\n\r\n")
        assert b"Content-Type: application/openmetrics-text" in head
        assert list(openmetrics(text.decode()))  # type: ignore[no-untyped-call]
        head, _, text = (await exchange(port, GET.replace(b"GET", b"HEAD"))).partition(b"\r\n\r\n")
        assert (head[9:12], text) == (b"200", b"")
        for request, code in {
            GET.replace(b"/metrics", b"/metrics?x=1"): b"200",
            GET.replace(b"/metrics", b"/"): b"404",
            GET.replace(b"GET", b"POST"): b"405",
            b"\x00\x01\r\n\r\n": b"405",
        }.items():
            assert (await exchange(port, request))[9:12] == code
        assert await exchange(port, b"GET " + b"x" * 40000 + b"\r\n\r\n") == b""

    serving(f"127.0.0.1:{port}", body)


@pytest.mark.parametrize("turns", range(6))
def test_the_end_of_it_ends_who_has_just_come(turns: int) -> None:
    """After each of the loop's turns that it takes to begin with a connection."""
    port = free_port()

    async def main() -> None:
        server = HttpServer(MetricsService(lambda: ()), [f"127.0.0.1:{port}"], lambda: None)
        running = asyncio.create_task(server.run())
        await exchange(port, GET)
        with socket.socket() as sock:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", port))
            for _ in range(turns):
                await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionResetError):  # it was never accepted
                    assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""

    asyncio.run(main())


def test_a_fault_in_a_metric_ends_nothing() -> None:
    port = free_port()

    def fault() -> Any:
        raise KeyError("x")

    async def body(server: HttpServer) -> None:
        for _ in range(2):
            assert (await exchange(port, GET))[9:12] == b"500"

    serving(f"127.0.0.1:{port}", body, fault)


def test_a_unix_socket_is_for_this_user_alone(place: Path) -> None:  # noqa: F811
    path = place / "metrics.sock"

    async def body(server: HttpServer) -> None:
        assert (await exchange(str(path), GET))[9:12] == b"200"
        assert path.stat().st_mode & 0o777 == 0o600

    serving(str(path), body)
    assert not path.exists()


def test_those_who_say_nothing_are_few() -> None:
    port = free_port()

    async def body(server: HttpServer) -> None:
        await exchange(port, GET)
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
        ended = 0
        for reader, _ in idle[httpserver.CONNECTIONS :]:
            try:
                ended += await reader.read() == b""
            except ConnectionResetError:
                ended += 1
        assert ended == 40 - httpserver.CONNECTIONS
        for _, writer in idle:
            writer.close()

    serving(f"127.0.0.1:{port}", body)


def test_a_port_that_is_taken_is_said_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpserver, "RETRY_LAST", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        async def body(server: HttpServer) -> None:
            def said() -> list[str]:
                return [] if server.problem is None else [str(server.problem)]

            await until(said)
            assert f'127.0.0.1:{port}" cannot be opened: Address already in use' in said()[0]
            taken.close()
            while (await exchange(port, GET))[9:12] != b"200":
                await asyncio.sleep(0.01)
            assert not said()

        serving(f"127.0.0.1:{port}", body)


def test_a_path_that_is_no_socket_is_left_alone(place: Path) -> None:  # noqa: F811
    path = place / "file"
    path.write_text("mine")

    async def body(server: HttpServer) -> None:
        await until(lambda: server.problem is not None)
        assert server.problem is not None
        assert server.problem.code == codes.SOCKET_NOT_POSSIBLE

    serving(str(path), body)
    assert path.read_text() == "mine"


# -- of a daemon -----------------------------------------------------------------------------------


def test_of_a_daemon(place: Path) -> None:  # noqa: F811
    port = free_port()
    config = place / "rayfwd.toml"
    config.write_text(
        f"{HEAD}state_dir = '{place}/state'\nruntime_dir = '{place}/run'\n{NO_RAY}"
        f"[metrics]\nlisten = '127.0.0.1:{port}'\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "rayfwd", "run", "--config", str(config)],
        stderr=subprocess.PIPE,
        env=os.environ,
    ) as process:
        try:
            text = scraped(port, process)
        finally:
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=20)
    assert values(text)["rayfwd_node_state", ("ready",)] == 1
    table = documented()
    for name, row in exposed(text).items():
        assert row == table[name]
    assert b'"metrics_listening"' in said
    assert process.returncode == 0


def scraped(port: int, process: subprocess.Popen[bytes]) -> str:
    """What is exposed once the daemon is ready."""
    deadline = time.monotonic() + 30
    while True:
        assert process.poll() is None, process.communicate()[1].decode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = str(answer.read().decode())
        except urllib.error.URLError:
            text = ""
        if 'rayfwd_node_state{state="ready"} 1.0' in text:
            return text
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
