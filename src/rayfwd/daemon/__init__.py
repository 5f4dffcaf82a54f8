"""Puts head or worker together and runs it until it is told to stop; owns every task."""

from __future__ import annotations

import asyncio

from rayfwd.config import Config
from rayfwd.daemon import handover
from rayfwd.daemon.head import HeadDaemon
from rayfwd.daemon.runtime import Daemon
from rayfwd.daemon.worker import WorkerDaemon
from rayfwd.problems import ProblemError
from rayfwd.system.logs import get_logger
from rayfwd.system.malloc import keep_freed
from rayfwd.system.notify import Notifier

log = get_logger(__name__)


def run(config: Config) -> int:
    """Run the daemon in front. Returns the exit code: 0 ended in order, 1 it could not begin."""
    keep_freed()
    try:
        daemon = asyncio.run(_run(config))
    except ProblemError as exc:
        problem = exc.problem
        log.error(problem.code.name, cause=problem.cause, remedy=problem.remedy)
        Notifier().send(f"STATUS=cannot begin: {problem.cause}")
        return 1
    if daemon.again:
        handover.exec_again(daemon.left)
    return 0


async def _run(config: Config) -> Daemon:
    """Raises ProblemError."""
    daemon: Daemon = HeadDaemon(config) if config.role == "head" else WorkerDaemon(config)
    await daemon.run()
    return daemon
