"""Reading `ray status` and the node table, as real Rays gave them; see the fixtures' README."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayfwd.ray import dashboard as ray_dashboard
from rayfwd.ray import nodes, status_text
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.session.target import Target
from rayfwd.transport.endpoints import Endpoint
from tests.unit.ports import free_port

FIXTURES = Path(__file__).parent.parent / "fixtures" / "ray_status"
VERSIONS = ["2.9.3", "2.40.0", "2.60.0"]


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The zone in which the fixtures were recorded: Ray prints local time."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def read(name: str) -> status_text.RayStatus:
    return status_text.parse((FIXTURES / f"{name}.txt").read_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_idle(version: str) -> None:
    seen = read(f"{version}-idle")
    assert seen.totals["CPU"] == (0.0, 2.0)
    assert seen.totals["r_h"] == (0.0, 2.0)
    assert seen.totals["r_w1"] == (0.0, 2.0)
    assert seen.totals["object_store_memory"] == (0.0, 190.73 * 2**20)
    assert seen.totals.keys() == {"CPU", "memory", "object_store_memory", "r_h", "r_w1"}
    assert (len(seen.active), seen.pending, seen.failed) == (2, 0, 0)
    assert seen.as_of is not None
    assert time.strftime("%Y-%m-%d", time.gmtime(seen.as_of)) == "2026-11-23"


@pytest.mark.parametrize("version", VERSIONS)
def test_busy(version: str) -> None:
    seen = read(f"{version}-busy")
    assert seen.totals["CPU"] == (1.0, 2.0)
    assert seen.totals["r_w1"] == (0.5, 2.0)
    assert seen.totals["object_store_memory"] == (19.07 * 2**20, 190.73 * 2**20)


V2 = ["2.40.0-v2", "2.60.0-v2"]
"""Recorded with Ray's second autoscaler."""


@pytest.mark.parametrize("recorded", V2)
def test_the_second_autoscaler(recorded: str) -> None:
    """It tells idle nodes from active ones; either kind is there."""
    idle, busy = read(f"{recorded}-idle"), read(f"{recorded}-busy")
    for seen in (idle, busy):
        assert sorted(seen.active) == sorted(idle.active)
        assert len(set(seen.active)) == 2
        assert all(node.startswith("node_") for node in seen.active)
        assert (seen.pending, seen.failed) == (0, 0)
        assert seen.as_of is not None
    assert idle.totals["CPU"] == (0.0, 2.0)
    assert idle.totals.keys() == {"CPU", "memory", "object_store_memory", "r_h", "r_w1"}
    assert busy.totals["CPU"] == (1.0, 2.0)
    assert busy.totals["r_w1"] == (0.5, 2.0)
    assert busy.totals["object_store_memory"] == (19.07 * 2**20, 190.73 * 2**20)


@pytest.mark.parametrize("recorded", [*VERSIONS, *V2])
def test_with_failures(recorded: str) -> None:
    """The second node's raylet was killed: what it brought is not in the totals any more."""
    seen = read(f"{recorded}-failures")
    assert seen.totals["CPU"] == (0.0, 1.0)
    assert seen.totals.keys() == {"CPU", "memory", "object_store_memory", "r_h"}
    assert len(seen.active) == 1
    assert seen.pending == 0
    # The first autoscaler lists only failures of nodes that it has launched itself.
    assert seen.failed == (1 if recorded in V2 else 0)


@pytest.mark.parametrize("version", ["2.9.3", "2.40.0"])
def test_nothing_reported_yet(version: str) -> None:
    assert read(f"{version}-unreported") == status_text.RayStatus(None, {}, (), 0, 0)


def test_time_stamp() -> None:
    text = (FIXTURES / "2.60.0-idle.txt").read_text()
    stamp = text.splitlines()[0].split("status: ")[1].rstrip(" =")
    as_of = status_text.parse(text).as_of
    assert as_of is not None
    assert time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(as_of)) == stamp.partition(".")[0]


def test_what_an_autoscaler_adds() -> None:
    """The shape of `format_info_string` in `ray/autoscaler/_private/util.py` (2.60)."""
    seen = status_text.parse(
        "======== Autoscaler status: 2026-01-02 03:04:05.678901 ========\n"
        "Node status\n-----\n"
        "Active:\n 3 cpu_node\nIdle:\n 1 gpu_node\n"
        "Pending:\n cpu_node, 2 launching\n 10.0.0.9: gpu_node, setting-up\n"
        "Recent failures:\n gpu_node: NodeTerminated (ip: 10.0.0.7)\n\n"
        "Resources\n-----\n"
        "Total Usage:\n 3.0/4.0 CPU (1.0 used of 2.0 reserved in placement groups)\n"
        " 0.0/1.0 accelerator_type:T4\n 1.50KiB/2.00TiB memory\n\n"
        "From request_resources:\n (none)\n"
        "Pending Demands:\n {'CPU': 1}: 2+ pending tasks/actors\n"
    )
    assert seen.active == ("cpu_node", "cpu_node", "cpu_node", "gpu_node")
    assert (seen.pending, seen.failed) == (2, 1)
    assert seen.totals == {
        "CPU": (3.0, 4.0),
        "accelerator_type:T4": (0.0, 1.0),
        "memory": (1536.0, 2.0 * 2**40),
    }


@pytest.mark.parametrize("text", ["", "Ray cluster is not found at 127.77.0.1:6379\n", "\x00"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the output of ray status"):
        status_text.parse(text)


Answers = dict[str, Any]
"""What a dashboard says to a path."""
PATH = "/api/cluster_status"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    said: Answers = {}

    def get(dashboard: Endpoint, path: str, token: str | None) -> bytes:
        assert (str(dashboard), token) == ("127.77.0.1:8265", "open sesame")
        return json.dumps({"result": True, "data": {"clusterStatus": said[path]}}).encode()

    monkeypatch.setattr(ray_dashboard, "get", get)
    return said


def fetched() -> status_text.RayStatus | None:
    return asyncio.run(status_text.fetch(Endpoint(Target("127.77.0.1", 8265)), "open sesame"))


def test_by_the_dashboard(answers: Answers) -> None:
    """Which may be in another zone than we are."""
    answers[f"{PATH}?format=1"] = (FIXTURES / "2.60.0-busy.txt").read_text()
    answers[PATH] = {"time": 1700000000.5, "gcsRequestTime": 0.001}
    assert fetched() == replace(read("2.60.0-busy"), as_of=1700000000.5)


@pytest.mark.parametrize("told", [None, {}, [], "x", {"time": None}, {"time": "soon"}])
@pytest.mark.parametrize("text", [None, "no", {}])
def test_what_is_no_status_of_the_dashboards_is_none(
    told: Any, text: Any, answers: Answers
) -> None:
    answers[PATH], answers[f"{PATH}?format=1"] = told, text
    assert fetched() is None
    answers[PATH] = {"time": 1.0}
    assert fetched() is None


def test_a_dashboard_that_is_not_there_is_none() -> None:
    assert asyncio.run(status_text.fetch(Endpoint(Target("127.0.0.1", free_port())))) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_node_table(version: str) -> None:
    answer = json.loads((FIXTURES / f"{version}-nodes.json").read_text())
    seen = {node.address: node for node in nodes.parse(answer)}
    assert seen.keys() == {"127.77.0.1", "127.77.0.2"}
    assert seen["127.77.0.1"].is_head
    assert not seen["127.77.0.2"].is_head
    assert seen["127.77.0.2"].state == "ALIVE"
    assert seen["127.77.0.2"].resources_total["r_w1"] == 2.0
    # `ray status` lists a node by its id: what the rules rely on.
    listed = read(f"{version}-idle").active
    assert sorted(listed) == sorted(f"node_{node.node_id}" for node in seen.values())


@pytest.mark.parametrize(
    "answer", [{}, [], None, {"result": False, "msg": "no"}, {"result": True, "data": {}}]
)
def test_other_answers_are_refused(answer: object) -> None:
    with pytest.raises(ValueError):
        nodes.parse(answer)


def test_report_goes_over_the_wire_unchanged() -> None:
    answer = json.loads((FIXTURES / "2.60.0-nodes.json").read_text())
    report = ClusterReport(
        as_of=1.5,
        totals={"CPU": (0.0, 2.0)},
        nodes=tuple(nodes.parse(answer)),
    )
    assert ClusterReport.from_wire(json.loads(json.dumps(report.to_wire()))) == report


@pytest.mark.parametrize("data", [None, {}, [1], {"as_of": "x", "totals": {}, "nodes": []}])
def test_other_reports_are_refused(data: object) -> None:
    with pytest.raises(ValueError):
        ClusterReport.from_wire(data)
