"""Does something as another user of this machine: in a child that is that user, and nothing else.

Root must neither run what lies in a user's environment nor open what lies in that user's
directories, and there are homes that root cannot look into (NFS). So `rayfwd` said as root goes
through here: `run` for a program, `call` for a function of ours, `become` for good.

The child has that user's ids and groups, an environment made from nothing, no descriptor of ours
but its three standard streams, no terminal, and a process group of its own, which is killed when
its time is up. What it writes is bounded and is that user's word, not ours.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import pwd
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rayfwd import codes
from rayfwd.problems import Problem, ProblemError
from rayfwd.system.ownership import stranger_in

MOST_OUTPUT = 16 << 20
"""Bytes of a child's standard output and of its standard error that are taken."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""systemd's default for a service."""


@dataclass(frozen=True, slots=True)
class SystemUser:
    """A user of this machine."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: Path

    @property
    def is_own(self) -> bool:
        """This process is that user already."""
        return self.uid == os.geteuid()


@dataclass(frozen=True, slots=True)
class Finished:
    """A child that has ended by itself."""

    code: int
    """Its exit code; negative: the signal that ended it."""
    output: bytes
    errors: bytes

    @property
    def last_words(self) -> str:
        """The last line of its standard error; empty where it wrote none."""
        lines = self.errors.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


class ChildError(Exception):
    """A child could not be started, did not end in time, or wrote what nobody can take."""


def account_named(name: str) -> SystemUser:
    """Raises KeyError where there is no such user."""
    return account_of(pwd.getpwnam(name))


def account_of(entry: pwd.struct_passwd) -> SystemUser:
    """Of an entry of the user database."""
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return SystemUser(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, Path(entry.pw_dir))


def own_account() -> SystemUser:
    """Who this process is."""
    return _with_uid(os.geteuid(), os.getegid())


def _with_uid(uid: int, gid: int) -> SystemUser:
    """`gid` where the user database does not know that user."""
    try:
        return account_of(pwd.getpwuid(uid))
    except KeyError:
        return SystemUser(str(uid), uid, gid, (gid,), Path("/"))


def whose(path: Path) -> SystemUser | None:
    """Who, other than root, has a say about `path`; None: nobody.

    Raises ProblemError (directory_unusable) where anybody has.
    """
    found = stranger_in(path, (0,))
    if found is None:
        return None
    if found.uid is None:
        raise codes.DIRECTORY_UNUSABLE.error(
            f"root does not use a directory that any user can change: {found}",
            f"remove that right: chmod o-w,g-w {found.path}",
        )
    return _with_uid(found.uid, found.path.lstat().st_gid)


def become(account: SystemUser) -> None:
    """Be `account` from now on: there is no way back to root.

    The environment is a child's, but for what says how to write on this terminal. Raises OSError,
    and ProblemError (rayfwd_not_executable) where that user could not run what is still to come.
    """
    kept = {name: text for name, text in os.environ.items() if name in _OF_THE_TERMINAL}
    env = environment(account) | kept
    os.setgroups(account.groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    os.umask(0o077)
    os.environ.clear()
    os.environ.update(env)
    for needed in (sys.executable, __file__):
        if not os.access(needed, os.R_OK):
            raise _not_executable(account, f"{needed} may not be read")


_OF_THE_TERMINAL = ("TERM", "COLUMNS", "LINES", "NO_COLOR", "COLORTERM", "LANG")


def check_roots(path: Path) -> None:
    """See that root may run what is at `path`. Raises PermissionError; only if this is root."""
    if os.geteuid() == 0 and (found := stranger_in(path, (0,))) is not None:
        raise PermissionError(f"root does not run it: {found}")


def environment(account: SystemUser) -> dict[str, str]:
    """What a child that is `account` has for an environment."""
    env = {"HOME": str(account.home), "USER": account.name, "LOGNAME": account.name}
    env |= {"PATH": _PATH, "LC_ALL": "C.UTF-8"}
    if account.is_own:
        env["PATH"] = os.environ.get("PATH", _PATH)
        if "SSH_AUTH_SOCK" in os.environ:
            env["SSH_AUTH_SOCK"] = os.environ["SSH_AUTH_SOCK"]
    return env


def run(
    account: SystemUser,
    argv: Sequence[str],
    *,
    timeout: float,
    data: bytes = b"",
    env: Mapping[str, str] | None = None,
    on_output: Callable[[bytes], None] | None = None,
) -> Finished:
    """Run a program as `account`, with `data` on its standard input, for at most `timeout` seconds.

    `env` is added to the environment. `on_output` takes its output as it comes, instead of
    `Finished.output`.

    Raises ChildError where it cannot be started (only root becomes another), is not done in time,
    or writes more than MOST_OUTPUT. Whatever `on_output` raises ends the child as well.
    """
    deadline = time.monotonic() + timeout
    ids: dict[str, Any] = {}
    if not account.is_own:
        ids = {"user": account.uid, "group": account.gid, "extra_groups": account.groups}
        ids["umask"] = 0o077
    with _readable(data) as stdin:
        try:
            child = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(account) | dict(env or {}),
                cwd="/",
                start_new_session=True,
                **ids,
            )
        except OSError as exc:
            raise ChildError(str(exc)) from None
    assert child.stdout is not None
    assert child.stderr is not None
    errors = bytearray()
    output = bytearray()
    try:
        _collect({child.stdout: on_output or output.extend, child.stderr: errors.extend}, deadline)
        code = child.wait(max(0.0, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        raise ChildError(f"not done in {timeout:.0f} s") from None
    finally:
        child.stdout.close()
        child.stderr.close()
        if child.returncode is None:
            # Not reaped yet, so the group's number is still its own.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return Finished(code, bytes(output), bytes(errors))


def call(
    account: SystemUser,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    emit: Callable[[Any], None] | None = None,
) -> Any:
    """What `function` (of a module, plain or a coroutine) returns in a child that is `account`.

    `arguments` and all that comes back must be of JSON's kinds. With `emit` the function gets an
    argument of that name to call, and each thing it emits is emitted here as it comes (`emit` may
    raise ChildError for a thing that makes no sense).

    Raises ProblemError: what the function raised, or `rayfwd_not_executable` where that user cannot
    run it or it is not done within `timeout` seconds.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    # Neither the directory it is started in nor another user's home says what is imported.
    alone = "-P" if account.is_own else "-I"
    argv = [sys.executable, alone, "-m", "rayfwd.system.asuser", name]
    asked = {"arguments": dict(arguments), "emit": emit is not None}
    answers = ChildOutput(emit)
    try:
        done = run(
            account,
            argv,
            timeout=timeout,
            data=json.dumps(asked).encode(),
            env=env,
            on_output=answers.feed,
        )
    except ChildError as exc:
        raise _not_executable(account, str(exc)) from None
    if answers.problem is not None:
        raise ProblemError(answers.problem)
    if done.code != 0 or not answers.returned:
        raise _not_executable(account, done.last_words or "no output")
    return answers.result


def _not_executable(account: SystemUser, cause: str) -> ProblemError:
    return codes.RAYFWD_NOT_EXECUTABLE.error(
        f"user {account.name} cannot run {sys.executable}: {cause}",
        "install rayfwd where that user can read it, for example in /opt/rayfwd",
    )


class ChildOutput:
    """A called child's standard output: a line of JSON for each thing emitted, then the result."""

    def __init__(self, emit: Callable[[Any], None] | None) -> None:
        self._emit = emit
        self._rest = b""
        self.returned = False
        self.result: Any = None
        self.problem: Problem | None = None

    def feed(self, data: bytes) -> None:
        """Raises ChildError for what is no such line."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                answer = json.loads(line)
            except (ValueError, RecursionError):
                answer = None
            self._take(answer)

    def _take(self, answer: Any) -> None:
        match answer:
            case {"emit": thing} if self._emit is not None:
                self._emit(thing)
            case {"result": result}:
                self.returned, self.result = True, result
            case {"problem": {"code": str(code), "cause": str(cause), "remedy": str(remedy)}}:
                self.problem = codes.named(code).problem(cause, remedy)
            case _:
                raise ChildError("wrote what is no answer")


def _readable(data: bytes) -> IO[bytes]:
    """A file in memory, so that nobody waits for a child that does not read."""
    descriptor = os.memfd_create("stdin")
    file = os.fdopen(descriptor, "w+b")
    file.write(data)
    file.seek(0)
    return file


def _collect(takers: Mapping[IO[bytes], Callable[[bytes], None]], deadline: float) -> None:
    """Give what each pipe brings to its taker, until all are at their end."""
    with selectors.DefaultSelector() as selector:
        for pipe, take in takers.items():
            selector.register(pipe, selectors.EVENT_READ, _bounded(take))
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if data:
                    key.data(data)
                else:
                    selector.unregister(key.fileobj)


def _bounded(take: Callable[[bytes], None]) -> Callable[[bytes], None]:
    taken = 0

    def bounded(data: bytes) -> None:
        nonlocal taken
        taken += len(data)
        if taken > MOST_OUTPUT:
            raise ChildError(f"wrote more than {MOST_OUTPUT} bytes")
        take(data)

    return bounded


def main(name: str) -> None:
    """In the child: call the function of that name as standard input says."""
    # Whatever else prints, prints to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    asked = json.load(sys.stdin)
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    arguments = asked["arguments"]
    if asked["emit"]:
        arguments["emit"] = lambda thing: answer(emit=thing)
    try:
        result = function(**arguments)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
    except ProblemError as exc:
        answer(problem=exc.problem.to_wire())
    else:
        answer(result=result)


if __name__ == "__main__":
    main(sys.argv[1])
