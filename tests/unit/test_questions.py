"""What a newcomer asks of each page, and the sentence of the page that answers; how long they are.

Whoever rewrites a page keeps its answers, or gives better ones in answers.toml: an answer is one
sentence, with its subject, that can be read by itself.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]

MOST_WORDS = 45
"""An answer that is longer answers more than one question."""

LONGEST = 35
"""Words of a sentence: who is tired, and no native speaker, reads a longer one twice."""

FEW = 3
"""Longer ones of a page that are let pass, such as figures in a row."""

MEAN = 20
"""Words of a page's sentences, on average."""

WRITTEN = {"docs/benchmarks.md"}
"""Pages that a program writes, most of it tables; of these the notes are judged."""

ANSWERS: dict[str, dict[str, str]] = tomllib.loads(
    (CHECKOUT / "tests" / "fixtures" / "answers.toml").read_text()
)
"""By page: the question, and its answer."""


def plain(text: str) -> str:
    """A page as it is read: without line breaks, links' targets, stars, bullets and rulers."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)", "", text)
    text = re.sub(r"(?m)^\s*(?:[-|>]|\d+\.) ", "", text)
    return " ".join(text.split())


def sentences(text: str) -> list[str]:
    """Of a page's paragraphs, list items and cells; without blocks and headings."""
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    text = re.sub(r"(?m)^(?: {4,}\S|#).*$", "", text)
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=\|)", text)
    cells = [cell for part in parts for cell in (part.split(" | ") if part[:1] == "|" else [part])]
    return [one for cell in cells for one in re.split(r"(?<=[.!?])\s+", plain(cell)) if one]


@pytest.mark.parametrize("page", sorted({*ANSWERS, "CHANGELOG.md", "bench/notes.md"} - WRITTEN))
def test_sentences_are_short(page: str) -> None:
    found = [one for one in sentences((CHECKOUT / page).read_text()) if len(one.split()) > 2]
    longer = [one for one in found if len(one.split()) > LONGEST]
    assert len(longer) <= FEW, longer
    assert sum(len(one.split()) for one in found) / len(found) < MEAN


def test_every_page_has_five_questions() -> None:
    pages = ["README.md", *(f"docs/{path.name}" for path in (CHECKOUT / "docs").glob("*.md"))]
    assert sorted(ANSWERS) == sorted(pages)
    assert {len(questions) for questions in ANSWERS.values()} == {5}


@pytest.mark.parametrize(
    ("page", "question"), [(page, question) for page in ANSWERS for question in ANSWERS[page]]
)
def test_a_sentence_of_the_page_answers(page: str, question: str) -> None:
    answer = ANSWERS[page][question]
    assert answer in plain((CHECKOUT / page).read_text()), f"{page}: {question}"
    assert len(answer.split()) <= MOST_WORDS


def lines(text: str) -> list[str]:
    """Those that are read: neither empty nor the edge of a block."""
    return [line for line in text.splitlines() if line and not line.startswith("```")]


def test_what_it_is_takes_ten_lines_and_each_situation_fewer() -> None:
    """With the commands, and the output that one sees."""
    readme = (CHECKOUT / "README.md").read_text()
    assert len(lines(readme.partition("\n![")[0].partition("\n")[2])) <= 10
    _, part = readme.split("\n## Your situation\n")
    situations = part.split("\n## ")[0].split("\n### ")[1:]
    assert len(situations) > 4
    for one in situations:
        title, _, text = one.partition("\n")
        assert len(lines(text)) < 10, title
