"""Join a cluster from any machine that has Python and Ray: no file, no root, no systemd.

It logs in on the head as `ssh` would, with your keys and agent. It runs in the foreground until
Ctrl-C, SIGTERM or --stop-after. Then Ray ends its tasks as far as --stop-timeout allows, and the
cluster is told at once. As process 1 of a container it reaps processes and passes signals on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayfwd.cli import chosen, front
from rayfwd.cli.connect import with_port
from rayfwd.cli.flags import DIRECT, Flag, direct_flag, flags_of
from rayfwd.config import Config
from rayfwd.status import Status


def _flags() -> list[Flag]:
    return [
        *front.any_flags("ephemeral"),
        direct_flag(),
        *flags_of("head", leave_out=["ssh"]),
        *flags_of("ray", leave_out=["port", "client_port", "dashboard_port", "status_interval"]),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "head", metavar="HEAD", help="user@host, user@host:port, or an alias of ~/.ssh/config"
    )
    parser.add_argument("-p", "--port", metavar="PORT", type=int, help="the head's SSH port")
    front.add_arguments(parser, _flags(), "head", "Ray here")


def speak() -> None:
    """See `front.speak`."""
    front.speak("worker", _flags())


def run(args: argparse.Namespace) -> int:
    flags = _flags()
    speak()
    _make_absolute(args, flags)
    ssh = with_port("join", args.head, args.port)
    base = {"role": "worker", "head": {"ssh": ssh, "via": "auto"}}
    data = front.said(base, args, flags)
    _share_login(data)

    def configured() -> Config:
        config = front.configuration(data, flags, "join")
        return front.configuration(chosen.beside(config, data), flags, "join")

    return front.hold(configured, args, what_next)


def _share_login(data: dict[str, Any]) -> None:
    """The key and the SSH configuration that are named hold for other workers too."""
    shared = {key: data["head"][key] for key in ("identity", "ssh_config") if key in data["head"]}
    if DIRECT in data and isinstance(data[DIRECT], list):
        data[DIRECT] = [{**shared, **way} if isinstance(way, dict) else way for way in data[DIRECT]]


def _make_absolute(args: argparse.Namespace, flags: Sequence[Flag]) -> None:
    """Files as the shell has them: below the directory in which this was said."""
    for flag in flags:
        given = getattr(args, flag.dest)
        if flag.kind == "path" and given and flag.key != "head.socket":
            setattr(args, flag.dest, str(Path(os.path.abspath(os.path.expanduser(given)))))


def what_next(config: Config, status: Status) -> list[str]:
    """How to work here, and how to leave."""
    seconds = config.stop_timeout or front.STOP_TIMEOUT
    own = status.node.address if status.node is not None else config.name
    nodes = len(status.roster)
    return [
        f"To run a job from here ({own}, {nodes} nodes): "
        + front.spoken(config, "exec -- python your_job.py"),
        f"To leave: Ctrl-C, or `kill -TERM {status.pid}`; tasks here have up to {seconds:g} s to "
        "end (--stop-timeout)",
    ]
