"""What all tests share: their order, their time limits, what they need, and that nothing is left.

Markers: `ray` needs Ray (2.60.0, or the versions in its arguments), `lab` needs root and its tools
(everything below tests/lab/ has it). Without them a test is skipped with a reason, or fails where
RAYFWD_REQUIRE=all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.lab.machines import left_over
from tests.need import CHECKOUT, need, no_lab, no_ray

ORDER = ("unit", "ray", "lab", "demo")
"""Directories below tests/, the quick ones first."""

LIMITS = {"unit": 60, "ray": 200, "lab": 300, "demo": 300}
"""Seconds for a test with its fixtures, where it has no `timeout` marker of its own."""


def folder(item: pytest.Item) -> str:
    """The directory below tests/ that a test is in; empty: it is elsewhere."""
    try:
        return item.path.relative_to(CHECKOUT / "tests").parts[0]
    except ValueError:
        return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests in order, and give them their markers."""
    place = {name: index for index, name in enumerate(ORDER)}
    items.sort(key=lambda item: place.get(folder(item), len(ORDER)))
    for item in items:
        where = folder(item)
        if where == "lab":
            item.add_marker(pytest.mark.lab)
        if item.get_closest_marker("timeout") is None and where in LIMITS:
            item.add_marker(pytest.mark.timeout(LIMITS[where]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, a test whose needs are not met, before its fixtures are made."""
    if item.get_closest_marker("lab") is not None:
        need(no_lab())
    if (marker := item.get_closest_marker("ray")) is not None:
        for version in marker.args or ("2.60.0",):
            need(no_ray(version))


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail when a process, a mount or an interface of the labs outlives the tests."""
    yield
    deadline = time.monotonic() + 5  # the kernel takes namespaces down a moment later
    while (left := left_over()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        things = "\n".join(left)
        pytest.fail(f"left over by the tests, which must end what they start:\n{things}", False)
