"""Set up the overlay network for the daemon, and remove it at the end (the service rayfwd-net)."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import pwd
from pathlib import Path

from rayfwd.cli import OK, MistakeError
from rayfwd.config import LogConfig
from rayfwd.network import overlay
from rayfwd.network.last_rules import LastRules
from rayfwd.network.overlay_keeper import OverlayKeeper
from rayfwd.system import logs
from rayfwd.system.paths import DEFAULT_CONFIG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "socket", type=Path, help="the socket where the daemon asks (its RAYFWD_OVERLAY)"
    )
    parser.add_argument(
        "--interface", default="rayfwd0", help="name of the interface (default: rayfwd0)"
    )
    parser.add_argument(
        "--user",
        help="a user that may ask besides root (default: only root); whose connections it may "
        "redirect besides its own and root's, listeners.users of the configuration says, which "
        "only root may be able to write",
    )
    parser.add_argument(
        "--network",
        action="append",
        default=[],
        type=ipaddress.IPv4Network,
        help="a network that the plan may have, in addition to those in 127.64.0.0/10",
    )
    parser.add_argument("--until-eof", action="store_true", help="end when standard input ends")
    parser.add_argument(
        "--remove",
        action="store_true",
        help="only remove what an overlay has left behind, then end",
    )


def run(args: argparse.Namespace) -> int:
    logs.setup(LogConfig())
    if args.remove:
        last = LastRules(args.socket)
        if not _another_follows(last):
            last.forget()
            overlay.OverlayMaker(args.interface).down()
        return OK
    try:
        owner = None if args.user is None else pwd.getpwnam(args.user).pw_uid
    except KeyError:
        raise MistakeError([f"--user {args.user}: this machine has no such user"]) from None
    # The daemon's own child has no more rights than the daemon, and root is believed.
    believed = args.until_eof or owner in (None, 0)
    file = None if believed else args.config or DEFAULT_CONFIG
    keeper = OverlayKeeper(args.socket, args.interface, owner, args.network, args.until_eof, file)
    asyncio.run(keeper.run())
    return OK


def _another_follows(last: LastRules) -> bool:
    """Whether what a keeper has left is for the next one, a second later: until then the way to
    other nodes stays shut. The service manager says how it ended. One that was killed could not
    say more; one that is restarted has left its rules, and one that is stopped has not."""
    result = os.environ.get("SERVICE_RESULT")
    killed = result in {"signal", "core-dump", "oom-kill"}
    return killed or (result == "success" and last.path.exists())
