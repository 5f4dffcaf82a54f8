"""Ways from a client to a server behind SSH, all through the same sshd on this machine.

Each contestant is a context manager that yields the port on 127.0.0.1 to connect to; its processes
are listed so that the processor time which they use can be read from /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
LISTENERS = "[network]\nlevel = 'listeners'\n"
"""All machines are this one, whose network is left as it is."""
OVERLAY = "[network]\nlevel = 'overlay'\n"
IN_A_NETWORK_OF_ITS_OWN = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""A command that becomes what follows it."""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if time.monotonic() > end:
            raise TimeoutError(f"nothing listens on port {port}")
        time.sleep(0.05)


def environment(compiled: Path | None) -> dict[str, str]:
    """Of a process of ours, which runs the compiled rayfwd that is unpacked there, or as it is."""
    if compiled is None:
        return dict(os.environ)
    places = [str(compiled), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


class Processes:
    """The processes of a contestant, ended by their ids."""

    def __init__(self, compiled: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self._env = {**environment(compiled), **(env or {})}

    def start(self, argv: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=BENCH.parent,
                env=self._env,
            )
        self.running.append(process)
        return process

    def close(self) -> None:
        for process in reversed(self.running):
            process.send_signal(signal.SIGTERM)
        for process in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def cpu_seconds(root: int) -> float:
    """Processor time of a process and all that came of it, dead children included."""
    ticks = os.sysconf("SC_CLK_TCK")
    children: dict[int, list[int]] = {}
    spent: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            spent[int(entry.name)] = sum(map(int, fields[11:15])) / ticks
    total, todo = 0.0, [root]
    while todo:
        pid = todo.pop()
        total += spent.get(pid, 0.0)
        todo += children.get(pid, [])
    return total


def nanoseconds(pid: int) -> int:
    """Processor time of a process, all its threads: finer than clock ticks."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


class Sshd:
    """Debian's sshd with its defaults, keys of its own, on a port of this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.key = directory / "id"
        self.known_hosts = directory / "known_hosts"
        self._processes = Processes()
        for name in ("host", "id"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)],
                check=True,
            )
        public = (directory / "host.pub").read_text().split()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public[0]} {public[1]}\n")
        authorized = directory / "authorized_keys"
        authorized.write_bytes((directory / "id.pub").read_bytes())
        Path("/run/sshd").mkdir(exist_ok=True)
        self.process = self._processes.start(
            [
                "/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_config",
                "-h", str(directory / "host"), "-p", str(self.port),
                "-o", "ListenAddress=127.0.0.1", "-o", f"AuthorizedKeysFile={authorized}",
                "-o", "StrictModes=no", "-o", "PidFile=none",
                "-o", "SetEnv=SHLVL=2",  # root's own startup files are no part of it
            ],
            directory / "sshd.log",
        )  # fmt: skip
        wait_for_port(self.port)

    def close(self) -> None:
        self._processes.close()

    def ssh_options(self) -> list[str]:
        return [
            "-F", "none", "-i", str(self.key), "-p", str(self.port),
            "-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "BatchMode=yes",
        ]  # fmt: skip


@contextlib.contextmanager
def openssh(
    sshd: Sshd, via: int, server: int, directory: Path, cipher: str | None
) -> Iterator[tuple[int, list[int]]]:
    """`ssh -L` to the server, by port `via` (the sshd's own, or a relay's)."""
    port = free_port()
    processes = Processes()
    options = sshd.ssh_options()
    options[options.index("-p") + 1] = str(via)
    if cipher is not None:
        options += ["-c", cipher]
    options += ["-o", f"HostKeyAlias=[127.0.0.1]:{sshd.port}"]
    try:
        ssh = processes.start(
            ["ssh", *options, "-N", "-L", f"127.0.0.1:{port}:127.0.0.1:{server}", "127.0.0.1"],
            directory / "ssh.log",
        )
        wait_for_port(port)
        yield port, [ssh.pid, sshd.process.pid]
    finally:
        processes.close()


@contextlib.contextmanager
def asyncssh_plain(
    sshd: Sshd, via: int, server: int, directory: Path
) -> Iterator[tuple[int, list[int]]]:
    """AsyncSSH's own local forwarding, with AES-GCM."""
    port = free_port()
    processes = Processes()
    try:
        client = processes.start(
            [
                sys.executable, str(BENCH / "asyncssh_forward.py"), str(via), str(sshd.key),
                str(sshd.known_hosts), str(sshd.port), str(port), str(server),
            ],
            directory / "asyncssh.log",
        )  # fmt: skip
        wait_for_port(port)
        yield port, [client.pid, sshd.process.pid]
    finally:
        processes.close()


@contextlib.contextmanager
def rayfwd(
    sshd: Sshd,
    via: int,
    server: int,
    directory: Path,
    workers: int = 1,
    reach: str = "exec",
    carrier: str = "",
    compiled: Path | None = None,
    direct: bool = False,
) -> Iterator[tuple[int, list[int]]]:
    """A head's and a worker's daemon; with two workers the server is the second one's.

    `reach`: `head.via`; `exec` is what `rayfwd init` sets up. `carrier`: further lines of [head].
    `compiled`: where the compiled rayfwd is unpacked that the daemons run. `direct`: the first
    worker logs in to the second.
    """
    port = free_port()
    names = [f"w{number}" for number in range(1, workers + 1)]
    forwards: dict[str, list[tuple[int, str, int]]] = {name: [] for name in names}
    forwards["w1"] = [(port, "w2" if workers == 2 else "head", server)]
    nodes = Nodes(sshd, via, directory, [server], forwards, reach, carrier, compiled, direct)
    with nodes.running() as pids:
        wait_for_port(port)
        yield port, pids


@dataclass(frozen=True, slots=True)
class Nodes:
    """A head's and its workers' daemons, all by one sshd on this machine."""

    sshd: Sshd
    via: int
    """The sshd's port, or a relay's to it."""
    directory: Path
    exposed: list[int]
    forwards: Mapping[str, list[tuple[int, str, int]]]
    """Of each worker: its ports here that lead to a node's."""
    reach: str = "exec"
    carrier: str = ""
    compiled: Path | None = None
    direct: bool = False
    """The first worker has a direct way to the second."""

    @contextlib.contextmanager
    def running(self) -> Iterator[list[int]]:
        """Their links are up; the processes, the sshd's first, then the head's."""
        (self.directory / "ssh_config").write_text(
            f"Host head\n  HostName 127.0.0.1\n  Port {self.via}\n"
            f"  HostKeyAlias [127.0.0.1]:{self.sshd.port}\n"
            f"  UserKnownHostsFile {self.sshd.known_hosts}\n"
        )
        processes, pids = Processes(self.compiled), [self.sshd.process.pid]
        try:
            for name in ("head", *self.forwards):
                file = self.directory / f"{name}.toml"
                file.write_text(self._file(name))
                argv = [sys.executable, "-m", "bench.daemon", "run", "--config", str(file)]
                pids.append(processes.start(argv, self.directory / f"{name}.log").pid)
            for name in self.forwards:
                wait_until_up(self.directory / f"{name}.toml", self.directory)
            if self.direct:
                wait_until(self.directory / "w1.toml", self.directory, _goes_directly)
            yield pids
        finally:
            processes.close()

    def _file(self, name: str) -> str:
        here = self.directory
        role = "head" if name == "head" else "worker"
        text = (
            f"role = '{role}'\nname = '{name}'\nexpose = {self.exposed}\n"
            f"state_dir = '{here}/{name}-state'\nruntime_dir = '{here}/{name}-run'\n"
        )
        ray = f"{LISTENERS}[ray]\nstart = false\ncommand = 'none'\nworker_ports = 8\n"
        if name == "head":
            network = f"127.{64 + os.getpid() % 60}.0.0/16"
            return f"{text}[hub]\nport_base = 24000\nnetwork = '{network}'\n{ray}"
        socket_path = f"{here}/head-run/hub.sock"
        python_path = shlex.quote(environment(self.compiled).get("PYTHONPATH", ""))
        attach = f"env PYTHONPATH={python_path} {sys.executable} -m rayfwd attach"
        forwards = "".join(
            f"[[forward]]\nlisten = '127.0.0.1:{port}'\nto = '{node}:{there}'\n"
            for port, node, there in self.forwards[name]
        )
        if self.direct and name == "w1":
            theirs = f"{here}/w2-run/peers.sock"
            forwards += (
                f"[[direct]]\nnode = 'w2'\nssh = 'head'\nidentity = '{self.sshd.key}'\n"
                f"ssh_config = '{here}/ssh_config'\nsocket = '{theirs}'\nvia = '{self.reach}'\n"
                f'attach_command = "{attach} --peer --socket {theirs}"\n'
            )
        return (
            text
            + ("" if forwards else "forward = []\n")
            + f"[head]\nssh = 'head'\nidentity = '{self.sshd.key}'\n"
            f"ssh_config = '{here}/ssh_config'\nsocket = '{socket_path}'\nbulk_lanes = 1\n"
            f"attach_command = \"{attach} --socket {socket_path}\"\nvia = '{self.reach}'\n"
            f"{self.carrier}\n{ray}{forwards}"
        )


@dataclass(frozen=True, slots=True)
class Three:
    """Ways between three nodes: ports that lead to a server of streams, one to that of calls."""

    bulk: list[int]
    """From the first worker to the head and to the second worker, from that to the head."""
    calls: int
    """From the first worker to the head."""


@contextlib.contextmanager
def three_nodes(
    sshd: Sshd, server: int, calls: int, directory: Path, compiled: Path | None
) -> Iterator[Three]:
    """A head and two workers of rayfwd."""
    ports = [free_port() for _ in range(4)]
    first, between, second, call = ports
    forwards = {
        "w1": [(first, "head", server), (between, "w2", server), (call, "head", calls)],
        "w2": [(second, "head", server)],
    }
    nodes = Nodes(sshd, sshd.port, directory, [server, calls], forwards, compiled=compiled)
    with nodes.running():
        for port in ports:
            wait_for_port(port)
        yield Three([first, between, second], call)


@contextlib.contextmanager
def three_by_ssh(
    sshd: Sshd, server: int, calls: int, directory: Path, _: Path | None
) -> Iterator[Three]:
    """An `ssh -L` for each pair of nodes, as people have it; the calls go by the first."""
    ports = [free_port() for _ in range(4)]
    first, between, second, call = ports
    processes = Processes()
    options = [*sshd.ssh_options(), "-o", f"HostKeyAlias=[127.0.0.1]:{sshd.port}", "-N"]
    try:
        for led in ([(first, server), (call, calls)], [(between, server)], [(second, server)]):
            forwards = [f"-L127.0.0.1:{port}:127.0.0.1:{to}" for port, to in led]
            log = directory / f"ssh-{led[0][0]}.log"
            processes.start(["ssh", *options, *forwards, "127.0.0.1"], log)
        for port in ports:
            wait_for_port(port)
        yield Three([first, between, second], call)
    finally:
        processes.close()


def wait_until_up(config: Path, directory: Path) -> None:
    """Until every lane of a worker stands."""
    wait_until(config, directory, lambda status: len(_lanes(status)) >= 2)


def wait_until(config: Path, directory: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Until the status of a daemon is as wanted."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        asked = subprocess.run(
            [sys.executable, "-m", "rayfwd", "status", "--json", "--config", str(config)],
            capture_output=True,
            check=False,
        )
        with contextlib.suppress(ValueError):
            if wanted(json.loads(asked.stdout)):
                return
        time.sleep(0.2)
    logs = "".join(path.read_text()[-2000:] for path in directory.glob("*.log"))
    raise TimeoutError(f"the link did not come up:\n{logs}")


def _lanes(status: dict[str, Any]) -> list[Any]:
    return list((status.get("link") or {}).get("lanes", []))


def _goes_directly(status: dict[str, Any]) -> bool:
    return [way["way"] for way in status.get("direct") or []] == ["direct"]


@contextlib.contextmanager
def hub_alone(
    server: int, directory: Path, compiled: Path | None = None, turns: Path | None = None
) -> Iterator[tuple[Path, int]]:
    """A head's daemon without workers: the hub's socket, and the daemon's process.

    `turns`: it is at the level of the overlay, in a network of its own, and what keeps its loop for
    long goes into this file (`bench/daemon.py`).
    """
    watched = {} if turns is None else {"RAYFWD_BENCH_TURNS": str(turns)}
    processes = Processes(compiled, watched)
    network = f"127.{64 + os.getpid() % 60}.0.0/16"
    (directory / "head.toml").write_text(
        f"role = 'head'\nname = 'head'\nexpose = [{server}]\n"
        f"state_dir = '{directory}/state'\nruntime_dir = '{directory}/run'\n"
        f"[hub]\nport_base = 24000\nnetwork = '{network}'\n{OVERLAY if turns else LISTENERS}"
        "[ray]\nstart = false\ncommand = 'none'\nworker_ports = 8\n"
    )
    daemon_argv = [sys.executable, "-m", "bench.daemon", "run", "--config"]
    try:
        daemon = processes.start(
            [*(IN_A_NETWORK_OF_ITS_OWN if turns else ()), *daemon_argv, f"{directory}/head.toml"],
            directory / "head.log",
        )
        path = directory / "run" / "hub.sock"
        end = time.monotonic() + 30
        while not path.exists():
            if time.monotonic() > end:
                raise TimeoutError((directory / "head.log").read_text()[-2000:])
            time.sleep(0.05)
        yield path, daemon.pid
    finally:
        processes.close()
