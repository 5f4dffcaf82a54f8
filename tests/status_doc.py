"""docs/status.md as data, and a status held against it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOC = Path(__file__).parents[1] / "docs" / "status.md"

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "list": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class Key:
    """A row of the tables."""

    def __init__(self, path: str, kind: str) -> None:
        self.path = path
        words, _, rest = kind.partition(", ")
        self.optional = rest == "may be absent"
        assert not rest or self.optional, kind
        self.types = [word.strip() for word in words.split(" or ")]
        unknown = set(self.types) - set(_TYPES)
        assert not unknown, f"{path}: {unknown} is no type of the tables"

    def takes(self, value: Any) -> bool:
        return any(
            isinstance(value, _TYPES[t]) and (t == "boolean" or not isinstance(value, bool))
            for t in self.types
        )


def documented() -> dict[str, Key]:
    """Every row, by path."""
    rows = re.findall(r"(?m)^\| `([^`]+)` \| ([^|]+) \|", DOC.read_text())
    keys = {path: Key(path, kind.strip()) for path, kind in rows}
    assert len(keys) == len(rows), "a key is documented twice"
    return keys


def mistakes(status: Any, keys: Mapping[str, Key]) -> tuple[list[str], set[str]]:
    """What of a status the tables do not have so, and the paths that were seen in it."""
    wrong: list[str] = []
    seen: set[str] = set()

    def look(path: str, value: Any) -> None:
        if path:
            key = keys.get(path)
            if key is None:
                wrong.append(f"{path}: not documented")
                return
            seen.add(path)
            if not key.takes(value):
                wrong.append(f"{path}: {value!r} is not {' or '.join(key.types)}")
        if isinstance(value, dict):
            below = list(_below(path, keys))
            open_key = next((k for k in below if k.endswith(">")), None)
            for name, part in value.items():
                look(open_key or (f"{path}.{name}" if path else name), part)
            needed = [k for k in below if k != open_key and not keys[k].optional]
            wrong.extend(f"{k}: absent" for k in needed if k.rpartition(".")[2] not in value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    below_item(f"{path}[]", item)
                else:
                    look(f"{path}[]", item)

    def below_item(path: str, item: dict[str, Any]) -> None:
        names = {k.rpartition(".")[2]: k for k in _below(path, keys)}
        wrong.extend(f"{path}.{n}: not documented" for n in item if n not in names)
        for name, key in names.items():
            if name in item:
                look(key, item[name])
            elif not keys[key].optional:
                wrong.append(f"{key}: absent")

    look("", status)
    return wrong, seen


def _below(path: str, keys: Mapping[str, Key]) -> Iterator[str]:
    """The keys one level below `path`."""
    for key in keys:
        above, _, name = key.rpartition(".")
        if above == path and not name.endswith("[]"):
            yield key
