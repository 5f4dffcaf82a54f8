"""docs/events.md has every event that is declared, with its levels and fields, and no other.

What is logged is declared: mypy sees to that. That docs/conditions.md has every code is seen to in
test_conditions.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.system.eventlog import Event, declared

DOCS = Path(__file__).parents[2] / "docs"
EVENTS = declared()

MADE_IN_LOGS = {"events_suppressed", "library_message"}
"""These are made of others' events, in logs.py."""


def row(name: str, event: Event) -> str:
    names = ", ".join(f"`{field}`" for field in sorted(event.fields))
    return f"| `{name}` | {', '.join(sorted(event.levels))} | {names} | … |"


def documented_events() -> dict[str, Event]:
    text = (DOCS / "events.md").read_text()
    section = text.partition("\n## Events\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| `(\w+)` \| ([\w, ]+) \|([^|]*)\| (\S.*) \|$", section)
    assert [found[0] for found in rows] == sorted(found[0] for found in rows), "in order, please"
    return {
        name: Event(set(levels.split(", ")), set(re.findall(r"`(\w+)`", fields)))
        for name, levels, fields, _ in rows
    }


def test_every_event_is_documented() -> None:
    documented = documented_events()
    missing = [row(name, event) for name, event in EVENTS.items() if name not in documented]
    assert not missing, "rows for docs/events.md:\n" + "\n".join(missing)


def test_no_event_that_is_gone_is_documented() -> None:
    assert documented_events().keys() - EVENTS.keys() == MADE_IN_LOGS


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_levels_and_fields(name: str) -> None:
    assert documented_events().get(name) == EVENTS[name], row(name, EVENTS[name])


def test_names_are_snake_case() -> None:
    for name in {*EVENTS, *codes.ALL}:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name), name
