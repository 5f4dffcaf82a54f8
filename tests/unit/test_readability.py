"""What rayfwd tells people: a remedy is something to do, what it names exists, a sentence is short.

Read from the sources, where each message is written; of a value that is put into one at run time
there is an X here.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from rayfwd.cli import VERBS, _parser, full_parser
from rayfwd.cli.explain import sections
from rayfwd.config import INNER, SECTIONS

CHECKOUT = Path(__file__).parents[2]
SOURCE = CHECKOUT / "src" / "rayfwd"

MOST_WORDS = 35
"""Of a sentence, or of a part of one that a semicolon or colon ends."""

MAKERS = {"problem", "error", "_impossible", "_refuse"}
"""Functions whose last two arguments are a cause and a remedy."""

_ACTIONS = (
    "add allow ask change check choose compare correct create delete do edit end export "
    "find get give install keep leave let log lower make move name open point press put "
    "raise read reinstall remove rename repair report restart restrict run say see send set "
    "start stop try upgrade use wait write"
)
ACTIONS = frozenset(_ACTIONS.split())
"""How a remedy, or a part of one, begins: with what is to be done."""

PLACE = r"(?:if|on|in|as|before|to|after) [^:,]+[:,] "
"""What may stand before that: where, or on which condition."""

NO_KEYS = {"ray.get", "ray.init"}
"""These look like keys."""

_THINGS = "directory|directories|options|ports|file|session|service|cluster"

BANNED = {
    r"\bsay the same again\b": "run the same command again",
    r"\bsay `": "run `",
    r"\banew\b": "again",
    r"\bmend\b": "correct",
    r"\btakes? (?:it|them|that) away\b": "removes",
    r"\bis none\b": "is not a …",
    r"\bto be had\b": "available",
    r"\bis so\b": "say what is",
    r"\bin vain\b": "say what failed",
    r"\bof its own accord\b": "by itself",
    r"\bwhose (?:it is|they are|that is)\b": "the owner",
    r"\b(?:this|that) is brief\b": "this takes a moment",
    r"\bsees? that\b": "check that",
    r"; else see\b": "; otherwise check",
    r"\b(?:hereby|thereof|whence|thither|lest|ere|albeit)\b": "modern words",
    r"\bsaid again\b": "repeated",
    r"\b(?:stood|from standing|it stands|link stands)\b": "is up",
    r"\bfaults? of rayfwd's\b": "a bug in rayfwd",
    rf"\b(?:{_THINGS}) of (?:its|their|your) own\b": "its own …",
    r"\bsomebody is in between\b": "a man in the middle",
    r"\blet in no more\b": "refused from then on",
}
"""Constructions that had to be read twice, each with what takes its place."""

ELSEWHERE = {r"\bis none\b", r"\bis so\b", r"\bsees? that\b"}
"""These are read at once in a page's longer sentences."""

READ_TWICE = [one for one in BANNED if one not in ELSEWHERE]

PAGES = ["README.md", "CHANGELOG.md", *sorted(f"docs/{p.name}" for p in CHECKOUT.glob("docs/*.md"))]

Message = tuple[str, str]
"""Where it is written, and what it says."""


def strings(node: ast.expr) -> list[str]:
    """What an expression may say; nothing where that is known at run time only."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            said = (str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
            return ["".join(said)]
        case ast.IfExp(body=one, orelse=other):
            return strings(one) + strings(other)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            pairs = itertools.product(strings(left) or ["X"], strings(right) or ["X"])
            return ["".join(pair) for pair in pairs]
        case _:
            return []


def written() -> Iterator[tuple[Message, Message]]:
    """Every cause and remedy that is written out, as (where, text) each."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and len(node.args) >= 2):
                continue
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else ""
            name = function.id if isinstance(function, ast.Name) else name
            if name in MAKERS:
                where = f"{path.relative_to(SOURCE)}:{node.lineno}"
                for cause, remedy in itertools.product(
                    strings(node.args[-2]) or [""], strings(node.args[-1]) or [""]
                ):
                    yield (where, cause), (where, remedy)


@cache
def messages() -> tuple[list[Message], list[Message]]:
    """The causes and the remedies."""
    causes, remedies = (
        sorted({one for one in of if one[1]}) for of in zip(*written(), strict=True)
    )
    return causes, remedies


def flags() -> Iterator[Message]:
    """What `--help` says of rayfwd, its verbs and their options."""
    parser, verbs = full_parser()
    for name, one in {"rayfwd": parser, **verbs}.items():
        yield f"{name} --help", str(one.description)
        for action in one._actions:
            if action.help and action.help != argparse.SUPPRESS:
                yield f"{name} {'/'.join(action.option_strings) or action.dest}", action.help
    for name, verb in VERBS.items():
        yield f"rayfwd {name}", verb.help
        yield from ((f"rayfwd {name}: {code}", said) for code, said in verb.exit_codes.items())


def comments() -> Iterator[Message]:
    """config.example.toml: what it says of each key."""
    text = (CHECKOUT / "config.example.toml").read_text()
    for number, line in enumerate(text.splitlines(), 1):
        yield f"config.example.toml:{number}", line.rpartition("  # ")[2] or line


def pages() -> Iterator[Message]:
    for code, text in sections((CHECKOUT / "docs" / "conditions.md").read_text()).items():
        yield f"conditions.md {code}", text
    text = (CHECKOUT / "docs" / "events.md").read_text()
    for name, said in re.findall(r"(?m)^\| `(\w+)` \|.*\| (.+) \|$", text):
        yield f"events.md {name}", said


def everything() -> list[Message]:
    return [*itertools.chain(*messages()), *flags(), *comments(), *pages()]


def keys() -> set[str]:
    """Every key of the configuration that belongs to a section, as `ray.auth`."""
    models: dict[str, type[BaseModel]] = {**SECTIONS, **INNER}
    return {f"{name}.{key}" for name, model in models.items() for key in model.model_fields}


KEYS = keys()


def is_an_action(remedy: str) -> bool:
    """Whether it says what is to be done, perhaps after where or when."""
    first = re.sub(rf"^(?:{PLACE})+", "", remedy)
    if re.match(r"`(?:rayfwd|systemctl|docker) ", first):
        return True
    if re.match(r"nothing(?: if| while| but|[:,;]|$)", first):
        return True
    begins = re.match(r"\w+", first)
    return begins is not None and (begins[0] in ACTIONS or first.startswith(("X", "did you mean")))


def hard_to_read(text: str) -> list[str]:
    """Sentences of a text that are too long, and constructions that are read twice."""
    plain = re.sub(r"`[^`]*`", "CODE", re.sub(r"\([^()]*\)", "", text))
    parts = re.split(r"[.;:?]\s|\n\n", plain)
    long = [part for part in parts if len(part.split()) > MOST_WORDS]
    found = ((p, re.search(p, text, re.IGNORECASE)) for p in BANNED)
    return long + [f'"{hit[0]}": better: {BANNED[p]}' for p, hit in found if hit]


def unknown(text: str) -> list[str]:
    """What a message names and there is not: keys, documents, commands of rayfwd's."""
    named = "|".join(map(re.escape, SECTIONS))
    wrong = [
        key
        for key in re.findall(rf"(?<![\w./-])((?:{named})\.[a-z_]+)\b(?![./(-])", text)
        if key not in KEYS | NO_KEYS
    ]
    wrong += [d for d in re.findall(r"docs/[a-z-]+\.md", text) if not (CHECKOUT / d).exists()]
    return wrong + [c for c in re.findall(r"`rayfwd ([^`]+)`", text) if not is_understood(c)]


def is_understood(command: str) -> bool:
    """Whether the command line takes it; a verb alone is only spoken of."""
    words = shlex.split(command.replace("…", "X"))
    if words[0].startswith("-"):
        return True
    if words[0] not in VERBS or len(words) == 1:
        return words[0] in VERBS
    try:
        _parser().parse_args(words)
    except SystemExit:
        return False
    return True


def test_they_are_found() -> None:
    assert [len(of) > 200 for of in messages()] == [True, True]
    assert len(everything()) > 900


def test_a_remedy_is_something_to_do() -> None:
    _, remedies = messages()
    assert [one for one in remedies if not is_an_action(one[1])] == []


def test_sentences_are_short_and_plain() -> None:
    found = ((where, hard_to_read(text)) for where, text in everything())
    assert [(where, hard) for where, hard in found if hard] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_construction_that_is_read_twice(page: str) -> None:
    text = re.sub(r"(?ms)^```.*?^```|^    .*?$|`[^`]*`", "", (CHECKOUT / page).read_text())
    plain = " ".join(text.split())
    hits = [(hit[0], BANNED[p]) for p in READ_TWICE for hit in re.finditer(p, plain, re.IGNORECASE)]
    assert hits == []


def test_an_option_says_what_it_does_and_not_what_a_value_does() -> None:
    """Its words are those of a key of the file, which is true or false."""
    assert [where for where, text in flags() if re.search(r"\b(?:true|false): ", text)] == []


def test_what_a_message_names_is_there() -> None:
    """Commands can be typed, keys are the configuration's, documents are in docs/."""
    found = ((where, unknown(text)) for where, text in itertools.chain(*messages()))
    assert [(where, names) for where, names in found if names] == []


def test_the_checks_see_what_they_are_for() -> None:
    assert not is_an_action("this is rayfwd's hub")
    assert not is_an_action("nothing answers there")
    assert is_an_action("on the head, start sshd")
    assert hard_to_read("mend it and say the same again")
    assert hard_to_read("word " * (MOST_WORDS + 1))
    assert hard_to_read("a short one. And a second one.") == []
    assert unknown(
        "set ray.tokens, see docs/none.md, run `rayfwd starts` or `rayfwd plan --all`"
    ) == [
        "ray.tokens",
        "docs/none.md",
        "starts",
        "plan --all",
    ]
    assert unknown('set ray.auth = "token", then `rayfwd check`') == []
