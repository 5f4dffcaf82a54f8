"""Show the state of the running daemon: what is wrong and what to do, then the details."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from rayfwd.cli import NOT_READY, OK
from rayfwd.cli.common import control_socket, load_as_owner, quiet_logs
from rayfwd.cli.screen import Screen, duration
from rayfwd.problems import Problem, ProblemError
from rayfwd.status import Status
from rayfwd.system.control import ask
from rayfwd.system.logs import escaped

WATCH_INTERVAL = 2.0
MIN_INTERVAL = 0.2
MAX_INTERVAL = 3600.0

PIPE_WIDTH = 120
"""Columns where standard output is no terminal and COLUMNS does not say."""

RESTART_SECONDS = 60.0
"""Seconds for which it is said that the daemon was restarted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON (docs/status.md); with --watch, one line each time",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_interval,
        const=WATCH_INTERVAL,
        default=None,
        metavar="SECONDS",
        help=f"show the status again every so many seconds (default: {WATCH_INTERVAL:g} s), "
        "until Ctrl-C",
    )


def _interval(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not MIN_INTERVAL <= value <= MAX_INTERVAL:
        raise argparse.ArgumentTypeError(
            f"{text}: must be a number of seconds from {MIN_INTERVAL:g} to {MAX_INTERVAL:g}"
        )
    return value


def run(args: argparse.Namespace) -> int:
    config = load_as_owner(args)
    quiet_logs()
    path = control_socket(config)
    if args.watch is not None:
        watch = Watch(lambda: ask(path, "status"), args.watch)
        with _terminable():
            try:
                watch.lines() if args.json else watch.screens(console())
            except KeyboardInterrupt:  # how a watch ends
                return OK
    status = ask(path, "status")
    if args.json:
        print(json.dumps(status, indent=2))
    else:
        console().print(Screen(Status.from_answer(status), time.time()))
    return exit_code(status)


def exit_code(status: dict[str, Any]) -> int:
    return OK if status.get("state") == "ready" else NOT_READY


def console() -> Console:
    """Standard output; in colour on a terminal only, and not where NO_COLOR is set."""
    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(force_terminal=terminal, width=width, highlight=False, emoji=False, markup=False)


class _AwayError(ProblemError):
    """Nobody answers, for now."""


class Watch:
    """Asks again and again; a daemon that is away is said to be, and awaited."""

    def __init__(self, fetch: Callable[[], dict[str, Any]], interval: float) -> None:
        self._fetch = fetch
        self._interval = interval
        self._last: Screen | None = None
        """What was shown last."""
        self._pid: object = None
        """Of the daemon that answered last."""
        self._restarted: float | None = None
        self._away: float | None = None

    def lines(self) -> NoReturn:
        """As JSON, one line each time, until Ctrl-C."""
        while True:
            try:
                line: dict[str, Any] = self._ask()
            except _AwayError as exc:
                line = {"error": exc.problem.to_wire()}
            print(json.dumps(line), flush=True)
            time.sleep(self._interval)

    def screens(self, out: Console) -> NoReturn:
        """On a terminal in its place, elsewhere one below the other, until Ctrl-C."""
        shown = self.screen()
        if not out.is_terminal or out.is_dumb_terminal:
            while True:
                out.print(shown)
                out.print()
                time.sleep(self._interval)
                shown = self.screen()
        live = Live(shown, console=out, screen=True, auto_refresh=False)
        try:
            with _signals_held():  # one that ended it half-way would leave the other screen on
                live.start(refresh=True)
            while True:
                time.sleep(self._interval)
                shown = self.screen()
                live.update(shown, refresh=True)
        finally:
            live.stop()
            out.print(shown)  # the terminal is as it was before: the last one stays to be read

    def screen(self) -> RenderableType:
        """What there is to see now. Raises ProblemError where asking on is no use."""
        try:
            self._last = Screen(Status.from_answer(self._ask()), time.time())
        except _AwayError as exc:
            return self._absence(exc.problem)
        note = time.strftime("%H:%M:%S")
        if self._restarted is not None and time.monotonic() - self._restarted < RESTART_SECONDS:
            note += f"  the daemon was restarted {duration(time.monotonic() - self._restarted)} ago"
        return Group(Text(note, "dim"), self._last)

    def _ask(self) -> dict[str, Any]:
        """Raises _AwayError where asking goes on, ProblemError where it would be no use."""
        try:
            status = self._fetch()
        except ProblemError as exc:
            if not exc.problem.code.daemon_away:
                raise
            self._away = time.monotonic() if self._away is None else self._away
            raise _AwayError(exc.problem) from exc
        if self._pid is not None and status.get("pid") != self._pid:
            self._restarted = time.monotonic()
        self._pid, self._away = status.get("pid"), None
        return status

    def _absence(self, problem: Problem) -> RenderableType:
        since = duration(time.monotonic() - (self._away or time.monotonic()))
        lines: list[RenderableType] = [
            Text(
                f"{time.strftime('%H:%M:%S')}  no answer for {since}; still asking", "bold yellow"
            ),
            Text(escaped(problem.cause)),
            Text(escaped(f"do  {problem.remedy}")),
        ]
        if self._last is not None:
            lines += [Text(), Text("last known state:", "dim"), self._last]
        return Group(*lines)


@contextmanager
def _signals_held() -> Iterator[None]:
    """SIGTERM and Ctrl-C wait until this is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a watch as cleanly as Ctrl-C does: the terminal is put back."""

    def terminated(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
