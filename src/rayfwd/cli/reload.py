"""Make the running daemon read its file again (`systemctl reload rayfwd`).

Keys that can change without an interruption take effect. The others are listed: they need a
restart. A file with a mistake changes nothing.
"""

from __future__ import annotations

import argparse

from rayfwd.cli import OK, MistakeError
from rayfwd.cli.common import control_socket, load_as_owner
from rayfwd.system.control import ask
from rayfwd.system.logs import escaped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but --config."""


def run(args: argparse.Namespace) -> int:
    config = load_as_owner(args)  # also where the daemon is
    answer = ask(control_socket(config), "reload")
    if mistakes := answer.get("mistakes"):
        raise MistakeError([str(line) for line in mistakes])
    for key in answer["changed"]:
        print(f"  changed   {escaped(key)}")
    for key in answer["kept"]:
        print(
            f"  kept      {escaped(key)}: takes effect after a restart (`systemctl restart rayfwd`)"
        )
    if not answer["changed"] and not answer["kept"]:
        print("Nothing has changed.")
    return OK
