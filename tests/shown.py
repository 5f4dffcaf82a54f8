"""Output that a document shows, held to what the command prints.

`compare("README.md", "To add a machine", output)` in a test finds the block of the document with a
line that begins with these words, and fails unless the output has its lines, one after another.
Numbers and the other `EXAMPLES` may differ. A line `…` stands for any lines, and `…` in a line for
any text.
`tests/unit/test_shown.py` wants such a call for every block of output.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
CHECKOUT = TESTS.parent

_UNIT = r"(?:ns|us|ms|s|min|h|B|kB|MB|GB)\b"

EXAMPLES = {
    "resources": (
        r"CPU \d.*object store memory \d.* GB",
        r"CPU \d.*object store memory \d.*\s[kMG]?B",
    ),
    "login": (r"\b(?:ray|root)@[\w.-]*\w", r"\S+?"),
    "machine": (r"\bgpu-1\b|\b\w+\.example\.org\b", r"\S+"),
    "path": (r"(?<![/:\w.])/(?!/)[\w./-]*\w", r"/\S*"),
    "size": (rf"(?<![\w.'])\d[\d.,]* {_UNIT}", rf"\d[\d.,]*\s{_UNIT}"),
    "number": (r"(?<![\w.'])\d[\d.,:-]*\d|(?<![\w.'])\d", r"\d[\d.,:-]*?"),
    "kind": (r"pure Python|compiled", r"(?:pure Python|compiled)"),
    "key": (
        r"ssh-ed25519 AAAA….*",
        r"(?:ssh-ed25519 AAAA.+|\((?:the key that will be created|the same key)\))",
    ),
    "counts": (r"\d+ pass, .*skipped", r"\d+ pass, .*skipped"),
    "system": (r"Debian[^,]*", r"[^,]+"),
}
"""What is another one at every machine, and what it looks like there."""

_EXAMPLE = re.compile("|".join(f"(?P<{name}>{one})" for name, (one, _) in EXAMPLES.items()))


class Block(NamedTuple):
    page: str
    lines: tuple[str, ...]
    fenced: bool


def blocks(page: str) -> Iterator[Block]:
    """Every block of a page, without its indent."""
    text = (CHECKOUT / page).read_text()
    fences = re.compile(r"(?ms)^```\n(.*?)^```$")
    for found in fences.findall(text):
        yield Block(page, tuple(found.splitlines()), fenced=True)
    for found in re.findall(r"(?m)(?:^ {4,}\S.*\n(?:\n(?= {4,}\S))?)+", fences.sub("", text)):
        lines = found.strip("\n").splitlines()
        if re.match(r"\s*(?:[-*]|\d+\.) ", lines[0]):
            continue  # a list within a list
        indent = min(len(line) - len(line.lstrip()) for line in lines if line)
        yield Block(page, tuple(line[indent:] for line in lines), fenced=False)


def has(one: Block, first: str) -> bool:
    return any(line.startswith(first) for line in one.lines)


def block(page: str, first: str) -> Block:
    """The one with a line that begins so; of several, the longest."""
    found = [one for one in blocks(page) if has(one, first)]
    assert found, f"{page} has no block with a line that begins with {first!r}"
    return max(found, key=lambda one: len(one.lines))


def pattern(line: str) -> str:
    """What a line of output looks like that is the same but for the examples."""
    words, at = [], 0
    for found in _EXAMPLE.finditer(line):
        assert found.lastgroup is not None
        words += [_literal(line[at : found.start()]), EXAMPLES[found.lastgroup][1]]
        at = found.end()
    return "".join([*words, _literal(line[at:])])


def _literal(text: str) -> str:
    """Any space is any space; three dots are any text."""
    parts = re.split(r"(\s+|…)", text)
    return "".join(
        ".*" if part == "…" else r"\s+" if part.isspace() else re.escape(part) for part in parts
    )


def missing(shown: Block, output: str) -> str | None:
    """The first line of the block that the output does not have in its place; None: it has all."""
    rest = [line.strip() for line in output.splitlines() if line.strip()]
    anywhere = True
    for line in filter(None, map(str.strip, shown.lines)):
        if line == "…":
            anywhere = True
            continue
        wanted = re.compile(pattern(line))
        last = len(rest) if anywhere else 1
        at = next((i for i, one in enumerate(rest[:last]) if wanted.fullmatch(one)), None)
        if at is None:
            return line
        rest, anywhere = rest[at + 1 :], False
    return None


def compare(page: str, first: str, output: str) -> None:
    """Fail unless the output is as the page shows it."""
    line = missing(block(page, first), output)
    assert line is None, f"{page} shows this line, and it was not printed:\n{line}\n\n{output}"


@cache
def compared() -> frozenset[tuple[str, str]]:
    """Page and first words of every block that a test compares: read from their sources."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "shown.compare":
                page, first = (ast.literal_eval(arg) for arg in node.args[:2])
                found.add((page, first))
    return frozenset(found)
