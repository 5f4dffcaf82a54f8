"""Show what passes over the running daemon's lanes, one line for each frame (docs/protocol.md).

It records for some seconds, or until there are enough lines, and then prints them: the time (UTC),
the peer, and of a frame its lane, direction, kind, stream, offset and length; between them, how
lanes, streams and sessions change. It shows no payload, and of a control message only its type.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from rayfwd.cli import OK
from rayfwd.cli.common import control_socket, load_as_owner, quiet_logs
from rayfwd.daemon.trace_verb import MOST_FRAMES, MOST_SECONDS
from rayfwd.system.control import ask
from rayfwd.system.logs import escaped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds",
        metavar="N",
        type=_whole(MOST_SECONDS),
        default=5,
        help=f"how long, from 1 to {MOST_SECONDS} (default: 5)",
    )
    parser.add_argument(
        "--frames",
        metavar="N",
        type=_whole(MOST_FRAMES),
        default=1000,
        help=f"how many lines at most, from 1 to {MOST_FRAMES} (default: 1000)",
    )
    parser.add_argument(
        "--peer", metavar="NAME", help="on the head: only the frames to and from this worker"
    )


def _whole(most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text) if text.isdecimal() else 0
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 to {most}")
        return value

    return read


def run(args: argparse.Namespace) -> int:
    config = load_as_owner(args)
    quiet_logs()
    asked = {"seconds": args.seconds, "frames": args.frames, "peer": args.peer}
    answer = ask(control_socket(config), "trace", asked, timeout=args.seconds + 10.0)
    for line in answer["lines"]:
        print(escaped(line))
    if not answer["lines"]:
        peers = ", ".join(answer["peers"]) or "no other node"
        print(f"no frame in {args.seconds} s; connected: {escaped(peers)}", file=sys.stderr)
    return OK
