"""What the tests on booted machines share: a lab a file, a cluster set up by `rayfwd init`, logs.

    head, worker     machines that are up, rayfwd installed, nothing set up; for all of a file
    cluster          the same, set up by the README's commands and ready

A test takes a machine as it finds it and leaves it as it was, or has a file of its own. What a
machine can do is in `machines.Machine`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.systemd import install
from tests.systemd.cluster import Cluster
from tests.systemd.machines import Lab, Machine, left_over


@pytest.fixture(scope="session", autouse=True)
def no_groups_left() -> Iterator[None]:
    """Fail when a control group of a machine outlives the tests."""
    yield
    if left := left_over():
        lines = "\n".join(left)
        pytest.fail(f"control groups left over by the tests:\n{lines}", False)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A head and a worker, up, for all tests of a file; `SUITE` there names another Debian."""
    suite = getattr(request.module, "SUITE", "bookworm")
    with Lab(tmp_path_factory.mktemp("lab"), install.installed(suite)) as made:
        made.boot()
        yield made


@pytest.fixture(scope="module")
def head(lab: Lab) -> Machine:
    return lab.machine("head")


@pytest.fixture(scope="module")
def worker(lab: Lab) -> Machine:
    return lab.machine("worker")


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    """Set up, enabled, started and ready."""
    cluster = Cluster(lab)
    cluster.set_up()
    cluster.start()
    cluster.wait_ready()
    return cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure the ends of the logs of the machines."""
    report = yield
    if report.failed and call.excinfo is not None and "\n--- " not in str(call.excinfo.value):
        used = getattr(item, "funcargs", {}).get("lab")
        if isinstance(used, Lab):
            report.sections.append(("logs of the lab", used.tails()))
    return report
