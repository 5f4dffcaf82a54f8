"""Which commands a test says that it runs, and whether it does.

`@pytest.mark.runs("rayfwd init head --ray *", ...)` on a test names commands as the documents have
them, with `*` for a value. What is started by `subprocess` is written down here (a command in a
machine of the lab is the end of such a line), and `main` does so for rayfwd's own command line in
this process. A test that passes without having run what it names fails (`tests/conftest.py`);
`tests/unit/test_documents.py` wants such a name for every command of the documents.

A test that runs a command may say more than its name has: further options, before and between.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from rayfwd import cli

TESTS = Path(__file__).parent

_ran: list[list[str]] = []
"""Everything that was run in this process, in order."""


def note(argv: Sequence[str]) -> None:
    """Write down a command that somebody else starts for the tests."""
    _ran.append([str(word) for word in argv])


def main(argv: Sequence[str]) -> int:
    """rayfwd's command line, in this process."""
    note(["rayfwd", *argv])
    return cli.main(list(argv))


def _started(event: str, args: tuple[object, ...]) -> None:
    if event == "subprocess.Popen":
        words = args[1]
        if isinstance(words, (str, bytes)):
            note([os.fsdecode(words)])
        elif isinstance(words, Sequence):
            _ran.append([os.fsdecode(word) for word in words])


def listen() -> None:
    """Write down from now on what is started (`subprocess.Popen` is an event of sys.audit)."""
    sys.addaudithook(_started)


def position() -> int:
    """How much was run until now."""
    return len(_ran)


def since(start: int) -> list[list[str]]:
    """What was run since then."""
    return _ran[start:]


def simple(text: str) -> list[str]:
    """The single commands of a shell's line: what is between pipes, `&&`, `;` and the like."""
    return [found.strip() for found in _SIMPLE.findall(text)]


_SIMPLE = re.compile(r"""(?:'[^']*'|"[^"]*"|\\.|[^'"|;&\n\\]|(?<!&)&(?!&)|['"\\])+""")


def is_run(command: str, ran: Iterable[Sequence[str]]) -> bool:
    """Whether one of these is this command, perhaps with more options."""
    wanted = _words(command)
    return any(_in_order(wanted, line) for argv in ran for line in _lines(argv))


def matches(command: str, named: str) -> bool:
    """Whether a document's command is the one that a test names: word by word, `*` is any word."""
    words, patterns = _words(command), _words(named)
    return len(words) == len(patterns) and all(map(fnmatchcase, words, patterns))


def _words(command: str) -> list[str]:
    """As a shell takes them; a command with half a quotation, by its spaces."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _in_order(wanted: Sequence[str], words: Sequence[str]) -> bool:
    """The program, and after it the other words in their order."""
    program, *rest = wanted
    for start, word in enumerate(words):
        if word == program or word.endswith(f"/{program}"):
            left = iter(words[start + 1 :])
            if all(any(fnmatchcase(word, pattern) for word in left) for pattern in rest):
                return True
    return False


def _lines(argv: Sequence[str]) -> Iterator[list[str]]:
    """The words of a command, and of every line of a script among them."""
    yield list(argv)
    for word in argv:
        for line in [*simple(word), *re.split(r"\n|[|;]|&&", word)] if " " in word else ():
            try:
                yield shlex.split(line, comments=True)
            except ValueError:  # half a quotation: no command of a document is in it
                continue


@cache
def named() -> dict[str, list[str]]:
    """Every command that a test names, and the tests that do: read from their sources."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for command in _commands(node.decorator_list):
                    where = f"{path.relative_to(TESTS.parent)}::{node.name}"
                    found.setdefault(command, []).append(where)
    return found


def _commands(decorators: Iterable[ast.expr]) -> Iterator[str]:
    """Of the test as a whole, and of its single cases (`pytest.param`)."""
    for one in (part for decorator in decorators for part in ast.walk(decorator)):
        if isinstance(one, ast.Call) and ast.unparse(one.func) == "pytest.mark.runs":
            yield from (ast.literal_eval(arg) for arg in one.args)
