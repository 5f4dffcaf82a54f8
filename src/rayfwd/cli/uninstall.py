"""Remove what `rayfwd init` has created on this machine, and nothing that was edited.

The service is stopped first, which ends its Ray in order. Edited files and rayfwd's state stay,
unless you give --purge. rayfwd itself stays installed.
"""

from __future__ import annotations

import argparse

from rayfwd.cli import OK
from rayfwd.setup.apply import take_away
from rayfwd.setup.manifest import Manifest
from rayfwd.setup.places import find_places


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--purge", action="store_true", help="also remove edited files and the state directory"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show every step, and change nothing"
    )


def run(args: argparse.Namespace) -> int:
    layout = find_places(args.config)
    manifest = Manifest(layout.manifest)
    if not manifest.entries:
        print(f"There is nothing to remove: {layout.manifest} does not exist.")
        return OK

    def report(came: str, thing: str) -> None:
        print(f"  {came:<9} {thing}")

    kept = take_away(manifest, layout, args.dry_run, args.purge, report)
    if args.dry_run:
        print("Nothing was changed (--dry-run).")
    elif kept:
        print("Edited files were kept; `rayfwd uninstall --purge` removes them.")
    return OK
