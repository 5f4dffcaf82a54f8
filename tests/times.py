"""How long files took, at the end of a run: where to look when the whole takes too long.

A file's time is all of its tests with their fixtures, on whichever side it ran; waiting for its
turn (`alone`) is not in it. Beside it is what of the processors it took: itself, and every process
of its that has ended. How busy the processors were says whether one more file at a time
(`pytest -n`) would help, and when each side had nothing left to do, whether the order would.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

SHOWN = 40
"""Files that are named, the slowest first."""
SPENT = "processor_seconds"
"""Under which a report has it."""


class Times:
    """The plugin; `tests/conftest.py` registers it."""

    def __init__(self) -> None:
        self._took: defaultdict[str, float] = defaultdict(float)
        self._spent: defaultdict[str, float] = defaultdict(float)
        """Processor time of each file."""
        self._spent_here = sum(os.times()[:4])
        self._busy = _busy_seconds()
        self._ended: dict[str, float] = {}
        """When each side's last test was over."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """On the side where it runs; the report takes it to where they come together."""
        report = yield
        spent = sum(os.times()[:4])
        setattr(report, SPENT, spent - self._spent_here)
        self._spent_here = spent
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        self._took[file] += report.duration
        self._spent[file] += getattr(report, SPENT, 0.0)
        self._ended[getattr(report, "worker_id", "master")] = report.stop

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if len(self._took) < 2:
            return
        terminalreporter.section(f"slowest {SHOWN} files")
        slowest = sorted(self._took, key=lambda file: self._took[file], reverse=True)
        for file in slowest[:SHOWN]:
            terminalreporter.write_line(
                f"{self._took[file]:7.2f}s, of processors {self._spent[file]:6.1f}s {file}"
            )
        busy = _busy_seconds() - self._busy
        terminalreporter.write_line(
            f"{sum(self._took.values()):.0f} s in all files; "
            f"{os.cpu_count()} processors were busy for {busy:.0f} s"
        )
        end = max(self._ended.values())
        idle = ", ".join(f"{side} {end - at:.0f} s" for side, at in sorted(self._ended.items()))
        terminalreporter.write_line(f"idle at the end: {idle}")


def _busy_seconds() -> float:
    """Processor time that this machine has spent since its start, by anyone (proc_stat(5))."""
    spent = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    idle = spent[3] + spent[4]
    return (sum(spent[:8]) - idle) / os.sysconf("SC_CLK_TCK")
