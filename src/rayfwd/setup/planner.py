"""Which steps set a machine up (pure): what each is follows from the request alone.

Whether a step is needed is found out when its turn comes (`steps`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rayfwd.setup import texts
from rayfwd.setup.request import GROUP, MAN_PAGES, Layout, SetupRequest
from rayfwd.setup.steps import Directory, File, Key, Member, Step, Symlink, SystemGroup, User


def plan(request: SetupRequest, layout: Layout, units: Mapping[str, str]) -> tuple[Step, ...]:
    """The steps in order. `units` are the shipped ones, name to text."""
    make = _system if layout.system else _user
    once: dict[str, Step] = {}
    for step in make(request, layout, units):
        once.setdefault(step.id, step)
    return tuple(once.values())


def _system(request: SetupRequest, layout: Layout, units: Mapping[str, str]) -> list[Step]:
    steps: list[Step] = [SystemGroup(GROUP)]
    if request.user_is_new:
        steps.append(User(request.user, request.home, GROUP))
    else:
        steps.append(Member(request.user, GROUP))
    if (request.role == "worker" or _has_a_key(request, layout)) and not request.by_hand:
        steps.append(Directory(layout.secrets, "root", GROUP, 0o750))
    steps += _head_key(request, layout)
    steps += _worker_files(request, layout, "root", GROUP)
    text = texts.config_text(request, layout)
    steps.append(File(layout.config, text, "root", GROUP, 0o640))
    steps += _units(request, layout, units, "root", "root")
    return [*steps, *_pages(layout, layout.man, 0o755)]


def _user(request: SetupRequest, layout: Layout, units: Mapping[str, str]) -> list[Step]:
    missing = [layout.state, layout.config.parent, *([layout.units] if units else [])]
    steps: list[Step] = [
        Directory(path, None, None, 0o700) for path in _with_parents(missing, request.home)
    ]
    steps += _head_key(request, layout)
    steps += _worker_files(request, layout, None, None)
    text = texts.config_text(request, layout)
    steps.append(File(layout.config, text, None, None, 0o600))
    steps += _units(request, layout, units, None, None)
    return [*steps, *_pages(layout, request.home, 0o700)]


def _has_a_key(request: SetupRequest, layout: Layout) -> bool:
    """Whether a head has one of its own, for a meeting place."""
    return request.meet_identity == layout.identity


def _head_key(request: SetupRequest, layout: Layout) -> list[Step]:
    if request.by_hand or not _has_a_key(request, layout):
        return []
    owner = request.user if layout.system else None
    return [Key(layout.identity, owner, f"rayfwd {request.name}")]


def _worker_files(
    request: SetupRequest, layout: Layout, owner: str | None, group: str | None
) -> list[Step]:
    if request.by_hand or (request.head is None and not request.direct):
        return []
    steps: list[Step] = []
    if request.identity is None:
        key_owner = request.user if layout.system else None
        steps.append(Key(layout.identity, key_owner, f"rayfwd {request.name}"))
    if request.host_key is not None:
        steps.append(File(layout.known_hosts, request.host_key, owner, group, 0o640))
    return steps


def _units(
    request: SetupRequest,
    layout: Layout,
    units: Mapping[str, str],
    owner: str | None,
    group: str | None,
) -> list[Step]:
    made = {
        name: texts.unit_text(name, text, request.user, layout)
        for name, text in sorted(units.items())
        if layout.overlay or name != texts.OVERLAY_SERVICE
    }
    return [File(layout.units / n, text, owner, group, 0o644) for n, text in made.items()]


def _pages(layout: Layout, below: Path, mode: int) -> list[Step]:
    if layout.pages is None:
        return []
    links = [Symlink(layout.man / page, layout.pages / page) for page in MAN_PAGES]
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
