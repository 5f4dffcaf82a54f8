"""The lab's machines: network namespaces with firewalls, each a machine to Ray and to sshd.

A `Lab` owns everything. Its machines hang on a bridge in a network namespace of the lab's own;
each has its own processes, mounts, host name and shared memory besides, and an ordinary user.
Namespaces have no names and are held by an init each (`init.py`), which ends with this process
however that ends: an interrupted run leaves nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from types import TracebackType
from typing import Self

from tests import namespaces
from tests.lab import package
from tests.lab.daemon import CONFIG, Daemon
from tests.lab.process import (
    HOME,
    UID,
    Process,
    began,
    boot_time,
    entering,
    environment,
    finish,
    parent,
    state,
    tail,
    until,
)
from tests.need import CHECKOUT, ray_envs, tool

NAMES = ("head", "w1", "w2")
NETWORK = "198.51.100.0/24"
INIT = "tests.lab.init"
LONGER = Path(__file__).with_name("longer.py")

SPACES = ("net", "pid", "mnt", "uts", "ipc")
made: dict[str, float] = {}
"""Every namespace that this process had made for a machine, as /proc/PID/ns shows them.

With the time (`boot_time`) it was given up, infinite until then: the kernel uses its number again,
for another run's labs too, but a process that began before that was ours.
"""


def tag() -> str:
    """How this run's interfaces, mounts and inits are marked."""
    return f"rfl{os.getpid()}"


_TAG = re.compile(r'"(rfl\d+)-')
"""The tag of a run, as the command line of an init has it."""


def start_first(module: str, name: str, spec: Mapping[str, object]) -> subprocess.Popen[bytes]:
    """Start a machine's first process, which ends with its standard input; it is ready.

    Raises RuntimeError with what it wrote.
    """
    process = subprocess.Popen(
        [*namespaces.COMMAND, module, json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=CHECKOUT,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        _, complaint = process.communicate()
        raise RuntimeError(
            f"machine {name} could not be made: {complaint.decode(errors='replace')}"
        )
    return process


def close_first(process: subprocess.Popen[bytes]) -> None:
    """Let a first process end, and wait until it and all processes of its namespaces have."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    process.wait(30)


class Init:
    """A first process and what it holds; it ends with its standard input."""

    def __init__(self, name: str, spec: Mapping[str, object]) -> None:
        self.name = name
        bare = bool(spec["bare"])
        self._outer = start_first(INIT, name, spec)
        outer = self._outer.pid
        children = Path(f"/proc/{outer}/task/{outer}/children")
        self.pid = outer if bare else int(children.read_text().split()[0])
        self.spaces = {kind: os.readlink(f"/proc/{self.pid}/ns/{kind}") for kind in SPACES}
        made.update(dict.fromkeys(set(self.spaces.values()) - set(_own_spaces()), math.inf))

    def kill(self) -> None:
        """Tell it to end, and so all processes of its namespaces."""
        if self._outer.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it; done when all processes of its namespaces have ended."""
        self.kill()
        close_first(self._outer)
        for space in self.spaces.values():
            if made.get(space) == math.inf:
                made[space] = boot_time()


def _own_spaces() -> list[str]:
    return [os.readlink(f"/proc/self/ns/{kind}") for kind in SPACES]


def network_command(pid: int, *argv: str, text: str | None = None) -> str:
    """Run one of this host's commands in the network of process `pid` alone."""
    ran = subprocess.run(
        [tool("nsenter"), f"--target={pid}", "--net", "--", tool(argv[0]), *argv[1:]],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if ran.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {ran.stderr.strip()}")
    return ran.stdout


def hardware_address(address: str) -> str:
    """Of the machine that begins with that IP address: made up locally, the same in every run."""
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))


class Machine:
    """One machine. Paths are as seen inside; the lab's own Python and Ray lie where they lie."""

    def __init__(self, lab: Lab, name: str, address: str, spec: Mapping[str, object]) -> None:
        self.lab = lab
        self.name = name
        self.address = address
        self.hardware = hardware_address(address)  # also where it is given another address later
        self.home = HOME
        self.port = f"{tag()}-{name}"[:15]  # an interface's name has no more room
        self._init = Init(name, spec)
        self._sshd: Process | None = None
        self._started = 0

    # Commands

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str = "ray",
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
        input: str | None = None,  # noqa: A002  # subprocess's own name for it
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, as `ray` in its home or as `root` in /.

        Raises CommandFailed (unless `check` is false) and TimeoutError.
        """
        inside = [str(arg) for arg in argv]
        line = entering(self._init.pid, inside, user, HOME if user == "ray" else "/")
        return finish(line, inside, environment(user, env), timeout, check, input)

    def popen(
        self,
        argv: Sequence[str],
        *,
        user: str = "ray",
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> Process:
        """Start a command; what it writes goes to `log` on the host's side."""
        inside = [str(arg) for arg in argv]
        self._started += 1
        name = f"{self.name}-{Path(inside[0]).name}"
        where = log if log is not None else self.lab.folder / f"{name}-{self._started}.log"
        line = entering(self._init.pid, inside, user, HOME if user == "ray" else "/")
        process = Process(line, environment(user, env), where, name)
        self.lab.processes.append(process)
        return process

    def pids(self) -> list[int]:
        """Host-side ids of the machine's processes, without its init and without zombies."""
        space = self._init.spaces["pid"]
        return [
            pid for pid in _inside({space: math.inf}) if pid != self._init.pid and state(pid) != "Z"
        ]

    def kill_all(self) -> None:
        """SIGKILL to every process but init, at once: a power cut. Files and firewall stay."""
        self.run(["kill", "-KILL", "--", "-1"], user="root")
        deadline = time.monotonic() + 20
        while left := self.pids():
            assert time.monotonic() < deadline, f"{self.name}: {left} outlive SIGKILL"
            time.sleep(0.05)
        self._sshd = None

    # Files

    def host_path(self, path: str) -> Path:
        """A path inside as the host reaches it, while the machine is there.

        A link with an absolute target leads to the host's own file instead.
        """
        assert path.startswith("/"), path
        return Path(f"/proc/{self._init.pid}/root{path}")

    def write(self, path: str, text: str, mode: int = 0o600) -> None:
        """A file inside, owned by `ray`; missing directories above it are made, `ray`'s too."""
        target = self.host_path(path)
        missing = [above for above in target.parents if not above.exists()]
        for above in reversed(missing):
            above.mkdir(mode=0o755)
            os.chown(above, UID, UID)
        target.write_text(text)
        os.chown(target, UID, UID)
        target.chmod(mode)

    # Network

    def attach(self, switch: Init) -> None:
        """Plug the machine into the lab's network."""
        own = ("address", self.hardware)
        peer = ("peer", "name", "eth0", *own, "netns", str(self._init.pid))
        network_command(switch.pid, "ip", "link", "add", self.port, "type", "veth", *peer)
        network_command(switch.pid, "ip", "link", "set", self.port, "master", "br0", "up")
        network_command(self._init.pid, "ip", "link", "set", "lo", "up")
        network_command(self._init.pid, "ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        network_command(self._init.pid, "ip", "link", "set", "eth0", "up")

    def meet(self, other: Machine) -> None:
        """Know the other's hardware address for good.

        Else a network that is cut tells of it: after half a minute ARP fails, and then every
        connect does at once, with "No route to host". Behind a router nobody would say so.
        """
        entry = (other.address, "lladdr", other.hardware, "dev", "eth0")
        network_command(self._init.pid, "ip", "neigh", "replace", *entry, "nud", "permanent")

    def firewall(self, accept_tcp: Sequence[int] = (), strict: bool = False) -> None:
        """Drop what comes in but for loopback, answers, and these TCP ports.

        `strict`: also what belongs to no connection, in both directions, and is no beginning.
        """
        new = "ct state new " if strict else ""
        ports = [f"tcp dport {port} {new}accept" for port in accept_tcp]
        lines = [
            "table inet firewall",
            "delete table inet firewall",  # with the line above: whether there was one or not
            "table inet firewall {",
            "chain input {",
            "type filter hook input priority 0; policy drop;",
            'iif "lo" accept',
            "ct state established,related accept",
            *ports,
            "}",
            "chain output {",
            "type filter hook output priority 0; policy accept;",
            *(['oif "lo" accept', "ct state invalid drop"] if strict else []),
            "}",
            "}",
        ]
        network_command(self._init.pid, "nft", "-f", "-", text="\n".join(lines) + "\n")

    def nft(self, text: str) -> None:
        """Add to the firewall, or take away from it."""
        network_command(self._init.pid, "nft", "-f", "-", text=text)

    def network_command(self, *argv: str) -> str:
        """Run ip, nft or ss of the host in this machine's network; what it wrote."""
        return network_command(self._init.pid, *argv)

    # SSH

    @property
    def public_key(self) -> str:
        """Of its user, as a line of authorized_keys."""
        return (self.lab.folder / f"{self.name}-user.pub").read_text().strip()

    @property
    def host_key(self) -> str:
        """Of its sshd, public: type and key."""
        return " ".join((self.lab.folder / f"{self.name}-host.pub").read_text().split()[:2])

    def authorize(self, *lines: str) -> None:
        """Make these the lines of the user's authorized_keys."""
        self.write(f"{HOME}/.ssh/authorized_keys", "".join(f"{line}\n" for line in lines))

    def know(self, *lines: str) -> None:
        """Make these the lines of the user's known_hosts."""
        self.write(f"{HOME}/.ssh/known_hosts", "".join(f"{line}\n" for line in lines))

    def give_keys(self) -> None:
        """Its user's key pair and its sshd's host key."""
        secret = (self.lab.folder / f"{self.name}-user").read_text()
        self.write(f"{HOME}/.ssh/id_ed25519", secret)
        self.write(f"{HOME}/.ssh/id_ed25519.pub", f"{self.public_key}\n", 0o644)
        self.host_path(f"{HOME}/.ssh").chmod(0o700)
        host_key = self.host_path("/run/lab/ssh_host_ed25519_key")
        host_key.touch(mode=0o600)
        host_key.write_text((self.lab.folder / f"{self.name}-host").read_text())

    @property
    def sshd_runs(self) -> bool:
        return self._sshd is not None and self._sshd.poll() is None

    def start_sshd(self, further: Sequence[str] = ()) -> Process:
        """Debian's sshd with its own configuration; only the host key is the lab's.

        `further` are options of the command line.
        """
        assert not self.sshd_runs, f"{self.name}: sshd runs"
        self.host_path("/run/sshd").mkdir(exist_ok=True)
        options = ["-D", "-e", "-f", "/etc/ssh/sshd_config", "-h", "/run/lab/ssh_host_ed25519_key"]
        options += further
        log = self.lab.folder / f"{self.name}-sshd.log"
        self._sshd = self.popen([tool("sshd"), *options], user="root", log=log)
        deadline = time.monotonic() + 20
        # The log is one for all starts, so ask the kernel.
        while not self.network_command("ss", "-Hltn", "sport = :22").strip():
            assert self._sshd.poll() is None, f"sshd has ended{tail(log)}"
            assert time.monotonic() < deadline, f"sshd does not listen{tail(log)}"
            time.sleep(0.05)
        return self._sshd

    def stop_sshd(self) -> None:
        """End the listening sshd. Connections that stand go on, as with Debian's service."""
        assert self._sshd is not None, f"{self.name}: sshd was not started"
        self._sshd.signal(signal.SIGTERM)
        self._sshd.wait(20)
        self._sshd = None

    # rayfwd and Ray

    def rayfwd_daemon(
        self,
        config_toml: str,
        env: Mapping[str, str] | None = None,
        under: Sequence[str] = (),
        net_admin: bool = False,
    ) -> Daemon:
        """Write ~/rayfwd.toml and start `rayfwd run` with it as user `ray`.

        `under`: a command that becomes it, as in `prlimit --nofile=200`. `net_admin`: it may change
        the network, as in a container with that right, and send packets as any container may.
        """
        self.write(CONFIG, config_toml)
        assert self.lab.rayfwd is not None, "rayfwd is not installed: see tests/lab/package.py"
        argv = [*under, str(self.lab.rayfwd), "run", "--config", CONFIG]
        log = self.lab.folder / f"{self.name}-rayfwd-{self._started + 1}.log"
        if not net_admin:
            return Daemon(self, self.popen(argv, env=env, log=log))
        ids = ["--reuid=ray", "--regid=ray", "--init-groups"]
        keep = [f"--{kind}-caps=+net_admin,+net_raw" for kind in ("inh", "ambient")]
        argv = [tool("setpriv"), *ids, *keep, "--", tool("env"), f"--chdir={HOME}", *argv]
        return Daemon(self, self.popen(argv, user="root", env=environment("ray", env), log=log))

    def ray(self, version: str = "2.60.0") -> Path:
        """The command `ray` of that version."""
        return ray_envs() / f"ray-{version}" / "bin" / "ray"

    def ray_python(self, version: str = "2.60.0") -> Path:
        """The Python that has that version of Ray."""
        return self.ray(version).with_name("python")

    def kill(self) -> None:
        """Tell all of it to end at once."""
        self._init.kill()

    def close(self) -> None:
        self._init.close()


class Lab:
    """Three machines and the network between them; all of it is gone when it is left.

    The head's firewall lets in SSH, the workers' nothing. `folder` (logs, keys) stays.
    """

    def __init__(
        self, folder: Path, rayfwd: Path | None = None, names: Sequence[str] = NAMES
    ) -> None:
        self.folder = folder
        self._names = names
        self.rayfwd = rayfwd if rayfwd is not None else package.current()
        self.processes: list[Process] = []
        self._switch: Init | None = None
        self._machines: dict[str, Machine] = {}

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._switch = Init("switch", {"bare": True, "tag": f"{tag()}-switch"})
        network_command(self._switch.pid, "ip", "link", "add", "br0", "type", "bridge")
        network_command(self._switch.pid, "ip", "link", "set", "br0", "up")
        addresses = {name: f"198.51.100.{k}" for k, name in enumerate(self._names, 1)}
        keep = self._trees()
        for name, address in addresses.items():
            for kind in ("user", "host"):
                keygen(self.folder / f"{name}-{kind}", f"{kind}@{name}")
            spec = {
                "bare": False,
                "tag": f"{tag()}-{name}",
                "name": name,
                "home": HOME,
                "uid": UID,
                "keep": keep,
                "files": _etc(name, addresses),
            }
            machine = self._machines[name] = Machine(self, name, address, spec)
            machine.attach(self._switch)
            machine.firewall([22] if name == "head" else [])
            machine.give_keys()
        for machine, other in permutations(self._machines.values(), 2):
            machine.meet(other)
        head, *workers = self._machines.values()
        head.authorize(*(worker.public_key for worker in workers))
        for worker in workers:
            worker.know(f"{head.address} {head.host_key}")

    def _trees(self) -> list[str]:
        """What machines see of this host's Python, Ray and rayfwd."""
        envs = sorted(ray_envs().glob("ray-*/bin/python"))
        found = [tree for python in envs for tree in package.trees(python.parents[1])]
        if self.rayfwd is not None:
            found += package.trees(self.rayfwd.parents[1])
        return list(dict.fromkeys(found))

    def machine(self, name: str) -> Machine:
        """`head`, `w1` or `w2`, and others where they were asked for."""
        return self._machines[name]

    @property
    def machines(self) -> tuple[Machine, ...]:
        """All of them, the head first."""
        return tuple(self._machines.values())

    def cut(self, machine: Machine) -> None:
        """Let no packet through to or from that machine; nobody is told."""
        self._switch_port(machine, "nomaster")

    def heal(self, machine: Machine) -> None:
        """Undo `cut`."""
        self._switch_port(machine, "master", "br0")

    def _switch_port(self, machine: Machine, *words: str) -> None:
        # Unplugged on the switch's side: the machine's own interface shows nothing of it.
        assert self._switch is not None
        network_command(self._switch.pid, "ip", "link", "set", machine.port, *words)

    def lengthen(self, machine: Machine, seconds: float) -> Callable[[], None]:
        """Let every packet to and from that machine take so much longer; returns what undoes it.

        What is under way when it begins or ends is lost.
        """
        assert self._switch is not None
        switch, near, far = self._switch.pid, f"{machine.name}-near", f"{machine.name}-far"
        network_command(switch, "ip", "link", "add", near, "type", "veth", "peer", "name", far)
        network_command(switch, "ip", "link", "set", far, "master", "br0", "up")
        network_command(switch, "ip", "link", "set", near, "up")
        self.cut(machine)
        # With its process namespace, which is this host's, so that nsenter stays as the parent.
        enter = [tool("nsenter"), f"--target={switch}", "--net", "--pid", "--"]
        script = [sys.executable, "-I", "-S", str(LONGER), machine.port, near, str(seconds)]
        log = self.folder / f"{machine.name}-longer.log"
        relay = Process([*enter, *script], os.environ, log, f"{machine.name}-longer")
        self.processes.append(relay)
        until(lambda: "relaying" in log.read_text(), 20, lambda: f"the relay{tail(log)}")

        def undo() -> None:
            relay.signal(signal.SIGKILL)
            relay.wait(20)
            log.unlink()
            network_command(switch, "ip", "link", "del", near)
            self.heal(machine)

        return undo

    def drop_one_way(self, source: Machine | None = None, target: Machine | None = None) -> None:
        """Let no packet of `source` through to `target`, but those of the other way (None: all).

        Adds to what is dropped already, until `drop_nothing`. Nobody is told.
        """
        assert self._switch is not None
        ends = [("iifname", source), ("oifname", target)]
        rule = " ".join(f'{key} "{end.port}"' for key, end in ends if end is not None)
        text = f"""table bridge dropped {{
            chain forward {{ type filter hook forward priority 0; policy accept; {rule} drop; }}
        }}"""
        network_command(self._switch.pid, "nft", "-f", "-", text=text)

    def drop_nothing(self) -> None:
        """Undo `drop_one_way`; `cut` stays."""
        assert self._switch is not None
        text = "table bridge dropped\ndelete table bridge dropped\n"  # there or not
        network_command(self._switch.pid, "nft", "-f", "-", text=text)

    def reset_connections(self, machine: Machine) -> int:
        """Break every TCP connection between that machine and others, at both ends; how many."""
        broken = machine.network_command("ss", "-HKtn", "dst", NETWORK)
        return len(broken.splitlines())

    def tails(self) -> str:
        """The ends of all logs, for a message."""
        logs = sorted({process.log for process in self.processes})
        return "".join(tail(log) for log in logs)

    def close(self) -> None:
        """End everything. May be called again."""
        machines, self._machines = self._machines, {}
        for machine in machines.values():
            machine.kill()
        # A machine is gone when nobody outside holds a process of it: nsenter, stopped with its
        # child, would.
        for process in self.processes:
            process.reap()
        for machine in machines.values():
            machine.close()
        if self._switch is not None:
            self._switch.close()
            self._switch = None


def keygen(path: Path, comment: str) -> None:
    if not path.exists():
        argv = [tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


def _etc(name: str, addresses: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """The machine's own files: users, names, and no DNS."""
    users = {"root": (0, "/root", "/bin/bash"), "nobody": (65534, "/nonexistent", "/bin/false")}
    # sshd's unprivileged part, as Debian's package makes it
    users |= {"sshd": (104, "/run/sshd", "/bin/false"), "ray": (UID, HOME, "/bin/bash")}
    groups = {"root": 0, "tty": 5, "shadow": 42, "nogroup": 65534, "ray": UID}
    own = {"nobody": 65534, "sshd": 65534}
    passwd = [f"{u}:x:{i}:{own.get(u, i)}:{u}:{home}:{sh}" for u, (i, home, sh) in users.items()]
    shadow = [f"{user}:*:19000:0:99999:7:::" for user in users]
    hosts = ["127.0.0.1 localhost", f"{addresses[name]} {name}"]
    return {
        "/etc/passwd": (_lines(passwd), 0o644),
        "/etc/group": (_lines(f"{group}:x:{i}:" for group, i in groups.items()), 0o644),
        "/etc/shadow": (_lines(shadow), 0o600),
        "/etc/hosts": (_lines(hosts), 0o644),
        "/etc/hostname": (f"{name}\n", 0o644),
        "/etc/resolv.conf": ("# no name server: questions are refused at once\n", 0o644),
    }


def _lines(lines: Sequence[str] | Iterator[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _inside(spaces: Mapping[str, float]) -> list[int]:
    """Processes that are in any of these namespaces since before the time given with it."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            for kind in SPACES:
                try:
                    space = os.readlink(f"/proc/{entry}/ns/{kind}")
                except OSError:  # gone, or a zombie
                    break
                if began(int(entry)) < spaces.get(space, 0.0):
                    found.append(int(entry))
                    break
    return found


def left_over() -> list[str]:
    """What is there of this process's labs, one line a thing; nothing once all are closed."""
    mark = tag()
    inside = [pid for pid in _inside(made) if not of_another_run(pid, mark)]
    lines = [f"process {pid} in a lab's namespace: {_called(pid)}" for pid in inside]
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        if f'"{mark}-' in _called(pid):
            lines.append(f"process {pid}, a lab's init: {_called(pid)}")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    lines += [f"mount {line}" for line in mounts if f"{mark}-" in line]
    links = os.listdir("/sys/class/net")
    lines += [f"interface {link}" for link in links if link.startswith(f"{mark}-")]
    return lines


def of_another_run(pid: int, own: str) -> bool:
    """Whether a process descends from a lab of another run than the one with that tag: it began
    before ours gave a namespace up, and got one of its own, under the same number, right after
    (systemd's services do)."""
    while pid > 1:
        if any(mark != own for mark in _TAG.findall(_called(pid))):
            return True
        pid = parent(pid)
    return False


def _called(pid: int) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return line.replace(b"\0", b" ").decode(errors="replace").strip()
