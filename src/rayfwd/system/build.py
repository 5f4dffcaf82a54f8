"""What this rayfwd is, and by which Python it runs: both decide how much it takes for a message."""

from __future__ import annotations

import importlib.util
import platform
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.resources import files
from typing import Any

_ONE_OF_THEM = "rayfwd.session.session"
"""All hot modules are compiled, or none: `tools/compiled.py`."""

COMPILED, PURE = "compiled", "pure Python"


@cache
def code() -> str:
    """Whether the modules that every message passes are `compiled` or `pure Python`."""
    spec = importlib.util.find_spec(_ONE_OF_THEM)
    origin = spec.origin if spec is not None else None
    return COMPILED if origin and origin.endswith(tuple(EXTENSION_SUFFIXES)) else PURE


@cache
def python() -> str:
    """Which Python this is: `3.11.7, built with optimizations`, or `without`.

    CPython's own build has none unless it is asked for them; a distribution's has.
    """
    name = platform.python_implementation()
    brand = "" if name == "CPython" else f"{name} "
    with_or_out = "with" if _optimized(sysconfig.get_config_vars()) else "without"
    return f"{brand}{platform.python_version()}, built {with_or_out} optimizations"


def _optimized(build: Mapping[str, Any]) -> bool:
    """By CPython's own record of its build: guided by a profile (PGO).

    Debian and Ubuntu build `profile-opt` without being configured for it, and then strike the
    compiler's flag for it out of the record, so that extensions are not built with it.
    """
    asked = "--enable-optimizations" in str(build.get("CONFIG_ARGS", ""))
    return asked or build.get("PGO_PROF_USE_FLAG") == ""


def why_not() -> str:
    """Why it was not compiled, where it was to be (`tools/compiled.py`); empty: it says nothing."""
    try:
        return (files("rayfwd") / "not_compiled").read_text().strip()
    except OSError:
        return ""


def lines() -> list[str]:
    """Both for people, with where this Python is."""
    why = why_not()
    more = f" ({why})" if why and code() == PURE else ""
    return [f"code: {code()}" + more, f"Python: {python()} ({sys.executable})"]
