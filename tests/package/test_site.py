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


@pytest.mark.parametrize("target", ["no-such.md", "overlay.md#no-such-part"])
def test_a_link_that_leads_nowhere_ends_the_build(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], target: str
) -> None:
    pages = tmp_path / "pages"
    site.gather(pages)
    with (pages / "limits.md").open("a") as page:
        page.write(f"\nSee [there]({target}).\n")
    assert site.build(pages, tmp_path / "site") != 0
    assert target in capfd.readouterr().err


def test_links_are_moved_with_their_pages() -> None:
    readme, page = CHECKOUT / "README.md", CHECKOUT / "docs" / "limits.md"
    assert site.moved("[a](docs/overlay.md#b)", readme) == "[a](overlay.md#b)"
    assert site.moved("[a](../README.md#b)", page) == "[a](index.md#b)"
    assert site.moved("[a](https://ray.io)", page) == "[a](https://ray.io)"
    assert site.moved("[a](#b)", page) == "[a](#b)"
