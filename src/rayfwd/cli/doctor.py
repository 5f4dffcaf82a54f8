"""Check this machine, the way to the head, and Ray, before the first start or while a daemon runs.

It checks a node, or a client that has a file. If root runs it, it checks as the service's user.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from rayfwd import __version__, codes
from rayfwd.cli import FAULT, MISTAKE, OK, WARNED, MistakeError
from rayfwd.cli.common import config_path, control_socket, quiet_logs, service_account, speak_for
from rayfwd.cli.status import console
from rayfwd.config import Config, ConfigError, load, parse
from rayfwd.doctor import report
from rayfwd.doctor.examination import examine, of_a_mistake
from rayfwd.doctor.rows import Result, Row, document, summary, worst
from rayfwd.problems import ProblemError
from rayfwd.system import asuser
from rayfwd.system.asuser import ChildError, SystemUser, account_named
from rayfwd.system.logs import escaped

DOCTOR_TIMEOUT = 300.0
"""Seconds for all checks of another user's child; each has a bound of its own."""

_STYLES: dict[Result, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}

READ_TIMEOUT = 10.0
"""Seconds for a file to be read by another user."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON (docs/doctor.md)"
    )
    parser.add_argument(
        "--report",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="PATH",
        help="write a file for whoever helps you (mode 0600, secrets blanked):\nthis check, the "
        "configuration, versions, the status, the machine",
    )
    parser.add_argument(
        "--with-logs",
        action="store_true",
        help="with --report: add the journal's lines and Ray's output, which contain what "
        "jobs print",
    )
    parser.add_argument("--log", metavar="PATH", type=Path, help="with --report: add this log file")
    parser.add_argument(
        "--user", help="check as this user (root only; default: the service's user)"
    )


def run(args: argparse.Namespace) -> int:
    path = config_path(args)
    if args.log is not None and args.report is None:
        raise MistakeError(["rayfwd doctor: --log: needs --report"])
    if args.with_logs and args.report is None:
        raise MistakeError(["rayfwd doctor: --with-logs: needs --report"])
    account, config = _account(args.user, path)
    found = rows_of(path, account, _ignore if args.json else print_row)
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
        report.write(to, _report(path, config, account, whole, args))
        print(f"written: {to}", file=sys.stderr if args.json else sys.stdout)
    return exit_code(found)


def _report(
    path: Path,
    config: Config | None,
    account: SystemUser | None,
    found: dict[str, Any],
    args: argparse.Namespace,
) -> str:
    control = None if config is None else control_socket(config)
    logs = report.Logs(args.with_logs, args.log)
    return report.compose(report.Subject(path, config, control, os.environ, account), found, logs)


def exit_code(found: Sequence[Row]) -> int:
    if any(row.problem is not None and row.problem.code == codes.CONFIG_INVALID for row in found):
        return MISTAKE
    return {"fail": FAULT, "warn": WARNED}.get(worst(found), OK)


def load_if_valid(path: Path) -> Config | None:
    try:
        return load(path)
    except ConfigError:
        return None


def rows_of(path: Path, account: SystemUser | None, emit: Callable[[Row], None]) -> list[Row]:
    """All rows; each is emitted as it comes. `account`: as whom, if not as oneself.

    Raises ProblemError (rayfwd_not_executable).
    """
    return _own_rows(path, emit) if account is None else _rows_as(path, account, emit)


def _own_rows(path: Path, emit: Callable[[Row], None]) -> list[Row]:
    quiet_logs()
    try:
        config = load(path)
        speak_for(config)
        if config.role == "head":
            config.own_head_plan()
    except ConfigError as exc:
        mistakes = [f"{exc.path}: {line}" for line in exc.problems]
    except ProblemError as exc:
        mistakes = [f"{path}: {exc}"]
    else:
        return asyncio.run(examine(config, control_socket(config), os.environ, emit))
    row = of_a_mistake(mistakes, not _is_absent(path))
    emit(row)
    return [row]


def _is_absent(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:  # there, and not for this user
        return False
    return False


def _rows_as(path: Path, account: SystemUser, emit: Callable[[Row], None]) -> list[Row]:
    """In a child that is that user."""
    found: list[Row] = []

    def take(answer: Any) -> None:
        try:
            row = Row.from_wire(answer)
        except (KeyError, TypeError):
            raise ChildError("wrote an answer that is not a row") from None
        found.append(row)
        emit(row)

    proxies = {name: text for name, text in os.environ.items() if name.lower().endswith("_proxy")}
    asked = {"path": str(path)}
    asuser.call(account, emit_rows, asked, timeout=DOCTOR_TIMEOUT, env=proxies, emit=take)
    return found


def emit_rows(path: str, emit: Callable[[Any], None]) -> None:
    """In the child: the rows of that file, as they go over a wire."""
    _own_rows(Path(path), lambda row: emit(row.to_wire()))


def _account(asked: str | None, path: Path) -> tuple[SystemUser | None, Config | None]:
    """As whom to look, if not as oneself; and the configuration, read as whose it is."""
    if os.geteuid() != 0:
        if asked is not None:
            raise MistakeError([f"rayfwd doctor: --user {asked}: needs root"])
        return None, load_if_valid(path)
    owner = asuser.whose(path)
    config = load_if_valid(path) if owner is None else _load_as(owner, path)
    if asked is None:
        return service_account(path, config), config
    try:
        return account_named(asked), config
    except KeyError:
        raise MistakeError([f"rayfwd doctor: --user {asked}: there is no such user"]) from None


def _load_as(owner: SystemUser, path: Path) -> Config | None:
    text = asuser.call(owner, report.text_of, {"path": str(path)}, timeout=READ_TIMEOUT)
    try:
        return None if text is None else parse(tomllib.loads(text), path)
    except (ConfigError, ValueError):
        return None


def _ignore(row: Row) -> None:
    del row


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
