"""On the head: remove machines that `rayfwd add` has brought into the cluster.

The machine drains its tasks and stops its daemon. What was installed and written there is removed,
and the head forgets its key, name, address and ports.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

from rayfwd.cli import MistakeError
from rayfwd.cli.add import JOBS, report, summary, tell_end
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
    parser.add_argument(
        "-f", "--file", metavar="FILE", type=Path, help="a file of machines, as for `rayfwd add -f`"
    )
    parser.add_argument(
        "--gone",
        action="store_true",
        help="the machine no longer exists: do not contact it, only forget it here",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=JOBS,
        help=f"how many machines at once (default: {JOBS})",
    )


def run(args: argparse.Namespace) -> int:
    wanted = _wanted(args)
    config = load_as_owner(args)
    quiet_logs()
    return summary(asyncio.run(_remove(config, wanted, args)), "removed")


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
    if args.jobs < 1:
        raise MistakeError([f"rayfwd remove: --jobs {args.jobs}: must be at least 1"])
    return list(dict.fromkeys(found))


async def _remove(config: Config, wanted: Sequence[str], args: argparse.Namespace) -> list[Outcome]:
    """Raises ProblemError where no head runs here."""
    head = await Head.find(config, control_socket(config))
    places = asyncio.Semaphore(args.jobs)

    async def one(text: str) -> Outcome:
        async with places:
            outcome = await removing.remove(head, text, args.gone, report)
        tell_end(outcome, "removed")
        return outcome

    return list(await asyncio.gather(*map(one, wanted)))
