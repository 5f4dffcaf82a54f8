"""A machine over SSH: its shell, files sent to it, and functions of the rayfwd that it has.

Everything is a command of the login user's, given what it needs on standard input: the script, and
the data that it reads. What a login shell prints before is passed over.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import shlex
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import asyncssh

from rayfwd import codes
from rayfwd.problems import Problem, ProblemError
from rayfwd.setup import texts
from rayfwd.setup.remote.hosts import Host
from rayfwd.ssh.ssh_connector import SshConnector
from rayfwd.system.asuser import ChildError, ChildOutput
from rayfwd.system.files import write_new

BEGINS = "rayfwd-begins"
"""The line after which the output is a command's own."""
COMMAND_SECONDS = 60.0
SESSION_SECONDS = 10.0
"""More, for the session in which a command is run."""
KEEPALIVE_SECONDS = 15
OUTPUT_BYTES = 4 << 20
"""Of what a command may print in all; the longest is a status."""
QUOTED = 400
"""Characters of what a command has said that are quoted."""

_FIRST = "{ : rayfwd"
"""How a script begins that has come whole."""
_EATEN = "something in its login shell files reads their standard input"
_NOT_EATEN = (
    "remove that from the login shell's files there (~/.profile, ~/.bashrc), or let it read from "
    "/dev/null where the shell is not interactive"
)

_WORDS = (
    ("head.known_hosts", "--known-hosts"),
    ("head.ssh_config", "--ssh-config"),
    ("head.identity", "--identity"),
    ("head.ssh", "the machine's name"),
    (
        "`rayfwd init worker --fingerprint SHA256:…`, if `rayfwd init` made that file",
        "`rayfwd add --fingerprint SHA256:…`",
    ),
    ("[head]", "the SSH configuration"),
)
"""What is said of a way to a head, and what of one to a machine."""
_TRANSPORT = re.compile(r"; or set transport = \"\w+\" in \[head\]")
"""`rayfwd add` has no such choice."""


def of_machine(problem: Problem, host: str) -> Problem:
    """A problem on the way to a head as one on the way to this machine."""
    texts_ = []
    for said in (problem.cause, problem.remedy):
        text = _TRANSPORT.sub("", said)
        for old, new in (*_WORDS, ("the head", host)):
            text = text.replace(old, new)
        texts_.append(text)
    return problem.code.problem(*texts_)


class Failed(Exception):  # noqa: N818
    """A command ended with another code than 0, or not in time; holds what it said last."""

    def __init__(self, cause: str, remedy: str = "run the same command again") -> None:
        super().__init__(cause)
        self.remedy = remedy


class Hangs(Failed):
    """A command that was not done in time; says how far the machine came with it."""

    def __init__(self, cause: str, remedy: str, own: bytes = b"") -> None:
        """`own`: what the command had printed by then."""
        super().__init__(cause, remedy)
        self.own = own


class PrintsTooMuch(Failed):
    """A command that was ended, because what it printed had no end."""

    def __init__(self, host: Host, at: bytearray) -> None:
        """`at`: what it printed last."""
        lines = at[-QUOTED:].decode(errors="replace").split("\n")
        line = lines[-2] if len(lines) > 2 else lines[-1]  # the last whole one, where there is one
        super().__init__(
            f"a command printed more than {OUTPUT_BYTES >> 20} MiB and was ended; its output ends "
            f"with: {line}",
            f"run `{by_hand(host, 'true')}`, which must print nothing: correct what prints there, "
            "such as the login shell's files (~/.profile, ~/.bashrc)",
        )


class NoShell(Failed):
    """Whatever answers there in the place of a login shell; holds what it said."""


class _TooMuchError(Exception):
    pass


class _Printed:
    """What a command has printed so far: no more than OUTPUT_BYTES, and a last piece."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.errors = bytearray()

    async def take(self, reader: asyncssh.SSHReader[bytes], into: bytearray) -> None:
        """To its end. Raises _TooMuchError."""
        while part := await reader.read(1 << 16):
            into += part
            if len(self.out) + len(self.errors) > OUTPUT_BYTES:
                raise _TooMuchError


class Machine:
    """Connected. `close` it."""

    def __init__(self, host: Host, connector: SshConnector) -> None:
        self.host = host
        self._connector = connector
        self._connection: asyncssh.SSHClientConnection | None = None

    @classmethod
    async def connect(cls, host: Host) -> Machine:
        """Log in; the host key is checked, strictly. Raises ProblemError."""
        machine = cls(host, SshConnector(host.way()))
        try:
            if host.fingerprint is not None:
                await machine._learn_host_key(host.fingerprint)
            machine._connection = await machine._connector.connect()
        except ProblemError as exc:
            machine._connector.close()
            raise ProblemError(of_machine(exc.problem, host.ssh)) from None
        machine._connection.set_keepalive(KEEPALIVE_SECONDS, 3)
        return machine

    async def _learn_host_key(self, fingerprint: str) -> None:
        """Write the host key down, where it is the one that was told. Raises ProblemError."""
        shown = await self._connector.host_key()
        wanted = fingerprint if fingerprint.startswith("SHA256:") else f"SHA256:{fingerprint}"
        if wanted.rstrip("=") != shown.fingerprint.rstrip("="):
            raise codes.HOST_KEY_MISMATCH.error(
                f"{shown.host} shows the host key {shown.fingerprint}, but --fingerprint is "
                f"{wanted}",
                "run `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on that machine itself to "
                "see which is right; if neither is, there may be a man in the middle",
            )
        if not shown.known:
            _append(
                self.host.known_hosts, texts.known_hosts_line(shown.host, shown.port, shown.key)
            )

    async def sh(self, script: str, data: bytes = b"", seconds: float = COMMAND_SECONDS) -> bytes:
        """What a script of the POSIX shell has printed. Raises Failed, ProblemError."""
        return (await self._run(script, data, seconds))[0]

    async def _run(
        self, script: str, data: bytes, seconds: float, may_fail: bool = False
    ) -> tuple[bytes, str]:
        line, own = by_any_shell(f"echo {BEGINS}\n{script}")
        printed = _Printed()
        try:
            code = await self._collect(line, own + data, seconds, printed)
        except (asyncssh.Error, OSError) as exc:
            raise codes.SSH_LOST.error(
                f"the SSH connection to {self.host.ssh} ended: {exc}", "run the same command again"
            ) from None
        out, errors = bytes(printed.out), bytes(printed.errors)
        _, begins, own = out.partition(f"{BEGINS}\n".encode())
        said = errors.decode(errors="replace").strip()
        if not begins:
            said = said or out.decode(errors="replace").strip()
            if said.endswith(_EATEN):
                raise Failed(_EATEN, _NOT_EATEN)
            raise NoShell(said[-QUOTED:] or "its login shell cannot run `sh`")
        if code != 0 and not may_fail:
            last = said or own.decode(errors="replace").strip() or f"exit code {code}"
            raise Failed(last[-QUOTED:])
        return own, said

    async def _collect(
        self, line: str, data: bytes, seconds: float, printed: _Printed
    ) -> int | None:
        """The exit code of a command, with what it prints in `printed`; None: a signal ended it.

        Raises Failed, asyncssh.Error, OSError.
        """
        assert self._connection is not None, "connected"
        try:
            async with asyncio.timeout(seconds + SESSION_SECONDS):
                process = await self._connection.create_process(line, encoding=None, input=data)
        except TimeoutError:
            raise self._no_session(seconds + SESSION_SECONDS) from None
        parts = (
            printed.take(process.stdout, printed.out),
            printed.take(process.stderr, printed.errors),
            process.wait_closed(),
        )
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*tasks)
        except TimeoutError:
            raise self._hangs(bytes(printed.out), seconds) from None
        except _TooMuchError:
            raise PrintsTooMuch(self.host, max(printed.out, printed.errors, key=len)) from None
        finally:
            process.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return process.exit_status

    def _hangs(self, out: bytes, seconds: float) -> Hangs:
        """`out`: what came until then."""
        _, begins, own = out.partition(f"{BEGINS}\n".encode())
        if begins:
            return Hangs(
                f"a command was not done in {seconds:.0f} s",
                f"log in there (`{by_hand(self.host)}`) and see what hangs, such as a disk; then "
                "run the same command again",
                own,
            )
        return Hangs(
            f"its login shell ran no command in {seconds:.0f} s",
            f"run `{by_hand(self.host, 'true')}`: correct what hangs there, in the login shell's "
            "files (~/.profile, ~/.bashrc) or in a home directory on a network disk",
        )

    def _no_session(self, seconds: float) -> Hangs:
        return Hangs(
            f"its sshd opened no session in {seconds:.0f} s",
            f"run `{by_hand(self.host, 'true')}`: if that hangs too, restart sshd there, or the "
            "machine",
        )

    async def send(self, files: Iterable[Path], folder: str, python: str | None) -> None:
        """Put files into a new directory there. `python`: what unpacks them where there is no tar.
        Raises Failed, ProblemError."""
        data = await asyncio.to_thread(_archive, list(files))
        instead = '{ echo "it has neither tar nor a Python that unpacks files" >&2; false; }'
        if python is not None:
            code = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|')"
            instead = f"{shlex.quote(python)} -c {shlex.quote(code + '.extractall()')}"
        unpack = f"if command -v tar >/dev/null 2>&1; then tar xf -; else {instead}; fi"
        place = shlex.quote(folder)
        half = f"{{ code=$?; cd /; rm -rf {place}; exit $code; }}"
        script = f"umask 077; rm -rf {place}; mkdir -p {place} && cd {place} && {unpack} || {half}"
        await self.sh(script, data, seconds=600.0)

    async def call(
        self,
        python: str,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        seconds: float = COMMAND_SECONDS,
    ) -> Any:
        """What a function of ours returns there, in the rayfwd of that Python.

        Raises ProblemError: what it raised, or that it cannot be run.
        """
        name = f"{function.__module__}:{function.__qualname__}"
        line = f"exec {shlex.quote(python)} -I -m rayfwd.system.asuser {shlex.quote(name)}"
        asked = json.dumps({"arguments": dict(arguments), "emit": False}).encode()
        answers = ChildOutput(None)
        try:
            out, said = await self._run(line, asked, seconds, may_fail=True)
            answers.feed(out)
        except Hangs as exc:
            raise codes.ADD_FAILED.error(
                f"{self.host.ssh}: {python} there: {exc}", exc.remedy
            ) from None
        except (Failed, ChildError) as exc:
            raise self._not_executable(python, str(exc)) from None
        if answers.problem is not None:
            raise ProblemError(answers.problem)
        if not answers.returned:
            raise self._not_executable(python, said[-QUOTED:] or "no output")
        return answers.result

    def _not_executable(self, python: str, cause: str) -> ProblemError:
        return codes.RAYFWD_NOT_EXECUTABLE.error(
            f"{self.host.ssh}: {python} cannot run rayfwd: {cause}",
            "run `rayfwd add` for this machine, which installs again what is broken; then run the "
            "same command again",
        )

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connector.close()


def by_any_shell(script: str) -> tuple[str, bytes]:
    """A line that every login shell passes on as it is, csh and fish too, and what the line reads
    first on its standard input: the script, which runs whole or not at all."""
    own = f"{_FIRST}\n{script}\n}}\n".encode()
    # One byte at a time: what follows is the script's own input.
    read = f's="`dd bs=1 count={len(own)} 2>/dev/null`"'
    run = f'case $s in "{_FIRST}"*"}}") eval "$s";; *) echo "{_EATEN}" >&2; exit 1;; esac'
    return f"sh -c '{read}; {run}'", own


def by_hand(host: Host, *command: str) -> str:
    """How somebody at the head's shell gets there by `ssh`, to run that command or none."""
    user, name, port = host.way().ssh_target()
    words = ["ssh"]
    for option, value in (("-F", host.ssh_config), ("-i", host.identity), ("-p", port)):
        if value is not None:
            words += [option, str(value)]
    return shlex.join([*words, name if user is None else f"{user}@{name}", *command])


def _archive(files: list[Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in files:
            archive.add(path, arcname=path.name, filter=_nobodys)
    return buffer.getvalue()


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o600
    return entry


def _append(named: Path | None, line: str) -> None:
    """One more line of known hosts. Raises ProblemError."""
    path = named or Path("~/.ssh/known_hosts").expanduser()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        write_new(path, before + line.encode(), 0o600, replace=True)
    except OSError as exc:
        raise codes.SETUP_FAILED.error(
            f"{path}: {exc.strerror or exc}",
            "make it writable, or name another file with --known-hosts",
        ) from None
