"""Where `rayfwd init` and `rayfwd add` put things on this machine: by who says it."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from rayfwd.setup.request import MAN_PAGES, Layout, system_layout, user_layout
from rayfwd.system.asuser import own_account
from rayfwd.system.paths import belongs_to_root


def own_command() -> Path:
    """`rayfwd` as whoever runs this has it."""
    given = Path(sys.argv[0])
    if given.name == "rayfwd" and (found := shutil.which(str(given))):
        return Path(found).absolute()
    return Path(sys.prefix) / "bin" / "rayfwd"


def find_places(config: Path | None) -> Layout:
    """Of the machine's service for root, of their own for others."""
    own = own_command()
    config = config.absolute() if config is not None else None
    home = own_account().home
    if os.geteuid() == 0:
        layout = system_layout(str(own), sys.executable, config)
        overlay = all(belongs_to_root(Path(path)) for path in (own, sys.executable, sys.prefix))
        layout = replace(layout, overlay=overlay)
    else:
        layout = user_layout(home, os.geteuid(), str(own), sys.executable, config)
    if layout.system and not layout.man.is_dir():
        return layout  # where it is absent, man does not look there
    return replace(layout, pages=_pages(Path(sys.prefix), layout.man))


def _pages(prefix: Path, man: Path) -> Path | None:
    """The man pages of this environment, where they are to be linked to.

    None: it has none, or they are there already, or nothing can be put there.
    """
    pages = prefix / "share" / "man"
    if not (pages / MAN_PAGES[0]).exists() or prefix in {Path("/usr"), *man.parents}:
        return None
    there = next(path for path in (man, *man.parents) if path.exists())
    return pages if os.access(there, os.W_OK | os.X_OK) else None
