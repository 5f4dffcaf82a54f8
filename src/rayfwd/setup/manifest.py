"""What `rayfwd init` has made on this machine, kept on disk so that exactly that can be undone."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.system.files import write_new

SCHEMA = 1

Entry = dict[str, Any]


class Manifest:
    """The entries in the order in which things were made, each on disk as soon as it is true."""

    def __init__(self, path: Path) -> None:
        """Read the file; none is an empty one. Raises ProblemError for one that is not ours."""
        self.path = path
        self.entries: list[Entry] = []
        try:
            found = path.lstat()
        except FileNotFoundError:
            return
        wrong = None
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            wrong = "other users can write to it"
        else:
            try:
                data = json.loads(path.read_bytes())
                if data["schema"] != SCHEMA:
                    raise ValueError(f"schema {data['schema']}")
                self.entries = [dict(entry) for entry in data["made"]]
                [entry["id"] for entry in self.entries]
            except (ValueError, TypeError, KeyError) as exc:
                wrong = f"it cannot be read: {exc!r}"
        if wrong is not None:
            raise codes.MANIFEST_UNUSABLE.error(
                f"{path} records what `rayfwd init` has created here, but {wrong}",
                "read it, then delete it; remove by hand what it lists",
            )

    def of(self, name: str) -> Entry | None:
        """The entry with that id; None: it was not made by us."""
        return next((entry for entry in self.entries if entry["id"] == name), None)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Remember; what had the same id is replaced where it stands."""
        new = dict(entry)
        for index, old in enumerate(self.entries):
            if old["id"] == new["id"]:
                self.entries[index] = new
                break
        else:
            self.entries.append(new)
        self.save()

    def drop(self, name: str) -> None:
        """Forget; the file goes with its last entry."""
        self.entries = [entry for entry in self.entries if entry["id"] != name]
        self.save()

    def save(self) -> None:
        """To disk; without entries there is no file."""
        if not self.entries:
            self.path.unlink(missing_ok=True)
            return
        text = json.dumps({"schema": SCHEMA, "made": self.entries}, indent=1) + "\n"
        if self.path.parent.is_dir():  # else it is a step on the way there that is remembered
            write_new(self.path, text.encode(), 0o600, replace=True)
