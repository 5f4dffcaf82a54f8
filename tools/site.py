"""Builds the site of the documents: `make site`.

Usage: python -m tools.site [DIRECTORY]

MkDocs wants all pages in one folder and no link out of it, so they are gathered in build/pages
first: README.md becomes the first page, config.example.toml a page of its own. A link that leads
nowhere ends the build. The site is in DIRECTORY, else in build/site.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
PAGES = CHECKOUT / "build" / "pages"
SITE = CHECKOUT / "build" / "site"

ELSEWHERE = {
    "README.md": "index.md",
    "docs/README.md": "documents.md",
    "config.example.toml": "configuration.md",
    "CHANGELOG.md": "changelog.md",
}
"""Where a file of the checkout is in the site; else a page has its own name."""


def page_of(source: Path) -> str | None:
    """The page that a file of the checkout becomes; None: it is none."""
    name = source.relative_to(CHECKOUT).as_posix()
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    return source.name if source.parent == CHECKOUT / "docs" else None


def moved(text: str, source: Path) -> str:
    """A page's text with its links as they are in the site."""

    def link(found: re.Match[str]) -> str:
        path, hash_, part = found[1].partition("#")
        page = page_of((source.parent / path).resolve()) if path else None
        return f"]({page or path}{hash_}{part})"

    return re.sub(r"\]\((?!\w+:)([^)\s]+)\)", link, text)


def gather(into: Path) -> None:
    """All pages, in a folder that is made anew."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    for source in [*(CHECKOUT / "docs").iterdir(), *(CHECKOUT / name for name in ELSEWHERE)]:
        page = page_of(source)
        assert page is not None, source
        if source.suffix == ".md":
            (into / page).write_text(moved(source.read_text(), source))
        elif source.suffix == ".toml":
            head = "# Configuration\n\nEvery key with its default.\n\n"
            (into / page).write_text(f"{head}```toml\n{source.read_text()}```\n")
        else:
            shutil.copy(source, into / page)


def build(pages: Path, site: Path) -> int:
    """MkDocs' exit code; what is wrong is on standard error."""
    # Not --quiet: what is not logged does not count for --strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"]
    # It advertises its successor.
    env = {**os.environ, "RAYFWD_PAGES": str(pages), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "--site-dir", str(site)], cwd=CHECKOUT, env=env, check=False
    ).returncode


def main(site: Path = SITE) -> int:
    gather(PAGES)
    return build(PAGES, site)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
