"""A handle on `rayfwd run` in a machine: its log's events, its status, its end."""

from __future__ import annotations

import json
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rayfwd.problems import ProblemError
from rayfwd.system.control import ask
from tests.lab.process import HOME, Process, rest, tail

if TYPE_CHECKING:
    from tests.lab.machines import Machine

Event = dict[str, Any]
Where = Mapping[str, Any] | Callable[[Event], bool] | None
"""Which events are meant: these fields have these values, or this is true of them."""

CONFIG = f"{HOME}/rayfwd.toml"


class Daemon:
    """`rayfwd run`; `Machine.rayfwd_daemon` starts it. Failures tell the ends of all logs."""

    def __init__(self, machine: Machine, process: Process) -> None:
        self.machine = machine
        self.process = process
        self.log = process.log
        self._read = 0
        """Bytes of the log that were read."""
        self._events: list[Event] = []
        self._reading = threading.Lock()
        """Tests look from several threads."""

    def events(self, name: str | None = None) -> list[Event]:
        """Everything it has logged, or the events of one name, in order.

        Lines that are not JSON (a traceback) are events named `not_json`. `_index` is the line.
        """
        with self._reading:
            self._read_on()
            return [event for event in self._events if name in {None, event.get("event")}]

    def _read_on(self) -> None:
        with self.log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        for line in new.decode(errors="replace").splitlines():
            self._events.append({**_event_of(line), "_index": len(self._events)})

    def wait_event(
        self, name: str, timeout: float = 60, where: Where = None, after: Event | None = None
    ) -> Event:
        """The first event of that name (after the one given), when it is there."""
        first = -1 if after is None else after["_index"]

        def look() -> Event | None:
            for event in self.events(name):
                if event["_index"] > first and _matches(event, where):
                    return event
            return None

        def what() -> str:
            fields = f" with {dict(where)}" if isinstance(where, Mapping) else ""
            return f"event {name}{fields}"

        return self._until(look, timeout, what)

    def status(self) -> dict[str, Any]:
        """What `rayfwd status --json` prints. Raises AssertionError when no daemon answers."""
        try:
            return self._ask()
        except ProblemError as exc:
            raise AssertionError(f"{exc}{self.machine.lab.tails()}") from None

    def _ask(self) -> dict[str, Any]:
        """Raises ProblemError. From this process: the command would start anew for each question,
        and take half of what the machines of a test have to compute with."""
        config = tomllib.loads(self.machine.host_path(CONFIG).read_text())
        return ask(self.machine.host_path(f"{config['runtime_dir']}/control.sock"), "status")

    def wait_status(
        self, predicate: Callable[[dict[str, Any]], object], timeout: float = 60
    ) -> dict[str, Any]:
        """The first status for which `predicate` is true."""
        last: dict[str, Any] = {}

        def look() -> dict[str, Any] | None:
            nonlocal last
            with suppress(ProblemError):
                last = self._ask()
                if predicate(last):
                    return last
            return None

        return self._until(look, timeout, lambda: f"a status; the last: {json.dumps(last)}")

    def wait_ready(self, timeout: float = 120) -> dict[str, Any]:
        """Its status, once the link stands and Ray is up."""
        deadline = time.monotonic() + timeout
        self.wait_event("rayfwd_ready", timeout)  # read from a file, which costs nothing
        left = max(5.0, deadline - time.monotonic())
        return self.wait_status(lambda status: status.get("state") == "ready", left)

    def _until(
        self, look: Callable[[], Event | None], timeout: float, what: Callable[[], str]
    ) -> Event:
        began = time.monotonic()
        while True:
            ended = self.process.poll()  # before the look: what it wrote last is seen
            if (found := look()) is not None:
                return found
            where = f"{self.machine.name}: {what()}"
            if ended is not None:
                tails = self.machine.lab.tails()
                raise AssertionError(f"{where}: rayfwd has ended, exit code {ended}{tails}")
            if time.monotonic() > began + timeout:
                raise AssertionError(f"{where}: not in {timeout:g} s{self.machine.lab.tails()}")
            rest(began)

    def stop(self, timeout: float = 90) -> int:
        """End it as a service manager does, with SIGTERM; its exit code."""
        self.process.signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except TimeoutError as exc:
            raise AssertionError(f"{exc}{self.machine.lab.tails()}") from None

    def kill(self) -> None:
        """SIGKILL to the daemon alone: its Ray lives on."""
        self.process.signal(signal.SIGKILL)
        self.process.wait(20)

    def tail(self) -> str:
        return tail(self.log)


def _event_of(line: str) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    return event if isinstance(event, dict) else {"event": "not_json", "line": line}


def _matches(event: Event, where: Where) -> bool:
    if where is None:
        return True
    if isinstance(where, Mapping):
        return all(event.get(key) == value for key, value in where.items())
    return where(event)
