"""Which steps set a machine up (pure): what each is follows from the wishes alone.

Whether a step is needed is found out when its turn comes (`steps`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rayfwd.setup import texts
from rayfwd.setup.steps import Directory, File, Group, Key, Link, Member, Step, User
from rayfwd.setup.wishes import GROUP, MAN_PAGES, Places, Wishes


def plan(wishes: Wishes, places: Places, units: Mapping[str, str]) -> tuple[Step, ...]:
    """The steps in order. `units` are the shipped ones, name to text."""
    make = _system if places.system else _user
    once: dict[str, Step] = {}
    for step in make(wishes, places, units):
        once.setdefault(step.id, step)
    return tuple(once.values())


def _system(wishes: Wishes, places: Places, units: Mapping[str, str]) -> list[Step]:
    steps: list[Step] = [Group(GROUP)]
    if wishes.user_is_new:
        steps.append(User(wishes.user, wishes.home, GROUP))
    else:
        steps.append(Member(wishes.user, GROUP))
    if wishes.role == "worker" and not wishes.by_hand:
        steps.append(Directory(places.secrets, "root", GROUP, 0o750))
    steps += _worker_files(wishes, places, "root", GROUP)
    text = texts.config_text(wishes, places)
    steps.append(File(places.config, text, "root", GROUP, 0o640))
    steps += _units(wishes, places, units, "root", "root")
    return [*steps, *_pages(places, places.man, 0o755)]


def _user(wishes: Wishes, places: Places, units: Mapping[str, str]) -> list[Step]:
    missing = [places.state, places.config.parent, places.units]
    steps: list[Step] = [
        Directory(path, None, None, 0o700) for path in _with_parents(missing, wishes.home)
    ]
    steps += _worker_files(wishes, places, None, None)
    text = texts.config_text(wishes, places)
    steps.append(File(places.config, text, None, None, 0o600))
    steps += _units(wishes, places, units, None, None)
    return [*steps, *_pages(places, wishes.home, 0o700)]


def _worker_files(
    wishes: Wishes, places: Places, owner: str | None, group: str | None
) -> list[Step]:
    if wishes.role == "head" or wishes.by_hand:
        return []
    steps: list[Step] = []
    if wishes.identity is None:
        key_owner = wishes.user if places.system else None
        steps.append(Key(places.identity, key_owner, f"rayfwd {wishes.name}"))
    if wishes.host_key is not None:
        steps.append(File(places.known_hosts, wishes.host_key, owner, group, 0o640))
    return steps


def _units(
    wishes: Wishes,
    places: Places,
    units: Mapping[str, str],
    owner: str | None,
    group: str | None,
) -> list[Step]:
    made = {n: texts.unit_text(n, text, wishes.user, places) for n, text in sorted(units.items())}
    return [File(places.units / n, text, owner, group, 0o644) for n, text in made.items()]


def _pages(places: Places, below: Path, mode: int) -> list[Step]:
    if places.pages is None:
        return []
    links = [Link(places.man / page, places.pages / page) for page in MAN_PAGES]
    missing = _with_parents([link.path.parent for link in links], below)
    # Whoever's these directories are: what is in them is only read, and by man.
    return [*(Directory(path, None, None, mode) for path in missing), *links]


def _with_parents(paths: list[Path], below: Path) -> list[Path]:
    """Each path with those above it, outermost first, without what is not below `below`."""
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_relative_to(below):
            above = [p for p in path.parents if p != below and p.is_relative_to(below)]
            found |= dict.fromkeys([*reversed(above), path])
    return list(found)
