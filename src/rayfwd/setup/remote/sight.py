"""What a machine is, looked at by its shell alone: it may have no Python yet (pure but for names).

`script` prints a line each, a key and its value; `read` makes a `Sight` of them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import Any

_INDEX = {"yes": "reaches a package index", "no": "does not reach a package index"}

CLOCK_SECONDS = 60.0
"""By which a clock may differ from ours before it is said; the look itself takes some of it."""

OLDEST_PYTHON = (3, 11)
"""That rayfwd runs with."""

MARKER = "rayfwd-add.json"
"""In a directory that we have made: what is in it."""

_SCRIPT = r"""
say() { printf '%s %s\n' "$1" "$2"; }
looking_at() { say at "$1"; }
reach() {
  for tool in curl wget; do
    command -v $tool >/dev/null 2>&1 && break
  done
  case $tool in
    curl) curl -sI -m 3 -o /dev/null "$index" && echo yes || echo no;;
    wget) wget -q --spider -T 3 -t 1 "$index" 2>/dev/null && echo yes || echo no;;
  esac
}
looking_at "whether a package index is reached"
net=unknown
index=${PIP_INDEX_URL:-@INDEX@}
[ -n "$index" ] && (command -v curl || command -v wget) >/dev/null 2>&1 && net=$(reach)
say system "$( (. /etc/os-release 2>/dev/null && echo "$PRETTY_NAME") || uname -s)"
say machine "$(uname -m)"
say kernel "$(uname -s)"
say now "$(date +%s)"
say uid "$(id -u)"
say user "$(id -un 2>/dev/null || id -u)"
say home "$HOME"
say host "$(uname -n)"
say from "${SSH_CONNECTION%% *}"
say cpus "$( (nproc || getconf _NPROCESSORS_ONLN) 2>/dev/null | head -n 1)"
say same "$(cat /proc/sys/kernel/random/boot_id 2>/dev/null) $(readlink /proc/self/ns/pid \
  /proc/self/ns/mnt /proc/self/ns/uts 2>/dev/null | tr '\n' ' ')"
say gpus "$(ls -d /dev/nvidia[0-9]* 2>/dev/null | wc -l)"
say index "$net"
say libc "$( (getconf GNU_LIBC_VERSION || ldd --version 2>&1 | head -n 1) 2>/dev/null)"
PREFIX=@PREFIX@
looking_at "the home directory or the directory of rayfwd"
[ -n "$PREFIX" ] || { if [ "$(id -u)" = 0 ]; then PREFIX=/opt/rayfwd
                      else PREFIX=$HOME/.local/share/rayfwd; fi; }
say prefix "$PREFIX"
# NFS may remember for a minute what is there or not, until somebody opens the directory (nfs(5)).
ls "$(dirname "$PREFIX")" "$PREFIX" "$PREFIX-ray" >/dev/null 2>&1
[ -e "$PREFIX" ] && say there yes
[ -e "$PREFIX.lock" ] && command -v flock >/dev/null 2>&1 &&
  { flock -n "$PREFIX.lock" true 2>/dev/null || say busy yes; }
[ -f "$PREFIX/@MARKER@" ] && say made "$(tr '\n' ' ' <"$PREFIX/@MARKER@")"
[ -f "$PREFIX-ray/@MARKER@" ] && say made-ray "$(tr '\n' ' ' <"$PREFIX-ray/@MARKER@")"
[ -f "$PREFIX/@MARKER@" ] && looking_at "$PREFIX/bin/python" &&
  { "$PREFIX/bin/python" -I -c 'import rayfwd' 2>/dev/null || say broken yes; }
[ -f "$PREFIX-ray/@MARKER@" ] && looking_at "$PREFIX-ray/bin/python" &&
  { "$PREFIX-ray/bin/python" -I -c 'from importlib.metadata import version; version("ray")' \
      2>/dev/null || say broken-ray yes; }
looking_at "the disk that has $PREFIX"
above=$PREFIX
while [ ! -d "$above" ]; do above=$(dirname "$above"); done
say free "$(df -Pk "$above" 2>/dev/null | awk 'NR == 2 { print $4 }')"
mount=$(df -Pk "$above" 2>/dev/null | awk 'NR == 2 { print $6 }')
say mount "$(awk -v at="$mount" '$2 == at { found = $4 } END { print found }' /proc/self/mounts \
  2>/dev/null)"
[ -w "$above" ] || say shut "$above"
looking_at "systemd"
[ -d /run/systemd/system ] && say systemd system
# A user's manager that does not linger ends with our own connection.
[ -d /run/systemd/system ] && [ "$(id -u)" != 0 ] && [ -e "/var/lib/systemd/linger/$(id -un)" ] &&
  systemctl --user show-environment >/dev/null 2>&1 && say systemd user
# A login over SSH has not the PATH that an image gives its other processes, or that a shell's
# files give to people.
in_usual_places() {
  for place in "$HOME/.venv" "$HOME/venv" "$HOME/.local" /opt/venv /venv /venv/main /usr/local \
      "$HOME"/*conda* "$HOME"/*forge* "$HOME"/*mamba* "$HOME"/*conda*/envs/* \
      "$HOME"/*forge*/envs/* /opt/*conda* /opt/*forge* /opt/*conda*/envs/* \
      "$HOME/.pyenv/versions"/* "$HOME/.local/share/uv/python"/*; do
    for found in "$@"; do [ -x "$place/bin/$found" ] && echo "$place/bin/$found" && break; done
  done
}
one() {
  version=$("$1" -c 'import platform; print(platform.python_version())' 2>/dev/null)
  whole=$("$1" -c 'import asyncio, tarfile, venv' >/dev/null 2>&1 && echo whole)
  say python "${version:-none} ${whole:-half} $1"
}
IFS='
'
for uv in "$(command -v uv 2>/dev/null)" "$HOME/.cargo/bin/uv" $(in_usual_places uv); do
  [ -n "$uv" ] && [ -x "$uv" ] && say uv "$uv" && break
done
looking_at "the Pythons of the PATH"
known=:
for python in python3.14 python3.13 python3.12 python3.11 python3 python; do
  at=$(command -v $python 2>/dev/null) || continue
  known="$known$at:"
  one "$at"
done
looking_at "the Pythons of the usual places"
for at in $(in_usual_places python3.14 python3.13 python3.12 python3.11 python3); do
  case $known in *":$at:"*) ;; *) one "$at";; esac
done
looking_at "where Ray may be"
for ray in @RAYS@ "$(command -v ray 2>/dev/null)" "$PREFIX-ray/bin/ray" $(in_usual_places ray); do
  [ -n "$ray" ] && [ -x "$ray" ] && say ray "$ray"
done
exit 0
"""


def script(prefix: str | None, rays: Sequence[str]) -> str:
    """What the machine's shell is to run. `rays`: where Ray may be, the likeliest first."""
    text = _SCRIPT.replace("@PREFIX@", shlex.quote(prefix or "")).replace("@MARKER@", MARKER)
    text = text.replace("@INDEX@", _usual_index())
    return text.replace("@RAYS@", " ".join(map(shlex.quote, rays)))


def last_look(output: str) -> str:
    """At what the script was when it had printed this; empty: it had not begun."""
    at = [line.removeprefix("at ") for line in output.splitlines() if line.startswith("at ")]
    return at[-1] if at else ""


def _usual_index() -> str:
    """Where pip looks unless it is told otherwise, as the pip of this environment has it; empty:
    there is none, or it does not say."""
    try:
        where = str(import_module("pip._internal.models.index").PyPI.simple_url)
    except (ImportError, AttributeError):
        return ""
    return where if re.fullmatch(r"https://[\w./-]+", where) else ""


@dataclass(frozen=True, slots=True)
class Python:
    """An interpreter there."""

    path: str
    version: str
    """Full: `3.11.2`."""
    whole: bool = True
    """It has its standard library, and so makes environments; else only uv does with it."""

    @property
    def key(self) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen; text that the machine has said, and so nothing to trust."""

    system: str
    machine: str
    """As `uname -m` has it."""
    root: bool
    """It is root who logs in."""
    user: str
    home: str
    host: str
    """Its own name."""
    head_as: str
    """The address that our connection comes from, as seen there; empty: not told."""
    cpus: int
    gpus: int
    free: int
    """Bytes on the disk where rayfwd goes."""
    libc: str
    index: str
    """Whether it reaches its package index: `yes`, `no`, `unknown`."""
    prefix: str
    there: bool
    """Something is in the place of our directory."""
    made: dict[str, Any] | None = None
    """What the marker in our directory says; None: there is none."""
    made_ray: dict[str, Any] | None = None
    noexec: bool = False
    """Nothing can be run from the disk where rayfwd goes."""
    readonly: bool = False
    """That disk is mounted read-only."""
    shut: str = ""
    """The directory there in which this login may create nothing; empty: it may."""
    ahead: float = 0.0
    """Seconds by which its clock is ahead of ours."""
    busy: bool = False
    """Something is being installed in our directory."""
    broken: bool = False
    """What is in our directory does not run."""
    broken_ray: bool = False
    systemd: bool = False
    """A service can be made: the machine's for root, else the user's."""
    booted: bool = False
    """systemd runs there."""
    uv: str | None = None
    pythons: tuple[Python, ...] = ()
    rays: tuple[str, ...] = field(default=())
    same: str = ""
    """What is the same, until it boots, for whoever sees the same machine; empty: not told."""

    @property
    def python(self) -> Python | None:
        """One that runs rayfwd."""
        return next((p for p in self.pythons if p.key >= OLDEST_PYTHON), None)

    @property
    def is_musl(self) -> bool:
        """Its C library is not glibc, for which Ray is made."""
        return "musl" in self.libc.lower()

    @property
    def any_python(self) -> str | None:
        return next((p.path for p in self.pythons if p.version), None)

    def clock(self) -> str:
        """What is wrong with its clock; empty: nothing."""
        if abs(self.ahead) < CLOCK_SECONDS:
            return ""
        which = "ahead of" if self.ahead > 0 else "behind"
        return f"its clock is {timedelta(seconds=round(abs(self.ahead)))} {which} the head's"

    def lines(self) -> str:
        """In words."""
        python = self.python or next(iter(self.pythons), None)
        words = [
            self.system,
            f"{self.cpus} CPU{'s' * (self.cpus != 1)}",
            f"{self.gpus} GPU{'s' * (self.gpus != 1)}",
            f"Python {python.version}" if python else "no Python",
            f"{self.free / 1e9:.1f} GB free",
            _INDEX.get(self.index, ""),
            self._services(),
            self.clock(),
        ]
        return ", ".join(filter(None, words))

    def _services(self) -> str:
        if self.systemd:
            return "systemd"
        # A user who does not linger, or whose home is several machines'.
        return "systemd, but no services of this user" if self.booted else "no service manager"


def read(output: str, now: float | None = None) -> Sight:
    """Of what the script has printed. `now`: what our clock shows, in Unix seconds; None: its clock
    is not looked at. Raises ValueError where that is no machine's."""
    single: dict[str, str] = {}
    several: dict[str, list[str]] = {"systemd": [], "python": [], "ray": []}
    for line in output.splitlines():
        key, _, value = line.partition(" ")
        if key in several:
            several[key].append(value.strip())
        else:
            single.setdefault(key, value.strip())
    if single.get("kernel") != "Linux" or not single.get("prefix", "").startswith("/"):
        raise ValueError(f"it is {single.get('kernel') or 'no machine with a POSIX shell'}")
    root = single.get("uid") == "0"
    options = single.get("mount", "").split(",")
    theirs = _number(single.get("now"))
    pythons = [
        Python(path, version if version[:1].isdecimal() else "", whole == "whole")
        for version, _, rest in (value.partition(" ") for value in several["python"])
        for whole, _, path in [rest.partition(" ")]
    ]
    return Sight(
        system=single.get("system", ""),
        machine=single.get("machine", ""),
        root=root,
        user=single.get("user", ""),
        home=single.get("home", ""),
        host=single.get("host", ""),
        head_as=single.get("from", ""),
        cpus=_number(single.get("cpus")),
        gpus=_number(single.get("gpus")),
        free=_number(single.get("free")) * 1024,
        libc=single.get("libc", ""),
        index=single.get("index", "unknown"),
        prefix=single["prefix"],
        there="there" in single,
        made=_object(single.get("made")),
        made_ray=_object(single.get("made-ray")),
        noexec="noexec" in options,
        readonly="ro" in options,
        shut=single.get("shut", ""),
        ahead=theirs - now if theirs and now is not None else 0.0,
        busy="busy" in single,
        broken="broken" in single,
        broken_ray="broken-ray" in single,
        systemd=("system" if root else "user") in several["systemd"],
        booted=bool(several["systemd"]),
        uv=single.get("uv"),
        pythons=tuple(pythons),
        rays=tuple(dict.fromkeys(several["ray"])),
        same=single.get("same", ""),
    )


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _object(text: str | None) -> dict[str, Any] | None:
    try:
        data = json.loads(text or "")
    except ValueError:
        return None
    return data if isinstance(data, dict) else None
