"""What the tests of hostile peers share: the lab's machines, and a scene with an honest worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.scene import Scene
from tests.lab.conftest import module_lab, pytest_runtest_makereport, rayfwd
from tests.lab.machines import Lab

__all__ = ["module_lab", "pytest_runtest_makereport", "rayfwd"]


@pytest.fixture(scope="module")
def scene(module_lab: Lab) -> Iterator[Scene]:
    """A head and an honest worker that works, for all tests of a file."""
    made = Scene(module_lab)
    made.start()
    yield made
    made.stop()
