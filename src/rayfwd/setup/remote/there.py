"""What rayfwd does on a machine that is brought in, said from the head over SSH.

Every function is called there by name (`Machine.call`). It takes and returns what JSON has (see
`calls.py`), and raises ProblemError with what is wrong on that machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from rayfwd import codes
from rayfwd.cluster.plan import check_name
from rayfwd.config import ConfigError, HeadConfig, load
from rayfwd.problems import ProblemError
from rayfwd.ray import install, procfs
from rayfwd.setup import apply as applying
from rayfwd.setup import planner, texts, units
from rayfwd.setup.manifest import Manifest
from rayfwd.setup.places import find_places, own_command
from rayfwd.setup.remote import keys
from rayfwd.setup.remote.calls import (
    Found,
    Known,
    NodeRequest,
    Prepared,
    SelfReport,
    Started,
    TakenAway,
)
from rayfwd.setup.remote.sight import MARKER
from rayfwd.setup.request import GROUP, Layout, SetupRequest
from rayfwd.setup.steps import Directory, File, Step, Symlink, Verdict, command, public_key
from rayfwd.ssh.ssh_connector import SshConnector
from rayfwd.status import Status
from rayfwd.system import asuser
from rayfwd.system.asuser import account_of, own_account
from rayfwd.system.control import ask
from rayfwd.system.files import locked, look_anew, read_regular, replace_file
from rayfwd.system.ownership import peer_credentials
from rayfwd.system.paths import (
    CONTROL_SOCKET,
    MACHINES,
    default_runtime_dir,
    of_this_machine,
    own_place,
)
from rayfwd.wire import fields_from_wire, fields_to_wire

REACH_SECONDS = 20.0
LOOK_SECONDS = 60.0
"""For Ray's Python to say which it is."""
STOP_SECONDS = 90.0
"""Longer than a stop takes unless its file says otherwise: 30 s for Ray's tasks, and 20."""
HANGS_SECONDS = 30.0
"""Without an answer, after which a daemon is said to hang."""
MANIFEST = "init.json"
"""In a user's state directory: what was made for it."""
LOG = "rayfwd.log"
"""Of a daemon that no service manager has, in its state directory."""
OWN_FILE = texts.made_by("rayfwd add")
"""How the file begins that `prepare` writes."""
STARTED_WITH = "started-with"
"""In the state directory of such a daemon: the rayfwd that was installed then, by its digest."""
LOG_KEPT = 2000
"""Characters of its end that are told."""


# -- looking -------------------------------------------------------------------------------


async def look(
    rays: list[str], ways: list[dict[str, str]], wanted: list[str] | None = None
) -> dict[str, Any]:
    """Which Ray is here, of these commands the first that has the versions `wanted` (its own, its
    Python's), else the first that works; and which of these ways lead to the head: each has `ssh`,
    and the `key` that the head's sshd must show. Found."""
    ray, versions, problem = None, None, None
    for asked in rays:
        try:
            one = await asyncio.to_thread(_ray_of_its_owner, asked)
        except ProblemError as exc:
            problem = problem or exc.problem
            continue
        if ray is None or one["versions"] == wanted:
            ray, versions = one["ray"], tuple(one["versions"])
        if wanted is None or one["versions"] == wanted:
            break
    shown = await asyncio.gather(*(_shows(way["ssh"], way["key"]) for way in ways))
    return fields_to_wire(Found(tuple(shown), ray, versions, problem))


def _ray_of_its_owner(command: str) -> dict[str, Any]:
    """Looked at by whose it is, where we are root. Raises ProblemError."""
    account = own_account()
    if account.uid == 0:
        with suppress(OSError, KeyError):
            account = account_of(pwd.getpwuid(os.stat(command).st_uid))
    found: dict[str, Any] = asuser.call(
        account, find_ray, {"command": command}, timeout=LOOK_SECONDS
    )
    return found


async def find_ray(command: str) -> dict[str, Any]:
    """Raises ProblemError."""
    ray = await install.find(command, os.environ)
    return {"ray": ray.command, "versions": [ray.versions.ray, ray.versions.python]}


async def _shows(ssh: str, key: str) -> str:
    """Why this is no way to the machine that has this host key; empty: it is one."""
    connector = SshConnector(HeadConfig(ssh=ssh, ssh_config=Path(os.devnull)))
    try:
        async with asyncio.timeout(REACH_SECONDS):
            shown = await connector.host_key()
    except ProblemError as exc:
        return f"{ssh}: {exc.problem.cause}"
    except TimeoutError:
        return f"{ssh}: no answer within {REACH_SECONDS:.0f} s"
    finally:
        connector.close()
    return "" if shown.key == key else f"{ssh}: another machine answers there"


# -- setting up ----------------------------------------------------------------------------


def layout_of(service: bool, apart: bool = False) -> Layout:
    """Where things go here. `service`: a service manager has the daemon. `apart`: other machines
    have the same home, which need not show here yet.

    Of such machines each has a place of its own, with its file too. No service manager has their
    daemons: units in the home would be every machine's.
    """
    layout = find_places(None)
    if not layout.system:
        own = own_place(layout.state) if apart else of_this_machine(layout.state)
        if own != layout.state:
            config, runtime, manifest = own / layout.config.name, own / "run", own / MANIFEST
            layout = replace(layout, config=config, secrets=own, manifest=manifest)
            return replace(layout, state=own, runtime=runtime)
    if service or not layout.system:
        # What is below /run/user goes at logout.
        runtime = layout.runtime if service else layout.state / "run"
        return replace(layout, runtime=runtime)
    # As root, where no systemd runs: root's own, as in a container.
    return replace(layout, system=False, secrets=layout.state, runtime=default_runtime_dir({}))


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Write what the daemon needs, where it is not there: a NodeRequest's, and Prepared."""
    asked = fields_from_wire(NodeRequest, request, "request")
    # Machines with one home may be added in one moment: the first leaves its file for the others.
    with _alone_in_this_home():
        layout = layout_of(asked.service, _is_anothers(find_places(None), asked.elsewhere))
        return fields_to_wire(_prepare(asked, layout))


@contextmanager
def _alone_in_this_home() -> Iterator[None]:
    """Raises ProblemError."""
    folder = Path(sys.prefix).parent
    if os.geteuid() == 0:
        yield
        return
    try:
        with locked(folder):
            yield
    except OSError as exc:
        raise codes.SETUP_FAILED.error(
            f"{folder}: {exc.strerror or exc}", "correct this, then run the same command again"
        ) from None


def _is_anothers(layout: Layout, elsewhere: Sequence[str]) -> bool:
    """Whether the file of this home is another machine's."""
    if layout.system or not elsewhere:
        return False
    try:
        return load(layout.config).name in elsewhere
    except ConfigError:
        return False


def _prepare(asked: NodeRequest, layout: Layout) -> Prepared:
    service = asked.service and not is_apart(layout)
    _check_nobody_is_here(layout)
    user, home, is_new = _person(layout, asked.ray)
    request = SetupRequest(
        role="worker",
        name=check_name(asked.name),
        user=user,
        home=home,
        user_is_new=is_new,
        ray=asked.ray,
        head=asked.head,
        head_command=asked.attach,
        host_key=asked.host_key,
        more=asked.more,
        made_by="rayfwd add",
    )
    manifest = Manifest(layout.manifest)
    lost = _has_lost_its_record(layout, manifest, asked.name)
    steps = [*planner.plan(request, layout, units.shipped() if service else {}), *_link()]
    if lost:
        _adopt(steps, manifest, layout)
    _note_shared(steps, manifest, layout)
    outcome = applying.apply(steps, manifest, layout, False, lambda came, thing: None)
    return Prepared(
        changed=tuple(thing for thing in outcome.changed if thing != f"{layout.identity}"),
        kept=tuple(outcome.kept),
        key=public_key(layout.identity) if asked.head is not None else None,
        identity=str(layout.identity),
        known_hosts=str(layout.known_hosts),
        socket=str(layout.runtime / "link.sock"),
        command=layout.command,
        config=str(layout.config),
        user=user,
        service=service,
    )


def who() -> dict[str, Any]:
    """Known."""
    layout = layout_of(False)
    name = None
    if is_apart(layout):
        with suppress(ConfigError):
            name = load(layout.config).name
    return fields_to_wire(Known(is_apart(layout), name))


def is_apart(layout: Layout) -> bool:
    """Whether this machine has a place of its own in a home of several."""
    return layout.state.parent.name == MACHINES


def _note_shared(steps: Sequence[Step], manifest: Manifest, layout: Layout) -> None:
    """Links that all machines of a home use are each one's: the last one takes them away."""
    if is_apart(layout):
        for step in steps:
            if isinstance(step, Symlink) and step.inspect(manifest) is Verdict.THERE:
                manifest.add(step.entry)


def _check_nobody_is_here(layout: Layout) -> None:
    """Raises ProblemError where a node of this user runs that has no file. It has the directories
    that ours would have, and ours would be started in its place."""
    for runtime in {layout.runtime, default_runtime_dir(os.environ)}:
        with suppress(ProblemError, OSError):
            status = Status.from_answer(ask(runtime / CONTROL_SOCKET, "status"))
            words = Path(f"/proc/{status.pid}/cmdline").read_bytes().split(b"\0")
            if {b"head", b"join"} & set(words):
                break
    else:
        return
    what = "`rayfwd head`" if status.role == "head" else "`rayfwd join`"
    raise codes.ADD_BLOCKED.error(
        f"{what} runs on this machine as the same user: {status.name}, process {status.pid}",
        f"end it there first (`kill {status.pid}`), or log in there as another user",
    )


def _person(layout: Layout, ray: str) -> tuple[str, Path, bool]:
    """Who runs it, below which directory things are made for it, and whether we make that user."""
    # Where Ray is not started here, it may be no path.
    owner = Path(ray).stat().st_uid if ray.startswith("/") else os.geteuid()
    if not layout.system:
        own = own_account()
        if own.uid == 0 and owner != 0:
            raise codes.ADD_BLOCKED.error(
                f"{ray} belongs to user id {owner}, and root runs no program of another user",
                "log in as that user, or use --ray, which installs one that belongs to root",
            )
        return own.name, Path("/") if own.uid == 0 else own.home, False
    try:
        found = pwd.getpwuid(owner) if owner != 0 else pwd.getpwnam(GROUP)
    except KeyError:
        return GROUP, Path("/var/lib/rayfwd"), True
    home = Path(found.pw_dir)
    return found.pw_name, home, home == Path("/var/lib/rayfwd")


def _link() -> list[Step]:
    """`rayfwd` where a shell finds it."""
    own = own_command()
    folder = Path("/usr/local/bin")
    if os.geteuid() != 0:
        folder = own_account().home / ".local" / "bin"
    made = [path for path in (folder.parent, folder) if not path.exists()]
    directories = [Directory(path, None, None, 0o755) for path in made]
    return [*directories, Symlink(folder / "rayfwd", own)]


def _has_lost_its_record(layout: Layout, manifest: Manifest, name: str) -> bool:
    """Whether this machine was set up by us as this node, and the record of that has gone, as with
    its state directory. Raises ProblemError where another rayfwd has this machine, or ours under
    another name."""
    if not layout.config.exists():
        return False
    recorded = manifest.of(str(layout.config)) is not None
    try:
        other = load(layout.config)
        what = f"a {other.role} named {other.name}"
    except ConfigError:
        other, what = None, "another rayfwd's"
    if recorded or layout.config.read_text(errors="replace").startswith(OWN_FILE):
        if other is None or other.name == name:
            return not recorded
        raise codes.ADD_BLOCKED.error(
            f"this machine is {other.name} already, and would be {name}", other_name(other.name)
        )
    raise codes.ADD_BLOCKED.error(
        f"{layout.config} exists there ({what}), but `rayfwd add` did not make it",
        "to join a second cluster there, run `rayfwd join HEAD --cluster NAME` on that "
        "machine; otherwise remove the file",
    )


def _adopt(steps: Sequence[Step], manifest: Manifest, layout: Layout) -> None:
    """Have in the record again what stands as it would be made now. The file is ours in any case;
    where it stands otherwise, it counts as edited."""
    for step in steps:
        if isinstance(step, File | Symlink) and step.inspect(manifest) is Verdict.THERE:
            manifest.add(step.entry)
    if manifest.of(path := str(layout.config)) is None:
        manifest.add({"id": path, "kind": "file", "path": path, "sha256": ""})


def other_name(name: str) -> str:
    """What to do about a machine that has this name, and was to have another."""
    return (
        f"use --name {name}; to rename it, run `rayfwd remove {name}` first; if it is another "
        f"machine, which has the same home directory as {name}, start rayfwd on {name} first"
    )


def authorize(line: str, name: str) -> bool:
    """Let the head's key in; whether the line is new."""
    return keys.authorize(own_account().home, line, name)


def check_way(head: str, identity: str, known_hosts: str, user: str) -> None:
    """Log in on the head as the daemon will. Raises ProblemError."""
    account = own_account() if user == own_account().name else asuser.account_named(user)
    asked = {"head": head, "identity": identity, "known_hosts": known_hosts}
    asuser.call(account, log_in, asked, timeout=2 * REACH_SECONDS)


async def log_in(head: str, identity: str, known_hosts: str) -> None:
    """Raises ProblemError."""
    way = HeadConfig(ssh=head, identity=Path(identity), known_hosts=Path(known_hosts))
    connector = SshConnector(way)
    try:
        (await connector.connect()).abort()
    finally:
        connector.close()


# -- running -------------------------------------------------------------------------------


def start(service: bool, anew: bool) -> dict[str, Any]:
    """Have the daemon run; `anew`: with what is new. Started."""
    layout = layout_of(service)
    if not service:
        return fields_to_wire(_start_in_background(layout, anew))
    words = applying.manager(layout)
    active = subprocess.run(
        [*words, "is-active", "--quiet", "rayfwd"], check=False, timeout=STOP_SECONDS
    )
    verb = ["enable", "--now", "--no-block"]
    if active.returncode == 0:
        verb = ["restart", "--no-block"] if anew else ["enable"]
    command([*words, *verb, "rayfwd"])
    came = "runs" if active.returncode == 0 and not anew else "started"
    kind = "the machine's service" if layout.system else "a service of this user (lingering is on)"
    return fields_to_wire(Started(came, kind))


def _start_in_background(layout: Layout, anew: bool) -> Started:
    log = layout.state / LOG
    how = f"in the background, its log is {log}"
    started = _started_with()
    if (pid := _pid(layout)) is not None:
        # Another machine of this home may have brought a new rayfwd.
        if not anew and _text_of(layout.state / STARTED_WITH) in {"", started}:
            return Started("runs", how)
        _end(pid)
    words = _daemon_words(layout)
    with _opened(log) as out:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd="/",
            start_new_session=True,
        )
    with suppress(OSError):
        replace_file(layout.state / STARTED_WITH, started.encode())
    deadline = time.monotonic() + REACH_SECONDS
    while _listening_at(layout.runtime / CONTROL_SOCKET) is None and time.monotonic() < deadline:
        if child.poll() is not None:
            raise codes.ADD_FAILED.error(
                f"`{' '.join(words)}` ended immediately: {_end_of(log).strip()[-300:]}",
                f"see {log} there",
            )
        time.sleep(0.05)
    return Started("started", how)


def _started_with() -> str:
    """Which rayfwd is installed."""
    try:
        return str(json.loads(_text_of(Path(sys.prefix) / MARKER))["wheel"])
    except (ValueError, LookupError, TypeError):
        return ""


def _text_of(path: Path) -> str:
    try:
        return read_regular(path).decode(errors="replace").strip()
    except OSError:
        return ""


def _daemon_words(layout: Layout) -> list[str]:
    return [layout.command, "run", "--config", str(layout.config)]


def _opened(log: Path) -> IO[bytes]:
    """For what is added at its end. Raises ProblemError."""
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"{log} cannot be written: {exc.strerror or exc}",
            "make its directory writable there, and check that its disk is not full",
        ) from None
    return os.fdopen(descriptor, "ab")


def _status(layout: Layout) -> Status | None:
    with suppress(ProblemError):
        return Status.from_answer(ask(layout.runtime / CONTROL_SOCKET, "status"))
    return None


def _pid(layout: Layout) -> int | None:
    """Of the daemon that runs from our file; None: none does.

    Raises ProblemError where one does and does not answer.
    """
    path = layout.runtime / CONTROL_SOCKET
    try:
        ask(path, "status", timeout=HANGS_SECONDS)
    except ProblemError as exc:
        if exc.problem.code is codes.DAEMON_NOT_ANSWERING:
            raise _hanging(path) from None
        # Its socket may have gone with its state directory.
        found = procfs.with_command(_daemon_words(layout))
        return found[0].pid if found else None
    return _listening_at(path)


def _hanging(path: Path) -> ProblemError:
    """A daemon that was killed in half, stopped, or waits for a disk that does not answer."""
    pid = _listening_at(path)
    told = "its rayfwd" if pid is None else f"its rayfwd (process {pid})"
    return codes.ADD_BLOCKED.error(
        f"{told} hangs: it does not answer on {path}",
        f"end it there (`kill -9 {pid or 'PID'}`), then run the same command again",
    )


def _listening_at(path: Path) -> int | None:
    """The process that does, by the kernel's word; None: there is none, or it takes nobody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError:
            return None
        return peer_credentials(sock)[0]


def _end(pid: int) -> None:
    """End the daemon in order. Raises ProblemError where it does not."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if _is_zombie(pid):
            return
        time.sleep(0.05)
    raise codes.ADD_FAILED.error(
        f"the daemon (process {pid}) did not end within {STOP_SECONDS:.0f} s",
        "read its log there, then run the same command again",
    )


def _is_zombie(pid: int) -> bool:
    """Where nobody reaps, as in a container without an init."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def how_it_is(service: bool) -> dict[str, Any]:
    """What keeps it from being ready: SelfReport."""
    layout = layout_of(service)
    status = _status(layout)
    if status is None:
        log = "" if service else _end_of(layout.state / LOG)
        return fields_to_wire(SelfReport("its rayfwd does not answer", log=log))
    wrong = tuple(c.problem for c in status.conditions if c.severity != "note")
    return fields_to_wire(SelfReport(status.summary, wrong))


def _end_of(log: Path) -> str:
    with suppress(OSError):
        return log.read_text(errors="replace")[-LOG_KEPT:]
    return ""


# -- leaving -------------------------------------------------------------------------------


def take_away(service: bool, name: str) -> dict[str, Any]:
    """Drain and stop the daemon, and undo what `prepare` and `authorize` have done: TakenAway.

    Where other machines have the same home, what all of them use stays, and is the next one's.
    """
    layout = layout_of(service)
    _check_nobody_is_here(layout)
    said: list[str] = []
    if not service and (pid := _pid(layout)) is not None:
        _end(pid)
        said.append(f"its daemon, process {pid}, has ended")
    with _alone_in_this_home():
        others = _others_here(layout)
        _take_away(layout, others, name, said)
    return fields_to_wire(TakenAway(tuple(said), len(others)))


def _others_here(layout: Layout) -> list[Path]:
    """The records of other machines that have this home."""
    if layout.system or os.geteuid() == 0:
        return []
    usual = find_places(None).manifest.parent
    places = [usual, *sorted(usual.glob(f"{MACHINES}/*"))]
    for place in places:  # what another machine has removed just now is not there any more
        look_anew(place)
    found = [place / MANIFEST for place in places]
    return [path for path in found if path != layout.manifest and path.exists()]


def _hand_over(manifest: Manifest, layout: Layout, heir: Manifest) -> None:
    """What others use is removed with the last of them: links, and the directories above."""
    of_all = [
        entry
        for entry in manifest.entries
        if entry["kind"] in {"link", "directory"} and _is_of_all(Path(entry["path"]), layout)
    ]
    known = {entry["id"] for entry in heir.entries}
    heir.entries[:0] = [entry for entry in of_all if entry["id"] not in known]
    heir.save()
    for entry in of_all:
        manifest.entries.remove(entry)
    manifest.save()


def _is_of_all(path: Path, layout: Layout) -> bool:
    """Whether all machines of a home use what is there, and not this one alone."""
    if is_apart(layout):
        return path != layout.state and layout.state not in path.parents
    return layout.state not in path.parents or path == layout.state / MACHINES


def _take_away(layout: Layout, others: Sequence[Path], name: str, said: list[str]) -> None:
    manifest = Manifest(layout.manifest)
    if others:
        _hand_over(manifest, layout, Manifest(others[0]))
    if manifest.entries:
        undone: list[str] = []
        applying.take_away(
            manifest, layout, False, True, lambda came, thing: undone.append(f"{came} {thing}")
        )
        said += [line for line in undone if line.startswith(("done", "kept", "left"))]
        said.append(
            f"removed {sum(line.startswith('removed') for line in undone)} files and settings"
        )
    if keys.take_back(own_account().home, name):
        said.append("the head's key is no longer accepted")
