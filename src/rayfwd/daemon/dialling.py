"""The workers that a head dials: those of its file, and those that `rayfwd add` has brought in.

The second kind is kept in the state directory and comes and goes while the head runs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from rayfwd import codes
from rayfwd.config import Config, DialConfig
from rayfwd.problems import Problem
from rayfwd.system.files import read_regular, replace_file
from rayfwd.transport.carrier import Carrier
from rayfwd.transport.dialler import Dialler

RECORD = "dials.json"
"""In the state directory: the workers that were added, by name."""

MakeCarrier = Callable[[DialConfig], Carrier]


def added(config: Config) -> dict[str, DialConfig]:
    """Those that `rayfwd add` has brought in. Raises ProblemError where the record is no good."""
    path = config.state_dir / RECORD
    try:
        data = json.loads(read_regular(path))
        return {name: DialConfig.model_validate(dial) for name, dial in dict(data).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as exc:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"{path} cannot be read: {exc}",
            "remove it, then add its machines again with `rayfwd add`",
        ) from None


def all_dials(config: Config) -> tuple[DialConfig, ...]:
    """Those of the file, and those that were added. Raises ProblemError."""
    return (*config.hub.dial, *added(config).values())


class Dialling:
    """Owns a dialler for each. `run` until it is cancelled."""

    def __init__(
        self,
        config: Config,
        make: MakeCarrier,
        on_change: Callable[[], None],
        vouch_for: Callable[[str], bytes],
    ) -> None:
        """`vouch_for`: what tells the hub that a connection is the node's of that name. Raises
        ProblemError where the record of those that were added is no good."""
        self._config = config
        self._make = make
        self._vouch_for = vouch_for
        self._on_change = on_change
        self._added = added(config)
        self._of_file = [self._dialler(dial) for dial in config.hub.dial]
        self._by_name = {name: self._dialler(dial) for name, dial in self._added.items()}
        self._tasks: dict[Dialler, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    def _dialler(self, dial: DialConfig) -> Dialler:
        config = self._config
        return Dialler(
            dial,
            self._make(dial),
            config.hub_socket,
            config.ride_through,
            self._on_change,
            # Its host key is checked: whoever answers there is the machine of this name.
            self._vouch_for(dial.called),
        )

    def _all(self) -> list[Dialler]:
        return [*self._of_file, *self._by_name.values()]

    async def run(self) -> None:
        async with asyncio.TaskGroup() as self._group:
            for dialler in self._all():
                self._start(dialler)
            await asyncio.get_running_loop().create_future()

    def _start(self, dialler: Dialler) -> None:
        if self._group is not None:
            task = self._group.create_task(dialler.run(), name=f"dial {dialler.called}")
            self._tasks[dialler] = task

    def problems(self) -> Iterator[tuple[str, Problem]]:
        """What keeps a worker from being dialled, and what that worker is called."""
        for dialler in self._all():
            if (kept := dialler.problem) is not None:
                yield dialler.called, kept

    async def dial_verb(self, args: dict[str, Any]) -> dict[str, Any]:
        """Dial one more worker from now on, or an added one in another way. Raises ProblemError."""
        try:
            dial = DialConfig.model_validate(args.get("dial"))
        except ValidationError as exc:
            raise codes.CONTROL_BAD_REQUEST.error(
                f"the worker to dial: {exc.errors()[0]['msg']}",
                "use the same installation of rayfwd as the daemon",
            ) from None
        name = dial.called
        if self._added.get(name) == dial:
            return {"dialled": name, "new": False}
        try:
            dialler = self._dialler(dial)
        except ImportError as exc:  # the first that is dialled has AsyncSSH loaded
            raise codes.CONTROL_BAD_REQUEST.error(
                f"rayfwd was replaced on this machine while this daemon ran: {exc}",
                "restart the daemon, then run the command again",
            ) from exc
        await self._drop(name)
        self._keep({**self._added, name: dial})
        self._by_name[name] = dialler
        self._start(self._by_name[name])
        return {"dialled": name, "new": True}

    async def undial_verb(self, args: dict[str, Any]) -> dict[str, Any]:
        """Dial an added worker no more. Raises ProblemError."""
        name = str(args.get("name", ""))
        if name not in self._added:
            return {"undialled": None}
        self._keep({n: dial for n, dial in self._added.items() if n != name})
        await self._drop(name)
        self._on_change()
        return {"undialled": name}

    def _keep(self, dials: dict[str, DialConfig]) -> None:
        path = self._config.state_dir / RECORD
        data = {n: d.model_dump(mode="json", exclude_unset=True) for n, d in dials.items()}
        try:
            replace_file(path, json.dumps(data, indent=1).encode() + b"\n")
        except OSError as exc:
            raise codes.DIRECTORY_UNUSABLE.error(
                f"{path} cannot be written: {exc.strerror or exc}",
                f"make {path.parent} writable for this user, and check that its disk is not full",
            ) from exc
        self._added = dials

    async def _drop(self, name: str) -> None:
        dialler = self._by_name.pop(name, None)
        if dialler is None:
            return
        dialler.close()
        if (task := self._tasks.pop(dialler, None)) is not None:
            task.cancel()
            await asyncio.wait([task])

    def end(self) -> None:
        """Dial no more; what stands is the hub's to end."""
        for dialler in self._all():
            dialler.end()

    async def drained(self) -> None:
        """Once the connections that stood are over, and what the hub said last is on its way."""
        await asyncio.gather(*(dialler.drained() for dialler in self._all()))

    def close(self) -> None:
        """Dial no more, and give up what stands."""
        for dialler in self._all():
            dialler.close()
