"""Explain a code of the log or of the status; without a code, list the codes."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from difflib import get_close_matches
from importlib import resources
from itertools import cycle
from pathlib import Path

from rayfwd import codes
from rayfwd.cli import OK
from rayfwd.cli.common import table

MOST_NEAREST = 4
WIDEST = 100
"""Columns of a line, also where the terminal has more."""


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


def readable(section: str) -> str:
    """A section for a terminal: no Markdown, lines that fit, a link as the name of its file."""
    text = re.sub(r"\[[^]]*\]\(([\w./-]+\.md)[^)]*\)", r"docs/\1", section)
    spans = text.split("`")
    text = "".join(
        one if inside else one.replace("*", "") for one, inside in zip(spans, cycle((False, True)))
    )
    width = min(shutil.get_terminal_size().columns - 1, WIDEST)
    paragraphs = (" ".join(one.split()) for one in text.split("\n\n"))
    return "\n\n".join(
        textwrap.fill(one, width, break_long_words=False, break_on_hyphens=False)
        for one in paragraphs
    )


def explanation(code: str) -> str:
    """A code's section. Raises ProblemError (condition_unknown)."""
    known = sections(document())
    wanted = code.strip().lower().replace("-", "_")
    if wanted in known:
        return f"{wanted}\n\n{readable(known[wanted])}"
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
