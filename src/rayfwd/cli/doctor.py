"""Look for what would keep this machine from working, before the first start or beside a daemon.

Of a node, or of a client by its file. As root, it looks as the service's user.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.text import Text

from rayfwd import __version__
from rayfwd.cli import FAULT, MISTAKE, OK, WARNED, MistakeError
from rayfwd.cli.common import control_socket, quiet_logs
from rayfwd.cli.status import console
from rayfwd.cluster.plan import PlanError
from rayfwd.config import Config, ConfigError, load
from rayfwd.doctor import report, unit_checks
from rayfwd.doctor.examination import examine, of_a_mistake
from rayfwd.doctor.rows import Result, Row, document, summary, worst
from rayfwd.problems import Problem, ProblemError
from rayfwd.setup.survey import Person, become, person_named
from rayfwd.system.logs import escaped
from rayfwd.system.paths import usual_config

_STYLES: dict[Result, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print all as JSON (docs/doctor.md)")
    parser.add_argument(
        "--report",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="PATH",
        help="write a file for whoever is to help (0600, no secrets in it):\n"
        "this, the configuration, versions, status, journal",
    )
    parser.add_argument(
        "--log", metavar="PATH", type=Path, help="with --report: the log, where it is a file"
    )
    parser.add_argument("--user", help="look as this user (root only; default: the service's user)")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    path: Path = args.config or usual_config(os.environ)
    if args.log is not None and args.report is None:
        raise MistakeError(["rayfwd doctor: --log: belongs to --report"])
    person = _person(args.user, path)
    config = load_if_valid(path)
    tell: Callable[[Row], None] = _quiet if args.json else _print_row
    if args.rows:
        tell = _print_wire
    found = look(path, person, tell)
    if args.rows:
        return OK
    whole = document(
        None if config is None else config.role,
        None if config is None else config.name,
        __version__,
        found,
    )
    if args.json:
        print(json.dumps(whole, indent=2))
    else:
        print(summary(found))
    if args.report is not None:
        to = (
            args.report
            if args.report != Path()
            else report.default_path(whole["name"], time.time())
        )
        control = None if config is None else control_socket(config)
        report.write(to, report.compose(path, config, control, os.environ, whole, args.log))
        print(f"written: {to}", file=sys.stderr if args.json else sys.stdout)
    return exit_code(found)


def exit_code(found: Sequence[Row]) -> int:
    if any(row.problem is not None and row.problem.code == "config_invalid" for row in found):
        return MISTAKE
    return {"fail": FAULT, "warn": WARNED}.get(worst(found), OK)


def load_if_valid(path: Path) -> Config | None:
    try:
        return load(path)
    except ConfigError:
        return None


def look(path: Path, person: Person | None, tell: Callable[[Row], None]) -> list[Row]:
    """All rows; each is told as it comes. `person`: as whom, if not as oneself.

    Raises ProblemError (rayfwd_not_executable).
    """
    return _look_here(path, tell) if person is None else _look_as(path, person, tell)


def _look_here(path: Path, tell: Callable[[Row], None]) -> list[Row]:
    quiet_logs()
    try:
        config = load(path)
        if config.role == "head":
            config.own_head_plan()
    except ConfigError as exc:
        mistakes = [f"{exc.path}: {line}" for line in exc.problems]
    except PlanError as exc:
        mistakes = [f"{path}: {exc}"]
    else:
        return asyncio.run(examine(config, control_socket(config), os.environ, tell))
    row = of_a_mistake(mistakes)
    tell(row)
    return [row]


def _look_as(path: Path, person: Person, tell: Callable[[Row], None]) -> list[Row]:
    """In a child that is that user."""
    env, ids = become(person)
    env |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    argv = [sys.executable, "-m", "rayfwd", "--config", str(path), "doctor", "--rows"]
    found = []
    try:
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd="/",
            **ids,
        ) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            for line in child.stdout:
                row = Row.from_wire(json.loads(line))
                found.append(row)
                tell(row)
            said = child.stderr.read().strip().splitlines()
        code = child.returncode
    except OSError as exc:
        said, code = [str(exc)], 1
    if code != OK:
        raise ProblemError(
            Problem(
                "rayfwd_not_executable",
                f"user {person.name} cannot run {sys.executable}: "
                f"{said[-1] if said else 'no output'}",
                "install rayfwd where that user may read it, as in /opt/rayfwd",
            )
        )
    return found


def _person(asked: str | None, path: Path) -> Person | None:
    if os.geteuid() != 0:
        if asked is not None:
            raise MistakeError([f"rayfwd doctor: --user {asked}: needs root"])
        return None
    unit = unit_checks.of(unit_checks.SYSTEM, path)
    name = asked or (None if unit is None else unit.user)
    if name is None:
        return None
    try:
        return person_named(name)
    except KeyError:
        raise MistakeError([f"rayfwd doctor: --user {name}: there is no such user"]) from None


def _quiet(row: Row) -> None:
    del row


def _print_wire(row: Row) -> None:
    print(json.dumps(row.to_wire()), flush=True)


def _print_row(row: Row) -> None:
    print_row(row)


def print_row(row: Row, indent: str = "") -> None:
    """A line, and the remedy below it where something is wrong."""
    code = f"{row.problem.code}: " if row.problem is not None else ""
    text = Text(indent)
    text.append(row.result, _STYLES[row.result])
    text.append(f"  {row.check:<14}  {escaped(code + row.said)}")
    out = console()
    out.print(text, soft_wrap=True)
    if row.problem is not None:
        out.print(Text(f"{indent}      {'do':<14}  {escaped(row.problem.remedy)}"), soft_wrap=True)
