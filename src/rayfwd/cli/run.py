"""Run the daemon in front until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse

from rayfwd import daemon, logs
from rayfwd.cli.common import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but --config."""


def run(args: argparse.Namespace) -> int:
    config = load_config(args)
    logs.setup(config.log)
    return daemon.run(config)
