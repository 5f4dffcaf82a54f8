"""What the lab's tests share: rayfwd as installed, a lab each, and all logs with a failure."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.lab import package
from tests.lab.machines import Lab
from tests.need import need, no_lab


@pytest.fixture(scope="session", autouse=True)
def rayfwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `rayfwd`, installed from a wheel of this checkout. Every `Lab` finds it.

    Once for all that run files side by side.
    """
    need(no_lab())
    own = tmp_path_factory.getbasetemp()
    base = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return package.current() or package.install(base / "package")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab for one test."""
    with Lab(tmp_path / "lab") as made:
        yield made


@pytest.fixture(scope="module")
def module_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab for all tests of a file."""
    with Lab(tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure the ends of the logs of every lab that the test used."""
    report = yield
    if report.failed and call.excinfo is not None and "\n--- " not in str(call.excinfo.value):
        for name, value in getattr(item, "funcargs", {}).items():
            used = value if isinstance(value, Lab) else getattr(value, "lab", None)
            if isinstance(used, Lab):
                report.sections.append((f"logs of {name}", used.tails()))
                break
    return report
