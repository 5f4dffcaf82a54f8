"""Set this machine up: user, configuration, SSH key, the head's host key, and the service.

As root, this creates a system service; as any other user, a service of that user (`systemctl
--user`). Running it again is safe: it changes nothing that is already set up, and never overwrites
what was edited.
"""

from __future__ import annotations

import argparse
import os
import pwd
import socket
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import asyncssh

from rayfwd import codes
from rayfwd.cli import OK, MistakeError, doctor
from rayfwd.cluster.plan import check_name
from rayfwd.config import Config, ConfigError, HeadConfig, load, parse
from rayfwd.doctor.rows import worst
from rayfwd.doctor.unit_checks import OVERLAY_SERVICE, SERVICE
from rayfwd.problems import ProblemError
from rayfwd.setup import texts, units
from rayfwd.setup.apply import apply, service_runs
from rayfwd.setup.manifest import Manifest
from rayfwd.setup.places import find_places
from rayfwd.setup.planner import plan
from rayfwd.setup.request import (
    GROUP,
    Layout,
    SetupRequest,
)
from rayfwd.setup.steps import public_key
from rayfwd.setup.survey import Survey, survey
from rayfwd.ssh.ownssh import KEY_FILE
from rayfwd.system.asuser import SystemUser, account_named, account_of, own_account
from rayfwd.system.users import NOBODY, named, who_else_logs_in

_HOST_KEYS = ("ed25519", "ecdsa", "rsa")
"""In the order in which a worker asks for them (`ssh.HOST_KEY_TYPES`)."""


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
    _check_flags(args)
    layout = find_places(args.config)
    before = _config_before(layout.config, args.role)
    shipped = units.shipped()
    manifest = Manifest(layout.manifest)
    by_hand = before is not None and manifest.of(str(layout.config)) is None
    request, seen = _request(args, layout, before, by_hand)
    kind = "the machine's service" if layout.system else "a service of this user"
    print(f"{args.role}, named {request.name}: {kind}, run by {request.user}")
    if seen.ray_versions:
        print(f"  {'found':<9} {seen.ray}: {seen.ray_versions}")

    if request.auth == "token" and before is None:
        others = named(_others(request.user))
        print(
            f'  {"chosen":<9} ray.auth = "token", because {others} may log in here: Ray asks for '
            f'a token, which rayfwd hands out; set "auto" in {layout.config} to undo this'
        )

    def report(came: str, thing: str) -> None:
        print(f"  {came:<9} {thing}")

    had_overlay = (layout.units / OVERLAY_SERVICE).exists()
    outcome = apply(plan(request, layout, shipped), manifest, layout, args.dry_run, report)
    if not outcome.changed:
        print("Nothing had to be done: everything exists already.")
    elif args.dry_run:
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
    failing = False if args.dry_run else _doctor(request, layout)
    if args.role == "head":
        _print_for_workers(request, layout)
        if request.meet is not None:
            _print_head_meeting(request, layout, seen)
    elif request.head is None:
        _print_dialled(request, layout, args.head_key or "(the head's public key)")
    elif not by_hand:
        own = seen.public_key if request.identity else public_key(layout.identity)
        _print_for_head(request, seen.login, own or "(the key that will be created)")
        if request.meet is not None:
            _print_meeting(request, own or "(the same key)")
            host = HeadConfig(ssh=request.head or "").ssh_target()[1]
            print(
                f"\nAdd the head's host key to ~{request.user}/.ssh/known_hosts on this machine. "
                "The head's own\n`rayfwd init` printed the line:\n"
            )
            print(f"    {host} ssh-ed25519 AAAA…")
    if args.role == "worker":
        own = seen.public_key if request.identity else public_key(layout.identity)
        asked = _only(request, args.direct)
        if asked.direct and (by_hand or str(layout.config) in outcome.kept):
            print(f"\nAdd this at the end of {layout.config}:\n")
            print(textwrap.indent(texts.direct_text(asked, layout), "    "))
        _print_direct(asked if by_hand else request, layout, own or "(this machine's public key)")
        for key in args.peer_key:
            _print_peer(request, layout, key)
    if not by_hand:
        print("\nWhat firewalls must let in (TCP), and nothing else:\n")
        lines = texts.to_open(request, bool(args.peer_key))
        print(textwrap.indent("\n".join(lines), "    "))
    if not layout.system:
        print("\nTo let the service start at boot and run after you log out, run this once:\n")
        print(f"    loginctl enable-linger {request.user}")
    renewed = any(name.startswith(f"{layout.units}/") for name in outcome.changed)
    if renewed and service_runs(layout):
        _print_restart(layout, had_overlay, before, request.role)
        return OK
    waits = (
        " (the service waits until what fails above is corrected, and then goes on)"
        if failing
        else ""
    )
    print(f"\nNext, here{waits}:\n")
    print(f"    {texts.next_command(layout)}")
    return OK


def _print_restart(layout: Layout, had_overlay: bool, before: Config | None, role: str) -> None:
    """What is left to do where the service runs by other units than are there now."""
    wanted = before is None or before.network.level != "listeners"
    if layout.overlay and not had_overlay and wanted:
        cost = (
            "what runs in it.\nNo other node's is."
            if role == "worker"
            else "every job\nof the cluster: the workers' Ray joins the new one."
        )
        print(
            "\nThe next restart of rayfwd gives this node the overlay network, if the machine "
            "allows it\n(docs/overlay.md). This node's Ray is then restarted once, which ends "
            f"{cost}"
        )
    print("\nNext, run this here to use what is new:\n")
    print(f"    {texts.restart_command(layout, had_overlay)}")


def _doctor(request: SetupRequest, layout: Layout) -> bool:
    """How it looks now, as the service's user; whether something fails."""
    print("\nHealth check (`rayfwd doctor` repeats it):\n")
    sys.stdout.flush()
    found = doctor.rows_of(
        layout.config, account_named(request.user), lambda row: doctor.print_row(row, "  ")
    )
    return worst(found) == "fail"


def _check_flags(args: argparse.Namespace) -> None:
    other = {
        "head": ("head", "head_rayfwd", "fingerprint", "dialled", "head_key", "direct", "peer_key"),
        "worker": ("login",),
    }
    wrong = [
        f"--{name.replace('_', '-')}: only for a {'worker' if args.role == 'head' else 'head'}"
        for name in other[args.role]
        if getattr(args, name)
    ]
    if args.role == "head" and args.identity and not args.meet:
        wrong.append("--identity: only for a worker, or with --meet")
    if args.user and os.geteuid() != 0:
        wrong.append(f"--user {args.user}: needs root; without root, the service belongs to you")
    if wrong:
        raise MistakeError([f"rayfwd init {args.role}: {line}" for line in wrong])


def _config_before(path: Path, role: str) -> Config | None:
    """What an earlier run has written, whose answers hold again; None where there is none."""
    if not path.exists():
        return None
    try:
        before = load(path)
    except ConfigError as exc:
        raise MistakeError(str(exc).splitlines()) from None
    if before.role != role:
        raise MistakeError(
            [f"{path}: has role = {before.role!r}; `rayfwd uninstall --purge` removes it"]
        )
    return before


def _request(
    args: argparse.Namespace, layout: Layout, before: Config | None, by_hand: bool
) -> tuple[SetupRequest, Survey]:
    """Every answer: from a flag, from the file that is there, looked for, or asked."""
    head = None
    if args.role == "worker":
        was = before.head if before is not None else None
        head = args.head or (was.ssh if was is not None else None)
        if not head and not (args.dialled or (was is not None and was.dialled)):
            head = _ask("--head", "How does ssh reach the head (user@host)? ")
        head = head or None
    ray = args.ray or (before.ray.command if before is not None else None) or _ray_beside()
    if ray is not None and "/" in ray:
        ray = str(Path(ray).expanduser().absolute())
    person, is_new = _person(args.user or _user_before(layout), ray)
    name = args.name or (before.name if before else None) or socket.gethostname().split(".")[0]
    try:
        check_name(name)
        if head is not None:
            way = {"ssh": head} | ({"meet": args.meet} if args.meet else {})
            parse({"role": "worker", "name": name, "head": way})
        direct = _directs(args.direct, before)
        if direct:
            ways = [{"node": node, "ssh": ssh} for node, ssh in direct]
            parse({"role": "worker", "name": name, "head": {"dialled": True}, "direct": ways})
        if args.role == "head" and args.meet:
            parse({"role": "head", "name": name, "hub": {"meet": [{"ssh": args.meet}]}})
    except ConfigError as exc:
        raise MistakeError([f"rayfwd init: {line}" for line in exc.problems]) from None
    except ValueError as exc:
        raise MistakeError([f"rayfwd init: --name {name}: {exc}"]) from None
    host_key = _host_key_before(layout)
    moved = before is not None and before.head is not None and (before.head.ssh or None) != head
    meet = args.meet or _meet_before(before)
    wanted = not host_key or args.fingerprint or moved
    # At a meeting place the head may not wait yet.
    fetch = head is not None and meet is None and not by_hand and bool(wanted)
    identity = args.identity.absolute() if args.identity is not None else None
    if before is not None and before.head is not None and identity is None:
        kept = before.head.identity
        identity = kept if kept not in {None, layout.identity} else None
    meet_identity = _meet_identity(args.role, before, meet, layout.identity)
    if identity is None and meet_identity != layout.identity:
        identity = meet_identity
    seen = survey(person, ray or "ray", head, identity, fetch)
    if seen.ray is None and ray is None:
        ray = _ask("--ray", "Where is the `ray` command on this machine? ")
        seen = survey(person, str(Path(ray).expanduser().absolute()), head, identity, fetch)
    if seen.ray is None:
        assert seen.ray_problem is not None, "it was looked for and not found"
        raise ProblemError(seen.ray_problem)
    if head is not None and seen.host_key is not None:
        host_key = _trust(args.fingerprint, seen, host_key)
    if args.identity is not None and seen.public_key is None:
        wrong = f"{person.name} can read no SSH key there"
        raise MistakeError([f"rayfwd init: --identity {args.identity}: {wrong}"])
    logins = args.login or (before.hub.users if before is not None else ())
    request = SetupRequest(
        role=args.role,
        name=name,
        user=person.name,
        home=person.home,
        user_is_new=is_new,
        ray=seen.ray,
        logins=tuple(logins),
        head=head,
        head_command=args.head_rayfwd or _head_command_before(before) or layout.command,
        identity=identity,
        by_hand=by_hand,
        auth=_auth(args.role, before, seen, person.name),
        meet=meet,
        meet_identity=(identity or meet_identity) if args.role == "head" else None,
        direct=direct,
        own_ssh=meet is not None and args.role == "head" and not _sshd_answers(),
        host_key=host_key,
    )
    return request, seen


def _sshd_answers() -> bool:
    """Where workers would come to by a meeting place."""
    try:
        socket.create_connection(("127.0.0.1", 22), 1.0).close()
    except OSError:
        return False
    return True


def _directs(asked: list[str], before: Config | None) -> tuple[tuple[str, str], ...]:
    """Those of the file that is there, and what is asked for now. Raises MistakeError."""
    found = {} if before is None else {direct.node: direct.ssh for direct in before.direct}
    for each in asked:
        node, equals, ssh = each.partition("=")
        if not (node and equals and ssh):
            wrong = "must be NODE=USER@HOST: the worker's name, and how ssh reaches it"
            raise MistakeError([f"rayfwd init: --direct {each}: {wrong}"])
        found[node] = ssh
    return tuple(found.items())


def _meet_before(before: Config | None) -> str | None:
    if before is None:
        return None
    if before.head is not None:
        return before.head.meet or None
    return next((meet.ssh for meet in before.hub.meet), None)


def _meet_identity(role: str, before: Config | None, meet: str | None, new: Path) -> Path | None:
    """A head's key at its meeting place: `new`, unless a file that is there says otherwise."""
    if role != "head" or meet is None:
        return None
    if before is not None and before.hub.meet:
        return before.hub.meet[0].identity
    return new


def _auth(role: str, before: Config | None, seen: Survey, user: str) -> str | None:
    """`ray.auth` of a head's file: a token, where Ray knows one, would ask for none by itself, and
    others may log in. What is in a file that is there stays."""
    if before is not None:
        return before.ray.auth if "auth" in before.ray.model_fields_set else None
    if role != "head" or seen.asks_for_token is not False or not _others(user):
        return None
    return "token"


def _others(user: str) -> list[str]:
    """Who may log in beside the service's user, who may not have been made yet."""
    try:
        return who_else_logs_in(pwd.getpwnam(user).pw_uid)
    except KeyError:
        return who_else_logs_in(NOBODY)


def _ray_beside() -> str | None:
    """The `ray` of rayfwd's own environment."""
    beside = Path(sys.prefix) / "bin" / "ray"
    return str(beside) if beside.exists() else None


def _head_command_before(before: Config | None) -> str | None:
    if before is None or before.head is None:
        return None
    command, space, verb = before.head.attach_command.rpartition(" ")
    return command if space and verb == "attach" and "'" not in command else None


def _user_before(layout: Layout) -> str | None:
    """Whom the service that is there runs as."""
    try:
        lines = (layout.units / SERVICE).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition("=")[2] for line in lines if line.startswith("User=")), None)


def _name_of(uid: int, path: str) -> str:
    """Raises MistakeError where the user database has no such user."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        wrong = (
            f"{path} belongs to user id {uid}, which has no name; name the user that runs "
            "rayfwd with this option"
        )
        raise MistakeError([f"rayfwd init: --user: {wrong}"]) from None


def _person(asked: str | None, ray: str | None) -> tuple[SystemUser, bool]:
    """Who is to run it; and whether that user has to be made (then nobody looks instead)."""
    if os.geteuid() != 0:
        return own_account(), False
    if asked is None and ray is not None:
        try:
            owner = os.stat(ray).st_uid
        except PermissionError:
            wrong = f"root may not look at {ray}; name the user that runs rayfwd with this option"
            raise MistakeError([f"rayfwd init: --user: {wrong}"]) from None
        except OSError:
            owner = 0
        if owner != 0:
            asked = _name_of(owner, ray)
    name = asked or GROUP
    if name == "root":
        raise MistakeError(
            ["--user root: Ray runs any code that a job brings; name an ordinary user"]
        )
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        nobody = pwd.getpwnam("nobody")
        home = Path("/var/lib/rayfwd")
        return SystemUser(name, nobody.pw_uid, nobody.pw_gid, (), home), True
    person = account_of(found)
    # One that we have made stays one, so that a second run finds the same plan.
    return person, person.home == Path("/var/lib/rayfwd")


def _host_key_before(layout: Layout) -> str | None:
    try:
        return layout.known_hosts.read_text()
    except OSError:
        return None


def _trust(asked: str | None, seen: Survey, before: str | None) -> str | None:
    """The line of known hosts that is to be written; None: the user's own files have the key.

    Raises ProblemError for another fingerprint than was given, or a no.
    """
    assert seen.host_key is not None, "it was fetched"
    line = texts.known_hosts_line(seen.host, seen.port, seen.host_key)
    if asked is not None:
        wanted = asked if asked.startswith("SHA256:") else f"SHA256:{asked}"
        if wanted.rstrip("=") != seen.fingerprint.rstrip("="):
            raise codes.HOST_KEY_MISMATCH.error(
                f"{seen.host} shows the host key {seen.fingerprint}, but --fingerprint is {wanted}",
                "run `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the head itself to see "
                "which is right; if neither is, there may be a man in the middle",
            )
        return None if seen.known and before is None else line
    if seen.known:
        return None
    print(f"{seen.host} shows the host key {seen.fingerprint} ({seen.host_key.split()[0]}).")
    print("On the head, `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints the right one.")
    if _ask("--fingerprint", "Are they the same (yes/no)? ").strip().lower() != "yes":
        raise codes.HOST_KEY_UNKNOWN.error(
            f"the host key of {seen.host} was not confirmed; nothing was changed",
            "ask the head's owner for its fingerprint, then run the same command with "
            "--fingerprint",
        )
    return line


def _ask(flag: str, question: str) -> str:
    """Ask whoever is there. Raises MistakeError where nobody is, naming the flag."""
    if sys.stdin.isatty():
        try:
            if answer := input(question).strip():
                return answer
        except EOFError:
            print()
    raise MistakeError([f"rayfwd init: {flag}: must be given, as there is no terminal to ask"])


def _host_keys() -> list[asyncssh.SSHKey]:
    """Of this machine's sshd, those that a worker prefers first."""
    found = []
    for kind in _HOST_KEYS:
        try:
            found.append(asyncssh.read_public_key(Path(f"/etc/ssh/ssh_host_{kind}_key.pub")))
        except (OSError, ValueError):
            continue
    return found


def _print_for_workers(request: SetupRequest, layout: Layout) -> None:
    prints = [key.get_fingerprint() for key in _host_keys()]
    line = texts.worker_command(request, layout, socket.gethostname(), prints)
    if request.meet is None:
        print(
            "\nRun this on each worker, with this machine's name or address as the worker "
            "sees it, and the worker's `ray`:\n"
        )
    else:
        print(
            "\nRun this on each worker, with the worker's `ray`. The name after the @ does not "
            "have to resolve:\nit is the name under which this machine's host key is known there.\n"
        )
    print(f"    {line}")


def _print_dialled(request: SetupRequest, layout: Layout, key: str) -> None:
    print(f"\nAdd this line to ~{request.user}/.ssh/authorized_keys on this machine:\n")
    print(f"    {texts.authorized_line(layout.command, key)}")
    print(
        "\nAdd this to the head's file, with this machine's name or address as the head sees it, "
        "and\nadd this machine's host key to known_hosts there:\n"
    )
    section = texts.dial_section(request, layout, socket.gethostname())
    print(textwrap.indent(section, "    "))


def _print_head_meeting(request: SetupRequest, layout: Layout, seen: Survey) -> None:
    """What the third host and the workers are to have of this head."""
    if request.identity is not None:
        own = seen.public_key
    elif request.meet_identity is not None:
        own = public_key(layout.identity) or "(the key that will be created)"
    else:
        own = None
    _print_meeting(request, own or f"(the public key with which {request.user} logs in there)")
    if request.own_ssh:
        print(
            "\nNo sshd answers here at 127.0.0.1:22, so rayfwd answers there itself "
            '(sshd = "own").\nIts host key is created at the first start. Then add this line to '
            "known_hosts on each worker,\nwith the key from the file:\n"
        )
        key = f"({layout.state}/{KEY_FILE}.pub)"
    else:
        print("\nAdd this head's host key to known_hosts on each worker:\n")
        key = next((k.export_public_key().decode() for k in _host_keys()), "(its public key)")
    print(f"    {socket.gethostname()} {key.strip()}")


def _print_meeting(request: SetupRequest, key: str) -> None:
    """What the third host is to have, and what this machine of it."""
    user, host, port = HeadConfig(ssh=request.meet or "").ssh_target()
    print(f"\nAdd this line to {f'~{user}' if user else '~'}/.ssh/authorized_keys on {host}:\n")
    print(f"    {texts.forwarding_line(key)}")
    print(
        f"\nAdd the host key of {host} to known_hosts on this machine, as {request.user}. Compare "
        "it with the\none that its owner names:\n"
    )
    print(f"    mkdir -p ~/.ssh && ssh-keyscan -p {port or 22} {host} >> ~/.ssh/known_hosts")


def _only(request: SetupRequest, asked: list[str]) -> SetupRequest:
    """With those direct ways alone that were asked for now."""
    names = {each.partition("=")[0] for each in asked}
    return replace(request, direct=tuple(way for way in request.direct if way[0] in names))


def _print_direct(request: SetupRequest, layout: Layout, key: str) -> None:
    """What each worker is to have that this one dials, and what this one of it."""
    for node, ssh in request.direct:
        user, host, port = HeadConfig(ssh=ssh).ssh_target()
        print(
            f"\nFor the direct way to {node}, add this line to "
            f"~{user or request.user}/.ssh/authorized_keys there:\n"
        )
        print(f"    {texts.authorized_line(layout.command, key, peer=True)}")
        print(
            f"\nAdd the host key of {host} to ~{request.user}/.ssh/known_hosts on this machine, "
            "after you compare it\nwith its owner:\n"
        )
        print(f"    ssh-keyscan -p {port or 22} {host} >> ~{request.user}/.ssh/known_hosts")


def _print_peer(request: SetupRequest, layout: Layout, key: str) -> None:
    print(
        f"\nA worker dials this one directly. Add this line to ~{request.user}/.ssh/authorized_keys"
        " on this machine:\n"
    )
    print(f"    {texts.authorized_line(layout.command, key, peer=True)}")


def _print_for_head(request: SetupRequest, login: str, key: str) -> None:
    print(f"\nAdd this line to ~{login or request.user}/.ssh/authorized_keys on the head:\n")
    print(f"    {texts.authorized_line(request.head_command, key)}")
