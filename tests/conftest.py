"""What all tests share: their order, their time limits, what they need, and that nothing is left.

Markers: `ray` needs Ray (2.60.0, or the versions in its arguments), `lab` needs root and its tools
(everything below tests/lab/ and tests/hostile/ has it), `systemd` boots machines (everything below
tests/systemd/). Without them a test is skipped with a reason, or fails where RAYFWD_REQUIRE=all.
`interpreted` is for a test that replaces what is compiled in a wheel: a compiled rayfwd does not
run it. `alone` is for a file that measures how long something takes: where files run side by side
(`pytest -n 4`), none runs beside it but those in `LIGHT`. `runs` names commands of the documents
that a test runs (`tests/commands.py`), and `story` is for a file whose tests need those before them
(`tests/stories.py`). `thorough` is for what other tests show as well, another way, and takes long:
it is run where RAYFWD_THOROUGH=1.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from rayfwd.daemon.resources import raise_descriptor_limit
from rayfwd.system import build, setting
from tests import commands
from tests.lab.machines import left_over
from tests.need import CHECKOUT, need, no_lab, no_machines, no_ray
from tests.stories import Stories
from tests.times import Times

ORDER = ("unit", "ray", "demo", "package", "hostile", "lab", "systemd")
"""Directories below tests/: the quick ones first."""

LONG = (
    *("lab/test_overlay", "lab/test_libraries", "lab/test_cluster", "lab/test_advertise_checks"),
    *("systemd/test_user_service", "lab/test_client", "lab/test_token", "lab/test_losses"),
    *("systemd/test_service", "systemd/test_cluster", "systemd/test_overlay"),
    *("lab/test_stop_and_restart", "lab/test_conditions_ray", "lab/test_join", "lab/test_doctor"),
    *("lab/test_problems_of_ray", "lab/test_dialled", "ray/test_ray", "demo/test_demo"),
    *("hostile/test_peers", "lab/test_meeting", "systemd/test_trixie", "lab/test_init"),
    *("package/test_compiled", "package/test_package", "systemd/test_init"),
    *("lab/test_versions", "lab/test_advertise", "hostile/test_servers"),
)
"""The files that take longest (tests/times.py says which). The longest come first, and beside the
two that take most of the processors some that mostly wait: four clusters at work on two processors
keep each other's tasks waiting for minutes. They come right after `unit`, and those that are
`alone` last of all, so that whoever runs files side by side has short ones for everybody at the
end, and waits for the others once."""

LIGHT = (
    *("lab/test_ways", "lab/test_conditions_link", "lab/test_problems", "lab/test_budget"),
    *("lab/test_lab", "lab/test_overlay_rules"),
)
"""Files that mostly wait, the longest first: they take less than a quarter of a processor, and
never start Ray. They are kept for the end, for the others to run beside one that is `alone`, and
take about as long as that."""

LIMITS = {"unit": 60, "ray": 200, "hostile": 300, "lab": 300, "systemd": 300, "demo": 300}
"""Seconds for a test with its fixtures, where it has no `timeout` marker of its own."""

# A shell's background job ignores Ctrl-C, and so would all that is started here and is to obey it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow moment of the machine is no fault of what is tested.
settings.register_profile("rayfwd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rayfwd")


def folder(item: pytest.Item) -> str:
    """The directory below tests/ that a test is in; empty: it is elsewhere."""
    try:
        return item.path.relative_to(CHECKOUT / "tests").parts[0]
    except ValueError:
        return ""


def file_of(item: pytest.Item) -> str:
    """As `LONG` and `LIGHT` have it."""
    return f"{folder(item)}/{item.path.stem}"


def together(path: str) -> str:
    """What runs on one side, one test after the other: a file, or a directory below tests/lab/,
    whose files share a cluster (`lab/shared.py`). `path`: of the file, from the checkout."""
    parts = path.split("/")
    return "/".join(parts[:3]) if len(parts) > 3 else path


def turn_of(item: pytest.Item) -> tuple[int, int]:
    """Where in the order a test's file has its place."""
    where, file = folder(item), file_of(item)
    if item.get_closest_marker("alone") is not None:
        return 3, 0
    if file in LIGHT:
        return 4, LIGHT.index(file)
    if where == "unit":
        return 0, 0
    if file in LONG:
        return 1, LONG.index(file)
    return 2, ORDER.index(where) if where in ORDER else len(ORDER)


def pytest_configure(config: pytest.Config) -> None:
    """Have stories told in order, and files timed."""
    config.pluginmanager.register(Stories())
    config.pluginmanager.register(Times())
    raise_descriptor_limit()  # as the daemon does


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the tests in order, give them their markers, and leave out those that are not to be run.

    What is compiled takes nothing in the place of its own parts: so it is faster.
    """
    for item in items:  # also those that a story puts back
        where = folder(item)
        if where in {"lab", "systemd"}:
            item.add_marker(getattr(pytest.mark, where))
        if where == "hostile":
            item.add_marker(pytest.mark.lab)  # its machines are the lab's
        if item.get_closest_marker("timeout") is None and where in LIMITS:
            item.add_marker(pytest.mark.timeout(LIMITS[where]))
    left_out = {"interpreted"} if build.code() == build.COMPILED else set()
    if os.environ.get("RAYFWD_THOROUGH") != "1":
        left_out.add("thorough")
    not_run = [item for item in items if any(m.name in left_out for m in item.iter_markers())]
    config.hook.pytest_deselected(items=not_run)
    items[:] = [item for item in items if item not in not_run]
    items.sort(key=turn_of)


def pytest_collection_finish() -> None:
    """Leave out what stays to the end anyway whenever garbage is collected, as before and after
    each coroutine of a unit test (`unit/loops.py`): all modules and tests are a million objects."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`: what runs `together` counts as one file."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # not on every machine that runs tests

    class Together(LoadFileScheduling):  # type: ignore[misc]  # it has no types
        def _split_scope(self, nodeid: str) -> str:
            return together(super()._split_scope(nodeid))

    return Together(config, log)


class Turn:
    """What keeps an `alone` file apart from all others, in this checkout's other runs too.

    Two locks of the kernel's, on directories that are there anyway: whoever waits for `room` holds
    `gate`, so that no file can overtake one that waits to be alone.
    """

    def __init__(self) -> None:
        self._room: int | None = None

    def take(self, alone: bool) -> None:
        """Begin a file, when its turn has come.

        A run within a test (tests/ray/inside.py) has that test's turn: were it to wait for one of
        its own behind a file that waits to be alone, neither would come.
        """
        if os.environ.get("RAYFWD_INSIDE") == "1":
            return
        gate = os.open(CHECKOUT / "tests", os.O_RDONLY)
        try:
            fcntl.flock(gate, fcntl.LOCK_EX)
            self._room = os.open(CHECKOUT / "tests" / "lab", os.O_RDONLY)
            fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            os.close(gate)

    def leave(self) -> None:
        """End it."""
        if self._room is not None:
            os.close(self._room)
            self._room = None

    @property
    def taken(self) -> bool:
        """Whether a file has begun."""
        return self._room is not None


turn = Turn()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the waiting is not on a test's own time limit
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Hold a turn from the first test of what runs `together` until the fixtures of its last are
    gone."""
    if not turn.taken and file_of(item) not in LIGHT:
        turn.take(item.get_closest_marker("alone") is not None)
    try:
        return (yield)
    finally:
        if nextitem is None or together(nextitem.location[0]) != together(item.location[0]):
            turn.leave()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, a test whose needs are not met, before its fixtures are made."""
    if item.get_closest_marker("lab") is not None:
        need(no_lab())
    if item.get_closest_marker("systemd") is not None:
        need(no_machines())
    if (marker := item.get_closest_marker("ray")) is not None:
        for version in marker.args or ("2.60.0",):
            need(no_ray(version))


# What was run for a test: by itself, and by the fixtures that it has, whenever they were made.

commands.listen()
_by_fixtures: dict[object, list[list[str]]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    """Remember what a fixture has run."""
    start = commands.position()
    try:
        return (yield)
    finally:
        _by_fixtures[fixturedef] = commands.since(start)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that passes without having run what it says it runs."""
    start = commands.position()
    result = yield
    ran = commands.since(start)
    for made in getattr(item, "_fixtureinfo").name2fixturedefs.values():  # noqa: B009  # for mypy
        ran += _by_fixtures.get(made[-1], [])
    for marker in item.iter_markers("runs"):
        for command in marker.args:
            if not commands.is_run(command, ran):
                pytest.fail(f"{item.name} names `{command}`, and did not run it", False)
    return result


@pytest.fixture(autouse=True)
def _there_is_a_file() -> Iterator[None]:
    """Whatever command line a test has run in this process."""
    yield
    setting.use_file()


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
