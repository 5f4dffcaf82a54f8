"""How whoever reads our messages sets a key: in the file, or by an option where there is no file.

`rayfwd head`, `join` and `connect` have none. What names a key in a message asks here how to say
it: `key` and `value` for one of this process, `theirs` for one of another node, which may have a
file or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NAMES = {"ray.command": "--ray", "log.level": "--log-level", "log.format": "--log-format"}
"""Options that are not named after their keys."""
OF_A_HEAD = {"ray.port", "ray.client_port", "ray.dashboard_port", "ray.status_interval"}
"""Keys that only a head has, beside those of [hub]."""
_WITH_OPTIONS = {"head", "hub", "ray"}
"""Sections whose keys have options of their own; those of the others come by --set."""


@dataclass(frozen=True, slots=True)
class _Means:
    options: Mapping[str, str]
    """By keys; what is not in it has none of its own."""
    has_set: bool
    """Any other key comes by --set; else only by a file."""
    role: str


class _This:
    """Of this process."""

    means: _Means | None = None
    """None: there is a file."""


def use_options(options: Mapping[str, str], role: str, has_set: bool = True) -> None:
    """From now on: this process was configured on the command line. `options`: by keys. `has_set`:
    any other key comes by --set; else only by a file."""
    _This.means = _Means(dict(options), has_set, role)


def use_file() -> None:
    """From now on: it has a file, as at the beginning."""
    _This.means = None


def option_name(key: str, negated: bool = False) -> str:
    """That of a key of `rayfwd head` or `join`."""
    return NAMES.get(key, "--" + "no-" * negated + key.rpartition(".")[2].replace("_", "-"))


def key(name: str) -> str:
    """A key of this node, in a sentence: `ray.command`, or `--ray`."""
    means = _This.means
    if means is None or _is_of_another_role(name, means.role):
        return name
    if (option := means.options.get(name)) is not None:
        return option
    return f"--set {name}=…" if means.has_set else f"{name} in a file (--config)"


def value(name: str, what: object) -> str:
    """That a key of this node has this value: `ray.auth = "token"`, or `--auth token`."""
    means = _This.means
    if means is None or _is_of_another_role(name, means.role):
        return f"{name} = {_in_a_file(what)}"
    option = means.options.get(name)
    if option is None:
        said = _in_a_file(what)
        if not means.has_set:
            return f"{name} = {said} in a file (--config)"
        return f"--set {name}={said.strip(chr(34))}"
    if isinstance(what, bool):
        return option if option.startswith("--no-") != what else f"no {option}"
    return f"{option} {what}"


def keys(*names: str) -> str:
    """Several, in a sentence."""
    *most, last = map(key, names)
    return f"{', '.join(most)} and {last}" if most else last


def either(*names: str) -> str:
    """Those of several that a node of this role has, of which any will do."""
    role = None if _This.means is None else _This.means.role
    return " or ".join(key(n) for n in names if role is None or not _is_of_another_role(n, role))


def is_without_a_file(*roles: str) -> bool:
    """Whether this process has one of these roles, by the command line alone."""
    return _This.means is not None and _This.means.role in roles


def in_a_file() -> bool:
    """Whether this process was configured by one."""
    return _This.means is None


def how_to_start() -> str:
    """What has the daemon of this configuration run, in a sentence."""
    if _This.means is None:
        by_hand = "(`systemctl start rayfwd`, or `rayfwd run` by hand)"
        return f"start it {by_hand}, or name its file with --config"
    return f"run `rayfwd {'head' if _This.means.role == 'head' else 'join'}` again"


def theirs(name: str) -> str:
    """A key of another node, in a sentence: which means that one has is not known here."""
    section, _, last = name.rpartition(".")
    of_head = section == "hub" or name in OF_A_HEAD
    command = "rayfwd head" if of_head else "rayfwd join"
    if section in _WITH_OPTIONS:
        return f"{name} (`{command} {option_name(name)}`)"
    if not section:
        return f"{name} (`{command} --{last.replace('_', '-')}`)"
    return f"{name} (`{command} --set {name}=…`)"


def _is_of_another_role(name: str, role: str) -> bool:
    if role == "head":
        return name.startswith(("head.", "client.")) or name == "ray.advertise"
    return name.startswith("hub.") or name in OF_A_HEAD


def _in_a_file(what: object) -> str:
    if isinstance(what, bool):
        return str(what).lower()
    return f'"{what}"' if isinstance(what, str) else str(what)
