"""Goes through a plan, or back through a manifest, and says what comes of each step."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayfwd import codes
from rayfwd.doctor.unit_checks import SERVICE
from rayfwd.setup.manifest import Entry, Manifest
from rayfwd.setup.request import Layout
from rayfwd.setup.steps import Step, Verdict, command, remove_tree, undo
from rayfwd.system.paths import CLUSTERS, MACHINES

Report = Callable[[str, str], None]
"""Takes what came of a step, and the thing."""

_WORDS = {
    Verdict.THERE: ("exists", "exists"),
    Verdict.NEEDED: ("created", "to create"),
    Verdict.OUTDATED: ("renewed", "to renew"),
    Verdict.KEPT: ("kept", "kept"),
}


@dataclass(frozen=True, slots=True)
class Applied:
    """Of a whole plan."""

    changed: tuple[str, ...]
    """Things made or renewed, or that would be."""
    kept: tuple[str, ...]
    """Things of other content that were left alone."""


def apply(
    steps: Sequence[Step], manifest: Manifest, layout: Layout, dry: bool, report: Report
) -> Applied:
    """Make what is not there. `dry` changes nothing. Raises ProblemError; what is done stays."""
    changed: list[str] = []
    kept: list[str] = []
    for step in steps:
        verdict = step.inspect(manifest)
        if verdict in {Verdict.NEEDED, Verdict.OUTDATED}:
            changed.append(step.id)
            if not dry:
                try:
                    manifest.add(step.do())
                except OSError as exc:
                    cause = f"{step.id}: {exc.strerror or exc}"
                    raise codes.SETUP_FAILED.error(
                        cause, "correct this, then run the same command again"
                    ) from None
        elif verdict is Verdict.KEPT:
            kept.append(step.id)
        report(_WORDS[verdict][dry], step.id)
    if any(name.startswith(f"{layout.units}/") for name in changed) and manager_runs(layout):
        if not dry:
            command([*manager(layout), "daemon-reload"])
        report("to do" if dry else "done", " ".join([*manager(layout), "daemon-reload"]))
    return Applied(tuple(changed), tuple(kept))


def take_away(
    manifest: Manifest, layout: Layout, dry: bool, purge: bool, report: Report
) -> tuple[str, ...]:
    """Undo what the manifest has, last first; what was kept. Raises ProblemError."""
    _end_service(manifest, layout, dry, report)
    kept: list[str] = []
    directories: list[Entry] = []
    units_changed = False
    for entry in reversed(list(manifest.entries)):
        if entry["kind"] == "directory":
            directories.append(entry)
            continue
        came = _undo(entry, purge, dry)
        units_changed |= str(entry.get("path", "")).startswith(f"{layout.units}/")
        report(came, entry["id"])
        if came.startswith("kept"):
            kept.append(entry["id"])
        elif not dry:
            manifest.drop(entry["id"])
    if purge:
        others = list(_of_other_clusters(layout))
        if not dry:
            _remove_state(layout, others)
        report("to remove" if dry else "removed", f"{layout.state} (state)")
        for place in others:
            report("kept", f"{place} (of other clusters)")
    # The manifest may lie in one of the directories.
    if not dry and not kept:
        manifest.path.unlink(missing_ok=True)
    # What another machine with the same home has handed over may stand anywhere.
    for entry in sorted(directories, key=lambda e: -len(Path(e["path"]).parts)):
        came = _undo(entry, purge, dry)
        report(came, entry["id"])
        if not dry and (not kept or not came.startswith("kept")):
            manifest.entries.remove(entry)
    if not dry and kept:
        manifest.save()
    if units_changed and not dry and manager_runs(layout):
        command([*manager(layout), "daemon-reload"])
    return tuple(kept)


def _remove_state(layout: Layout, kept: Sequence[Path]) -> None:
    """Raises ProblemError."""
    try:
        remove_tree(layout.state, kept)
    except (OSError, RecursionError) as exc:
        raise codes.UNINSTALL_FAILED.error(
            f"{layout.state} cannot be removed: {exc}", f"remove it by hand: rm -rf {layout.state}"
        ) from None


def _of_other_clusters(layout: Layout) -> Iterator[Path]:
    """What those that have a name here (`--cluster`) have below the state directory, and other
    machines with the same home."""
    for place in (
        layout.state / CLUSTERS,
        layout.state / "run" / CLUSTERS,
        layout.state / MACHINES,
    ):
        if place.is_dir() and any(place.iterdir()):
            yield place


def _undo(entry: Entry, purge: bool, dry: bool) -> str:
    try:
        came = undo(entry, purge, really=not dry)
    except OSError as exc:
        cause = f"{entry['id']}: {exc.strerror or exc}"
        raise codes.UNINSTALL_FAILED.error(
            cause, "correct this, then run the same command again"
        ) from None
    return "to remove" if dry and came == "removed" else came


def _end_service(manifest: Manifest, layout: Layout, dry: bool, report: Report) -> None:
    """Stop and disable: rayfwd ends its Ray in order."""
    made = [Path(e["path"]).name for e in manifest.entries if "path" in e]
    units = [name for name in made if name.endswith((".service", ".socket"))]
    if SERVICE not in units:
        return
    others = [name for name in units if name != SERVICE]
    runs = manager_runs(layout)
    words = [*manager(layout), "disable", *(["--now"] if runs else []), SERVICE]
    if not dry:
        if runs:
            command(words)
            if others:
                command([*manager(layout), "stop", *others])
        for link in layout.units.glob(f"*.wants/{SERVICE}"):
            link.unlink()  # where no manager runs; nothing else of ours is there
    report("to do" if dry else "done", " ".join(words))


def service_runs(layout: Layout, unit: str = SERVICE) -> bool:
    """Whether the service is up, or on its way."""
    if not manager_runs(layout):
        return False
    words = [*manager(layout), "show", "--property=ActiveState", "--value", unit]
    return command(words).strip() in {"active", "activating", "reloading"}


def manager(layout: Layout) -> list[str]:
    """How systemd is spoken to."""
    return ["systemctl"] if layout.system else ["systemctl", "--user"]


def manager_runs(layout: Layout) -> bool:
    """Whether there is a systemd to speak to: in a container, or after `su`, there may be none."""
    if layout.system:
        return Path("/run/systemd/system").is_dir()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime or not (Path(runtime) / "systemd").is_dir():
        return False
    try:
        asked = subprocess.run(
            [*manager(layout), "show-environment"], check=False, capture_output=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0
