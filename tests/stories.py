"""Files whose tests are one story: each begins where the one before it has left off.

Such a file has the mark `story`. Once one of its tests has failed, those after it are skipped, with
its name: they would say what it has left behind, and not what they are about. Where `-k` or `-m`
chooses some of them, those before are run too, so that what is proved stays the same. Where a test
is called by its address (`file.py::test`) it is run alone, and its report says what was left out.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest


class Stories:
    """The plugin; `tests/conftest.py` registers it."""

    def __init__(self) -> None:
        self._failed: dict[Path, str] = {}
        self._called: set[Path] = set()
        """Files of which tests are called by their addresses."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> Generator[None, None, None]:
        """Put back what comes before a chosen test of a story."""
        whole = list(items)
        self._called = {
            (config.invocation_params.dir / arg.partition("::")[0]).resolve()
            for arg in config.args
            if "::" in arg
        }
        yield
        chosen = set(items)
        wanted: set[pytest.Item] = set()
        for item in reversed(whole):
            later = any(one.path == item.path for one in wanted)
            if _is_story(item) and (item in chosen or later):
                wanted.add(item)
        if wanted - chosen:
            place = {item: number for number, item in enumerate(whole)}
            order = {item.path: number for number, item in reversed(list(enumerate(items)))}
            items[:] = sorted(
                chosen | wanted, key=lambda item: (order.get(item.path, 0), place[item])
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if _is_story(item) and (failed := self._failed.get(item.path)) is not None:
            pytest.skip(f"{failed}, before it in its story, has failed")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed and _is_story(item):
            self._failed.setdefault(item.path, item.name)
            if item.path in self._called:
                said = "run by its address, without the tests before it in its file"
                report.sections.append(("story", said))
        return report


def _is_story(item: pytest.Item) -> bool:
    return item.get_closest_marker("story") is not None
