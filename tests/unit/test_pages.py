"""Every page: its commands are understood, its configuration loads, what it names is there.

Which command of which page a test runs is held by test_documents.py. Here every page has its turn,
those too that only speak of commands.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rayfwd.cli import VERBS, _parser
from rayfwd.config import SECTIONS, Config, ConfigError, parse
from tests.commands import simple

CHECKOUT = Path(__file__).parents[2]
PAGES = sorted(
    ["README.md", *(path.relative_to(CHECKOUT).as_posix() for path in CHECKOUT.glob("docs/*.md"))]
)

FOLDERS = ("src/rayfwd", "tests", "tools", "docs", "examples", "bench", "share", "systemd", ".ci")

ELLIPSIS = ("…", "...")
"""A command that has one is an outline."""

BASES: dict[str, dict[str, Any]] = {
    "head": {"role": "head", "name": "head"},
    "worker": {"role": "worker", "name": "gpu-1", "head": {"ssh": "ray@head.example.org"}},
    "client": {"role": "client", "name": "laptop", "head": {"ssh": "ray@head.example.org"}},
}
"""Files to which a page's lines are added."""


def text_of(name: str) -> str:
    return (CHECKOUT / name).read_text()


def blocks(text: str) -> list[str]:
    """What is set apart: indented by four (by seven in a list), or fenced."""
    fenced = re.findall(r"(?ms)^```\w*\n(.*?)^```", text)
    runs: list[list[str]] = [[]]
    for line in re.sub(r"(?ms)^```.*?^```", "", text).split("\n"):
        if line.startswith("    ") and line.strip():
            runs[-1].append(line[7 if line.startswith(" " * 7) else 4 :])
        else:
            runs.append([])
    return [*fenced, *("\n".join(run) for run in runs if run)]


def commands(name: str) -> list[str]:
    """The lines of rayfwd's, and the words in backquotes that begin with it."""
    text = text_of(name)
    found = [line for block in blocks(text) for line in block.splitlines()]
    found += re.findall(r"`([^`\n]+)`", text)
    outlines = [re.sub(r"\s{2,}#.*| \[[^]]*\]", "", line).strip() for line in found]
    return sorted(
        {
            command.partition(" && ")[0].rstrip(";")
            for command in outlines
            if command.startswith("rayfwd ") and not any(mark in command for mark in ELLIPSIS)
        }
    )


@pytest.mark.parametrize(
    ("name", "command"), [(name, command) for name in PAGES for command in commands(name)]
)
def test_a_command_is_understood(name: str, command: str) -> None:
    words = [word for word in shlex.split(simple(command)[0])[1:] if word != ">"]
    if words[0].startswith("-"):  # of rayfwd itself
        known = {option for action in _parser()._actions for option in action.option_strings}
        assert set(words) <= known, f"{name}: rayfwd has not all of {words}"
        return
    assert words[0] in VERBS, f"{name}: rayfwd has no verb {words[0]}"
    if len(words) > 1:  # else the verb is only spoken of
        _parser().parse_args(words)


def settings(name: str) -> list[str]:
    """The blocks of a page that are lines of the configuration file."""
    sections = "|".join([*SECTIONS, r"hub\.dial"])
    top = "|".join(Config.model_fields)
    first = re.compile(rf"(?:#.*\n)*(?:\[+(?:{sections})\]+|(?:{top}) = )")
    return [block for block in blocks(text_of(name)) if first.match(block)]


@pytest.mark.parametrize(
    ("name", "block"), [(name, block) for name in PAGES for block in settings(name)]
)
def test_a_setting_loads(name: str, block: str) -> None:
    data = tomllib.loads(block)
    mistakes = []
    for role, base in BASES.items():
        try:
            parse(together(base, data))
        except ConfigError as exc:
            mistakes.append(f"as a {role}: {'; '.join(exc.problems)}")
    assert len(mistakes) < len(BASES), f"{name}: no file has this: {mistakes}"


def together(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    both = {**base, **data}
    for key in base.keys() & data.keys():
        if isinstance(base[key], dict):
            both[key] = {**base[key], **data[key]}
    return both


def test_there_is_something_to_look_at() -> None:
    assert sum(len(commands(name)) for name in PAGES) > 100
    assert sum(len(settings(name)) for name in PAGES) > 5


@pytest.mark.parametrize("name", PAGES)
def test_targets_of_make_are_there(name: str) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", text_of("Makefile")))
    spoken = set(re.findall(r"(?m)(?:^ {4}|`)make ([a-z-]+)", text_of(name)))
    assert spoken <= targets


@pytest.mark.parametrize("name", PAGES)
def test_files_and_links_are_there(name: str) -> None:
    path, text = CHECKOUT / name, text_of(name)
    for target in re.findall(r"\]\((?!\w+:)([^)#\s]+)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+\w)`", text):
        if Path(target).name.isupper():  # stands for any
            continue
        assert any((CHECKOUT / below / target).exists() for below in ("", "tests")), target


@pytest.mark.parametrize("name", PAGES)
def test_parts_of_pages_that_are_linked_are_there(name: str) -> None:
    path, text = CHECKOUT / name, text_of(name)
    for target, part in re.findall(r"\]\((?!\w+:)([^)#\s]*)#([^)\s]+)\)", text):
        there = (path.parent / target if target else path).read_text()
        assert part in parts(there), f"{target}#{part}"


def parts(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
