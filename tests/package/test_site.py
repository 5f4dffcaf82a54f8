"""The site of the documents: built strictly, complete, with nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import site

CHECKOUT = Path(__file__).parents[2]


def test_every_document_is_a_page_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pages, made = tmp_path / "pages", tmp_path / "site"
    site.gather(pages)
    assert site.build(pages, made) == 0
    documents = {site.page_of(path) for path in (CHECKOUT / "docs").glob("*.md")}
    for page in {*documents, "index.md", "configuration.md"}:
        assert page is not None
        name = Path(page).stem
        html = made / ("index.html" if name == "index" else f"{name}/index.html")
        loaded = re.findall(
            r"<(?:script|img|link rel=\"(?:stylesheet|icon)\")[^>]*", html.read_text()
        )
        assert loaded
        assert not [tag for tag in loaded if re.search(r"(src|href)=\"?(https?:)?//", tag)], page


def test_links_that_lead_nowhere_end_the_build(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """To a page that is not there, and to a part of one that it does not have."""
    pages, targets = tmp_path / "pages", ("no-such.md", "overlay.md#no-such-part")
    site.gather(pages)
    with (pages / "limits.md").open("a") as page:
        page.write("".join(f"\nSee [there]({target}).\n" for target in targets))
    assert site.build(pages, tmp_path / "site") != 0
    said = "".join(capfd.readouterr())
    assert [target in said for target in targets] == [True, True]
    assert "Aborted with 2 warnings in strict mode" in said


def test_links_are_moved_with_their_pages() -> None:
    readme, page = CHECKOUT / "README.md", CHECKOUT / "docs" / "limits.md"
    assert site.moved("[a](docs/overlay.md#b)", readme) == "[a](overlay.md#b)"
    assert site.moved("[a](../README.md#b)", page) == "[a](index.md#b)"
    assert site.moved("[a](https://ray.io)", page) == "[a](https://ray.io)"
    assert site.moved("[a](#b)", page) == "[a](#b)"
