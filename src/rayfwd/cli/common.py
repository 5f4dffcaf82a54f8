"""What several verbs share: the file loaded, the daemon asked, words made safe to print."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from rayfwd import codes
from rayfwd.cli import MistakeError
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config, ConfigError, LogConfig, load
from rayfwd.doctor import unit_checks
from rayfwd.problems import ProblemError
from rayfwd.system import asuser, logs
from rayfwd.system.asuser import SystemUser
from rayfwd.system.paths import (
    RECORD,
    RECORD_BEGINS,
    find_socket,
    named_clusters,
    running_config,
    usual_config,
)


def _is_record(path: Path) -> bool:
    """Of a daemon that was started without a file."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").startswith(RECORD_BEGINS)
    return False


_STARTED_BY = {"head": "head", "worker": "join"}


def load_config(args: argparse.Namespace) -> Config:
    """The file of `--config`, or the usual one. Raises MistakeError."""
    path = config_path(args)
    try:
        config = load(path)
    except ConfigError as exc:
        raise MistakeError([*str(exc).splitlines(), *_others(args, path)]) from None
    speak_for(config)
    return config


def speak_for(config: Config) -> None:
    """Have messages name options where this is the configuration of a daemon without a file."""
    if config.path == config.runtime_dir / RECORD and _is_record(config.path):
        importlib.import_module(f"rayfwd.cli.{_STARTED_BY[config.role]}").speak()


def config_path(args: argparse.Namespace) -> Path:
    """The file of `--config`; else that of a daemon which was started without one, else the usual
    one."""
    if args.config is not None:
        return Path(args.config)
    running = running_config(os.environ, args.cluster)
    return running or usual_config(os.environ, args.cluster)


def _others(args: argparse.Namespace, path: Path) -> list[str]:
    """Where there is no file: what runs here without one, and could have been meant."""
    if args.config is not None or path.exists():
        return []
    found = []
    if names := named_clusters(os.environ):
        found.append(f"clusters of yours that run here: {', '.join(names)} (--cluster NAME)")
    if args.cluster is not None and running_config(os.environ) is not None:
        found.append("a cluster of yours without a name runs here: leave --cluster out")
    start = "start one with `rayfwd head`, `rayfwd join USER@HEAD` or `rayfwd init`"
    return found or [f"no rayfwd of yours runs here: {start}"]


def load_as_owner(args: argparse.Namespace) -> Config:
    """The same, for verbs that root says on behalf of the service.

    Root becomes whose files these are, for good, before it looks at them: the service's user, else
    whoever has a say about the file or the state directory. Raises MistakeError, ProblemError.
    """
    path = config_path(args)
    if os.geteuid() == 0 and (account := asuser.whose(path)) is not None:
        asuser.become(account)
    config = load_config(args)
    if os.geteuid() == 0 and (account := service_account(path, config)) is not None:
        asuser.become(account)
    return config


def service_account(path: Path, config: Config | None) -> SystemUser | None:
    """As root: on whose behalf that configuration is looked at; None: root's own.

    Raises ProblemError (directory_unusable, user_unknown).
    """
    unit = unit_checks.of(unit_checks.SYSTEM, path)
    if unit is not None and unit.user is not None:
        try:
            return asuser.account_named(unit.user)
        except KeyError:
            raise codes.USER_UNKNOWN.error(
                f"{unit.path} names the user {unit.user}, but that user does not exist",
                "correct User= there",
            ) from None
    found = asuser.whose(path)
    if found is None and config is not None:
        found = asuser.whose(config.state_dir)
    return found


def quiet_logs() -> None:
    """For verbs that print: only what is wrong is logged beside."""
    logs.setup(LogConfig(level="warning", format="text"))


def control_socket(config: Config) -> Path:
    """Where the daemon of this file listens."""
    if "runtime_dir" in config.model_fields_set:
        return config.control_socket
    return find_socket(config.control_socket.parent, config.control_socket.name)


def own_head_plan(config: Config) -> NodePlan:
    """The head's own plan. Raises MistakeError where the file leaves no room for it."""
    try:
        return config.own_head_plan()
    except ProblemError as exc:
        raise MistakeError([f"{config.path}: {exc}"]) from None


def table(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Left-aligned columns, two spaces between them."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        (indent + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
