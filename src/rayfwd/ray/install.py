"""Finds the `ray` command and the Python behind it, and asks that Python for the versions.

Starting `ray --version` costs more than a second; the metadata of the installed package, read by
the interpreter that the script names, costs a tenth.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rayfwd import codes
from rayfwd.problems import ProblemError
from rayfwd.system import children, setting
from rayfwd.system.asuser import check_roots

OLDEST = (2, 9)
"""First Ray whose flags this package knows (`--runtime-env-agent-port`)."""

TOO_NEW = (3,)

VERSION_TIMEOUT = 30.0
"""Seconds for the interpreter to answer; a cold network file system is slow."""

_ASK = r"""
import importlib.metadata, json, platform, re
ray = importlib.metadata.distribution("ray")
try:
    flags = re.findall(r'"(--[a-z][a-z-]+)"', ray.locate_file("ray/scripts/scripts.py").read_text())
except OSError:
    flags = []
print(json.dumps([ray.version, platform.python_version(), sorted(set(flags))]))
"""


@dataclass(frozen=True, slots=True)
class Versions:
    """Both must be the same on every node of a cluster; Ray refuses anything else."""

    ray: str
    python: str
    """Full: `3.11.7`."""


@dataclass(frozen=True, slots=True)
class RayInstall:
    """A usable Ray."""

    command: str
    """Absolute path of the `ray` script."""
    python: str
    """Absolute path of its interpreter."""
    versions: Versions
    flags: frozenset[str] = frozenset()
    """Command-line flags that its sources name; empty where they cannot be read."""


async def find(command: str, env: Mapping[str, str]) -> RayInstall:
    """The Ray that `command` (a name on PATH of `env`, or a path) stands for.

    Raises ProblemError: ray_not_found, ray_not_usable, ray_version_unsupported.
    """
    path = await asyncio.to_thread(_resolve, command, env)
    python = await asyncio.to_thread(_interpreter, path, env)
    versions, flags = await _ask(path, python, env)
    check_supported(versions, path)
    return RayInstall(path, python, versions, flags)


def version_key(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison: `2.41.0rc1` is (2, 41, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def check_supported(versions: Versions, path: str) -> None:
    """Raises ProblemError (ray_version_unsupported) for a Ray whose flags are not known."""
    if not OLDEST <= version_key(versions.ray) < TOO_NEW:
        raise codes.RAY_VERSION_UNSUPPORTED.error(
            f"{path} is Ray {versions.ray}",
            f"install Ray 2.9 or newer (but older than 3), or set {_command()} to such a Ray",
        )


def _resolve(command: str, env: Mapping[str, str]) -> str:
    if command.startswith("~"):
        home = env.get("HOME")
        rest = command.removeprefix("~/")
        command = (
            str(Path(home) / rest) if home and rest != command else os.path.expanduser(command)
        )
    if "/" in command:
        path = Path(command).absolute()
        if not path.is_file():
            raise _not_found(f"{setting.value('ray.command', str(path))}: no such file")
        if not os.access(path, os.X_OK):
            raise _not_found(
                f"{setting.value('ray.command', str(path))}: this user may not execute the file"
            )
        return str(path)
    search = env.get("PATH") or os.defpath
    found = shutil.which(command, path=search)
    if found is None:
        raise _not_found(f"{setting.value('ray.command', command)}: not found on PATH ({search})")
    return str(Path(found).absolute())


def _command() -> str:
    return setting.key("ray.command")


def _not_found(cause: str) -> ProblemError:
    return codes.RAY_NOT_FOUND.error(
        cause,
        f"install Ray (pip install 'ray[default]'), or set {_command()} to the path of its `ray` "
        "script",
    )


def _not_usable(cause: str) -> ProblemError:
    return codes.RAY_NOT_USABLE.error(
        cause,
        f"reinstall Ray in its environment, or set {_command()} to another `ray` script",
    )


def _interpreter(path: str, env: Mapping[str, str]) -> str:
    try:
        with open(path, "rb") as script:
            head = script.read(4096)
    except OSError as exc:
        raise _not_usable(f"{path}: cannot be read: {exc.strerror}") from None
    words = script_interpreter(head.decode("utf-8", "replace"))
    if not words:
        raise _not_usable(f"{path} is not a Python script: its first line names no interpreter")
    found = shutil.which(words, path=env.get("PATH") or os.defpath)
    if found is None:
        raise _not_usable(
            f"{path}: its interpreter {words} is missing, or this user may not execute it"
        )
    return str(
        Path(found).absolute()
    )  # not resolved: a venv's python is a link, and means the venv


def script_interpreter(text: str) -> str | None:
    """The interpreter that a script's first lines name (a path, or a name on PATH), or None.

    Besides `#!/path/python` there are `#!/usr/bin/env python` and, where the path is longer than
    the kernel takes or holds a space, a shell script that Python reads as a string:
    `#!/bin/sh`, then `'''exec' "/long/path/python" "$0" "$@"` (distlib, which pip and uv use).
    """
    lines = text.splitlines()
    if not lines or not lines[0].startswith("#!"):
        return None
    try:
        words = shlex.split(lines[0][2:])
    except ValueError:
        return None
    if not words:
        return None
    if Path(words[0]).name == "env":
        rest = [w for w in words[1:] if not w.startswith("-") and "=" not in w]
        return rest[0] if rest else None
    if Path(words[0]).name in ("sh", "bash", "dash"):
        for line in lines[1:6]:
            match = re.match(r"""\s*'''+\s*exec'\s+(.*)""", line)
            if match:
                try:
                    return shlex.split(match[1])[0]
                except (ValueError, IndexError):
                    return None
        return None
    return words[0] if "python" in Path(words[0]).name or "pypy" in words[0] else None


async def _ask(path: str, python: str, env: Mapping[str, str]) -> tuple[Versions, frozenset[str]]:
    try:
        for part in (path, python):
            check_roots(Path(part))
        ran = await children.run(
            *(python, "-c", _ASK),
            seconds=VERSION_TIMEOUT,
            env=env,
            start_new_session=True,  # it gets no terminal of ours
        )
    except TimeoutError:
        raise _not_usable(
            f"{path}: its interpreter {python} did not answer in {VERSION_TIMEOUT:.0f} s"
        ) from None
    except OSError as exc:
        raise _not_usable(f"{path}: its interpreter {python} does not start: {exc}") from None
    if ran.code != 0:
        last = ran.last_line or "no output"
        raise _not_usable(f"{path}: {python} does not find the package ray: {last}")
    try:
        ray, version, flags = json.loads(ran.out)
    except ValueError:
        raise _not_usable(f"{path}: {python} answered {ran.out[:200]!r}") from None
    return Versions(str(ray), str(version)), frozenset(map(str, flags))
