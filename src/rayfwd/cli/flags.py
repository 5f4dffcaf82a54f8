"""The keys of the configuration as options of the command line, for a daemon without a file.

A key of [head], [hub] or [ray], or one before any section, is an option by its own name; any other
is set by `--set section.key=value`. The words of the help are those below the key in config.py.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from rayfwd.cli import MistakeError
from rayfwd.config import INNER, SECTIONS, Config
from rayfwd.system import setting

_SHORT = {"head.identity": "-i", "head.ssh_config": "-F"}
"""As `ssh` has them."""
DIRECT = "direct"
_LISTS = ("forward", DIRECT)
"""Sections that a file may have several of."""
_SHOWN = {
    "NAME": ("name",),
    "DIRECTORY": ("state_dir", "runtime_dir"),
    "SECONDS": ("ride_through", "stop_timeout", "ray.status_interval", "hub.forget_after"),
    "BYTES": ("ray.object_store_memory",),
    "PORT": ("expose", "ray.port", "ray.dashboard_port", "ray.client_port", "hub.port_base"),
    "PATH": ("head.socket", "hub.socket", "head.meet_socket", "ray.command"),
    "USER@HOST": ("head.meet", *INNER),
    "NODE=USER@HOST": (DIRECT,),
    "COMMAND": ("head.attach_command",),
    "ARGUMENT": ("ray.extra_args",),
    "ADDRESS": ("ray.advertise",),
    "NETWORK": ("hub.network",),
    "USER": ("hub.users",),
}
"""What the help has for a value of these keys."""
_SHOWN_FOR = {
    "path": "FILE",
    "object": "KEY=VALUE",
    "integer": "NUMBER",
    "number": "NUMBER",
}
"""The same, by a key's kind."""


def said_of(cls: type) -> dict[str, str]:
    """The text below each of a class's keys."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[node.target.id] = " ".join(str(below.value.value).split())
    return found


@dataclass(frozen=True, slots=True)
class Flag:
    """An option that stands for a key."""

    key: str
    """Dotted, as the file has it."""
    option: str
    kind: str
    """As JSON's schema names it."""
    choices: tuple[str, ...]
    help: str
    default: Any

    @property
    def dest(self) -> str:
        """Where argparse puts it."""
        return f"given:{self.key}"

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        names = [*filter(None, [_SHORT.get(self.key)]), self.option]
        common: dict[str, Any] = {"dest": self.dest, "help": self.help.replace("%", "%%")}
        if self.kind == "boolean":
            parser.add_argument(*names, action="store_const", const=not self.default, **common)
        elif self.kind in {"array", "object"}:
            parser.add_argument(*names, action="append", metavar=self._shown, **common)
        else:
            metavar = None if self.choices else self._shown
            parser.add_argument(*names, choices=self.choices or None, metavar=metavar, **common)

    @property
    def _shown(self) -> str:
        """What the help has for its value."""
        named = (word for word, keys in _SHOWN.items() if self.key in keys)
        return next(named, _SHOWN_FOR.get(self.kind, "VALUE"))

    def value(self, given: Any) -> Any:
        """As the file would have it. What is none of its kind stays text, for the configuration
        to refuse."""
        if self.kind == "object":
            return _table(self, given)
        if self.key == DIRECT:
            return [_direct(self, text) for text in given]
        if self.key in INNER:
            return [_section(self, text) for text in given]
        if self.kind == "array":
            return [_plain(text) for text in given]
        if self.kind in {"integer", "number"}:
            return _plain(given)
        return given


def flags_of(section: str | None, leave_out: Iterable[str] = ()) -> Iterator[Flag]:
    """Of a section, or of the keys before any."""
    cls: type[BaseModel] = Config if section is None else SECTIONS[section]
    words, schema = said_of(cls), cls.model_json_schema()
    for name, field in cls.model_fields.items():
        if name in leave_out or (section is None and name in SECTIONS):
            continue
        key = name if section is None else f"{section}.{name}"
        inner = _shape(schema["properties"][name])
        kind = "path" if inner.get("format") == "path" else inner["type"]
        off = kind == "boolean" and field.default is True
        yield Flag(
            key=key,
            option=setting.option_name(key, negated=off),
            kind=kind,
            choices=tuple(inner.get("enum", ())),
            # An option has no value to be told.
            help=re.sub(r"\b(?:true|false): ", "", words[name])
            if kind == "boolean"
            else words[name],
            default=field.default,
        )


def direct_flag() -> Flag:
    """Of each [[direct]] of a worker."""
    return Flag(
        key=DIRECT,
        option="--direct",
        kind="array",
        choices=(),
        help="another worker that this one can log in to: its name, and how ssh reaches it. Their "
        "streams then go directly. Or a JSON object with the keys of [[direct]]",
        default=(),
    )


def _shape(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a key that may be left out: what it is where it is not."""
    for part in schema.get("anyOf", ()):
        if part.get("type") != "null":
            return _shape(part)
    return schema


def add_set(parser: argparse.ArgumentParser) -> None:
    """The option for all other keys."""
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set any other key, with a value as in the file: --set canary.enabled=true",
    )


def given_by(args: argparse.Namespace, flags: Iterable[Flag]) -> dict[str, Any]:
    """What the options say, in the terms of the file. Raises MistakeError."""
    data: dict[str, Any] = {}
    for flag in flags:
        if (given := getattr(args, flag.dest)) is not None:
            put(data, flag.key, flag.value(given))
    for text in args.set:
        key, equals, value = text.partition("=")
        if not (equals and re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", key)):
            raise MistakeError([f"--set {text}: must be KEY=VALUE, as in canary.enabled=true"])
        if key in SECTIONS and key not in _LISTS:
            raise MistakeError([f"--set {text}: {key} is a section; name a key of it"])
        put(data, key, _toml(value))
    return data


def duration(text: str) -> float:
    """Seconds, from `90`, `90s`, `45m`, `2h` or `1d`; for argparse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text, re.ASCII)
    seconds = 0.0
    if found is not None:
        seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a time, as in 90, 45m, 2h or 1d")
    return seconds


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. Raises MistakeError."""
    *above, last = key.split(".")
    for part in above:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise MistakeError([f"{key}: {part} is set to a value already"])
    data[last] = value


def as_option(problem: str, flags: Iterable[Flag]) -> str:
    """A mistake of the configuration with the option that it came by instead of the key."""
    for flag in flags:
        found = re.match(rf"{re.escape(flag.key)}(?=[ :\[.=])", problem)
        if found is not None:
            return flag.option + problem[found.end() :]
    return problem


def _plain(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _section(flag: Flag, text: str) -> dict[str, Any]:
    """Of a machine alone, or of a JSON object with the section's keys."""
    return _json_object(flag, text) if text.startswith("{") else {"ssh": text}


def _direct(flag: Flag, text: str) -> dict[str, Any]:
    """Of a name and a machine, or of a JSON object with the section's keys."""
    if text.startswith("{"):
        return _json_object(flag, text)
    node, equals, ssh = text.partition("=")
    if not (node and equals and ssh):
        raise MistakeError([f"{flag.option} {text}: must be NODE=USER@HOST, or a JSON object"])
    return {"node": node, "ssh": ssh}


def _json_object(flag: Flag, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise MistakeError([f"{flag.option} {text}: must be a JSON object"]) from None


def _table(flag: Flag, given: Iterable[str]) -> dict[str, Any]:
    """Of `name=value` each, or of a JSON object as `ray start` takes it."""
    table: dict[str, Any] = {}
    text_only = flag.key in {"ray.labels", "ray.env"}
    for text in given:
        if text.startswith("{"):
            table |= _json_object(flag, text)
            continue
        name, equals, value = text.partition("=")
        if not (equals and name):
            raise MistakeError([f"{flag.option} {text}: must be NAME=VALUE"])
        table[name] = value if text_only else _plain(value)
    return table
