"""Show rayfwd at work, on this machine only: a head, and a worker that has no network."""

from __future__ import annotations

import argparse

from rayfwd import demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray", metavar="PATH", default="ray", help="the `ray` command to use (default: ray)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the demo's files when it has ended"
    )


def run(args: argparse.Namespace) -> int:
    return demo.run(ray=args.ray, keep=args.keep)
