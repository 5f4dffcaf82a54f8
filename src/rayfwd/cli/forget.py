"""On the head: drop a worker from the roster, so that its name, address and ports are free."""

from __future__ import annotations

import argparse

from rayfwd.cli import FAULT, OK, MistakeError
from rayfwd.cli.common import control_socket, load_config, own_head_plan, quiet_logs
from rayfwd.control import ask
from rayfwd.problems import ProblemError
from rayfwd.roster import Roster


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the worker's name, as `rayfwd plan` lists it")


def run(args: argparse.Namespace) -> int:
    config = load_config(args)
    name: str = args.name
    if config.role != "head":
        raise MistakeError(
            [f"{config.path}: forget is for the head; this file has role = 'worker'"]
        )
    quiet_logs()
    try:
        known = bool(ask(control_socket(config), "forget", {"name": name}).get("forgotten"))
    except ProblemError as exc:
        if exc.problem.code != "daemon_not_running":
            raise
        roster = Roster(
            config.roster_file, own_head_plan(config), config.hub.network, config.hub.port_base
        )
        known = roster.forget(name)
    if known:
        print(f"{name} is forgotten; it gets a new address when it joins again")
        return OK
    print(f"there is no worker named {name}; `rayfwd plan` lists them")
    return FAULT
