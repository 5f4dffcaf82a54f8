"""A session as bytes, for the process that comes after this one (pure).

What a snapshot holds is a tree of dicts, lists, numbers, text, true, false, null and bytes;
`Session.snapshot` and its parts make theirs, others may put more around it. As bytes it is::

    magic | u32 format | u64 length of the JSON | JSON | all bytes of the tree, one after another

A format is read by the versions that know it: a snapshot is seconds old, and what it holds are the
insides of one version. Where it cannot be read, streams are reset, as if there were none.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

Tree = dict[str, Any]

MAGIC: Final = b"rayfwd snapshot\n"
FORMAT: Final = 2
"""Raised whenever a key comes, goes, or changes its meaning, in any of the trees."""
OF_0_1_0: Final = 1
"""Read as well; `daemon.handover` knows what it calls otherwise."""

_HEAD: Final = struct.Struct(">IQ")
_BYTES: Final = "bytes"
"""The only key of an object that stands for bytes: where they begin, and how many they are."""


class SnapshotError(Exception):
    """These bytes are no snapshot that this version can read; the text says why."""


def dump(tree: Tree) -> list[bytes | memoryview]:
    """The snapshot, in chunks that belong one behind the other."""
    chunks: list[bytes | memoryview] = []
    position = 0

    def place(value: object) -> dict[str, list[int]]:
        nonlocal position
        if not isinstance(value, bytes | memoryview):
            raise TypeError(f"{type(value).__name__} in a snapshot")
        chunks.append(value)
        begin, position = position, position + len(value)
        return {_BYTES: [begin, len(value)]}

    text = json.dumps(tree, default=place).encode()
    return [MAGIC + _HEAD.pack(FORMAT, len(text)) + text, *chunks]


def load(data: bytes | memoryview) -> Tree:
    """The tree of a snapshot; its bytes are copies. Raises SnapshotError."""
    view = memoryview(data)
    start = len(MAGIC) + _HEAD.size
    if len(view) < start or bytes(view[: len(MAGIC)]) != MAGIC:
        raise SnapshotError("it does not begin as a snapshot does")
    number, length = _HEAD.unpack_from(view, len(MAGIC))
    if number not in {FORMAT, OF_0_1_0}:
        raise SnapshotError(f"it has format {number}, and this version reads format {FORMAT}")
    rest = view[start + length :]

    def put(value: dict[str, Any]) -> Any:
        if value.keys() != {_BYTES}:
            return value
        begin, size = value[_BYTES]
        if not 0 <= begin <= begin + size <= len(rest):
            raise ValueError("bytes beyond the end")
        return bytes(rest[begin : begin + size])

    try:
        tree = json.loads(bytes(view[start : start + length]), object_hook=put)
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise SnapshotError(f"it is damaged: {exc}") from exc
    if not isinstance(tree, dict):
        raise SnapshotError("it is damaged: no object")
    return tree
