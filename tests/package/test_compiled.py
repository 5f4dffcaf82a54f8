"""The compiled wheel: made from this checkout, said by the command, held to the unit tests.

And pure Python from the same checkout where there is no compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import setup_wheel
from tests.need import CHECKOUT, need, no_compiler

HELD = (
    *("frames", "lane", "stream", "session", "session_events", "session_faults", "snapshot"),
    *("trace", "mux", "readpacing", "writev", "fastpath", "pipes"),
)
"""The files of tests/unit that are about the compiled modules; the lab runs the rest of them."""

pytestmark = pytest.mark.timeout(900)


def modules() -> list[str]:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    listed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["modules"]
    return [str(module) for module in listed]


def run(argv: list[str], env: Mapping[str, str]) -> str:
    done = subprocess.run(
        argv,
        cwd=CHECKOUT,
        env={**os.environ, "PIP_NO_COMPILE": "1", **env},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, f"{argv}: {done.stdout[-20000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def installed(wheel: Path, folder: Path) -> dict[str, str]:
    """The variables by which this environment's Python takes rayfwd from a wheel."""
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return {"PYTHONPATH": str(folder)}


def version(env: Mapping[str, str]) -> str:
    return run([sys.executable, "-m", "rayfwd", "--version", "--verbose"], env)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    need(no_compiler())
    return installed(setup_wheel.make(), tmp_path_factory.mktemp("compiled"))


def test_what_is_listed_is_compiled_and_the_command_says_so(compiled: dict[str, str]) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = setup_wheel.make()
    assert f"-{tag}-{tag}-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for module in modules():
        assert module in names, "the source goes with it: tracebacks and people read it"
        assert [name for name in names if name.startswith(module.removesuffix("py") + "cpython-")]
    assert "\ncode: compiled\n" in version(compiled)


def test_the_unit_tests_hold_of_it(compiled: dict[str, str]) -> None:
    files = [f"tests/unit/test_{name}.py" for name in HELD]
    argv = [sys.executable, "-m", "pytest", "-q", *files, "-p", "no:cacheprovider"]
    others = {"RAYFWD_FIRST_SEED": "750"}  # unit/test_session_faults.py has those before
    said = run(argv, {**compiled, **others, "RAYFWD_INSIDE": "1"})
    assert " passed" in said
    assert " skipped" not in said


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"CC": "no-such-compiler"}, " (there is no compiler (no-such-compiler))"),
        ({"CC": "false"}, " (false takes no Python.h (python3-dev): it says nothing)"),
    ],
)
def test_without_a_compiler_it_is_pure_python(
    env: dict[str, str], why: str, tmp_path: Path
) -> None:
    """None at all, one that compiles nothing."""
    run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), "."],
        {"RAYFWD_COMPILE": "auto"} | env,
    )
    (wheel,) = tmp_path.glob("*.whl")
    is_pure(wheel, why, tmp_path)


def test_where_it_is_not_wanted_it_is_pure_python(tmp_path: Path) -> None:
    """As the booted machines have it, with RAYFWD_COMPILE=0."""
    is_pure(setup_wheel.make(pure=True), "", tmp_path)


def is_pure(wheel: Path, why: str, tmp_path: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert f"\ncode: pure Python{why}\n" in version(installed(wheel, tmp_path / "pure"))


@pytest.fixture(scope="module")
def without_mypy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what building takes, but for mypy: all that pip has on such a machine."""
    folder = tmp_path_factory.mktemp("wheels")
    run([sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), "hatchling"], {})
    return folder


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_where_pip_finds_no_mypy(choice: str, without_mypy: Path, tmp_path: Path) -> None:
    need(no_compiler())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index"]
    argv = [*pip, f"--find-links={without_mypy}", "-w", str(tmp_path), "."]
    env = {"RAYFWD_COMPILE": choice, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    if choice == "1":
        with pytest.raises(AssertionError, match=r"No matching distribution found for mypy"):
            run(argv, env)
        return
    run(argv, env)
    (wheel,) = tmp_path.glob("*.whl")
    said = version(installed(wheel, tmp_path / "pure"))
    assert "\ncode: pure Python (pip finds no mypy[mypyc]" in said


def test_who_asks_for_it_is_told_why_it_cannot_be(tmp_path: Path) -> None:
    env = {"RAYFWD_COMPILE": "1", "CC": "no-such-compiler"}
    with pytest.raises(AssertionError, match=r"there is no compiler \(no-such-compiler\)"):
        run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), "."], env)
