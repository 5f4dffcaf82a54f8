"""Run the daemon in front until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import os

from rayfwd import daemon, journal, logs
from rayfwd.cli import FAULT, MistakeError
from rayfwd.cli.common import load_config
from rayfwd.notify import Notifier

_log = logs.get_logger("rayfwd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but --config."""


def run(args: argparse.Namespace) -> int:
    try:
        config = load_config(args)
    except MistakeError as exc:
        # What `systemctl status` shows of a service that has failed, beside its exit code.
        Notifier().send(f"STATUS={exc.lines[0]}")
        mark = "<3>" if journal.is_stream(2, os.environ) else ""  # the journal's word for an error
        raise MistakeError([mark + line for line in exc.lines]) from None
    logs.setup(config.log)
    try:
        return daemon.run(config)
    except Exception:
        # A fault of ours: loud, in the log's own form, and then the service manager's turn.
        _log.error("rayfwd_fault", exc_info=True)
        return FAULT
