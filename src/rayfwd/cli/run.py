"""Run the daemon in the foreground until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import faulthandler
import os
from contextlib import closing

from rayfwd.cli import FAULT, MistakeError
from rayfwd.cli.common import load_config
from rayfwd.config import Config
from rayfwd.daemon import main as daemon
from rayfwd.problems import ProblemError
from rayfwd.system import first_process, logs
from rayfwd.system.notify import Notifier
from rayfwd.system.paths import usual_config

_log = logs.get_logger("rayfwd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but --config and --cluster."""


def run(args: argparse.Namespace) -> int:
    try:
        # Never that of a daemon which had no file: it may be another user's doing, or an old one.
        args.config = args.config or usual_config(os.environ, args.cluster)
        config = load_config(args)
    except MistakeError as exc:
        # What `systemctl status` shows of a service that has failed, beside its exit code.
        more = f" (and {len(exc.lines) - 1} more)" if len(exc.lines) > 1 else ""
        with closing(Notifier()) as notifier:
            notifier.send(f"STATUS=not started, a mistake in the file: {exc.lines[0]}{more}")
        raise
    return first_process.run(lambda: _hold(config), config.stop_timeout)


def _hold(config: Config) -> int:
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
