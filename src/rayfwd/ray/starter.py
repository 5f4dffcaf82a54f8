"""Starts Ray on this machine as the plan and the configuration say, or says how it is by hand.

What Ray is given is decided here: its ports are free, its versions are the head's, its environment
is the plan's, and it learns of bounds that it does not see. What becomes of it is the supervisor's.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config, RayConfig
from rayfwd.ray import commandline, ports, token
from rayfwd.ray.commandline import RayPlan
from rayfwd.ray.install import RayInstall, Versions, find
from rayfwd.ray.launcher import Launcher
from rayfwd.ray.process import RayProcess
from rayfwd.ray.token import RayAuth
from rayfwd.system import capacity
from rayfwd.system.redact import redact_command

LEFT_FOR_THE_LINK = 1.5
"""Seconds of `stop_timeout` that are not Ray's: for the link's end, and the daemon's."""
TASKS_PART = 0.5
"""Of Ray's seconds, those that its tasks have to end where `stop_timeout` bounds a stop."""

BeforeStart = Callable[[NodePlan, RayInstall], Awaitable[None]]
"""Awaited before each start of our own, with the ports known to be free; raises ProblemError where
Ray is not to be started yet."""


@dataclass(frozen=True, slots=True)
class RayWanted:
    """What Ray is to be here."""

    plan: RayPlan
    head_versions: Versions | None
    """None: not known, or this is the head."""
    auth: RayAuth | None
    digest: str
    """Of all that reaches Ray: where it changes, Ray is started again."""


class Starter:
    """Starts Ray, once what has to be true before is checked."""

    def __init__(
        self, config: Config, network: str, launcher: Launcher, before_start: BeforeStart | None
    ) -> None:
        self._config = config
        self._network = network
        self._launcher = launcher
        self._before_start = before_start

    @property
    def stop_within(self) -> float | None:
        """Seconds for Ray's own end, of those for the whole stop; None: as many as it takes."""
        timeout = self._config.stop_timeout
        return None if timeout is None else timeout - LEFT_FOR_THE_LINK

    def wanted(
        self,
        own: NodePlan,
        head: NodePlan,
        head_versions: Versions | None,
        ride_through: float,
        network: str | None,
        auth: RayAuth | None,
        interface: str | None,
    ) -> RayWanted:
        """What Ray is to be by this plan; `network`: None is the one before."""
        self._network = network or self._network
        plan = RayPlan(own, head, self._config.ray, ride_through, self._network, interface)
        return RayWanted(plan, head_versions, auth, commandline.digest(plan, auth))

    async def find(self, wanted: RayWanted) -> RayInstall:
        """The installation that `ray.command` names. Raises ProblemError."""
        return await find(self._config.ray.command, self.environment(wanted))

    async def check(self, wanted: RayWanted) -> RayInstall:
        """What is to be started, which can be now. Raises ProblemError where it cannot."""
        install = await self.find(wanted)
        check_versions(install, wanted.head_versions, self.environment(wanted))
        await asyncio.to_thread(ports.check_free, wanted.plan.own.ports)
        if self._before_start is not None:
            await self._before_start(wanted.plan.own, install)
        return install

    def start(self, wanted: RayWanted, install: RayInstall, joined: str | None) -> RayProcess:
        """`ray start`, which runs on; `joined`: which start of the head's Ray it joins, if that is
        known. Raises ProblemError."""
        bounded = replace(wanted.plan, ray=_as_bounded(wanted.plan.ray))
        argv = commandline.start_command(bounded, install)
        try:
            return RayProcess.spawn(
                argv,
                _with_its_python(self.environment(wanted), install, self._config.ray),
                self._config.state_dir,
                digest=wanted.digest,
                versions=install.versions,
                command=shlex.join(redact_command(argv)),
                launcher=self._launcher,
                joined=joined,
            )
        except OSError as exc:
            raise codes.RAY_START_FAILED.error(
                f"{install.command} cannot be started: {exc}",
                f"check that this user can run that command and write to {self._config.state_dir}",
            ) from None

    def by_hand(self, wanted: RayWanted, install: RayInstall | None) -> str:
        """The shell line that starts it, for a person."""
        return commandline.by_hand(wanted.plan, install, self._auth(wanted))

    def environment(self, wanted: RayWanted) -> dict[str, str]:
        """What Ray and its own command-line tools are given."""
        env = commandline.start_environment(wanted.plan, os.environ, self._auth(wanted))
        if (within := self.stop_within) is not None:
            # The rest is for `ray start`, which ends its children one by one after that.
            env.setdefault(commandline.DRAIN_VARIABLE, f"{within * TASKS_PART:.1f}")
        return env

    def _auth(self, wanted: RayWanted) -> dict[str, str]:
        return token.environment(wanted.auth, self._config.state_dir)


def _with_its_python(env: dict[str, str], install: RayInstall, ray: RayConfig) -> dict[str, str]:
    """With Ray's own programs first on the PATH, as where its environment is activated: `ray job
    submit -- python job.py` is to find the Python that has Ray."""
    folder = os.path.dirname(install.command)
    path = env.get("PATH", os.defpath)
    found = folder in path.split(os.pathsep) or not os.access(f"{folder}/python", os.X_OK)
    return env if found or "PATH" in ray.env else {**env, "PATH": f"{folder}{os.pathsep}{path}"}


def check_versions(install: RayInstall, head: Versions | None, env: dict[str, str]) -> None:
    """Raises ProblemError where this node's Ray or Python is not the head's.

    Ray compares both as text, Python with its patch level (`ray._private.utils.check_version_info`;
    newer Rays take the level from RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL).
    """
    if head is None:
        return
    own = install.versions
    if own.ray != head.ray:
        raise codes.RAY_VERSION_DIFFERS.error(
            f"this node has Ray {own.ray} ({install.command}), the head has Ray {head.ray}",
            f"install Ray {head.ray} here, or Ray {own.ray} on the head: both must have "
            "the same version",
        )
    parts = 2 if env.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL") == "minor" else 3
    if own.python.split(".")[:parts] != head.python.split(".")[:parts]:
        raise codes.PYTHON_VERSION_DIFFERS.error(
            f"this node runs Ray with Python {own.python} ({install.python}), the head with "
            f"Python {head.python}",
            f"use Python {head.python} for Ray here, or Python {own.python} on the head: Ray "
            "compares the whole version",
        )


def _as_bounded(ray: RayConfig) -> RayConfig:
    """Ray knows what the outermost control group leaves, and not that an affinity, or a job's group
    below it, leaves less. Of less than one processor it makes none, and would run no task."""
    update: dict[str, Any] = {}
    if ray.num_cpus is None and (cpus := capacity.cpus()) != capacity.rays_cpus():
        update["num_cpus"] = cpus
    if (memory := capacity.memory()) < capacity.rays_memory():
        store = ray.object_store_memory or capacity.store_within(memory)
        update["object_store_memory"] = store
        if not any(word.startswith("--memory") for word in ray.extra_args):
            update["extra_args"] = (*ray.extra_args, f"--memory={max(0, memory - store)}")
    return ray.model_copy(update=update) if update else ray
