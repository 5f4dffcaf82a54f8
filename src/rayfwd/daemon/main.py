"""Puts head or worker together and runs it until it is told to stop; owns every task."""

from __future__ import annotations

import asyncio
import os

from rayfwd import __version__
from rayfwd.config import Config
from rayfwd.daemon import handover
from rayfwd.daemon.lifetime import Front, Lifetime, Nobody
from rayfwd.daemon.node import Makers
from rayfwd.daemon.resources import claimed, recorded
from rayfwd.daemon.role import Role
from rayfwd.daemon.runtime import Runtime
from rayfwd.daemon.signals import Signals
from rayfwd.problems import ProblemError
from rayfwd.system import fdpass, fdstore
from rayfwd.system.fdstore import FdStore
from rayfwd.system.logs import get_logger
from rayfwd.system.malloc import keep_freed
from rayfwd.system.notify import Notifier

log = get_logger(__name__)


def run(config: Config, lifetime: Lifetime | None = None, front: Front | None = None) -> int:
    """Run the daemon in front, for ever unless `lifetime` says otherwise.

    Returns the exit code: 0 ended in order, 1 it could not begin, 3 it was not ready in time.
    """
    keep_freed()
    try:
        runtime = asyncio.run(_run(config, lifetime or Lifetime(), front or Nobody()))
    except ProblemError as exc:
        problem = exc.problem
        log.error(problem.code.event, cause=problem.cause, remedy=problem.remedy)
        Notifier().send(f"STATUS=cannot begin: {problem.cause}")
        return 1
    if runtime.again:
        handover.exec_again(runtime.left)
    return runtime.code


async def _run(config: Config, lifetime: Lifetime, front: Front) -> Runtime:
    """Raises ProblemError."""
    with claimed(config), recorded(config):
        signals = Signals(asyncio.get_running_loop())
        log.info("rayfwd_starting", version=__version__, role=config.role, node=config.name)
        notifier = Notifier()
        given = fdpass.received(os.environ)
        arrival = handover.arrived(given.pop(fdpass.NAME, []), config.role, config.name, notifier)
        try:
            role = role_of(config)
            role.node.hold_listeners(FdStore(notifier), fdstore.taken(given))
            runtime = Runtime(role, notifier, arrival, lifetime, front)
            signals.obeyed_by(runtime)
            await runtime.run()
        finally:
            if arrival is not None:
                arrival.close()
    return runtime


def role_of(config: Config, makers: Makers | None = None) -> Role:
    """The role that the configuration names, built whole. Raises ProblemError."""
    makers = makers or Makers()
    if config.role == "head":
        from rayfwd.daemon.head import HeadRole  # noqa: PLC0415  # what no worker needs

        return HeadRole(config, makers)
    from rayfwd.daemon.worker import WorkerRole  # noqa: PLC0415  # what no head needs

    return WorkerRole(config, makers)
