"""Makes this process a machine of its own, and is that machine's first process.

Started by `machine.py` as a script (standard library only). It leaves the host's network, process,
mount, host name and IPC namespaces, brings up loopback, starts what it is told on standard input
and reaps whatever ends. When standard input ends, so does it, and the kernel ends everything that
is left in the machine and drops its mounts: nothing can outlive whoever started it.

One JSON object a line. In: `{"do": "start", "name", "argv", "env", "log", "out"}`,
`{"do": "signal", "name", "signal"}`, `{"do": "list"}`. Out: `{"event": "up", "interfaces",
"own_user_namespace"}` or `{"event": "failed", "step", "errno", "cause"}` first, then
`{"event": "exited", "name", "code"}` and `{"event": "processes", "names"}`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

# <linux/sched.h>
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_MACHINE = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET

# <sys/mount.h>
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

# <sys/prctl.h>, <linux/sockios.h>, <linux/if.h>
PR_SET_PDEATHSIG = 1
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)


class StepError(Exception):
    """The kernel refused a step of making the machine."""

    def __init__(self, step: str, cause: OSError) -> None:
        super().__init__(f"{step}: {cause.strerror or cause}")
        self.step = step
        self.cause = cause


@contextmanager
def _step(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StepError(what, exc) from exc


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError."""
    words = (word.encode() or None for word in (source, target, kind))
    _check(_libc.mount(*words, flags, data.encode() or None))


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    _check(_libc.unshare(flags))


def mount_over(places: Mapping[Path, Path], kept: Sequence[Path]) -> None:
    """Put a directory in the place of each of `places`, and `kept`, of what was there, back in.

    Raises OSError.
    """
    with ExitStack() as stack:

        def hold(path: Path) -> Path:
            """A path that stays good when other mounts lie over the old one."""
            descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            return Path(f"/proc/self/fd/{descriptor}")

        inside = [p for p in kept if p.is_dir() and any(p.is_relative_to(q) for q in places)]
        sources = {place: hold(private) for place, private in places.items()}
        kept_sources = {path: hold(path) for path in inside if path not in places}
        for place, private in sources.items():
            for path in kept_sources:
                if path.is_relative_to(place):
                    (private / path.relative_to(place)).mkdir(parents=True, exist_ok=True)
            mount(str(private), str(place), flags=MS_BIND)
        for path, source in kept_sources.items():
            mount(str(source), str(path), flags=MS_BIND | MS_REC)


def leave_the_host() -> bool:
    """New namespaces for this process and its children; True: with a user namespace of its own.

    Root needs none. An ordinary user has rights over a machine only inside a user namespace; there
    it stays who it is, and what it starts has no right that it had not before. Raises StepError.
    """
    if os.geteuid() == 0:
        try:
            unshare(_MACHINE)
        except PermissionError:
            pass  # a root with less than root's rights, as in a container
        else:
            return False
    uid, gid = os.geteuid(), os.getegid()
    with _step("a user namespace (unshare)"):
        unshare(CLONE_NEWUSER)
    with _step("the user namespace's map of users"):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with _step("network, process and mount namespaces (unshare)"):
        unshare(_MACHINE)
    return True


def furnish(spec: Mapping[str, Any]) -> None:
    """Mounts, host name and loopback. Raises StepError."""
    with _step("private mounts"):
        mount("none", "/", flags=MS_REC | MS_PRIVATE)
    places = {Path(path): Path(private) for path, private in spec["private"].items()}
    with _step(f"a private {', '.join(map(str, places))} (mount)"):
        mount_over(places, [Path(path) for path in spec["keep"]])
    with _step("a private /dev/shm (mount)"):
        mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={spec['shm']}")
    with _step("its own /proc (mount)"):
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    with _step("its own host name"):
        socket.sethostname(spec["name"])
    with _step("its loopback interface"):
        raise_loopback()


def raise_loopback() -> None:
    """`ip link set lo up`. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 0)
        answer = fcntl.ioctl(sock, SIOCGIFFLAGS, request)
        (flags,) = struct.unpack_from("H", answer, 16)
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))


def say(event: str, **fields: Any) -> None:
    """Tell whoever started this machine; that it has gone is noticed on standard input."""
    try:
        os.write(1, json.dumps({"event": event, **fields}).encode() + b"\n")
    except OSError:
        pass


def processes() -> list[str]:
    """The command lines of all processes of this machine but the first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != "1":
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").strip()
                # One that is just being started, or ending, has no command line.
                name = words or b"[%s]" % (entry / "comm").read_bytes().strip()
            except OSError:
                continue  # it has just ended
            found.append(name.decode(errors="replace"))
    return found


class _Init:
    """The first process: starts, signals and reaps."""

    def __init__(self) -> None:
        self._started: dict[int, str] = {}

    def run(self) -> None:
        """Until standard input ends."""
        woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(0, False)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(woken, select.POLLIN)
        rest = b""
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if woken in ready:
                os.read(woken, 4096)
            self._reap()
            if 0 in ready:
                data = os.read(0, 65536)
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            name = self._started.pop(pid, None)
            if name is not None:
                say("exited", name=name, code=os.waitstatus_to_exitcode(status))

    def _obey(self, order: Mapping[str, Any]) -> None:
        match order["do"]:
            case "start":
                self._start(order)
            case "signal":
                for pid, name in self._started.items():
                    if name == order["name"]:
                        os.kill(pid, order["signal"])
            case "list":
                say("processes", names=processes())

    def _start(self, order: Mapping[str, Any]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, order["out"], flags, 0o600),
            (os.POSIX_SPAWN_OPEN, 2, order["log"], flags, 0o600),
        ]
        argv = order["argv"]
        try:
            pid = os.posix_spawn(
                argv[0],
                argv,
                order["env"],
                file_actions=actions,
                setsid=True,
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # Python ignores them
            )
        except OSError as exc:
            Path(order["log"]).write_text(f"{argv[0]}: {exc.strerror}\n")
            say("exited", name=order["name"], code=127)
        else:
            self._started[pid] = order["name"]


def _be_first(spec: Mapping[str, Any], own_user_namespace: bool) -> None:
    os.setsid()
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir("/")
    furnish(spec)
    interfaces = [name for _, name in socket.if_nameindex()]
    say("up", interfaces=interfaces, own_user_namespace=own_user_namespace)
    _Init().run()


def main() -> int:
    """The process outside: makes the namespaces, starts the first process, waits for its end."""
    spec = json.loads(sys.argv[1])
    try:
        own_user_namespace = leave_the_host()
        with _step("the first process of the machine (fork)"):
            child = os.fork()
        if child == 0:
            _be_first(spec, own_user_namespace)
            os._exit(0)
    except StepError as exc:
        say("failed", step=exc.step, errno=exc.cause.errno or errno.EIO, cause=str(exc))
        return 1
    # The machine's processes must hear of the end of the orders from the first process alone.
    os.close(0)
    os.close(1)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    os.waitpid(child, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
