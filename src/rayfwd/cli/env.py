"""Print what a shell must export so that a driver and its libraries find the cluster.

For a shell: `eval "$(rayfwd env)"`. Variables that the shell has already are left out, so they keep
their values. For root, it is the environment of the user that runs rayfwd.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex

from rayfwd.cli import OK
from rayfwd.cli.common import control_socket, load_as_owner, quiet_logs
from rayfwd.cluster.environment import (
    ADDRESS_VARIABLES,
    FIXED_VARIABLES,
    INTERFACE_VARIABLES,
    SHARING_VARIABLES,
)
from rayfwd.config import Config
from rayfwd.ray import token
from rayfwd.system.control import ask

NAMES = frozenset(
    {
        "RAY_ADDRESS",
        "NO_PROXY",
        "no_proxy",
        token.MODE,
        token.PATH,
        *INTERFACE_VARIABLES,
        *ADDRESS_VARIABLES,
        *FIXED_VARIABLES,
        *SHARING_VARIABLES,
    }
)
"""What a daemon may say here: root's shell may run what this prints, and the daemon is another
user's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    config = load_as_owner(args)
    quiet_logs()
    added = additions(config)
    if args.json:
        print(json.dumps(added, indent=1))
    else:
        for name, value in added.items():
            print(f"export {name}={shlex.quote(value)}")
    return OK


def additions(config: Config) -> dict[str, str]:
    """What the running daemon says, without what this environment has. Raises ProblemError."""
    answer = ask(control_socket(config), "environment")
    told = {name: value for name, value in answer.items() if name in NAMES}
    proxies = {
        name: _joined(os.environ.get(name, ""), str(told[name]))
        for name in told
        if name.lower() == "no_proxy"
    }
    rest = {name: str(value) for name, value in told.items() if name not in os.environ}
    return dict(sorted((rest | proxies).items()))


def _joined(here: str, told: str) -> str:
    """Two lists of hosts for which no proxy is asked."""
    hosts = [host.strip() for host in f"{here},{told}".split(",")]
    return ",".join(dict.fromkeys(host for host in hosts if host))
