"""The status on a screen: recordings of real daemons beside what people are to see of them.

The recordings are made by tests/lab/record.py, the texts by `python -m tests.unit.test_screen`:
read what changed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayfwd.cli.screen import Screen
from tests.status_doc import documented, mistakes
from tests.unit.test_cli import STATUS

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDINGS = sorted((FIXTURES / "status").glob("*.json"))
WIDTHS = (80, 130)
TEXTS = FIXTURES / "screens"


def drawn(status: Any, now: float, width: int, colour: bool = False) -> str:
    out = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        _environ={"TERM": "xterm"},
    )
    out.print(Screen(status, now))
    assert isinstance(out.file, io.StringIO)
    return "".join(f"{line.rstrip()}\n" for line in out.file.getvalue().splitlines())


def recording(path: Path) -> tuple[dict[str, Any], float]:
    data = json.loads(path.read_text())
    return data["status"], data["now"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_as_people_see_it(path: Path, width: int) -> None:
    shown = drawn(*recording(path), width)
    assert shown == (TEXTS / f"{path.stem}-{width}.txt").read_text()
    assert max(map(len, shown.splitlines())) <= width


def test_there_is_a_text_for_every_recording_and_no_other() -> None:
    assert len(RECORDINGS) >= 7
    names = {f"{path.stem}-{width}.txt" for path in RECORDINGS for width in WIDTHS}
    assert {path.name for path in TEXTS.iterdir()} == names


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_the_recordings_are_as_documented(path: Path) -> None:
    wrong, _ = mistakes(recording(path)[0], documented())
    assert wrong == []


def test_what_is_wrong_comes_first_and_once() -> None:
    shown = drawn(STATUS, 1000.0, 80)
    assert shown.splitlines()[:13] == [
        "WAITING  worker gpu-1 at 127.77.0.2, up 2 h 1 min, rayfwd 0.1.0, pid 4242",
        "",
        "waiting  ray_down",
        "         Ray ended",
        "     do  see its log",
        "",
        "problem  ray_node_without_resources  gpu-2  for 1 min",
        "         no \\x1b[31mresources",
        "     do  look",
        "",
        "problem  listener_blocked",
        "         port 1 is taken",
        "     do  free it",
    ]
    again = STATUS | {"problems": [*STATUS["problems"], STATUS["listeners"]["blocked"][0]]}
    assert drawn(again, 1000.0, 80).count("listener_blocked") == 1


def test_a_severity_is_shown_where_there_is_one() -> None:
    problem = {"code": "link_slow", "cause": "c", "remedy": "r", "severity": "note"}
    assert "\nnote  link_slow\n" in drawn(STATUS | {"problems": [problem]}, 1000.0, 80)


def test_clients_have_a_row_each() -> None:
    client = dict(STATUS["link"], name="laptop", user="ray", streams={"open": 7}, bytes={"in": 1})
    shown = drawn(STATUS | {"clients": [client, {}]}, 1000.0, 80)
    (row,) = (line for line in shown.splitlines() if line.startswith("laptop"))
    assert row.split()[:3] == ["laptop", "ray", STATUS["link"]["state"]]
    assert row.split()[-4:] == ["7", "1", "B", "?"]


def test_colour_is_beside_the_words_and_only_where_it_is_wanted() -> None:
    plain = drawn(STATUS, 1000.0, 80)
    assert "\x1b" not in plain
    coloured = drawn(STATUS, 1000.0, 80, colour=True)
    assert "\x1b[1;33mWAITING\x1b[0m" in coloured


def test_a_narrow_terminal_loses_no_word() -> None:
    text = drawn(*recording(FIXTURES / "status" / "head-ready.json"), 40)
    assert max(map(len, text.splitlines())) <= 40
    for word in ("READY", "w1", "w2", "CPU"):
        assert word in text


def test_markup_in_a_name_is_a_name() -> None:
    problem = {"code": "x", "cause": "[red]a[/red] :smile:", "remedy": "[bold]r"}
    shown = drawn(STATUS | {"problems": [problem]}, 1000.0, 80)
    assert "[red]a[/red] :smile:" in shown
    assert "[bold]r" in shown


def without_parts(value: Any) -> Iterator[Any]:
    """The value with each of its parts in turn missing, null, or of another kind."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield {k: v for k, v in value.items() if k != key}
            others: tuple[Any, ...] = (None, 5, "x\x1b[2J", [], {}, [None], {"a": {}}, True)
            for other in others:
                yield {**value, key: other}
            for changed in without_parts(part):
                yield {**value, key: changed}
    if isinstance(value, list):
        for index, part in enumerate(value):
            for changed in without_parts(part):
                yield [*value[:index], changed, *value[index + 1 :]]


@pytest.mark.parametrize("which", ["a worker", "a head"])
def test_any_part_may_be_missing_or_strange(which: str) -> None:
    status = STATUS
    if which == "a head":
        worker = dict(STATUS["link"], name="gpu-1", state="parked", ray={"phase": "up"})
        status = {"role": "head", "state": "ready", "workers": [worker, {}]}
    cases = list(without_parts(status))
    assert len(cases) > 100
    for case in cases:
        assert drawn(case, 1000.0, 80).replace("\n", "").isprintable()


if __name__ == "__main__":
    TEXTS.mkdir(exist_ok=True)
    for source in RECORDINGS:
        for columns in WIDTHS:
            text = drawn(*recording(source), columns)
            (TEXTS / f"{source.stem}-{columns}.txt").write_text(text)
