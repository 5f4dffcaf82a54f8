"""Run the daemon in front until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import faulthandler
from contextlib import closing

from rayfwd import daemon
from rayfwd.cli import FAULT, MistakeError
from rayfwd.cli.common import load_config
from rayfwd.problems import ProblemError
from rayfwd.system import logs
from rayfwd.system.notify import Notifier

_log = logs.get_logger("rayfwd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but --config."""


def run(args: argparse.Namespace) -> int:
    try:
        config = load_config(args)
    except MistakeError as exc:
        # What `systemctl status` shows of a service that has failed, beside its exit code.
        more = f" (and {len(exc.lines) - 1} more)" if len(exc.lines) > 1 else ""
        with closing(Notifier()) as notifier:
            notifier.send(f"STATUS=not started, a mistake in the file: {exc.lines[0]}{more}")
        raise
    # Should the watchdog end us, the journal has where every thread was.
    faulthandler.enable()
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
