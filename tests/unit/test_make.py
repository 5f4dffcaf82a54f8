"""What `make` does: its targets as they are, without doing it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PARTS = sorted(path.parent.name for path in CHECKOUT.glob("tests/*/test_*.py"))


def dry(target: str, **variables: str) -> str:
    """The commands of a target, in an environment with these variables."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env = {**env, **variables}
    ran = subprocess.run(
        ["make", "--dry-run", target],
        cwd=CHECKOUT,
        env=env,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def parts_tested(commands: str) -> set[str]:
    (line,) = [line for line in commands.splitlines() if " -m pytest " in line]
    return set(re.findall(r"\btests/(\w+)", line))


@pytest.mark.runs("make fast")
def test_fast_is_the_unit_tests() -> None:
    assert parts_tested(dry("fast")) == {"unit"}


@pytest.mark.runs("make checks")
def test_checks_are_format_lint_types_and_layers() -> None:
    done = dry("checks")
    for tool in ("ruff format --check", "ruff check", "/mypy", "/lint-imports"):
        assert tool in done


@pytest.mark.runs("make test")
def test_test_is_everything() -> None:
    done = dry("test")
    assert dry("checks").strip() in done
    assert parts_tested(done) == set(PARTS)
    for made in (
        "tests/setup_packages.sh",
        "tests/setup_envs.py",
        "tests/setup_roots.py",
        "tests.setup_firewalls",
        "tests.setup_wheel",
        "/pytest --collect-only",
    ):
        assert made in done


@pytest.mark.runs("make demo")
def test_demo_is_ours_with_a_ray_of_its_own() -> None:
    assert re.search(r"bin/rayfwd demo --ray \S+/ray-[\d.]+/bin/ray", dry("demo"))


@pytest.mark.runs("make manual")
def test_manual_writes_what_is_made_from_the_sources() -> None:
    assert "-m tools.manual" in dry("manual")


@pytest.mark.runs("make site")
def test_site_is_built_from_the_documents() -> None:
    """As tests/package/test_site.py builds it."""
    assert "-m tools.site" in dry("site")


@pytest.mark.runs("make bench")
def test_bench_measures_in_this_checkout() -> None:
    assert "-m bench.run" in dry("bench")


@pytest.mark.runs("make recording")
def test_recording_is_of_the_demo() -> None:
    assert re.search(r"-m tools.recording \S+/ray-[\d.]+/bin/ray", dry("recording"))


@pytest.mark.runs("make clean")
def test_clean_removes_what_was_made_here_and_nothing_else() -> None:
    removed = {word for line in dry("clean").splitlines() for word in line.split()[2:]}
    assert {".venv", ".cache"} <= removed
    tracked = subprocess.check_output(["git", "ls-files"], cwd=CHECKOUT, text=True).splitlines()
    assert not {path.split("/")[0] for path in tracked} & removed


def test_roots_are_made_where_python_has_no_pip() -> None:
    """As Debian's own has none."""
    (script,) = re.findall(r"python=\S+; (?:.*\\\n)*.*python tests/setup_roots\.py", dry("roots"))
    assert "import pip" in script
    assert "-m venv .cache/pip" in script


def test_it_takes_a_python_that_can_make_environments_and_compile(tmp_path: Path) -> None:
    """The system's before another of its version; what cannot is passed over, also where it is the
    first of its name."""
    (cannot := tmp_path / "cannot").mkdir()
    (can := tmp_path / "can").mkdir()
    for folder, word in ((cannot, "exit 1"), (can, f'exec {sys.executable} "$@"')):
        (folder / "python3.11").write_text(f"#!/bin/sh\n{word}\n")
        (folder / "python3.11").chmod(0o700)
    taken = {folder: python_with(folder) for folder in (cannot, can)}
    assert taken[cannot] not in {"", "python3.11"}
    assert taken[can] in {"/usr/bin/python3.11", "python3.11"}
    assert taken[can] == taken[cannot] or not taken[cannot].startswith("/usr/bin/python3.11")


def python_with(folder: Path) -> str:
    """Which one `make` takes where this folder is first in PATH."""
    path = f"{folder}:{os.environ['PATH']}"
    (taken,) = re.findall(r"(\S+) tests/setup_envs\.py", dry("ray-envs", PATH=path))
    return str(taken)


def test_who_is_not_root_is_told_what_is_left_out() -> None:
    for target, what in (("ray-envs", "real Ray"), ("roots", "booted")):
        done = dry(target)
        assert re.search(rf'"not root: [^"]*{what}[^"]*"', done), done
