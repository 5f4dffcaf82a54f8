"""Makes wheels of what is installed here, for a machine that reaches no package index.

An installed distribution has in its metadata which files are its own: they are put back into an
archive under the name that says which Pythons they are for. So pip and uv install them elsewhere,
and refuse what does not fit there.

The standard library alone: the Python of a Ray that is to be copied runs this file as a script.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import stat
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath

_LEFT_OUT = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json"}
"""Of an installation's metadata: what is about this installation only."""
_WHEN = (2020, 1, 1, 0, 0, 0)
"""The time of every member: the same files make the same wheel."""


class WheelError(Exception):
    """What is installed here cannot be made a wheel; says which, and why."""


def name_of(text: str) -> str:
    """A distribution's name as all spellings of it compare."""
    return re.sub(r"[-_.]+", "-", text).lower()


def closure(roots: Iterable[str], extras: Iterable[str] = ()) -> list[metadata.Distribution]:
    """The distributions of these names and all that they need, as far as they are installed.

    `extras` are those of the roots. What a marker leaves out here is not installed, either, so
    markers are asked for extras only. Raises WheelError where a root is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    waiting = [(root, frozenset(extras)) for root in roots]
    first = {name_of(root) for root in roots}
    while waiting:
        name, wanted = waiting.pop()
        key = name_of(name)
        if key in found:
            continue
        try:
            found[key] = distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if key in first:
                raise WheelError(f"{name} is not installed for {sys.executable}") from None
            continue
        waiting += [(need, frozenset()) for need in _needs(distribution, wanted)]
    return list(found.values())


def _needs(distribution: metadata.Distribution, extras: frozenset[str]) -> Iterator[str]:
    for line in distribution.requires or ():
        requirement, _, marker = line.partition(";")
        of_extra = re.findall(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if of_extra and not extras & set(of_extra):
            continue
        found = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement.strip())
        if found is not None:
            yield found[0]


def make(distribution: metadata.Distribution, folder: Path) -> Path:
    """A wheel of it in `folder`. Raises WheelError."""
    name = distribution.metadata["Name"]
    files = {str(path): path.locate() for path in distribution.files or () if _is_its_own(path)}
    wheel = distribution.read_text("WHEEL")
    if wheel is None or not files:
        raise WheelError(f"{name} was not installed from a wheel")
    info = next((path.split("/")[0] for path in files if path.endswith("/METADATA")), None)
    if info is None:
        raise WheelError(f"{name} has no METADATA among its files")
    members, programs = {}, set()
    for path, place in files.items():
        try:
            members[path] = Path(str(place)).read_bytes()
        except OSError as exc:
            raise WheelError(f"{name}: {place}: {exc.strerror}") from None
        if os.access(str(place), os.X_OK):
            programs.add(path)
    return write(folder, name, distribution.version, info, _tag(wheel), members, programs)


def _is_its_own(path: metadata.PackagePath) -> bool:
    """Below site-packages; scripts are made anew where it is installed."""
    inside = ".." not in path.parts and not path.is_absolute() and "__pycache__" not in path.parts
    about = path.parent.name.endswith(".dist-info") and path.name in _LEFT_OUT
    return inside and not about and path.suffix != ".pyc"


def _tag(wheel: str) -> str:
    """The Pythons, ABIs and platforms as a file's name has them."""
    tags = re.findall(r"(?m)^Tag:\s*(\S+?)-(\S+?)-(\S+?)\s*$", wheel)
    if not tags:
        raise WheelError("its metadata does not say which Pythons it supports")
    return "-".join(".".join(dict.fromkeys(part)) for part in zip(*tags))  # noqa: B905  # Python 3.9


def write(
    folder: Path,
    name: str,
    version: str,
    info: str,
    tag: str,
    members: dict[str, bytes],
    programs: Collection[str] = (),
) -> Path:
    """The archive, with a RECORD of its own. `programs`: those of the members that are run, as
    Ray's raylet is."""
    record = f"{info}/RECORD"
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    for path, data in sorted(members.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        writer.writerow([path, f"sha256={digest}", len(data)])
    writer.writerow([record, "", ""])
    plain = re.sub(r"[-_.]+", "_", name)
    target = folder / f"{plain}-{version}-{tag}.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path, data in [*sorted(members.items()), (record, rows.getvalue().encode())]:
            entry = zipfile.ZipInfo(path, _WHEN)
            entry.external_attr = (stat.S_IFREG | (0o755 if path in programs else 0o644)) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return target


def of_installer(folder: Path) -> Path | None:
    """A wheel of pip, which runs as it is; None: there is none here."""
    try:
        return make(metadata.distribution("pip"), folder)
    except (metadata.PackageNotFoundError, WheelError):
        pass
    import ensurepip  # noqa: PLC0415  # where the system has it apart, it may be missing

    bundled = [Path(ensurepip.__file__).with_name("_bundled"), Path("/usr/share/python-wheels")]
    for place in bundled:
        for path in sorted(place.glob("pip-*.whl")):
            target = folder / path.name
            target.write_bytes(path.read_bytes())
            return target
    return None


def members_below(folder: Path, prefix: str, leave_out: Iterable[str] = ()) -> dict[str, bytes]:
    """The files below `folder`, as members of an archive below `prefix`; none that is compiled."""
    skip = {"__pycache__", *leave_out}
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and not skip & set(inside.parts) and path.suffix not in {".pyc", ".so"}:
            found[str(PurePosixPath(prefix, *inside.parts))] = path.read_bytes()
    return found


def main(folder: str, *roots: str) -> int:
    """As a script: wheels of these and of what they need, `NAME[EXTRA]` each; their names."""
    made = []
    for root in roots:
        name, _, extra = root.partition("[")
        try:
            for distribution in closure([name], [e for e in extra.rstrip("]").split(",") if e]):
                made.append(make(distribution, Path(folder)).name)
        except WheelError as exc:
            print(exc, file=sys.stderr)
            return 1
    print(json.dumps(sorted(set(made))))
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(*sys.argv[1:]))
