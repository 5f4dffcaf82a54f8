"""What the head sends: wheels of its own rayfwd, of what that needs, and of its Ray."""

from __future__ import annotations

import asyncio
import functools
import json
import platform
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rayfwd import __version__, codes
from rayfwd.problems import ProblemError
from rayfwd.setup import units
from rayfwd.setup.remote import wheels
from rayfwd.system import children
from rayfwd.system.files import digest

_PACKAGE = Path(__file__).parents[2]
_CHECKOUT = _PACKAGE.parents[1]
_OWN = "rayfwd"
_PACK_SECONDS = 300.0
"""For the head's Ray to be packed as wheels."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What is sent beside rayfwd's own wheel."""

    wheels: tuple[Path, ...]
    """Of what rayfwd needs; empty: they cannot be made here, and `why` says why."""
    why: str
    pip: Path | None


@dataclass(frozen=True, slots=True)
class Shipment:
    """Files for machines; what is compiled in them is for machines like this one."""

    own: Path
    """rayfwd's wheel."""
    needs: Callable[[], Needs]
    """Made at the first call: a machine that has it all needs none."""
    uv: Path | None
    digest: str
    """Of `own`: the same where nothing has changed."""
    python: tuple[int, ...] = sys.version_info[:2]
    machine: str = platform.machine()
    libc: str = platform.libc_ver()[0]


def pack(folder: Path) -> Shipment:
    """All but Ray. Raises ProblemError where rayfwd's own files cannot be read."""
    try:
        own = own_wheel(folder)
    except (OSError, metadata.PackageNotFoundError) as exc:
        raise codes.ADD_FAILED.error(
            f"the rayfwd that runs here cannot be packed as a wheel: {exc}",
            "install rayfwd here from a wheel, so that any user can read it",
        ) from None
    uv = shutil.which("uv")
    lock = threading.Lock()

    @functools.cache
    def once() -> Needs:
        return _needs(folder)

    def needs() -> Needs:
        with lock:
            return once()

    return Shipment(
        own=own,
        needs=needs,
        uv=None if uv is None else Path(uv),
        digest=digest(own.read_bytes()),
    )


def _needs(folder: Path) -> Needs:
    made, why = [], ""
    try:
        for distribution in wheels.closure([_OWN]):
            if wheels.name_of(distribution.metadata["Name"]) != _OWN:
                made.append(wheels.make(distribution, folder))
    except (wheels.WheelError, OSError) as exc:
        made, why = [], str(exc)
    return Needs(tuple(made), why, wheels.of_installer(folder))


def own_wheel(folder: Path) -> Path:
    """Of the rayfwd that runs, however it was installed. Raises OSError."""
    version = __version__
    info = f"{_OWN}-{version}.dist-info"
    members = wheels.members_below(_PACKAGE, _OWN)
    if (_CHECKOUT / "pyproject.toml").exists() and f"{_OWN}/conditions.md" not in members:
        members[f"{_OWN}/conditions.md"] = (_CHECKOUT / "docs" / "conditions.md").read_bytes()
    for name, text in units.shipped().items():
        members[f"{_OWN}/setup/units/{name}"] = text.encode()
    members |= _shared(f"{_OWN}-{version}.data/data/share")
    found = metadata.distribution(_OWN)
    for name in ("METADATA", "entry_points.txt"):
        members[f"{info}/{name}"] = (found.read_text(name) or "").encode()
    members[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: rayfwd\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    return wheels.write(folder, _OWN, version, info, "py3-none-any", members)


def _shared(prefix: str) -> dict[str, bytes]:
    """Man pages and completions."""
    if (_CHECKOUT / "share" / "man").is_dir():
        return wheels.members_below(_CHECKOUT / "share", prefix)
    found = {}
    for part in ("man/man1/rayfwd.1", "man/man5/rayfwd.toml.5"):
        path = Path(sys.prefix) / "share" / part
        if path.is_file():
            found[f"{prefix}/{part}"] = path.read_bytes()
    return found


async def pack_ray(python: str, folder: Path) -> list[Path]:
    """Wheels of the Ray of that Python, and of what it needs. Raises ProblemError."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    script = str(Path(wheels.__file__))
    try:
        ran = await children.run(
            *(python, "-I", script, str(folder), "ray[default]"), seconds=_PACK_SECONDS
        )
    except TimeoutError:
        raise _not_packed("not done in time") from None
    if ran.code != 0:
        raise _not_packed(ran.err.decode(errors="replace").strip())
    return [folder / name for name in json.loads(ran.out)]


def _not_packed(why: str) -> ProblemError:
    return codes.ADD_NO_PACKAGES.error(
        f"the head's Ray cannot be packed as wheels: {why}",
        "install the same Ray there by hand, and give its path with --ray-command",
    )
