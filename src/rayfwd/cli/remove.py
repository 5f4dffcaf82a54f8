"""On the head: remove machines that `rayfwd add` has brought into the cluster.

The machine drains its tasks and stops its daemon. What was installed and written there is removed,
and the head forgets its key, name, address and ports.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

from rayfwd.cli import MistakeError, many
from rayfwd.cli.common import control_socket, load_as_owner, quiet_logs
from rayfwd.config import Config
from rayfwd.setup.remote import hosts, removing
from rayfwd.setup.remote.adding import Outcome
from rayfwd.setup.remote.here import Head
from rayfwd.setup.remote.hosts import Host, HostsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "machines",
        metavar="NAME",
        nargs="*",
        help="a node's name, or USER@HOST[:PORT] as it was added",
    )
    many.add_arguments(parser, "a file of machines, as for `rayfwd add -f`")
    parser.add_argument(
        "--gone",
        action="store_true",
        help="the machine no longer exists: do not contact it, only forget it here",
    )


def run(args: argparse.Namespace) -> int:
    wanted = _wanted(args)
    config = load_as_owner(args)
    quiet_logs()
    return asyncio.run(_remove(config, wanted, args))


def _wanted(args: argparse.Namespace) -> list[str]:
    """Raises MistakeError."""
    found: list[str] = list(args.machines)
    if args.file is not None:
        try:
            found += [host.ssh for host in hosts.read(args.file, Host(ssh=""))]
        except HostsError as exc:
            raise MistakeError([f"rayfwd remove: {line}" for line in exc.lines]) from None
    if not found:
        raise MistakeError(["rayfwd remove: give a NAME, or a file of machines with -f"])
    if wrong := many.wrong_jobs(args.jobs):
        raise MistakeError([f"rayfwd remove: {line}" for line in wrong])
    return list(dict.fromkeys(found))


async def _remove(config: Config, wanted: Sequence[str], args: argparse.Namespace) -> int:
    """The exit code. Raises ProblemError where no head runs here."""
    head = await Head.find(config, control_socket(config))

    async def work(text: str, outcome: Outcome) -> None:
        await removing.remove(head, text, args.gone, many.report, outcome)

    return await many.at_once(wanted, str, work, args.jobs, "removed")
