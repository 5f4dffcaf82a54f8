"""Machines that are booted: Debian with its own systemd, journal, sshd, firewall and network.

A `Lab` owns everything: a switch, and on it a head and a worker, each a systemd-nspawn container
on a root of `tests/setup_roots.py` with rayfwd installed (`install.py`). What a machine writes is
in memory and gone with it. Namespaces have no names and end with this process however that ends
(`booter.py`), and so do all control groups.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests import setup_roots
from tests.lab import machines as namespaces
from tests.lab.machines import Init, keygen, network_command
from tests.lab.process import (
    Process,
    began,
    boot_time,
    entering,
    environment,
    finish,
    tail,
    until,
)
from tests.need import tool
from tests.systemd import booter
from tests.systemd.install import Installed

NETWORK = "198.51.100"
BOOT_SECONDS = 60.0
"""A boot takes 2 to 5 s where nothing else runs."""
BOOTER = booter.__name__
USERS = {"root": 0, "ray": setup_roots.UID}
RAY = "/home/ray/venv/bin/ray"

FIREWALL = """\
flush ruleset
table inet firewall {{
    chain input {{
        type filter hook input priority 0; policy drop;
        iif "lo" accept
        ct state established,related accept
        {accept}
    }}
}}
"""
"""Debian's /etc/nftables.conf, for a machine that lets in these and drops the rest."""


class Machine:
    """One machine. Paths are as seen inside."""

    def __init__(self, lab: Lab, name: str, number: int, installed: Installed) -> None:
        self.lab = lab
        self.name = name
        self.suite = installed.suite
        self.address = f"{NETWORK}.{number}"
        self.console = lab.folder / f"{name}-console.log"
        self.tag = f"{namespaces.tag()}-{name}"
        self.port = self.tag[:15]  # an interface's name has no more room
        self._installed = installed
        self._spaces: set[str] = set()
        """Namespaces that there are of it."""
        self._booted: set[str] = set()
        """Those of the present boot."""
        self._started = 0
        self._net = Init(f"{name}-net", {"bare": True, "tag": f"{self.tag}-net"})
        self._outer: subprocess.Popen[bytes] | None = None

    # Life

    def make(self, switch: Init) -> None:
        """Plug it in and give it its disk; it is off."""
        peer = ("peer", "name", "eth0", "netns", str(self._net.pid))
        network_command(switch.pid, "ip", "link", "add", self.port, "type", "veth", *peer)
        network_command(switch.pid, "ip", "link", "set", self.port, "master", "br0", "up")
        booter.remove_groups(self.tag)  # of a process that had this one's number
        spec = {
            "tag": self.tag,
            "lower": [str(path) for path in self._installed.lower],
            "files": self._files(),
            "network": self._net.pid,
            "nspawn": tool("systemd-nspawn"),
            "options": [
                "--quiet",
                "--register=no",
                "--keep-unit",
                "--settings=no",
                "--console=pipe",
                "--link-journal=no",
                "--resolv-conf=off",
                "--timezone=off",
                f"--machine={self.name}",
                "--capability=CAP_NET_ADMIN",
                f"--bind-ro={self._installed.wheels}:/wheels",
                f"--bind-ro={setup_roots.CHECKOUT}:/checkout",
            ],
            # Control groups of version 2 alone, whatever this host has: newer systemd needs them.
            "environment": {"PATH": os.environ["PATH"], "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            "console": str(self.console),
        }
        self._outer = namespaces.start_first(BOOTER, self.name, spec)
        self._remember(self._holder())

    def boot(self, wait: bool = True) -> None:
        """Turn it on; `wait`: until it is up."""
        assert self._outer is not None
        assert self._outer.stdin is not None
        assert not self.is_on, f"{self.name} is on"
        self._outer.stdin.write(b"boot\n")
        self._outer.stdin.flush()
        until(lambda: self.is_on, 10, lambda: f"{self.name}: no nspawn{tail(self.console)}")
        if wait:
            self.wait_up()

    def wait_up(self, timeout: float = BOOT_SECONDS) -> None:
        """Return when its basic services and sshd run. rayfwd, if enabled, may still start.

        `systemctl is-system-running --wait` would wait for rayfwd too, which waits for its head.
        """
        units = ["systemctl", "is-active", "dbus.service", "ssh.service", "systemd-logind.service"]
        said = ["no first process"]

        def up() -> bool:
            if self._leader() != 0:
                said[:] = self.run(units, check=False).stdout.split()
            return said == ["active"] * 3

        until(up, timeout, lambda: f"{self.name} is up: {said}{tail(self.console)}")

    @property
    def is_on(self) -> bool:
        """Whether nspawn runs."""
        return bool(_children(self._holder()))

    def reboot(self, wait: bool = True) -> None:
        """`systemctl reboot`; `wait`: until it is up again."""
        before = self._leader()
        assert before, f"{self.name} is off"
        self.run(["systemctl", "reboot"], check=False)  # it may be gone before it has answered
        if wait:
            self.wait_down(before)
            self.wait_up()

    def wait_down(self, before: int, timeout: float = 120) -> None:
        """Return when process `before`, the first of a boot, has ended."""
        until(
            lambda: self._leader() != before,
            timeout,
            lambda: f"{self.name} goes down{tail(self.console)}",
        )

    def poweroff(self, timeout: float = 120) -> None:
        """`systemctl poweroff`, until it is off."""
        self.run(["systemctl", "poweroff"], check=False)
        self._wait_off(timeout)

    def power_cut(self) -> None:
        """SIGKILL to everything at once. What was written is there at the next boot."""
        os.kill(self._leader(), signal.SIGKILL)
        self._wait_off(20)

    def _wait_off(self, timeout: float) -> None:
        until(lambda: not self.is_on, timeout, lambda: f"{self.name} is off{tail(self.console)}")
        self._give_up(self._booted, boot_time())
        self._booted = set()

    # Commands

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
        input: str | None = None,  # noqa: A002  # subprocess's own name for it
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, as `root` in / or as `ray` at home, as after a login.

        Raises CommandFailed (unless `check` is false) and TimeoutError.
        """
        inside = [str(arg) for arg in argv]
        return finish(
            self._entering(inside, user), inside, self._env(user, env), timeout, check, input
        )

    def popen(
        self, argv: Sequence[str], *, user: str = "root", env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a command; what it writes goes to a log in the lab's folder."""
        inside = [str(arg) for arg in argv]
        self._started += 1
        name = f"{self.name}-{Path(inside[0]).name}"
        log = self.lab.folder / f"{name}-{self._started}.log"
        process = Process(self._entering(inside, user), self._env(user, env), log, name)
        self.lab.processes.append(process)
        return process

    def _entering(self, inside: Sequence[str], user: str) -> list[str]:
        leader = self._leader()
        assert leader, f"{self.name} is off{tail(self.console)}"
        return entering(leader, inside, user, "/home/ray" if user == "ray" else "/")

    def _env(self, user: str, extra: Mapping[str, str] | None) -> dict[str, str]:
        session = {"XDG_RUNTIME_DIR": f"/run/user/{USERS[user]}"}
        # Where `pip install` finds what it needs: there is no network but the lab's.
        packages = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "/wheels",
            "PIP_ROOT_USER_ACTION": "ignore",
        }
        return environment(user, {**session, **packages, **(extra or {})})

    # systemd and its journal

    def systemctl(self, *words: str, user: str = "root", check: bool = True) -> str:
        """What systemctl(1) printed; of the user's own manager for `ray`."""
        manager = ["systemctl"] if user == "root" else ["systemctl", "--user"]
        return self.run([*manager, *words], user=user, check=check, timeout=150).stdout

    def edit_unit(self, unit: str, text: str) -> None:
        """`systemctl edit`, on a terminal, with an editor that writes this."""
        self.write("/root/written", text)
        self.write("/root/editor", '#!/bin/sh\ncat /root/written > "$1"\n', mode=0o755)
        edit = ["script", "-qec", f"systemctl edit {unit}", "/dev/null"]
        self.run(edit, env={"SYSTEMD_EDITOR": "/root/editor"})

    def show(self, unit: str = "rayfwd", user: str = "root") -> dict[str, str]:
        """Every property of a unit: ActiveState, StatusText, MainPID, NRestarts and so on."""
        lines = self.systemctl("show", unit, user=user).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def wait_for(
        self, unit: str = "rayfwd", timeout: float = 90, user: str = "root", **wanted: str
    ) -> dict[str, str]:
        """The unit's properties as soon as they are as `wanted`: `ActiveState="active"`."""
        seen: dict[str, str] = {}

        def fits() -> bool:
            seen.update(self.show(unit, user))
            return all(seen.get(key) == value for key, value in wanted.items())

        def what() -> str:
            has = {key: seen.get(key) for key in [*wanted, "StatusText", "Result"]}
            lines = self.run(
                ["journalctl", "--no-pager", "--lines=40", "--unit", unit], check=False
            )
            return f"{self.name}: {unit} is {wanted}; it is {has}\n{lines.stdout}"

        until(fits, timeout, what)
        return seen

    def wait_for_status(self, begins: str, timeout: float = 90) -> dict[str, str]:
        """The properties of rayfwd's unit as soon as its STATUS begins so."""
        seen: dict[str, str] = {}

        def fits() -> bool:
            seen.update(self.show())
            return seen.get("StatusText", "").startswith(begins)

        until(fits, timeout, lambda: f"{self.name}: {begins!r}; it is {seen.get('StatusText')!r}")
        return seen

    def journal(
        self, *words: str, unit: str | None = "rayfwd", user: str = "root"
    ) -> list[dict[str, Any]]:
        """Entries of all boots, oldest first, as `journalctl -o json` has them; for `ray`, of the
        user's own unit.

        A value that is no text is a list of bytes there, and one that comes twice a list.
        """
        of = ["--unit", unit] if unit is not None else []
        if user != "root":  # `--user-unit` would be one of root's own
            of = [f"_SYSTEMD_USER_UNIT={unit}.service"]
        said = self.run(["journalctl", "--no-pager", "--all", "-o", "json", *of, *words])
        return [json.loads(line) for line in said.stdout.splitlines()]

    def events(
        self, name: str | None = None, unit: str = "rayfwd", user: str = "root"
    ) -> list[dict[str, Any]]:
        """rayfwd's own entries, oldest first: those of one event, or all."""
        own = [entry for entry in self.journal(unit=unit, user=user) if "EVENT" in entry]
        return [entry for entry in own if name is None or entry["EVENT"] == name]

    def status(self, user: str = "root") -> dict[str, Any]:
        """`rayfwd status --json`."""
        said = self.run(["rayfwd", "status", "--json"], user=user, check=False)
        assert said.stdout, said.stderr
        found: dict[str, Any] = json.loads(said.stdout)
        return found

    # Files

    def host_path(self, path: str) -> Path:
        """A path inside as the host reaches it, while the machine is on."""
        return Path(f"/proc/{self._leader()}/root{path}")

    def write(self, path: str, text: str, owner: str = "root", mode: int = 0o644) -> None:
        """A file inside; the directory must be there."""
        target = self.host_path(path)
        target.touch(mode=0o600)
        target.write_text(text)
        os.chown(target, USERS[owner], USERS[owner])
        target.chmod(mode)

    def read(self, path: str) -> str:
        return self.host_path(path).read_text()

    def _files(self) -> dict[str, tuple[str, int]]:
        """What makes it this machine, before its first boot."""
        network = (
            f"[Match]\nName=eth0\n[Network]\nAddress={self.address}/24\n"
            "LinkLocalAddressing=no\nIPv6AcceptRA=no\nLLDP=no\n"
        )
        hosts = ["127.0.0.1 localhost", *(f"{a} {n}" for n, a in self.lab.addresses.items())]
        private = self.lab.folder / f"{self.name}-host"
        keygen(private, f"host@{self.name}")
        identity = self.name.encode().hex().ljust(32, "0")[:32]
        return {
            "/etc/hostname": (f"{self.name}\n", 0o644),
            "/etc/machine-id": (f"{identity}\n", 0o444),
            "/etc/hosts": ("".join(f"{line}\n" for line in hosts), 0o644),
            "/etc/resolv.conf": ("# no name server\n", 0o644),
            "/etc/systemd/network/eth0.network": (network, 0o644),
            "/etc/nftables.conf": (FIREWALL.format(accept=_accept(self.lets_in)), 0o755),
            "/etc/ssh/ssh_host_ed25519_key": (private.read_text(), 0o600),
            "/etc/ssh/ssh_host_ed25519_key.pub": (
                private.with_suffix(".pub").read_text(),
                0o644,
            ),
        }

    # Network

    @property
    def lets_in(self) -> tuple[int, ...]:
        """TCP ports that its firewall lets in from a boot on."""
        return (22,) if self.name == "head" else ()

    def firewall(self, *accept_tcp: int) -> None:
        """From now to the next boot: let in these TCP ports and what answers, drop the rest."""
        text = FIREWALL.format(accept=_accept(accept_tcp))
        network_command(self._net.pid, "nft", "-f", "-", text=text)

    def network_command(self, *argv: str) -> str:
        """Run ip, nft or ss of the host in this machine's network; what it wrote."""
        return network_command(self._net.pid, *argv)

    @property
    def host_key(self) -> str:
        """Of its sshd, public: type and key."""
        text = (self.lab.folder / f"{self.name}-host.pub").read_text()
        return " ".join(text.split()[:2])

    @property
    def fingerprint(self) -> str:
        """Of its sshd's host key."""
        path = self.lab.folder / f"{self.name}-host.pub"
        said = subprocess.run(
            [tool("ssh-keygen"), "-lf", path], check=True, capture_output=True, text=True
        )
        return said.stdout.split()[1]

    # What is underneath

    def _holder(self) -> int:
        """The first process of the namespace that nspawn is in."""
        assert self._outer is not None
        return next(iter(_children(self._outer.pid)), 0)

    def _leader(self) -> int:
        """The machine's first process, seen from the host; 0: there is none (yet)."""
        for nspawn in _children(self._holder()):
            for pid in _children(nspawn):
                with contextlib.suppress(OSError, StopIteration):
                    status = Path(f"/proc/{pid}/status").read_text().splitlines()
                    ids = next(line for line in status if line.startswith("NSpid:")).split()
                    if ids[-1] == "1" and Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                        booted = self._remember(pid)
                        # The boot before had ended when this one began.
                        self._give_up(self._booted - booted, min(began(pid), boot_time()))
                        self._booted = booted
                        return pid
        return 0

    def _remember(self, pid: int) -> set[str]:
        """Hold the namespaces of this process to be gone at the end (`left_over`).

        Raises OSError where it has ended.
        """
        found = {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in namespaces.SPACES}
        found -= {os.readlink(f"/proc/self/ns/{kind}") for kind in namespaces.SPACES}
        self._spaces |= found
        namespaces.made.update(dict.fromkeys(found, math.inf))
        return found

    def _give_up(self, spaces: set[str], at: float) -> None:
        """They are gone since that time; the kernel uses their numbers again, for others too."""
        namespaces.made.update(dict.fromkeys(spaces, at))
        self._spaces -= spaces

    def kill(self) -> None:
        """Tell all of it to end at once."""
        if self._outer is not None and self._outer.poll() is None and (pid := self._holder()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End it; done when all of it is gone."""
        self.kill()
        if self._outer is not None:
            namespaces.close_first(self._outer)
            self._outer = None
        self._net.close()
        self._give_up(self._spaces, boot_time())


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _accept(ports: Sequence[int]) -> str:
    return "\n        ".join(f"tcp dport {port} accept" for port in ports)


class Lab:
    """A head and a worker, off, and the network between them; all of it is gone when it is left.

    The head's firewall lets in SSH, the worker's nothing. `folder` (logs, keys) stays.
    """

    def __init__(
        self,
        folder: Path,
        installed: Installed | Mapping[str, Installed],
        names: Sequence[str] = ("head", "worker"),
    ) -> None:
        """`installed`: what every machine has, or each one by its name."""
        self.folder = folder
        self.names = tuple(names)
        one = installed if isinstance(installed, Installed) else None
        self.installed = {name: one or installed[name] for name in names}  # type: ignore[index]
        self.addresses = {name: f"{NETWORK}.{k}" for k, name in enumerate(names, 1)}
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
        self._switch = Init("switch", {"bare": True, "tag": f"{namespaces.tag()}-switch"})
        network_command(self._switch.pid, "ip", "link", "add", "br0", "type", "bridge")
        network_command(self._switch.pid, "ip", "link", "set", "br0", "up")
        for number, name in enumerate(self.names, 1):
            machine = self._machines[name] = Machine(self, name, number, self.installed[name])
            machine.make(self._switch)

    def machine(self, name: str) -> Machine:
        """`head` or `worker`."""
        return self._machines[name]

    @property
    def machines(self) -> tuple[Machine, ...]:
        """All of them, the head first."""
        return tuple(self._machines.values())

    def boot(self) -> None:
        """Turn all machines on, side by side, until they are up."""
        for machine in self.machines:
            machine.boot(wait=False)
        for machine in self.machines:
            machine.wait_up()

    def cut(self, machine: Machine) -> None:
        """Let no packet through to or from that machine; nobody is told."""
        self._port(machine, "nomaster")

    def heal(self, machine: Machine) -> None:
        """Undo `cut`."""
        self._port(machine, "master", "br0")

    def unplug(self, machine: Machine) -> None:
        """Pull its cable, which its own systemd-networkd sees (no carrier)."""
        self._port(machine, "down")

    def plug(self, machine: Machine) -> None:
        """Undo `unplug`."""
        self._port(machine, "up")

    def _port(self, machine: Machine, *words: str) -> None:
        assert self._switch is not None
        network_command(self._switch.pid, "ip", "link", "set", machine.port, *words)

    def tails(self) -> str:
        """The ends of all logs, for a message: consoles, commands, and rayfwd's journals."""
        parts = [tail(machine.console, 2000) for machine in self.machines]
        parts += [tail(log) for log in sorted({process.log for process in self.processes})]
        for machine in self.machines:
            with contextlib.suppress(Exception):
                words = ["journalctl", "--no-pager", "-o", "short-monotonic", "--lines=80"]
                said = machine.run([*words, "-u", "rayfwd*"], check=False, timeout=20).stdout
                parts.append(f"\n--- {machine.name}: journalctl -u 'rayfwd*'\n{said[-8000:]}")
        return "".join(parts)

    def close(self) -> None:
        """End everything. May be called again."""
        machines, self._machines = self._machines, {}
        for machine in machines.values():
            machine.kill()
        for process in self.processes:
            process.reap()
        for machine in machines.values():
            machine.close()
        if self._switch is not None:
            self._switch.close()
            self._switch = None


def left_over() -> list[str]:
    """Control groups of this process's machines, one line each; nothing once all are closed.

    All else is in `tests.lab.machines.left_over`.
    """
    deadline = time.monotonic() + 5
    while True:
        mark = f"{namespaces.tag()}-"
        left = [str(p) for top in booter.hierarchies() for p in top.glob(f"{mark}*")]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)
