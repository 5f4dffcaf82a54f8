"""Start Ray for the daemon, and keep it while the daemon restarts (the service rayfwd-ray)."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from rayfwd.cli import OK
from rayfwd.config import LogConfig
from rayfwd.ray.keeper import Keeper
from rayfwd.system import logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "socket", type=Path, help="the socket where the daemon asks (its RAYFWD_KEEPER)"
    )


def run(args: argparse.Namespace) -> int:
    logs.setup(LogConfig())
    asyncio.run(_run(args.socket))
    return OK


async def _run(socket: Path) -> None:
    await Keeper(socket).run()
