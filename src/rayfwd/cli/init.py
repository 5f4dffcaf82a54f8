"""Set this machine up: user, configuration, SSH key, the head's host key, and the service.

As root, this creates a system service; as any other user, a service of that user (`systemctl
--user`). Running it again is safe: it changes nothing that is already set up, and never overwrites
what was edited.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rayfwd import codes
from rayfwd.cli import OK, doctor, init_answers, init_words
from rayfwd.config import Config
from rayfwd.doctor.rows import Row, worst
from rayfwd.doctor.unit_checks import OVERLAY_SERVICE
from rayfwd.setup import texts, units
from rayfwd.setup.apply import Applied, apply, service_runs
from rayfwd.setup.manifest import Manifest
from rayfwd.setup.places import find_places
from rayfwd.setup.planner import plan
from rayfwd.setup.request import Layout, SetupRequest
from rayfwd.setup.survey import Survey
from rayfwd.system.asuser import account_named
from rayfwd.system.users import named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("role", choices=["head", "worker"])
    parser.add_argument(
        "--head", metavar="USER@HOST", help="worker only: how ssh reaches the head (user@host)"
    )
    parser.add_argument(
        "--dialled",
        action="store_true",
        help="worker only: the head dials this machine; this machine dials nobody",
    )
    parser.add_argument(
        "--head-key",
        metavar="KEY",
        help="with --dialled: the head's public key, for the line that is printed",
    )
    parser.add_argument(
        "--meet",
        metavar="USER@HOST",
        help="a third host that both the head and the workers can log in to, if\nneither accepts "
        "SSH from the other; use it on both",
    )
    parser.add_argument(
        "--direct",
        metavar="NODE=USER@HOST",
        action="append",
        default=[],
        help="worker only: another worker that this one may log in to; streams\nbetween the two "
        "then go there directly",
    )
    parser.add_argument(
        "--peer-key",
        metavar="KEY",
        action="append",
        default=[],
        help="worker only: the public key of another worker that dials this one\ndirectly, for "
        "the line that is printed",
    )
    parser.add_argument(
        "--ray", metavar="PATH", help="the `ray` command (default: rayfwd searches for it)"
    )
    parser.add_argument("--name", help="this node's name (default: the host name)")
    parser.add_argument(
        "--user",
        help="the user that runs rayfwd and Ray (root only; default: the user that\nowns the ray "
        "command, else rayfwd, which is created)",
    )
    parser.add_argument(
        "--login",
        metavar="USER",
        action="append",
        default=[],
        help="head only: another user that workers log in as",
    )
    parser.add_argument(
        "--identity",
        metavar="PATH",
        type=Path,
        help="the SSH key to use: of a worker, or of a head with --meet\n(default: a new one is "
        "created)",
    )
    parser.add_argument(
        "--head-rayfwd",
        metavar="PATH",
        help="worker only: path of `rayfwd` on the head (default: as on this machine)",
    )
    parser.add_argument(
        "--fingerprint",
        metavar="SHA256:…",
        help="worker only: fingerprint of the head's host key; rayfwd then asks no question",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show every step, and change nothing"
    )


def run(args: argparse.Namespace) -> int:
    init_answers.check_options(args)
    layout = find_places(args.config)
    before = init_answers.config_before(layout.config, args.role)
    shipped = units.shipped()
    manifest = Manifest(layout.manifest)
    by_hand = before is not None and manifest.of(str(layout.config)) is None
    request, seen = init_answers.request_of(args, layout, before, by_hand)
    _print_found(request, seen, layout, before)

    def report(came: str, thing: str) -> None:
        print(f"  {came:<9} {thing}")

    had_overlay = (layout.units / OVERLAY_SERVICE).exists()
    outcome = apply(plan(request, layout, shipped), manifest, layout, args.dry_run, report)
    _print_outcome(outcome, layout, args.dry_run)
    new_key = str(layout.identity) in outcome.changed
    failing = False if args.dry_run else _doctor(request, layout, new_key)
    _print_for_machines(args, request, layout, seen, outcome.kept)
    renewed = any(name.startswith(f"{layout.units}/") for name in outcome.changed)
    if renewed and service_runs(layout):
        init_words.print_restart(layout, had_overlay, before, request.role)
        return OK
    waits = (
        " (the service waits until what fails above is corrected, and then goes on)"
        if failing
        else ""
    )
    print(f"\nNext, here{waits}:\n")
    print(f"    {texts.next_command(layout)}")
    return OK


def _print_found(
    request: SetupRequest, seen: Survey, layout: Layout, before: Config | None
) -> None:
    kind = "the machine's service" if layout.system else "a service of this user"
    print(f"{request.role}, named {request.name}: {kind}, run by {request.user}")
    if seen.ray_versions:
        print(f"  {'found':<9} {seen.ray}: {seen.ray_versions}")

    if request.auth == "token" and before is None:
        others = named(init_answers.others(request.user))
        print(
            f'  {"chosen":<9} ray.auth = "token", because {others} may log in here: Ray asks for '
            f'a token, which rayfwd hands out; set "auto" in {layout.config} to undo this'
        )


def _print_outcome(outcome: Applied, layout: Layout, dry_run: bool) -> None:
    if not outcome.changed:
        print("Nothing had to be done: everything exists already.")
    elif dry_run:
        print("Nothing was changed (--dry-run).")
    if layout.system and not layout.overlay:
        print(
            "The overlay network was left out: users other than root could change\n"
            f"{layout.command}, so root does not run it.\nTo get the overlay, install rayfwd in "
            "a directory that only root can change (docs/overlay.md)."
        )
    for kept in outcome.kept:
        print(
            f"{kept} was left as it is, because it was edited or `rayfwd init` did not create it."
        )


def _print_for_machines(
    args: argparse.Namespace,
    request: SetupRequest,
    layout: Layout,
    seen: Survey,
    kept: Sequence[str],
) -> None:
    """What is left to do by hand, on this machine and on others."""
    if request.role == "head":
        init_words.print_for_head(request, layout, seen)
    else:
        init_words.print_for_worker(request, layout, seen, args.head_key)
        file_was_kept = str(layout.config) in kept
        init_words.print_for_others(request, layout, seen, args.direct, file_was_kept)
        for key in args.peer_key:
            init_words.print_peer(request, layout, key)
    if not request.by_hand:
        print("\nWhat firewalls must let in (TCP), and nothing else:\n")
        lines = texts.to_open(request, bool(args.peer_key))
        print(textwrap.indent("\n".join(lines), "    "))
    if not layout.system:
        print("\nTo let the service start at boot and run after you log out, run this once:\n")
        print(f"    loginctl enable-linger {request.user}")


def _doctor(request: SetupRequest, layout: Layout, new_key: bool) -> bool:
    """How it looks now, as the service's user; whether something fails. `new_key`: nobody can know
    it yet."""
    print("\nHealth check (`rayfwd doctor` repeats it):\n")
    sys.stdout.flush()

    def show(row: Row) -> None:
        problem = row.problem
        if new_key and problem is not None and problem.code == codes.SSH_AUTH_REFUSED:
            remedy = "add the line below to authorized_keys there: this machine's key is new"
            row = replace(row, problem=problem.code.problem(problem.cause, remedy))
        doctor.print_row(row, "  ")

    return worst(doctor.rows_of(layout.config, account_named(request.user), show)) == "fail"
