"""The system's `ssh` as the way to the head: what it would do, and how it is to be called.

`ssh` reads its own configuration, with `Match`, `Include`, ProxyCommand and /etc/ssh, and is asked
what came of that (`ssh -G`). What is not its configuration's to say is said on its command line,
which comes first: host keys are checked strictly, nothing is asked of anybody, and a connection
that stands already (ControlMaster) is used and never made.

Jump hosts are called here, not by `ssh`, which would hand them none of these options.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from rayfwd import codes
from rayfwd.config import HEAD, Destination, HeadConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.ssh import knownhosts, meeting_command, openssh_words
from rayfwd.ssh.agent import agent_at
from rayfwd.ssh.dial import LOGIN_TIMEOUT
from rayfwd.ssh.hops import JUMPS, jumps_in_a_circle
from rayfwd.ssh.knownhosts import KnownHosts
from rayfwd.ssh.ssh_process import environment

CONNECT_TIMEOUT = 10
"""Seconds for each address, and for the server's first answer."""
CHECK_TIMEOUT = 3.0
"""Seconds for a ControlMaster's word that it is there."""
LOOK_TIMEOUT = 20.0
"""Seconds for `ssh -G`, which reads files and may run the commands of `Match exec`."""
KEYS = "identityfiles"
"""Under this name, all that `ssh -G` has of these options, a line each."""
FILES_OF_KEYS = ("identityfile ", "certificatefile ")
_NEEDLESS = re.compile(r"\[([^]:]+)\]")
ALWAYS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "VerifyHostKeyDNS": "no",
    "NoHostAuthenticationForLocalhost": "no",
    "UpdateHostKeys": "no",
    "LogLevel": openssh_words.LEVEL,
    "ControlMaster": "no",
    "ControlPersist": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "Tunnel": "no",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "Compression": "no",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
}
"""Of every call."""
USUAL = {"SessionType": "default", "StdinNull": "no", "ForkAfterAuthentication": "no"}
"""What is set back where the configuration has something else: an `ssh` before 8.7 knows none of
them."""


@dataclass(frozen=True, slots=True)
class OpensshHop:
    """One SSH server of the way, as `ssh -G` has it."""

    written: str
    known: KnownHosts
    user: str
    """Whom it is logged in as there."""
    is_head: bool
    first: bool
    """No jump host is before it."""
    command: bool
    """A command of the configuration (ProxyCommand) dials it."""
    shared: bool = False
    """A connection to it stands already, and is used."""
    options: tuple[str, ...] = ()
    """Of the command line, for this one."""

    before: str = ""
    """The hop before, as the configuration names it."""
    meet: str | None = None
    """The socket of a meeting place where it waits: the hop before is that host."""
    meets: bool = False
    """It is such a host."""
    to: Destination = HEAD
    """Whom the way leads to."""
    keys: tuple[Path, ...] = ()
    """Files of private keys that are offered, and of certificates."""
    agent_socket: str = ""
    """Of the agent whose keys are offered; empty: none is asked."""

    @property
    def direct(self) -> bool:
        return self.first and not self.command

    @property
    def called(self) -> str:
        """In a sentence."""
        if self.is_head:
            return self.written
        return f"the {'meeting place' if self.meets else 'jump host'} {self.written}"


def find_way(head: HeadConfig) -> list[OpensshHop]:
    """The hops to the head, which is the last. Blocks: it runs `ssh`. Raises ProblemError."""
    if shutil.which("ssh") is None:
        raise codes.OPENSSH_ABSENT.error(
            f"{head.destination.set_to('transport', 'openssh')} needs the command `ssh`, and PATH "
            "has none",
            "install OpenSSH's client, or set " + head.destination.set_to("transport", "asyncssh"),
        )
    for name in ("identity", "ssh_config", "known_hosts"):
        _check_readable(head, name)
    way = _way(head, head.ssh, True, ())
    if head.meet:
        *before, host = _way(head, head.meet, False, ())
        at_head = replace(way[-1], first=False, command=False, meet=head.meet_socket)
        way = [*before, replace(host, meets=True), at_head]
    return [way[0], *(replace(hop, before=last.written) for last, hop in pairwise(way))]


def _check_readable(head: HeadConfig, name: str) -> None:
    path: Path | None = getattr(head, name)
    if path is None or (name == "identity" and path.with_name(f"{path.name}.pub").exists()):
        return  # of a key that an agent or a token has, the public half is enough
    try:
        with path.expanduser().open("rb"):
            pass
    except OSError as exc:
        raise codes.SSH_FILE_UNREADABLE.error(
            f"{path}: {exc.strerror}",
            f"correct {head.destination.key(name)}, or the owner and mode of that file",
        ) from exc


def _way(head: HeadConfig, written: str, is_head: bool, after: tuple[str, ...]) -> list[OpensshHop]:
    if written in after or len(after) > JUMPS:
        raise ProblemError(jumps_in_a_circle((*after, written)))
    said = _looked_up(head, written)
    jumps = said.get("proxyjump", "none")
    hop = _hop(head, written, is_head, said, first=jumps == "none")
    if hop.shared or jumps == "none":
        return [replace(hop, first=True)]
    first, *others = [_jump(word) for word in jumps.split(",")]
    after = (*after, written)
    # As with ssh: the first has a way of its own, the others are reached from the one before.
    way = _way(head, first, False, after)
    for other in others:
        found = _hop(head, other, False, _looked_up(head, other), first=False)
        way.append(replace(found, command=False))
    return [*way, hop]


def _jump(word: str) -> str:
    """As it was written: `ssh -G` puts brackets around every host that has a port."""
    return _NEEDLESS.sub(r"\1", word.strip().removeprefix("ssh://"))


def _hop(
    head: HeadConfig, written: str, is_head: bool, said: Mapping[str, str], first: bool
) -> OpensshHop:
    own = _own_options(head, is_head, said)
    port, alias = int(said["port"]), said.get("hostkeyalias")
    host = head.model_copy(update={"ssh": written}).ssh_target()[1]
    tokens = knownhosts.tokens(host, said["hostname"], port, alias, said["user"])
    files = [knownhosts.expanded(name, tokens) for name in shlex.split(own["UserKnownHostsFile"])]
    system = [
        knownhosts.expanded(name, tokens) for name in shlex.split(own["GlobalKnownHostsFile"])
    ]
    proxy = said.get("proxycommand", "none")
    known = KnownHosts(
        host=said["hostname"],
        port=port,
        alias=alias,
        files=knownhosts.read(dict.fromkeys([*files, *system])),
        new=None if str(files[0]) in {"none", os.devnull} else files[0],
    )
    shared = _stands(head, written, said.get("controlpath", "none"))
    if not shared:
        own["ControlPath"] = "none"
    words = [word for name, value in own.items() for word in ("-o", f"{name}={value}")]
    if head.identity is not None:
        words += ["-i", str(head.identity.expanduser())]
    return OpensshHop(
        written,
        known,
        said["user"],
        is_head,
        first,
        proxy != "none",
        shared,
        tuple(words),
        to=head.destination,
        keys=_keys(head, is_head, said),
        agent_socket=agent_at(said.get("identityagent", "")),
    )


def _keys(head: HeadConfig, is_head: bool, said: Mapping[str, str]) -> tuple[Path, ...]:
    """The files of private keys that are offered, if they are there."""
    named = () if head.identity is None else (head.identity,)
    if said.get("pkcs11provider", "none") != "none":
        return ()  # a token has them
    if is_head and named:
        return named
    return (*named, *map(Path, said.get(KEYS, "").splitlines()))


def _own_options(head: HeadConfig, is_head: bool, said: Mapping[str, str]) -> dict[str, str]:
    """Where a server's host key is looked for, and with which key it is logged in."""
    user = said.get("userknownhostsfile", " ".join(map(str, knownhosts.USER_FILES)))
    system = said.get("globalknownhostsfile", " ".join(map(str, knownhosts.SYSTEM_FILES)))
    own: dict[str, str] = {}
    if head.known_hosts is not None:
        named = f'"{head.known_hosts.expanduser()}"'
        user, system = (named, named) if is_head else (f"{named} {user}", system)
        if said.get("knownhostscommand", "none") != "none" and is_head:
            own["KnownHostsCommand"] = "none"
    own |= {"UserKnownHostsFile": user, "GlobalKnownHostsFile": system}
    if head.identity is not None and is_head:
        own["IdentitiesOnly"] = "yes"
    return own | {
        name: usual for name, usual in USUAL.items() if said.get(name.lower(), usual) != usual
    }


def _target(head: HeadConfig, written: str) -> list[str]:
    """The words that name a server, and the configuration that is read of it."""
    user, host, port = head.model_copy(update={"ssh": written}).ssh_target()
    words = ["-F", str(head.ssh_config.expanduser())] if head.ssh_config is not None else []
    words += ["-p", str(port)] if port is not None else []
    words += ["-l", user] if user is not None else []
    return [*words, "--", host]


def _looked_up(head: HeadConfig, written: str) -> dict[str, str]:
    """The options that hold for a server, by their names in small letters. Raises ProblemError."""
    always = [word for name, value in ALWAYS.items() for word in ("-o", f"{name}={value}")]
    ran = run(["-G", *always, *_target(head, written)])
    if ran is None or ran.returncode != 0:
        said = "" if ran is None else openssh_words.spoken(ran.stderr)
        raise ProblemError(_config_problem(head, said))
    found: dict[str, str] = {}
    for line in ran.stdout.splitlines():
        name, _, value = line.partition(" ")
        found.setdefault(name.lower(), value)
    named = [line for line in ran.stdout.splitlines() if line.startswith(FILES_OF_KEYS)]
    found[KEYS] = "\n".join(line.partition(" ")[2] for line in named)
    return found


def _config_problem(head: HeadConfig, said: str) -> Problem:
    remedy = "correct the SSH configuration"
    if head.ssh_config is None:
        named = head.destination.key("ssh_config")
        remedy += f", or set {named} to a file of your own, which is then the only one that is read"
    silent = (
        f"`ssh -G` does not answer within {LOOK_TIMEOUT:.0f} s (a command of `Match exec`, or a "
        "name for CanonicalizeHostname that this machine's resolver does not answer?)"
    )
    return codes.SSH_CONFIG_INVALID.problem(" ".join(said.split()) or silent, remedy)


def _stands(head: HeadConfig, written: str, control: str) -> bool:
    """Whether a ControlMaster of this user's serves that server now."""
    if control == "none" or not Path(control).is_socket():
        return False
    asked = ["-O", "check", "-o", f"ControlPath={_literal(control)}", *_target(head, written)]
    ran = run(asked, CHECK_TIMEOUT)
    return ran is not None and ran.returncode == 0


def run(
    words: Sequence[str], seconds: float = LOOK_TIMEOUT
) -> subprocess.CompletedProcess[str] | None:
    """None: it took too long, or could not be started."""
    try:
        return subprocess.run(
            ["ssh", *words],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            start_new_session=True,
            env=environment(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def command(head: HeadConfig, hops: Sequence[OpensshHop], seconds: int) -> list[str]:
    """The call that leads to the last hop, up to `--` and its host: what is to be done there comes
    behind. `seconds`: for each address, and for the server's first answer."""
    *before, hop = hops
    return ["ssh", *_options(head, before, hop, seconds), *_target(head, hop.written)]


def _options(
    head: HeadConfig, before: Sequence[OpensshHop], hop: OpensshHop, seconds: int
) -> list[str]:
    # Of a hop behind others the time begins before they are logged in to.
    logins = len(before) * int(LOGIN_TIMEOUT)
    options = {**ALWAYS, "ConnectTimeout": str(seconds + logins)}
    # The configuration's own forwards are left out where nothing is forwarded for us: a second
    # lane could not have their ports.
    forwards = hop.is_head and head.via != "exec"
    options["ClearAllForwardings"] = "no" if forwards else "yes"
    options["ExitOnForwardFailure"] = "no"
    if before:
        options["ProxyCommand"] = _through(head, before, seconds, hop.meet)
        options["ProxyUseFdpass"] = "no"
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return ["-T", "-x", "-a", *words, *hop.options]


def _through(head: HeadConfig, hops: Sequence[OpensshHop], seconds: int, meet: str | None) -> str:
    """A ProxyCommand that has the last of these hosts connect to where ssh wants to, or to the
    socket of a meeting place."""
    *before, hop = hops
    words = ["ssh", *_options(head, before, hop, seconds)]
    target = _target(head, hop.written)
    if meet is not None:
        return _literal(shlex.join([*words, *target, meeting_command.command(meet)]))
    return f"{_literal(shlex.join(words))} -W '[%h]:%p' {_literal(shlex.join(target))}"


def _literal(text: str) -> str:
    """As ssh takes it where it expands % itself."""
    return text.replace("%", "%%")
