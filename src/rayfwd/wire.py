"""Dataclasses as JSON objects and back, for what two of our own processes tell each other.

The keys are the fields' names, unless `key` says otherwise. A class with a `to_wire` and a
`from_wire` of its own is left to them.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from functools import cache
from typing import Any, TypeVar

from rayfwd import codes
from rayfwd.problems import Problem

_T = TypeVar("_T")


def key(name: str) -> Any:
    """A field whose key is a word that Python keeps for itself."""
    return field(metadata={"key": name})


def fields_to_wire(value: Any) -> dict[str, Any]:
    """A dataclass, field by field."""
    return {
        f.metadata.get("key", f.name): _to_wire(getattr(value, f.name))
        for f in dataclasses.fields(value)
    }


def _to_wire(value: Any) -> Any:
    if hasattr(value, "to_wire"):
        return value.to_wire()
    if dataclasses.is_dataclass(value):
        return fields_to_wire(value)
    if isinstance(value, tuple):
        return [_to_wire(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _to_wire(item) for name, item in value.items()}
    return value


def fields_from_wire(of: type[_T], value: Any, path: str) -> _T:
    """The inverse of `fields_to_wire`; keys that are not known are left out.

    `path` is what an error calls it. Raises ValueError, with the key that is not as it must be.
    """
    return typing.cast(_T, _fields(of, _checked(value, dict, path), path))


def _fields(of: Any, value: Mapping[str, Any], path: str) -> Any:
    found = {}
    for f in dataclasses.fields(of):
        name = f.metadata.get("key", f.name)
        if name in value:
            found[f.name] = _from_wire(_hints(of)[f.name], value[name], f"{path}.{name}")
        elif f.default is dataclasses.MISSING:
            raise ValueError(f"{path}.{name} is not there")
    return of(**found)


def _from_wire(wanted: Any, value: Any, path: str) -> Any:
    if wanted is Any:
        return value
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        rest = next(part for part in inner if part is not types.NoneType)
        return None if value is None else _from_wire(rest, value, path)
    if origin is tuple:
        items = enumerate(_checked(value, list, path))
        return tuple(_from_wire(inner[0], item, f"{path}[{index}]") for index, item in items)
    if origin is not None:  # Mapping[str, …]
        pairs = _checked(value, dict, path).items()
        return {name: _from_wire(inner[1], item, f"{path}.{name}") for name, item in pairs}
    if wanted is Problem:
        return _by_itself(codes.problem_from, value, path)
    if hasattr(wanted, "from_wire"):
        return _by_itself(wanted.from_wire, value, path)
    if dataclasses.is_dataclass(wanted):
        return _fields(wanted, _checked(value, dict, path), path)
    if wanted is float:
        return float(_number(value, path))
    return _number(value, path, int) if wanted is int else _checked(value, wanted, path)


@cache
def _hints(of: type) -> Mapping[str, Any]:
    return typing.get_type_hints(of)


def _by_itself(from_wire: Callable[[Any], _T], value: Any, path: str) -> _T:
    try:
        return from_wire(value)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise ValueError(f"{path}: {exc!r}") from exc


def _checked(value: Any, wanted: type[_T], path: str) -> _T:
    if not isinstance(value, wanted):
        raise ValueError(f"{path} is {type(value).__name__}, not {wanted.__name__}")
    return value


def _number(value: Any, path: str, wanted: Any = (int, float)) -> Any:
    if isinstance(value, bool) or not isinstance(value, wanted) or not abs(value) < 1e300:
        raise ValueError(f"{path} is no number of this kind")
    return value
