"""On the head: remove a worker from the roster, so that its name, address and ports are free.

If Ray asks for a token, Ray gets a new one, because the forgotten node knows the old one. This
restarts Ray on every node, and everything that runs in the cluster is lost. --keep-token keeps it.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

from rayfwd import codes
from rayfwd.cli import FAULT, OK, MistakeError
from rayfwd.cli.common import control_socket, load_as_owner, own_head_plan, quiet_logs
from rayfwd.config import Config
from rayfwd.daemon.forgotten import KEPT, NAMED, OFF, TURNED, Forgotten
from rayfwd.daemon.resources import lock
from rayfwd.hub.roster import Roster
from rayfwd.problems import ProblemError
from rayfwd.ray import token
from rayfwd.system.control import ask
from rayfwd.system.logs import escaped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the worker's name, as `rayfwd plan` shows it")
    parser.add_argument(
        "--keep-token",
        action="store_true",
        help="keep Ray's token, and do not restart Ray: for a machine that you trust",
    )


def run(args: argparse.Namespace) -> int:
    config = load_as_owner(args)
    name: str = args.name
    if config.role != "head":
        raise MistakeError(
            [f"{config.path}: `forget` runs on the head; this file has role = '{config.role}'"]
        )
    quiet_logs()
    try:
        told = _forget(config, name, args.keep_token)
    except ProblemError as exc:
        if exc.problem.code != codes.DAEMON_NOT_RUNNING:
            raise
        told = _forget_on_disk(config, name, args.keep_token)
    if told is None:
        print(f"no worker is named {escaped(name)}; `rayfwd plan` shows the names")
        return FAULT
    print("\n".join(escaped(line) for line in told.lines()))
    return FAULT if told.token == NAMED else OK


def _forget(config: Config, name: str, keep_token: bool) -> Forgotten | None:
    """By the daemon. None: there is no such worker. Raises ProblemError."""
    answer = ask(control_socket(config), "forget", {"name": name, "keep_token": keep_token})
    told = answer.get("forgotten")
    if isinstance(told, bool):  # a daemon from before Ray's token was turned over
        return Forgotten(node=name) if told else None
    return None if told is None else Forgotten.from_wire(told)


def _forget_on_disk(config: Config, name: str, keep_token: bool) -> Forgotten | None:
    """Raises ProblemError where a daemon that did not answer has the roster after all."""
    own = own_head_plan(config)
    held = config.state_dir / "lock"
    # Taken only where a daemon has made it: made here, it might belong to the wrong user.
    with lock(held, config.state_dir) if os.path.lexists(held) else nullcontext():
        roster = Roster(config.roster_file, own, config.hub.network, config.hub.port_base)
        if not roster.knows(name):
            return None
        fate, variable = _token_on_disk(config, keep_token)
        roster.forget(name)
        return Forgotten(node=name, token=fate, variable=variable, daemon=False)


def _token_on_disk(config: Config, keep_token: bool) -> tuple[str, str | None]:
    """What became of Ray's token, and the variable that names it. Raises ProblemError."""
    variable = token.named_by({**os.environ, **config.ray.env})
    kept = token.kept_auth(config.state_dir)
    if kept is None or kept.mode == "off":
        return OFF, None
    if keep_token:
        return KEPT, None
    if variable is not None:
        return NAMED, variable
    token.turn_over(config.home_environment(os.environ), config.state_dir)
    return TURNED, None
