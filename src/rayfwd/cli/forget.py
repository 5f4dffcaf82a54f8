"""On the head: drop a worker from the roster, so that its name, address and ports are free."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

from rayfwd import codes
from rayfwd.cli import FAULT, OK, MistakeError
from rayfwd.cli.common import control_socket, load_as_owner, own_head_plan, quiet_logs
from rayfwd.config import Config
from rayfwd.daemon.resources import lock
from rayfwd.hub.roster import Roster
from rayfwd.problems import ProblemError
from rayfwd.system.control import ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the worker's name, as `rayfwd plan` lists it")


def run(args: argparse.Namespace) -> int:
    config = load_as_owner(args)
    name: str = args.name
    if config.role != "head":
        raise MistakeError(
            [f"{config.path}: forget is for the head; this file has role = '{config.role}'"]
        )
    quiet_logs()
    try:
        known = bool(ask(control_socket(config), "forget", {"name": name}).get("forgotten"))
    except ProblemError as exc:
        if exc.problem.code != codes.DAEMON_NOT_RUNNING:
            raise
        known = _forget_on_disk(config, name)
    if known:
        print(f"{name} is forgotten; it gets a new address when it joins again")
        return OK
    print(f"there is no worker named {name}; `rayfwd plan` lists them")
    return FAULT


def _forget_on_disk(config: Config, name: str) -> bool:
    """Raises ProblemError where a daemon that did not answer has the roster after all."""
    own = own_head_plan(config)
    held = config.state_dir / "lock"
    # Taken only where a daemon has made it: made here, it might belong to the wrong user.
    with lock(held, config.state_dir) if os.path.lexists(held) else nullcontext():
        roster = Roster(config.roster_file, own, config.hub.network, config.hub.port_base)
        return roster.forget(name)
