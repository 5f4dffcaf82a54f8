"""What the mark `story` does to the tests of a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STORY = """
import pytest
pytestmark = pytest.mark.story
SEEN = []

def test_one():
    SEEN.append(1)

def test_two():
    SEEN.append(2)
    assert {holds}

def test_three():
    assert SEEN == [1, 2]

def test_four():
    pass
"""
ALONE = "def test_one(): pass\ndef test_three(): pass\n"


def played(tmp_path: Path, holds: bool, *words: str, test: str = "") -> str:
    (tmp_path / "test_story.py").write_text(STORY.format(holds=holds))
    (tmp_path / "test_alone.py").write_text(ALONE)
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-rs",
        "-v",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:asyncio",
    ]
    argv += ["-p", "tests.conftest", f"--rootdir={tmp_path}", "-c", "/dev/null", *words]
    argv += [f"{tmp_path}/test_story.py::{test}"] if test else [str(tmp_path)]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=50)
    return ran.stdout + ran.stderr


def test_what_follows_a_failure_is_skipped_with_its_name(tmp_path: Path) -> None:
    said = played(tmp_path, False)
    assert "1 failed, 3 passed, 2 skipped" in said
    assert "test_two, before it in its story, has failed" in said


@pytest.mark.parametrize(("chosen", "passed"), [("three", 4), ("test_one", 2), ("two or alone", 4)])
def test_what_comes_before_a_chosen_one_is_run(tmp_path: Path, chosen: str, passed: int) -> None:
    """`three` chooses one of another file besides, of which nothing more is run."""
    assert f"{passed} passed" in played(tmp_path, True, "-k", chosen)


def test_one_by_its_address_is_run_alone_and_says_so(tmp_path: Path) -> None:
    said = played(tmp_path, True, test="test_three")
    assert "1 failed" in said
    assert "run by its address, without the tests before it in its file" in said
