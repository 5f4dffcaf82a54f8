"""On the head: bring machines into the cluster over SSH, several at once.

For each machine, this installs rayfwd (and with --ray also the head's Ray) over the same SSH
connection, writes its files and keys, and starts its daemon. If the login is root and systemd runs
there, that is a system service; if lingering is enabled for the user, a service of that user;
otherwise a process in the background with a log file. The machine dials the head, or the head dials
the machine, whichever works. If you run it again, it does what is missing and changes nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.cli import MistakeError, many
from rayfwd.cli.common import control_socket, load_as_owner, quiet_logs
from rayfwd.cli.flags import add_set, duration, given_by
from rayfwd.config import Config, ConfigError, parse
from rayfwd.setup.remote import adding, hosts
from rayfwd.setup.remote.adding import Adding, Outcome
from rayfwd.setup.remote.here import Head
from rayfwd.setup.remote.hosts import VIAS, Host, HostsError
from rayfwd.setup.remote.shipment import pack

WAIT_FOR = 180.0

OWN_KEYS = {
    "name": "--name",
    "head.ssh": "--head",
    "head.dialled": "--via",
    "ray.command": "--ray-command",
    **dict.fromkeys(("role", "cluster", "state_dir", "runtime_dir"), ""),
    **dict.fromkeys(("head.identity", "head.known_hosts", "head.via", "head.attach_command"), ""),
}
"""Keys of a machine's file that follow from how it is added, and the options that they have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "machines",
        metavar="USER@HOST[:PORT]",
        nargs="*",
        help="how ssh reaches the machine, or an alias of ~/.ssh/config",
    )
    many.add_arguments(
        parser,
        "a file of machines, one per line: USER@HOST[:PORT], then its own --port, --name, --via, "
        "--ray, --ray-command, --identity, --known-hosts, --fingerprint, --prefix or --head; "
        "# begins a comment",
    )
    parser.add_argument(
        "-p",
        "--port",
        metavar="PORT",
        type=int,
        help="the SSH port, where USER@HOST has none (in a file, each line may have its own)",
    )
    parser.add_argument(
        "--name", help="the node's name in the cluster (default: the machine's host name)"
    )
    parser.add_argument(
        "--via",
        choices=VIAS,
        default="auto",
        help="who dials: the worker or the head (default: the worker, if it can reach the head)",
    )
    parser.add_argument(
        "--head",
        metavar="USER@HOST[:PORT]",
        help="how the machine reaches this head (default: found automatically)",
    )
    parser.add_argument(
        "--ray",
        action="store_true",
        help="install the head's version of Ray there, with the same Python",
    )
    parser.add_argument(
        "--ray-command",
        metavar="PATH",
        help="path of the `ray` command there (default: searched for)",
    )
    parser.add_argument("-i", "--identity", metavar="FILE", type=Path, help="the SSH key to use")
    parser.add_argument(
        "-F",
        "--ssh-config",
        metavar="FILE",
        type=Path,
        help="the only SSH configuration to read, as with `ssh -F`",
    )
    parser.add_argument(
        "--known-hosts",
        metavar="FILE",
        type=Path,
        help="the only file in which the machine's host key is looked up",
    )
    parser.add_argument(
        "--fingerprint",
        metavar="SHA256:…",
        help="the machine's host key has this fingerprint; the key is then added to the known "
        "hosts",
    )
    parser.add_argument(
        "--prefix",
        metavar="PATH",
        help="where rayfwd is installed there (default: /opt/rayfwd for root, else "
        "~/.local/share/rayfwd)",
    )
    parser.add_argument(
        "--wait-for",
        metavar="SECONDS",
        type=duration,
        default=WAIT_FOR,
        help="how long a machine may take from its start until it is in the cluster (default: "
        f"{WAIT_FOR:g})",
    )
    add_set(parser)


def run(args: argparse.Namespace) -> int:
    wanted = _hosts(args)
    config = load_as_owner(args)
    quiet_logs()
    return asyncio.run(_add(config, wanted, args))


def _hosts(args: argparse.Namespace) -> list[Host]:
    """Raises MistakeError."""
    if not args.machines and args.file is None:
        raise MistakeError(["rayfwd add: give USER@HOST, or a file of machines with -f"])
    more = given_by(args, [])
    usual = Host(
        ssh="",
        via=args.via,
        ray=args.ray,
        ray_command=args.ray_command,
        identity=hosts.absolute(args.identity),
        known_hosts=hosts.absolute(args.known_hosts),
        ssh_config=hosts.absolute(args.ssh_config),
        fingerprint=args.fingerprint,
        prefix=args.prefix,
        head=args.head,
        more=more,
    )
    wrong: list[str] = []
    if args.name is not None and (len(args.machines) != 1 or args.file is not None):
        wrong.append("--name: is for one machine; in a file, each line may have its own")
    if args.port is not None and not args.machines:
        wrong.append("--port: is for machines of the command line; each line may have its own")
    wrong += _keys_of_ours(more)
    try:
        parse(
            {"role": "worker", "name": "a", **more, "head": {"ssh": "head", **more.get("head", {})}}
        )
        places = [hosts.at_port(ssh, args.port) for ssh in args.machines]
        named = [replace(usual, ssh=ssh, name=args.name) for ssh in places]
        found = [hosts.checked(host) for host in named]
        if args.file is not None:
            found += hosts.read(args.file, usual)
        wrong += hosts.twice(found)
    except ConfigError as exc:
        wrong += [f"--set: {line}" for line in exc.problems]
    except HostsError as exc:
        wrong += exc.lines
    except ValueError as exc:
        wrong.append(str(exc))
    wrong += many.wrong_jobs(args.jobs)
    if wrong:
        raise MistakeError([f"rayfwd add: {line}" for line in wrong])
    return found


def _keys_of_ours(more: Mapping[str, Any]) -> Iterator[str]:
    """Keys that --set names and must not."""
    for key, option in OWN_KEYS.items():
        section, _, last = key.rpartition(".")
        if last in (more.get(section, {}) if section else more):
            yield f"--set {key}: cannot be set here" + f"; use {option}" * bool(option)


def _space() -> tempfile.TemporaryDirectory[str]:
    """For what is packed here. Raises ProblemError."""
    try:
        return tempfile.TemporaryDirectory(prefix="rayfwd-add-")
    except OSError as exc:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"there is no room here for what is sent: {exc.strerror or exc}",
            "make room in /tmp, or name another directory in the variable TMPDIR",
        ) from None


async def _add(config: Config, wanted: Sequence[Host], args: argparse.Namespace) -> int:
    """The exit code. Raises ProblemError where this is no head that runs."""
    head = await Head.find(config, control_socket(config))
    with _space() as folder:
        shipment = await asyncio.to_thread(pack, Path(folder))
        shared = Adding(head, shipment, Path(folder), args.wait_for, many.report)

        async def work(host: Host, outcome: Outcome) -> None:
            await adding.add(shared, host, outcome)

        return await many.at_once(
            wanted, lambda host: host.name or host.ssh, work, args.jobs, "in the cluster"
        )
