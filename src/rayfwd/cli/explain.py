"""Explain a code of the log or of the status; without a code, list the codes."""

from __future__ import annotations

import argparse
import re
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from rayfwd import codes
from rayfwd.cli import OK
from rayfwd.cli.common import table

MOST_NEAREST = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("code", nargs="?", metavar="CODE", help="a code, for example ray_died")


def run(args: argparse.Namespace) -> int:
    if args.code is None:
        rows = [(name, code.severity) for name, code in sorted(codes.ALL.items()) if code.counted]
        print("\n".join(table(rows)))
    else:
        print(explanation(args.code))
    return OK


def document() -> str:
    """docs/conditions.md: a part of the package, or beside it in a checkout."""
    packaged = resources.files("rayfwd") / "conditions.md"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parents[3] / "docs" / "conditions.md").read_text(encoding="utf-8")


def sections(text: str) -> dict[str, str]:
    """The text below each code's heading."""
    parts = re.split(r"(?m)^### (\w+)\n|^## .*\n", text)[1:]
    return {code: body.strip() for code, body in zip(parts[::2], parts[1::2], strict=True) if code}


def explanation(code: str) -> str:
    """A code's section. Raises ProblemError (condition_unknown)."""
    known = sections(document())
    wanted = code.strip().lower().replace("-", "_")
    if wanted in known:
        return f"{wanted}\n\n{known[wanted].replace('**Do:**', 'Do:').replace('`', '')}"
    words = set(wanted.split("_"))
    near = get_close_matches(wanted, known, MOST_NEAREST, 0.6)
    near += sorted(
        (other for other in known if words & set(other.split("_")) and other not in near),
        key=lambda other: (-len(words & set(other.split("_"))), other),
    )
    raise codes.CONDITION_UNKNOWN.error(
        f'the code "{code}" does not exist',
        f"did you mean {', '.join(near[:MOST_NEAREST])}? Run `rayfwd explain` with that code"
        if near
        else "`rayfwd explain` without a code lists the codes of the status",
    )
