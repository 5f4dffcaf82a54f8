"""Make the head's dashboard, Ray Client and page available on this machine, which is no node.

It needs SSH access to the head (a key or an agent, and the head's host key in known_hosts), but no
root and no file. It runs until Ctrl-C. When the link is lost, it dials again and holds what is
open, as a worker does. The head lists it under this machine's host name.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
from pathlib import Path
from typing import Any

from rayfwd.cli import OK, MistakeError
from rayfwd.cli.common import config_path, load_config
from rayfwd.client import Client
from rayfwd.config import DEFAULT_PATH, Config, ConfigError, LogConfig, parse
from rayfwd.setup.remote.hosts import at_port
from rayfwd.system import logs, setting
from rayfwd.system.malloc import keep_freed
from rayfwd.transport.tracing import tracing

_OPTIONS = {
    "head.ssh": "HEAD",
    "head.identity": "--identity",
    "head.socket": "--socket",
    "head.meet": "--meet",
    "head.via": "--via",
    "client.dashboard_port": "--dashboard-port",
    "client.client_port": "--client-port",
    "client.page_port": "--page-port",
    "forward": "--forward",
}
"""Which option gives a key of the configuration."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "head",
        metavar="HEAD",
        nargs="?",
        help="user@host, user@host:port, or an alias of ~/.ssh/config (default: from the "
        'configuration file with role = "client")',
    )
    parser.add_argument("-p", "--port", metavar="PORT", type=int, help="the head's SSH port")
    parser.add_argument(
        "-i",
        "--identity",
        metavar="FILE",
        help="the private key to use (default: as ssh would choose)",
    )
    parser.add_argument(
        "--via",
        choices=["socket", "exec"],
        help="how to reach the hub there: by its socket, or by running `rayfwd attach`\n(default: "
        "the socket, else the command)",
    )
    parser.add_argument(
        "--socket", metavar="PATH", help="the hub's socket there (default: /run/rayfwd/hub.sock)"
    )
    parser.add_argument(
        "--meet",
        metavar="USER@HOST",
        help="a third host to log in to, where the head waits ([[hub.meet]] in its file);\n"
        "HEAD then gives the user at the head, and the name of its host key",
    )
    parser.add_argument(
        "--dashboard-port",
        metavar="PORT",
        type=int,
        help="port of the dashboard on 127.0.0.1 (default: 8265, or the next free one)",
    )
    parser.add_argument(
        "--client-port",
        metavar="PORT",
        type=int,
        help="port of Ray Client on 127.0.0.1 (default: 10001, or the next free one)",
    )
    parser.add_argument(
        "--page-port",
        metavar="PORT",
        type=int,
        help="port of the head's page in the browser on 127.0.0.1\n(default: 9480, or the next "
        "free one)",
    )
    parser.add_argument(
        "--forward",
        metavar="LISTEN=TO",
        action="append",
        default=[],
        help="one more port of the head, as in 8000=head:8000; `expose` in the head's file "
        "must have it",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="write the log to standard error"
    )


def run(args: argparse.Namespace) -> int:
    config = _config(args)
    if config.path == DEFAULT_PATH:
        setting.use_options(_OPTIONS, "client", has_set=False)
    if args.verbose or "log" in config.model_fields_set:
        logs.setup(config.log)
        tracing.follow(config.log.level)
        return hold(config)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        # What a person should know of it is said besides, in sentences.
        logs.setup(LogConfig(level="error"), stream=nowhere)
        return hold(config)


def hold(config: Config) -> int:
    """Until SIGTERM or Ctrl-C. Raises ProblemError where it cannot begin."""
    keep_freed()
    asyncio.run(Client(config, lambda line: print(line, flush=True)).run())
    return OK


def _config(args: argparse.Namespace) -> Config:
    """What file and options amount to. Raises MistakeError."""
    given = _given(args)
    if args.config is None and (args.head or not config_path(args).exists()):
        if args.head is None:
            raise MistakeError(
                ["rayfwd connect: name the head, as in `rayfwd connect ray@head.example.org`"]
            )
        named = {} if args.cluster is None else {"cluster": args.cluster}
        return _parsed({"role": "client", "name": _own_name(), **named}, given)
    config = load_config(args)
    if config.role != "client":
        raise MistakeError(
            [
                (
                    f'{config.path}: role = "{config.role}": must be "client"; or name the head '
                    "on the command line"
                )
            ]
        )
    return _parsed(config.model_dump(mode="json", exclude_unset=True), given) if given else config


def _parsed(base: dict[str, Any], given: dict[str, Any]) -> Config:
    data = dict(base)
    for key, value in given.items():
        data[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    try:
        return parse(data)
    except ConfigError as exc:
        raise MistakeError([f"rayfwd connect: {_as_option(p)}" for p in exc.problems]) from None


def _as_option(problem: str) -> str:
    """A mistake with the option that it came by instead of the key."""
    key = re.match(r"[\w.]+", problem)
    option = _OPTIONS.get(key[0]) if key is not None else None
    return problem if key is None or option is None else option + problem[key.end() :]


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options in the terms of the file."""
    head = {
        "ssh": with_port("connect", args.head, args.port) if args.head or args.port else None,
        "identity": args.identity and str(Path(args.identity).expanduser().absolute()),
        "socket": args.socket,
        "via": args.via,
        "meet": args.meet,
    }
    ports = {
        "dashboard_port": args.dashboard_port,
        "client_port": args.client_port,
        "page_port": args.page_port,
    }
    given = {
        "head": {key: value for key, value in head.items() if value is not None},
        "client": {key: value for key, value in ports.items() if value is not None},
        "forward": [_forward(text) for text in args.forward],
    }
    return {key: value for key, value in given.items() if value}


def with_port(verb: str, head: str | None, port: int | None) -> str:
    """The head of `--port`. Raises MistakeError."""
    if head is None:
        raise MistakeError([f"rayfwd {verb}: --port: needs the head as well"])
    try:
        return at_port(head, port)
    except ValueError as exc:
        raise MistakeError([f"rayfwd {verb}: {exc}"]) from None


def _forward(text: str) -> dict[str, str]:
    """`8000=head:8000`, with an address before the first port where it is not 127.0.0.1."""
    listen, equals, to = text.partition("=")
    if not (equals and listen and to):
        raise MistakeError(
            [f"rayfwd connect: --forward {text}: must be LISTEN=TO, as in 8000=head:8000"]
        )
    return {
        "listen": listen if ":" in listen else f"127.0.0.1:{listen}",
        "to": to if ":" in to else f"head:{to}",
    }


def _own_name() -> str:
    """This host's name, as far as a node could have it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().split(".")[0])[:63]
    return name.strip("._-") or "client"
