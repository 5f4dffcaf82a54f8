"""Installs rayfwd on a machine, and Ray where that is asked for: by uv, or by venv and pip.

rayfwd's own wheel goes over the SSH connection. What it needs goes the same way where this
machine's fits there (the same Python, processor and C library), and comes from the machine's
package index where it does not.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rayfwd import codes
from rayfwd.problems import ProblemError
from rayfwd.ray.install import Versions
from rayfwd.setup.remote.shipment import Needs, Shipment
from rayfwd.setup.remote.sight import MARKER, OLDEST_PYTHON, Sight
from rayfwd.setup.remote.ssh import Failed, Hangs, Machine

INSTALL_SECONDS = 900.0
"""For what may come from a package index."""
ROOM = 250 << 20
"""Bytes that rayfwd with what it needs takes, and then some."""
ROOM_FOR_RAY = 2 << 30

_NO_PYTHON = re.compile("No interpreter found|(download|install) (cp|pypy)|python-build-standalone")
"""What uv says where it finds no interpreter, or cannot get one."""

_DISK = re.compile(
    "Read-only file system|No space left|Disk quota exceeded|Permission denied|Wrote only"
)
"""What the system says where nothing can be written, and tar where not all could be."""

_CERTIFICATE = re.compile("certificate", re.IGNORECASE)
"""In what is said where a server's certificate is not valid yet, or no longer."""

_ITS_PYTHON = "its Python is"

_SCRIPT = r"""
set -e
umask 022
cd @INCOMING@
fresh=
finish() { [ -n "$done" ] || [ -z "$fresh" ] || rm -rf @TARGET@; rm -rf @INCOMING@; }
done=
trap finish EXIT
trap 'exit 1' HUP INT TERM
# An `add` that was interrupted on the head may be at work here still.
if command -v flock >/dev/null 2>&1; then
  exec 9>@TARGET@.lock
  waited=0
  until flock -n 9; do
    [ $((waited += 1)) -le @SECONDS@ ] || { echo "another installation has not ended" >&2; exit 1; }
    sleep 1
  done
fi
# Another machine with the same home, or that `add`, may have installed the very same meanwhile;
# NFS shows it to who opens the directory.
ls "$(dirname @TARGET@)" @TARGET@ >/dev/null 2>&1 || :
if [ -x @TARGET@/bin/python ] && [ -z "@BROKEN@" ] &&
  grep -qF @SAME@ @TARGET@/@MARKER@ 2>/dev/null; then done=1; cd /; exit 0; fi
for old in @TARGET@.incoming.*; do
  [ "$old" = @INCOMING@ ] || find "$old" -maxdepth 0 -mmin +60 -exec rm -rf {} + || :
done
if [ ! -x @TARGET@/bin/python ] || [ -n "@BROKEN@" ]; then
  fresh=1; rm -rf @TARGET@; mkdir -p "$(dirname @TARGET@)"
fi
pip_wheel=$(ls pip-*.whl 2>/dev/null | head -n 1) || :
uv=@UV@
if [ -z "$uv" ] && [ -n "@BRING_UV@" ]; then
  if [ -f uv ]; then chmod 755 uv; uv=./uv
  else
    @OLD_PYTHON@ "$PWD/$pip_wheel/pip" install --quiet --target uv-from-index uv >&2
    uv=./uv-from-index/bin/uv
  fi
fi
if [ -n "$uv" ]; then
  [ -z @PYTHONS@ ] || export UV_PYTHON_INSTALL_DIR=@PYTHONS@
  [ -z "$fresh" ] || "$uv" venv --quiet --python @PYTHON@ @TARGET@ >&2
  put() { "$uv" pip install --quiet --compile-bytecode --python @TARGET@/bin/python "$@" >&2; }
  anew() { put --reinstall-package rayfwd --no-deps "$@"; }
else
  [ -z "$fresh" ] || @PYTHON@ -m venv --without-pip @TARGET@ >&2
  if [ -n "$pip_wheel" ]; then pip="$PWD/$pip_wheel/pip"
  else @TARGET@/bin/python -m ensurepip >/dev/null; pip="-m pip"; fi
  put() { @TARGET@/bin/python $pip install --quiet --disable-pip-version-check --no-input \
            --no-warn-script-location "$@" >&2; }
  anew() { put --force-reinstall --no-deps "$@"; }
fi
@PUT@
[ -n "$fresh" ] || [ -z "@OWN@" ] || anew --no-index @OWN@
printf '%s\n' @MADE@ >@TARGET@/@MARKER@
done=1
cd /
"""


@dataclass(frozen=True, slots=True)
class Tool:
    """By what it is installed."""

    uv: str = ""
    """The command there."""
    bring_uv: bool = False
    """It is not there, and is brought or fetched."""
    old_python: str = "false"
    """By which it is fetched, where it is not brought."""
    python: str = ""
    """An interpreter there, or for uv a version."""
    pythons: str = ""
    """Where uv puts an interpreter that it gets; empty: where it does so usually."""


def choose(sight: Sight, shipment: Shipment, has_pip: bool, wanted: str | None) -> Tool:
    """`wanted`: the Python to have, to the last number, as Ray's nodes must have the same; None:
    any that runs rayfwd. Raises ProblemError."""
    known = [p for p in sight.pythons if not _is_shut_away(sight, p.path)]
    if wanted is not None:
        fitting = [p for p in known if p.version == wanted]
    else:  # with the Python of the head's rayfwd all that it needs can be sent
        fitting = [p for p in known if p.key >= OLDEST_PYTHON]
        fitting.sort(key=lambda p: (p.key != shipment.python, not p.whole))
    found = next(iter(fitting), None)
    version = wanted or ".".join(map(str, shipment.python))
    python = found.path if found is not None else version
    if sight.uv is not None:
        return Tool(uv=sight.uv, python=python)
    if (whole := next((p for p in fitting if p.whole), None)) is not None:
        return Tool(python=whole.path)
    if shipment.uv is not None and not of_another_kind(sight, shipment):
        return Tool(bring_uv=True, python=python)
    if sight.any_python is not None and sight.index != "no" and has_pip:
        return Tool(bring_uv=True, old_python=sight.any_python, python=python)
    if found is not None:
        raise codes.ADD_NO_PYTHON.error(
            f"{found.path} there is without its standard library, and there is no uv, which would "
            "bring its own",
            "install that library there, for example with `apt-get install python3-venv`, or "
            "install uv there or on the head",
        )
    least = f"Python {version}" if wanted else "Python 3.11 or newer"
    has = ", ".join(p.version for p in sight.pythons if p.version) or "none"
    if shut := [p.path for p in sight.pythons if p not in known]:
        has += f"; the user of its service cannot run {', '.join(shut)}, which is root's"
    raise codes.ADD_NO_PYTHON.error(
        f"it has no {least} (it has {has}), and no uv that could install one",
        "install Python there, for example with `apt-get install python3`, or install uv there "
        "(https://docs.astral.sh/uv/), which brings its own Python; or install uv on the head",
    )


def _is_shut_away(sight: Sight, path: str) -> bool:
    """Whether the user of the machine's service cannot run what is there: it is root's home."""
    return sight.root and sight.systemd and path.startswith(f"{sight.home.rstrip('/')}/")


def _where_uv_puts(sight: Sight, target: str) -> str:
    return f"{target}.python" if _is_shut_away(sight, f"{sight.home.rstrip('/')}/") else ""


def fits(sight: Sight, shipment: Shipment, tool: Tool) -> str:
    """Why what is compiled here is not for that machine; empty: it is."""
    if other := of_another_kind(sight, shipment):
        return other
    key = next((p.key for p in sight.pythons if p.path == tool.python), None)
    if key is None:
        key = tuple(int(part) for part in tool.python.split(".")[:2])
    if key != shipment.python:
        there, here = (".".join(map(str, k)) for k in (key, shipment.python))
        return f"{_ITS_PYTHON} {there}, but the head's rayfwd has {here}"
    return ""


def of_another_kind(sight: Sight, shipment: Shipment) -> str:
    """Why no program of this machine runs on that one; empty: it does."""
    if sight.machine != shipment.machine:
        return f"its processor is {sight.machine}, but the head's is {shipment.machine}"
    if (shipment.libc == "glibc") == sight.is_musl:
        return f"its C library is {sight.libc or 'unknown'}, but the head's is {shipment.libc}"
    return ""


async def rayfwd(machine: Machine, sight: Sight, shipment: Shipment, name: str) -> bool:
    """Have this rayfwd there, for the node of that name; whether something was done.

    Raises ProblemError.
    """
    target = sight.prefix
    made = {"wheel": shipment.digest, "name": name, "host": sight.host}
    as_here = sight.made is not None and sight.made.get("wheel") == shipment.digest
    if as_here and not sight.broken:
        return False
    _check_place(sight, target, sight.there and sight.made is None, ROOM)
    needs = await asyncio.to_thread(shipment.needs)
    tool = choose(sight, shipment, needs.pip is not None, None)
    tool = replace(tool, pythons=_where_uv_puts(sight, target))
    why = needs.why or fits(sight, shipment, tool)
    files = [shipment.own, *([] if why else needs.wheels), *_tools(shipment, needs, tool)]
    own = shlex.quote(f"./{shipment.own.name}")
    ours, index = f"put --no-index --find-links . {own}", f"put {own}"
    put = index if why else f"{ours} || {index}"
    same = {"wheel": shipment.digest}
    order = Order(target, files, put, made, same, own, sight.broken)
    try:
        await _install(machine, order, tool, sight.any_python)
    except Hangs:
        raise
    except Failed as exc:
        raise _no_packages(machine, sight, tool, f"{exc}", why) from None
    return True


async def ray(
    machine: Machine, sight: Sight, shipment: Shipment, versions: Versions, ours: Sequence[Path]
) -> bool:
    """Have the head's Ray there, in a directory beside rayfwd's; whether something was done.

    `ours`: wheels of the head's, which are tried first where no index is reached. Raises
    ProblemError.
    """
    target, made = ray_prefix(sight), ray_marker(versions)
    if sight.made_ray == made and not sight.broken_ray:
        return False
    _check_place(sight, target, False, ROOM_FOR_RAY)
    needs = await asyncio.to_thread(shipment.needs)
    tool = choose(sight, shipment, needs.pip is not None, versions.python)
    tool = replace(tool, pythons=_where_uv_puts(sight, target))
    requirement = shlex.quote(f"ray[default]=={versions.ray}")
    here = sight.machine == shipment.machine and bool(ours)
    ways = [f"put {requirement}"]
    if here:
        ways.insert(
            len(ways) if sight.index == "yes" else 0,
            f"put --no-index --find-links . {requirement}",
        )
    files = [*(ours if here else ()), *_tools(shipment, needs, tool)]
    order = Order(target, files, " || ".join(ways), made, same=made)
    try:
        await _install(machine, order, tool, sight.any_python)
    except Hangs:
        raise
    except Failed as exc:
        raise _no_packages(machine, sight, tool, f"Ray {versions.ray}: {exc}", "") from None
    return True


def ray_marker(versions: Versions) -> dict[str, str]:
    """What says that this Ray is there."""
    return {"ray": versions.ray, "python": versions.python}


def ray_prefix(sight: Sight) -> str:
    return f"{sight.prefix}-ray"


def _check_place(sight: Sight, target: str, strange: bool, room: int) -> None:
    if strange:
        raise codes.ADD_BLOCKED.error(
            f"{target} exists there, but `rayfwd add` did not make it",
            "move it away there, or choose another directory with --prefix",
        )
    if sight.readonly or sight.shut:
        why = (
            "that disk is mounted read-only"
            if sight.readonly
            else (f"{sight.user} may create nothing in {sight.shut}")
        )
        raise codes.ADD_BLOCKED.error(
            f"nothing can be written where {target} goes: {why}",
            "make it writable for that login, or choose another directory with --prefix",
        )
    if sight.noexec:
        raise codes.ADD_BLOCKED.error(
            f"nothing can be run from where {target} goes: that disk is mounted noexec",
            "choose a directory on another disk with --prefix, or mount that one without noexec",
        )
    if 0 < sight.free < room:
        raise codes.ADD_BLOCKED.error(
            f"{sight.free / 1e6:.0f} MB are free where {target} goes, but {room / 1e6:.0f} MB are "
            "needed",
            "make room there, or choose another directory with --prefix",
        )


def _tools(shipment: Shipment, needs: Needs, tool: Tool) -> list[Path]:
    brought = [shipment.uv] if tool.bring_uv and tool.old_python == "false" else []
    return [path for path in (needs.pip, *brought) if path is not None]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be installed on a machine, and from what."""

    target: str
    """The directory there."""
    files: Sequence[Path]
    """What is sent."""
    put: str
    """The command that installs, of the script's words."""
    made: Mapping[str, str]
    """What is written down of it there."""
    same: Mapping[str, str]
    """Of that, what says that it is the same."""
    own: str = ""
    """The wheel among them that is ours."""
    broken: bool = False
    """What is there goes first."""


async def _install(
    machine: Machine, order: Order, tool: Tool, any_python: str | None = None
) -> None:
    """`any_python`: one that unpacks what is sent, where there is no tar. Raises Failed,
    ProblemError."""
    target = order.target
    incoming = f"{target}.incoming.{secrets.token_hex(4)}"
    python = tool.python if tool.python.startswith("/") else any_python
    await machine.send(order.files, incoming, python)
    words = {
        "@INCOMING@": shlex.quote(incoming),
        "@TARGET@": shlex.quote(target),
        "@UV@": shlex.quote(tool.uv),
        "@BRING_UV@": "yes" if tool.bring_uv else "",
        "@OLD_PYTHON@": shlex.quote(tool.old_python),
        "@PYTHON@": shlex.quote(tool.python),
        "@PYTHONS@": shlex.quote(tool.pythons),
        "@PUT@": order.put,
        "@OWN@": order.own,
        "@MADE@": shlex.quote(json.dumps(dict(order.made))),
        "@SAME@": shlex.quote(json.dumps(dict(order.same))[1:-1]),
        "@MARKER@": MARKER,
        "@BROKEN@": "yes" if order.broken else "",
        "@SECONDS@": f"{INSTALL_SECONDS / 2:.0f}",
    }
    script = _SCRIPT
    for word, text in words.items():
        script = script.replace(word, text)
    await machine.sh(script, seconds=INSTALL_SECONDS)


def _no_packages(machine: Machine, sight: Sight, tool: Tool, said: str, why: str) -> ProblemError:
    by_uv = bool(tool.uv) or tool.bring_uv
    if _DISK.search(said):
        return codes.ADD_BLOCKED.error(
            f"nothing can be written where {sight.prefix} goes on {machine.host.ssh}: {said}",
            "make room there, or make it writable for that login, or choose another directory with "
            "--prefix",
        )
    if by_uv and not tool.python.startswith("/") and _NO_PYTHON.search(said):
        return codes.ADD_NO_PYTHON.error(
            f"there is no Python {tool.python} on {machine.host.ssh}, and uv could not get one: "
            f"{said}",
            f"install Python {tool.python} there, or give uv a way to one "
            "(UV_PYTHON_INSTALL_MIRROR in the environment of that login)",
        )
    cause = f"installing on {machine.host.ssh} failed: {said}"
    if why:
        cause += f" (the head's own packages were not sent: {why})"
    remedy = "correct this on that machine, then run the same command again"
    if _CERTIFICATE.search(said) and (clock := sight.clock()):
        cause += f"; {clock}"
        remedy = "set its clock (`timedatectl set-ntp true`), then run the same command again"
    elif not by_uv and ("ensurepip" in said or "venv" in said):
        remedy = (
            "install what creates environments, for example with `apt-get install "
            "python3-venv` there, or install uv"
        )
    elif why and sight.index == "no":
        remedy = "let that machine reach a package index (pip's index-url there)"
        if why.startswith(_ITS_PYTHON):
            least = ".".join(map(str, OLDEST_PYTHON))
            remedy += (
                f", or install the Python of the head's rayfwd there ({least} at least): then "
                "everything goes over SSH"
            )
    return codes.ADD_NO_PACKAGES.error(cause, remedy)


async def remove(machine: Machine, sight: Sight) -> list[str]:
    """Take away the directories that we have made; which. Raises Failed, ProblemError."""
    gone = [
        place
        for place, made in ((sight.prefix, sight.made), (ray_prefix(sight), sight.made_ray))
        if made is not None
    ]
    if gone:
        beside = [
            f"{quoted}.lock {quoted}.python {quoted}.incoming.*"
            for quoted in map(shlex.quote, gone)
        ]
        words = f"rm -rf {shlex.join(gone)} {' '.join(beside)}"
        # Another machine with this home may remove the same, and NFS says "Stale file handle".
        again = f"{words} 2>/dev/null || {{ sleep 1; {words}; }}"
        await machine.sh(again, seconds=INSTALL_SECONDS)
    return gone
