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
from rayfwd.problems import ProblemError
from rayfwd.status import Status
from tests import shown
from tests.status_doc import documented, mistakes
from tests.unit.test_cli import STATUS, condition

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
    out.print(Screen(Status.from_wire(status), now))
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


def test_the_documents_show_such_a_screen() -> None:
    """That of a worker beside one other node, with the overlay."""
    status, now = recording(FIXTURES / "status" / "worker-ready.json")
    addresses = {"127.77.0.1", status["node"]["address"]}
    overlay = {"level": "overlay", "interface": "rayfwd0", "why": "this machine allows it"}
    status["network"] |= overlay | {"remedy": None, "guard": True}
    status["roster"] = [row for row in status["roster"] if row["address"] in addresses]
    rows = status["cluster"]["nodes"]
    status["cluster"]["nodes"] = [row for row in rows if row["address"] in addresses]
    status["cluster"]["totals"].pop("disk")
    said = drawn(status, now, 200)
    shown.compare("README.md", "READY  worker", said)
    shown.compare("docs/overlay.md", "network    overlay", said)


def test_a_line_that_the_hosts_file_lacks_is_shown() -> None:
    status, now = recording(FIXTURES / "status" / "worker-ready.json")
    line = "this line in /etc/hosts, and no other with that name"
    assert line not in drawn(status, now, 130)
    status["network"] |= {"level": "listeners", "hosts_line": "127.77.0.2 gpu-1"}
    assert f"{line}: 127.77.0.2 gpu-1\n" in drawn(status, now, 130)


def test_a_node_that_has_just_come_is_not_said_to_be_missing() -> None:
    """The report from before it came is no sign; the condition is."""
    status, now = recording(FIXTURES / "status" / "worker-ready.json")
    own = status["node"]["address"]
    rows = status["cluster"]["nodes"]
    status["cluster"]["nodes"] = [row for row in rows if row["address"] != own]
    (row,) = [line for line in drawn(status, now, 130).splitlines() if "(this)" in line]
    assert "  up  " in row
    status["conditions"] = [condition("ray_not_listed", status["name"])]
    (row,) = [line for line in drawn(status, now, 130).splitlines() if "(this)" in line]
    assert "not listed" in row


def test_what_is_wrong_comes_first_and_once() -> None:
    shown = drawn(STATUS, 1000.0, 80)
    assert shown.splitlines()[:13] == [
        "WAITING  worker gpu-1 at 127.77.0.2, up 2 h 1 min, rayfwd 0.1.0, pid 4242",
        "",
        "waiting  ray_died  gpu-1  for 1 min",
        "         Ray ended",
        "     do  see its log",
        "",
        "error  ray_node_without_resources  gpu-2  for 1 min",
        "       no \\x1b[31mresources",
        "   do  r",
        "",
        "error  listener_blocked  gpu-1/127.0.0.1:1  for 1 min",
        "       port 1 is taken",
        "   do  r",
    ]


ROOT, LEAF = "link_down:gpu-1:gpu-1", "ray_died:gpu-1:gpu-1"


@pytest.mark.parametrize(
    ("root", "leaf", "whole"),
    [
        ({}, {"explained_by": ROOT}, ["error  link_down"]),
        ({}, {}, ["error  link_down", "error  ray_died"]),
        ({}, {"explained_by": "what:has:ended"}, ["error  link_down", "error  ray_died"]),
        ({"blocks_ready": True}, {"explained_by": ROOT}, ["waiting  link_down"]),
        (
            {"blocks_ready": True},
            {"explained_by": ROOT, "blocks_ready": True},
            ["waiting  link_down"],
        ),
        # What the node waits for is read whole, unless its root says it already.
        (
            {"severity": "warning"},
            {"explained_by": ROOT, "blocks_ready": True},
            ["waiting  ray_died", "warning  link_down"],
        ),
    ],
)
def test_what_is_explained_is_told_with_its_root(
    root: dict[str, Any], leaf: dict[str, Any], whole: list[str]
) -> None:
    rows = [condition("link_down", **root), condition("ray_died", **leaf)]
    shown = drawn(STATUS | {"conditions": rows}, 1000.0, 80)
    first = (
        line.partition("  gpu-1  for")[0] for line in shown.splitlines() if "  for 1 m" in line
    )
    assert list(first)[: len(whole)] == whole
    assert shown.count("explains ray_died gpu-1") == (len(whole) == 1)


def test_clients_have_a_row_each() -> None:
    moved = {"streams": {"open": 7, "parked": 0}, "bytes": {"in": 1, "out": 2}, "version": None}
    client = {**STATUS["link"], **moved, "name": "laptop", "user": "ray"}
    shown = drawn(STATUS | {"clients": [client]}, 1000.0, 80)
    (row,) = (line for line in shown.splitlines() if line.startswith("laptop"))
    assert row.split()[:3] == ["laptop", "ray", STATUS["link"]["state"]]
    assert row.split()[-5:] == ["7", "1", "B", "2", "B"]


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
    problem = condition("x", cause="[red]a[/red] :smile:", remedy="[bold]r")
    shown = drawn(STATUS | {"conditions": [problem]}, 1000.0, 80)
    assert "[red]a[/red] :smile:" in shown
    assert "[bold]r" in shown


def test_keys_of_a_newer_version_are_left_out() -> None:
    newer = STATUS | {"colour": "blue", "link": STATUS["link"] | {"mood": "good"}}
    assert drawn(newer, 1000.0, 80) == drawn(STATUS, 1000.0, 80)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (STATUS | {"schema": 1}, "it has schema 1, and this rayfwd reads schema 2"),
        (STATUS | {"schema": 3}, "it has schema 3, and this rayfwd reads schema 2"),
        ([], "it has schema None, and this rayfwd reads schema 2"),
        ({"schema": 2}, "status.version is not there"),
        (STATUS | {"pid": "x"}, "status.pid is no number of this kind"),
        (STATUS | {"uptime": float("inf")}, "status.uptime is no number of this kind"),
        (STATUS | {"pid": 10**400}, "status.pid is no number of this kind"),
        (STATUS | {"roster": {}}, "status.roster is dict, not list"),
        (STATUS | {"roster": [5]}, "status.roster[0] is int, not dict"),
        (STATUS | {"node": {}}, "status.node: "),
    ],
)
def test_a_status_of_another_version_is_said_to_be_one(answer: Any, said: str) -> None:
    with pytest.raises(ProblemError) as caught:
        Status.from_answer(answer)
    assert said in caught.value.problem.cause
    assert "--json" in caught.value.problem.remedy


def variants(value: Any) -> Iterator[Any]:
    """The value with each of its parts in turn missing, null, or of another kind."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield {k: v for k, v in value.items() if k != key}
            others: tuple[Any, ...] = (
                *(None, 5, -(10**30), 10**400, 1e299, float("nan"), "x\x1b[2J", True),
                *([], {}, [None], {"a": {}}, [[1]]),
            )
            for other in others:
                yield {**value, key: other}
            for changed in variants(part):
                yield {**value, key: changed}
    if isinstance(value, list):
        for index, part in enumerate(value):
            for changed in variants(part):
                yield [*value[:index], changed, *value[index + 1 :]]


def shortened(value: Any) -> Any:
    """The same with one row in every table: a second one is drawn as the first."""
    if isinstance(value, dict):
        return {key: shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        rows = all(isinstance(part, dict) for part in value)
        return [shortened(part) for part in value[: 1 if rows else None]]
    return value


@pytest.mark.parametrize("name", ["a worker", "head-rejoined"])
def test_any_answer_is_drawn_or_is_none(name: str) -> None:
    status = shortened(STATUS)
    if name != "a worker":
        status = shortened(recording(FIXTURES / "status" / f"{name}.json")[0])
    drew = said = 0
    for case in variants(status):
        try:
            shown = drawn(case, 1000.0, 80)
        except ValueError:
            said += 1
        else:
            drew += 1
            assert shown.replace("\n", "").isprintable()
    assert drew > 100
    assert said > 100


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_what_is_read_says_the_same_again(path: Path) -> None:
    status, _ = recording(path)
    assert Status.from_wire(status).to_wire() == status


if __name__ == "__main__":
    TEXTS.mkdir(exist_ok=True)
    for source in RECORDINGS:
        for columns in WIDTHS:
            text = drawn(*recording(source), columns)
            (TEXTS / f"{source.stem}-{columns}.txt").write_text(text)
