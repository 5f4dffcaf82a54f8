"""Every answer that `rayfwd init` needs: from an option, from the file that is there, looked for,
or asked.
"""

from __future__ import annotations

import argparse
import os
import pwd
import socket
import sys
from pathlib import Path

from rayfwd import codes
from rayfwd.cli import MistakeError
from rayfwd.cluster.plan import check_name
from rayfwd.config import Config, ConfigError, load, parse
from rayfwd.doctor.unit_checks import SERVICE
from rayfwd.problems import ProblemError
from rayfwd.setup import texts
from rayfwd.setup.request import GROUP, Layout, SetupRequest
from rayfwd.setup.survey import Survey, survey
from rayfwd.system.asuser import SystemUser, account_of, own_account
from rayfwd.system.users import NOBODY, who_else_logs_in


def check_options(args: argparse.Namespace) -> None:
    """Raises MistakeError for those that are another role's."""
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


def config_before(path: Path, role: str) -> Config | None:
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


def request_of(
    args: argparse.Namespace, layout: Layout, before: Config | None, by_hand: bool
) -> tuple[SetupRequest, Survey]:
    """What is to be set up, and what was seen of this machine and of the head. `by_hand`: the file
    is somebody else's. Raises MistakeError, ProblemError."""
    head = _head(args, before)
    ray = args.ray or (before.ray.command if before is not None else None) or _ray_beside()
    if ray is not None and "/" in ray:
        ray = str(Path(ray).expanduser().absolute())
    person, is_new = _person(args.user or _user_before(layout), ray)
    name = args.name or (before.name if before else None) or socket.gethostname().split(".")[0]
    direct = _checked(args, name, head, before)
    meet = args.meet or _meet_before(before)
    identity, meet_identity = _identities(args, before, meet, layout.identity)
    host_key = _host_key_before(layout)
    moved = before is not None and before.head is not None and (before.head.ssh or None) != head
    wanted = not host_key or args.fingerprint or moved
    # At a meeting place the head may not wait yet.
    fetch = head is not None and meet is None and not by_hand and bool(wanted)
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
        auth=auth(args.role, before, seen, person.name),
        meet=meet,
        meet_identity=(identity or meet_identity) if args.role == "head" else None,
        direct=direct,
        own_ssh=meet is not None and args.role == "head" and not _sshd_answers(),
        host_key=host_key,
    )
    return request, seen


def _head(args: argparse.Namespace, before: Config | None) -> str | None:
    """How a worker reaches the head; None: the head dials, or this is the head."""
    if args.role != "worker":
        return None
    was = before.head if before is not None else None
    head = args.head or (was.ssh if was is not None else None)
    if not head and not (args.dialled or (was is not None and was.dialled)):
        head = _ask("--head", "How does ssh reach the head (user@host)? ")
    return head or None


def _checked(
    args: argparse.Namespace, name: str, head: str | None, before: Config | None
) -> tuple[tuple[str, str], ...]:
    """The direct ways, once these answers are known to make a file. Raises MistakeError."""
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
    return direct


def _identities(
    args: argparse.Namespace, before: Config | None, meet: str | None, new: Path
) -> tuple[Path | None, Path | None]:
    """The key of somebody's own choice, None where one is made; and a head's at its meeting place.
    `new`: where one would be made."""
    identity = args.identity.absolute() if args.identity is not None else None
    if before is not None and before.head is not None and identity is None:
        kept = before.head.identity
        identity = kept if kept not in {None, new} else None
    at_meeting = _meet_identity(args.role, before, meet, new)
    if identity is None and at_meeting != new:
        identity = at_meeting
    return identity, at_meeting


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


def auth(role: str, before: Config | None, seen: Survey, user: str) -> str | None:
    """`ray.auth` of a head's file: a token, where Ray knows one, would ask for none by itself, and
    others may log in. What is in a file that is there stays."""
    if before is not None:
        return before.ray.auth if "auth" in before.ray.model_fields_set else None
    if role != "head" or seen.asks_for_token is not False or not others(user):
        return None
    return "token"


def others(user: str) -> list[str]:
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
