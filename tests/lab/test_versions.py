"""The essential work with the oldest Ray that is supported and with one between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.checks import ESSENTIAL, verify
from tests.lab.cluster import Cluster
from tests.lab.daemon import CONFIG
from tests.lab.machines import Lab

VERSIONS = ("2.9.3", "2.40.0")
pytestmark = pytest.mark.ray(*VERSIONS)


@pytest.fixture(
    scope="module", params=["2.9.3", pytest.param("2.40.0", marks=pytest.mark.thorough)]
)
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("lab")
    with Lab(folder) as lab:
        cluster = Cluster(lab, ray_version=request.param)
        cluster.start()
        cluster.wait_ready()
        yield cluster
        assert set(cluster.stop().values()) == {0}


# From the head goes the canary, with data both ways.
@pytest.mark.parametrize("driver", [pytest.param("head", marks=pytest.mark.thorough), "w1"])
def test_essential_work(cluster: Cluster, driver: str) -> None:
    status = cluster.head.status()
    assert status["ray"]["version"] == cluster.ray_version
    checks = ESSENTIAL if driver == "w1" else ("small_tasks", "large_results", "actors")
    lines = cluster.driver(driver, ["--checks", ",".join(checks)])
    verify(lines, driver, [node["address"] for node in status["roster"]], checks)


def test_canary(cluster: Cluster) -> None:
    """Its script is run by that Ray's own Python."""
    argv = [str(cluster.lab.rayfwd), "canary", "--json", "--config", CONFIG]
    answer = json.loads(cluster.lab.machine("head").run(argv, timeout=150).stdout)
    assert [node["name"] for node in answer["nodes"] if node["ok"]] == ["head", "w1", "w2"]


def test_totals_are_read(cluster: Cluster) -> None:
    status = cluster.head.wait_status(lambda s: (s["cluster"] or {}).get("totals"), 60)
    assert status["cluster"]["totals"]["CPU"][1] == 3.0
    assert status["conditions"] == []
