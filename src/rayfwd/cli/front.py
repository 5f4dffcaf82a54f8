"""A daemon that was started without a file and stays in front: `rayfwd join` and `rayfwd head`.

It is the daemon of `rayfwd run`. Here is what surrounds it: how it looks on a terminal, how long it
is there, what is said when it is ready, and that it may be process 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rayfwd import codes
from rayfwd.cli import FAULT, MistakeError
from rayfwd.cli.flags import Flag, add_set, as_option, duration, flags_of, given_by
from rayfwd.config import Config, ConfigError, parse
from rayfwd.daemon import main as daemon
from rayfwd.daemon.lifetime import Lifetime, cut_short_after
from rayfwd.problems import ProblemError
from rayfwd.status import Status
from rayfwd.system import first_process, logs, setting
from rayfwd.system.logs import escaped
from rayfwd.system.paths import RECORD, running_config
from rayfwd.system.steps import Steps
from rayfwd.system.users import user_name

STOP_TIMEOUT = 8.0
"""Seconds for a stop, unless said otherwise: Docker kills 10 s after its SIGTERM."""

OF_ANY_NODE = ("name", "state_dir", "runtime_dir", "ride_through", "stop_timeout", "expose")
"""Keys before any section; `cluster` is an option of every verb."""

LINGER = Path("/var/lib/systemd/linger")
"""Where logind has a file for each user who may stay (loginctl(1))."""

Next = Callable[[Config, Status], Sequence[str]]
"""Two lines, when it is ready: what to do next."""

_log = logs.get_logger("rayfwd")


def add_arguments(
    parser: argparse.ArgumentParser, flags: Iterable[Flag], section: str, of_ray: str
) -> None:
    """The options of the keys, and of how long it is there."""
    groups = {None: parser, section: None, "ray": None}
    named = {section: f"keys of [{section}]", "ray": f"keys of [ray]: {of_ray}"}
    parser.add_argument(
        "--wait-for",
        metavar="SECONDS",
        type=duration,
        help="give up, with exit code 3, if the node is not ready within this time (default: "
        "never)",
    )
    parser.add_argument(
        "--stop-after",
        metavar="DURATION",
        type=duration,
        help="leave the cluster after this time: 90, 45m, 2h, 1d (default: never)",
    )
    for flag in flags:
        above, dot, _ = flag.key.rpartition(".")
        key = above if dot else None
        if groups.get(key) is None:
            groups[key] = parser.add_argument_group(named.get(key or "", key))  # type: ignore[assignment]
        flag.add_to(groups[key])  # type: ignore[arg-type]
    add_set(parser)


def any_flags(*further: str) -> list[Flag]:
    """Of the keys before any section that a node has, and of [log]."""
    wanted = {*OF_ANY_NODE, *further}
    found = [flag for flag in flags_of(None) if flag.key in wanted]
    found += flags_of("log")
    return [
        replace(flag, help=f"seconds that a stop may take in all (default: {STOP_TIMEOUT:g})")
        if flag.key == "stop_timeout"
        else flag
        for flag in found
    ]


def speak(role: str, flags: Iterable[Flag]) -> None:
    """Have every message name these options where it would name the keys of a file."""
    options = {flag.key: flag.option for flag in flags}
    setting.use_options({**options, "head.ssh": "HEAD"}, role)


def said(base: dict[str, Any], args: argparse.Namespace, flags: Sequence[Flag]) -> dict[str, Any]:
    """What is in `base` and what the options say, as a file would have it. Raises MistakeError."""
    data = _merged({**base, "stop_timeout": STOP_TIMEOUT}, given_by(args, flags))
    if args.cluster is not None:
        data["cluster"] = args.cluster
    return data


def configuration(data: dict[str, Any], flags: Sequence[Flag], what: str) -> Config:
    """What that amounts to. Raises MistakeError."""
    try:
        made = parse(data)
        # The daemon writes it down there, for `rayfwd status` and the other verbs.
        return parse(data, made.runtime_dir / RECORD)
    except ConfigError as exc:
        named = (p.replace("head.ssh = ", "HEAD ", 1) for p in exc.problems)
        lines = [f"rayfwd {what}: {as_option(p, flags)}" for p in named]
        raise MistakeError(lines) from None


def _merged(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    data = dict(base)
    for key, value in given.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        data[key] = {**base[key], **value} if both else value
    return data


def hold(configured: Callable[[], Config], args: argparse.Namespace, what_next: Next) -> int:
    """The exit code, when it has ended. `configured` says of what, and may be asked again."""
    config = configured()
    return first_process.run(
        lambda: _hold(config, configured, args, what_next), config.stop_timeout
    )


def _hold(
    config: Config,
    configured: Callable[[], Config],
    args: argparse.Namespace,
    what_next: Next,
) -> int:
    faulthandler.enable()
    screen = StatusLine(sys.stderr)
    logs.setup(config.log, stream=screen)  # type: ignore[arg-type]
    _say_of_logout(config)
    lifetime = Lifetime(args.wait_for, args.stop_after)

    def run(config: Config) -> int:
        return daemon.run(config, lifetime, Terminal(config, screen, what_next))

    try:
        try:
            return run(config)
        except ProblemError as exc:
            # A machine that shares this home was faster: now it is known that one does.
            again = configured() if exc.problem.code is codes.ALREADY_RUNNING else config
            if again.state_dir == config.state_dir:
                raise
            return run(again)
    except ProblemError:
        raise  # told by whoever called us
    except Exception:
        _log.error("rayfwd_fault", exc_info=True)
        return FAULT
    finally:
        screen.show("")


def _say_of_logout(config: Config) -> None:
    """Where a logout may end what a user has started."""
    uid = os.geteuid()
    if uid == 0 or not config.runtime_dir.is_relative_to(f"/run/user/{uid}"):
        return
    user = user_name(uid)
    if not (LINGER / user).exists():
        _log.warning(
            "linger_off",
            cause=f"{config.runtime_dir}, which has this node's sockets, is removed when {user} "
            "has logged out, and this process may be killed",
            remedy="run `loginctl enable-linger` once, if this node should stay after the logout",
        )


class StatusLine:
    """A stream for the log that keeps a line below it, where it leads to a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = ""
        self._terminal = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Whole lines. Raises OSError."""
        if self._shown:
            self._stream.write("\r\x1b[2K")
        size = self._stream.write(text)
        self._draw()
        return size

    def flush(self) -> None:
        self._stream.flush()

    def show(self, text: str) -> None:
        """In the place of what was shown before; empty: nothing."""
        if not self._terminal or text == self._shown:
            return
        with suppress(OSError, ValueError):  # a terminal that has gone
            if self._shown:
                self._stream.write("\r\x1b[2K")
            self._shown = text
            self._draw()
            self._stream.flush()

    def _draw(self) -> None:
        if self._shown:
            # One that reached the edge would begin another line.
            room = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\x1b[1m{escaped(self._shown)[:room]}\x1b[0m")


class Terminal:
    """What whoever started it is told (a `Front`)."""

    def __init__(self, config: Config, screen: StatusLine, what_next: Next) -> None:
        self._config = config
        self._screen = screen
        self._what_next = what_next

    def shown(self, summary: str) -> None:
        self._screen.show(f"{self._config.name}: {summary}")

    def stopping(self, kill: Callable[[], int], steps: Steps, code: int) -> None:
        if (seconds := self._config.stop_timeout) is not None:
            cut_short_after(seconds, kill, steps, code)

    def ready(self, status: Status) -> None:
        lines = "".join(f"{line}\n" for line in self._what_next(self._config, status))
        try:
            if self._screen.isatty() and sys.stdout.isatty():
                self._screen.write(lines)
                self._screen.flush()
            else:
                print(lines, end="", flush=True)
        except (OSError, ValueError):
            # A pipe whose reader has gone, a full disk: nobody reads that, and the node stays.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def spoken(config: Config, words: str) -> str:
    """A command of rayfwd's that finds this daemon."""
    verb, _, rest = words.partition(" ")
    where = ""
    if running_config(os.environ, config.cluster) != config.path:
        where = f" --config {config.path}"
    elif config.cluster is not None:
        where = f" --cluster {config.cluster}"
    return f"rayfwd {verb}{where} {rest}".rstrip()
