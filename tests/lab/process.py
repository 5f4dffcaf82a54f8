"""Commands inside a machine's namespaces: run to their end, or started and held by a handle.

nsenter(1) stays outside as the parent of the command, which is therefore found as its child.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tests.need import tool

UID = 4242
"""Of the machines' ordinary user, and of its group."""
HOME = "/home/ray"

T = TypeVar("T")


class CommandFailed(subprocess.CalledProcessError):
    """A command in a machine failed; says what it wrote."""

    def __str__(self) -> str:
        return f"{super().__str__()}\nstdout: {self.stdout[-8000:]}\nstderr: {self.stderr[-8000:]}"


def entering(pid: int, argv: Sequence[str], user: str, cwd: str) -> list[str]:
    """The command line that runs `argv` beside process `pid`, in all of its namespaces."""
    ids = ["--reuid=ray", "--regid=ray", "--init-groups"]
    drop = [tool("setpriv"), *ids, "--"] if user == "ray" else []
    spaces = ["--mount", "--uts", "--ipc", "--net", "--pid"]
    return [
        *(tool("nsenter"), f"--target={pid}", *spaces, "--"),
        *drop,
        # A test run in the background ignores SIGINT, which a command would inherit.
        *(tool("env"), "--default-signal", f"--chdir={cwd}"),
        *argv,
    ]


def environment(user: str, extra: Mapping[str, str] | None) -> dict[str, str]:
    """What a login of that user has; nothing of the test's own environment."""
    path = "/usr/local/bin:/usr/bin:/bin"
    return {
        "HOME": HOME if user == "ray" else "/root",
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "PATH": path if user == "ray" else f"/usr/local/sbin:/usr/sbin:/sbin:{path}",
        **(extra or {}),
    }


def finish(
    argv: Sequence[str],
    inside: Sequence[str],
    env: Mapping[str, str],
    timeout: float,
    check: bool,
    text: str | None,
) -> subprocess.CompletedProcess[str]:
    """Run `argv` to its end; `inside` is how it is called in messages.

    Raises CommandFailed, and TimeoutError with what was written so far; then all of it is ended.
    """
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE if text is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=dict(env),
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(text, timeout)
        except BaseException as exc:
            # The group, since the command is not nsenter itself and may have children.
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(exc, subprocess.TimeoutExpired):
                raise
            out, err = _rest(process)
            raise TimeoutError(
                f"{shlex.join(inside)}: not done in {timeout:g} s\n"
                f"stdout: {out[-8000:]}\nstderr: {err[-8000:]}"
            ) from None
    if check and process.returncode != 0:
        raise CommandFailed(process.returncode, list(inside), out, err)
    return subprocess.CompletedProcess(list(inside), process.returncode, out, err)


def _rest(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=5)
    except subprocess.TimeoutExpired:  # somebody who left the group holds the pipe
        return "(not to be had)", ""


class Process:
    """A process in a machine. Its machine ends it with everything else, at the latest."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log: Path, name: str) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as out:
            self._outer = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                # A group of its own in our session: when we are killed while nsenter is stopped,
                # the group has nobody left who could continue it, and the kernel ends it.
                process_group=0,
            )
        self.pid = self._find_child()
        """On the host's side: the command itself, not nsenter. 0: it ended before it was seen."""

    def _find_child(self) -> int:
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        deadline = time.monotonic() + 20
        seen = 0
        while time.monotonic() < deadline:
            try:
                seen = int(children.read_text().split()[0])
            except (OSError, IndexError):
                pass
            if (seen and not _on_the_way(seen)) or self._outer.poll() is not None:
                return seen
            time.sleep(0.005)
        raise AssertionError(f"{self.name}: no process after 20 s")

    @property
    def parent(self) -> int:
        """On the host's side: nsenter, which stops itself when the command is stopped."""
        return self._outer.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._outer.poll()

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when it has ended."""
        if self.poll() is not None:
            return
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return
        if number == signal.SIGCONT:
            self._continue_outer()

    def _continue_outer(self) -> None:
        """Let nsenter go on where its child no longer is stopped: it does so only when told."""
        if self._outer.poll() is None and state(self._outer.pid) == "T" and state(self.pid) != "T":
            self._outer.send_signal(signal.SIGCONT)

    def wait(self, timeout: float = 60) -> int:
        """Its exit code, negative for a signal. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            self._continue_outer()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} runs on after {timeout:g} s: {tail(self.log)}")
            time.sleep(0.05)
        return code

    def reap(self) -> None:
        """After its machine was told to end: wait for what is left of it."""
        deadline = time.monotonic() + 10
        while self.poll() is None and time.monotonic() < deadline:
            self._continue_outer()
            time.sleep(0.01)
        self._outer.kill()  # nothing happens when it has ended
        self._outer.wait()


def _on_the_way(pid: int) -> bool:
    """Whether a process is still one of those that `entering` puts before a command.

    None of the lab's commands is one of them.
    """
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name in {"nsenter", "setpriv", "env"}
    except OSError:  # it has ended
        return False


def state(pid: int) -> str | None:
    """The kernel's letter for what a process does; None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[0]


def parent(pid: int) -> int:
    """The process that it is a child of; 0: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def without_forks(pids: Sequence[int]) -> list[int]:
    """These without the children of others of them: until a process that was forked becomes another
    program, it is called as its parent."""
    return [pid for pid in pids if parent(pid) not in pids]


def began(pid: int) -> float:
    """When a process began, on the clock that `boot_time` tells; infinite: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return math.inf
    return int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def boot_time() -> float:
    """Seconds since this host has started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def tail(log: Path, characters: int = 6000) -> str:
    """The end of a log, for a message."""
    try:
        text = log.read_text(errors="replace")
    except OSError as exc:
        text = f"({exc})"
    return f"\n--- {log.name}\n{text[-characters:]}"


def until(look: Callable[[], T], timeout: float, what: Callable[[], str]) -> T:
    """The first true thing that `look` returns. Raises AssertionError with `what`."""
    began = time.monotonic()
    while not (found := look()):
        if time.monotonic() > began + timeout:
            raise AssertionError(f"not within {timeout:g} s: {what()}")
        rest(began)
    return found


def rest(began: float) -> None:
    """Between two looks at something that is waited for since `began`: a look costs the machines
    processor time, and after a long wait a moment more is none."""
    time.sleep(min(0.5, 0.05 + (time.monotonic() - began) / 20))
