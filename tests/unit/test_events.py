"""docs/events.md has every event that there is in the source, and no other.

That docs/conditions.md has every code is seen to in test_conditions.py.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

import rayfwd
from rayfwd import codes

SOURCE = Path(rayfwd.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"

LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
LOGGERS = {"log", "_log"}
ALIASES = {"say"}
"""Names by which a level of a logger is called."""

MADE_IN_LOGS = {"events_suppressed", "library_message"}
"""These are made of others' events, in logs.py."""


@dataclass
class Event:
    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)

    def row(self, name: str) -> str:
        names = ", ".join(f"`{f}`" for f in sorted(self.fields))
        return f"| `{name}` | {', '.join(sorted(self.levels))} | {names} | … |"


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for path in sorted(SOURCE.rglob("*.py")):
        if {"demo", "script"} & set(path.relative_to(SOURCE).parts):
            continue  # they log nothing; they have a `say` of their own
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, node


def level_of(call: ast.Call) -> str | None:
    """The level that a call logs at; empty where it is decided elsewhere, None: it logs nothing."""
    function = call.func
    if isinstance(function, ast.Name) and function.id in ALIASES:
        return ""
    if isinstance(function, ast.Attribute) and function.attr in LEVELS:
        value = function.value
        name = value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")
        return function.attr if name in LOGGERS else None
    return None


@cache
def events() -> tuple[dict[str, Event], list[str]]:
    """The events of fixed names, and the expressions that the others are named by."""
    found: dict[str, Event] = defaultdict(Event)
    named_by: list[str] = []
    for path, call in calls():
        level = level_of(call)
        if level is None:
            continue
        first = call.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            event = found[first.value]
            event.levels.add("error" if level == "exception" else level)
            for keyword in call.keywords:
                assert keyword.arg is not None, f"{path.name}:{call.lineno}: fields by **"
                event.fields.add(keyword.arg)
        else:
            named_by.append(ast.unparse(first))
    return dict(found), named_by


def section(title: str) -> str:
    text = (DOCS / "events.md").read_text()
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def documented_events() -> dict[str, tuple[set[str], set[str]]]:
    rows = re.findall(r"(?m)^\| `(\w+)` \| ([\w, ]+) \|([^|]*)\| (\S.*) \|$", section("Events"))
    assert [row[0] for row in rows] == sorted(row[0] for row in rows), "in order, please"
    return {
        name: (set(levels.split(", ")), set(re.findall(r"`(\w+)`", fields)))
        for name, levels, fields, _ in rows
    }


def test_every_event_is_documented() -> None:
    documented = documented_events()
    missing = [e.row(name) for name, e in sorted(events()[0].items()) if name not in documented]
    assert not missing, "rows for docs/events.md:\n" + "\n".join(missing)


def test_no_event_that_is_gone_is_documented() -> None:
    assert sorted(documented_events().keys() - events()[0].keys() - MADE_IN_LOGS) == []


@pytest.mark.parametrize("name", sorted(events()[0]))
def test_levels_and_fields(name: str) -> None:
    event = events()[0][name]
    levels, fields = documented_events().get(name, (set(), set()))
    assert (levels, fields) == (event.levels, event.fields), event.row(name)


def test_the_events_made_in_logs_are_there() -> None:
    text = (SOURCE / "system" / "logs.py").read_text()
    for name in MADE_IN_LOGS:
        assert f'"{name}"' in text
        assert name in documented_events()


def test_other_events_are_named_by_a_code() -> None:
    named_by = events()[1]
    assert len(named_by) >= 6
    kinds = {tuple(name.split(".")[-2:]) for name in named_by}
    assert kinds == {("code", "name"), ("code", "event")}


def test_names_are_snake_case() -> None:
    for name in {*events()[0], *codes.ALL}:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name), name
