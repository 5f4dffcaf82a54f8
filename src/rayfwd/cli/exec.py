"""Run a command with the environment that `rayfwd env` prints: a driver, a notebook, torchrun.

For example: `rayfwd exec -- python train.py`. The command replaces this process. Variables
that are set already keep their values. Ray's own programs (`python`, `ray`) are found even if its
environment is not activated. For root, the command runs as the user that runs rayfwd.
"""

from __future__ import annotations

import argparse
import os
from typing import NoReturn

from rayfwd.cli import MistakeError
from rayfwd.cli.common import load_as_owner, quiet_logs
from rayfwd.cli.env import additions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "command", nargs="+", metavar="COMMAND", help="the command and its arguments"
    )


def run(args: argparse.Namespace) -> NoReturn:
    config = load_as_owner(args)
    quiet_logs()
    words = args.command
    env = {**os.environ, **additions(config)}
    if os.path.isdir(beside := os.path.dirname(config.ray.command)):  # what is active goes first
        env["PATH"] = f"{env.get('PATH', os.defpath)}{os.pathsep}{beside}"
    try:
        os.execvpe(words[0], words, env)
    except OSError as exc:
        raise MistakeError([f"{words[0]}: {exc.strerror or exc}"]) from None
