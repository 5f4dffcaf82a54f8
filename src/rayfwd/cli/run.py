"""Run the daemon in front until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse

from rayfwd import daemon, logs
from rayfwd.cli import FAULT
from rayfwd.cli.common import load_config
from rayfwd.problems import ProblemError

_log = logs.get_logger("rayfwd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but --config."""


def run(args: argparse.Namespace) -> int:
    config = load_config(args)
    logs.setup(config.log)
    try:
        if config.role == "client":
            from rayfwd.cli import connect  # noqa: PLC0415  # what a node's daemon does not need

            return connect.hold(config)
        return daemon.run(config)
    except ProblemError:
        raise  # told by whoever called us
    except Exception:
        # A fault of ours: loud, in the log's own form, and then the service manager's turn.
        _log.error("rayfwd_fault", exc_info=True)
        return FAULT
