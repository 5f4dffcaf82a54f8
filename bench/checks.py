"""What the check of a connection costs: `python -m bench.checks BEFORE...`, checkouts to compare.

Each of them (`git worktree add --detach BEFORE 41421fd^` is the one before the check), this one
and this one without the check run a head and a worker, through one sshd, and are asked in turns:
connections one behind the other that say one byte and hear it, sixteen at a time, and round trips
over one that stands. Beside what a client sees stands the processor time of the two daemons, which
depends less on what else the machine does. Root, in a network namespace of its own (`unshare -n`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.contestants import LISTENERS, Processes, Sshd, free_port, nanoseconds, wait_for_port

SECONDS, ROUNDS = 2.0, 5
AT_ONCE = 16
Way = tuple[str, str, Path | None]
"""What it is called, the module that is the daemon, and the checkout; None: this one."""


def configs(directory: Path, sshd: Sshd, number: int, server: int, port: int, more: str) -> None:
    """Of a head and a worker whose listener at `port` leads to the server."""
    socket_path = f"{directory}/head-run/hub.sock"
    ray = f"{more}[ray]\nstart = false\ncommand = 'none'\nworker_ports = 8\n"
    (directory / "ssh_config").write_text(
        f"Host head\n  HostName 127.0.0.1\n  Port {sshd.port}\n"
        f"  HostKeyAlias [127.0.0.1]:{sshd.port}\n  UserKnownHostsFile {sshd.known_hosts}\n"
    )
    texts = {
        "head": f"expose = [{server}]\n[hub]\nport_base = {24000 + 1000 * number}\n"
        f"network = '127.{100 + number}.0.0/16'\n{ray}",
        "worker": f"[head]\nssh = 'head'\nidentity = '{sshd.key}'\nbulk_lanes = 1\n"
        f"ssh_config = '{directory}/ssh_config'\nsocket = '{socket_path}'\nvia = 'socket'\n{ray}"
        f"[[forward]]\nlisten = '127.0.0.1:{port}'\nto = 'head:{server}'\n",
    }
    for role, text in texts.items():
        (directory / f"{role}.toml").write_text(
            f"role = '{role}'\nname = '{role}'\nstate_dir = '{directory}/{role}-state'\n"
            f"runtime_dir = '{directory}/{role}-run'\n{text}"
        )


class Cluster:
    """A head and a worker of one version of the code."""

    def __init__(self, number: int, way: Way, sshd: Sshd, server: int, at: Path) -> None:
        self.name, module, source = way
        self.port = free_port()
        self._processes = Processes()
        configs(at, sshd, number, server, self.port, "" if source else LISTENERS)
        words = [] if source is None else ["env", f"PYTHONPATH={source}/src"]
        self.pids = [
            self._processes.start(
                [*words, sys.executable, "-m", module, "run", "--config", f"{at}/{role}.toml"],
                at / f"{role}.log",
            ).pid
            for role in ("head", "worker")
        ]
        try:
            wait_for_port(self.port, 60)
            self._wait_for_an_echo()
        except TimeoutError:
            print((at / "worker.log").read_text()[-1500:], file=sys.stderr)
            raise

    def _wait_for_an_echo(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                echo(self.port)
                return
            time.sleep(0.2)
        raise TimeoutError(f"{self.name}: no answer")

    def close(self) -> None:
        self._processes.close()

    def spent(self) -> float:
        """Microseconds of processor time."""
        return sum(map(nanoseconds, self.pids)) / 1000


def serve(listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=answer, args=(sock,), daemon=True).start()


def answer(sock: socket.socket) -> None:
    with contextlib.suppress(OSError), sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := sock.recv(4096):
            sock.sendall(data)


def echo(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        say(sock)


def say(sock: socket.socket) -> None:
    sock.sendall(b"x")
    if sock.recv(1) != b"x":
        raise ConnectionError("ended early")


def repeated(action: Callable[[], None]) -> int:
    """How often, within `SECONDS`."""
    count, end = 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        action()
        count += 1
    return count


def one_by_one(port: int) -> int:
    return repeated(lambda: echo(port))


def many_at_once(port: int) -> int:
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: counts.append(one_by_one(port))) for _ in range(AT_ONCE)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)


def round_trips(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return repeated(lambda: say(sock))


WHAT = {"connections": one_by_one, "16 at a time": many_at_once, "round trips": round_trips}


def measure(clusters: list[Cluster]) -> None:
    for what, action in WHAT.items():
        rates: dict[str, list[float]] = {cluster.name: [] for cluster in clusters}
        costs: dict[str, list[float]] = {cluster.name: [] for cluster in clusters}
        for turn in range(ROUNDS):
            for cluster in clusters if turn % 2 else reversed(clusters):
                before = cluster.spent()
                count = action(cluster.port)
                costs[cluster.name].append((cluster.spent() - before) / count)
                rates[cluster.name].append(count / SECONDS)
        for name, seen in rates.items():
            rate, cost = statistics.median(seen), statistics.median(costs[name])
            print(f"{what:14} {name:7} {rate:8.0f} a second   {cost:7.0f} us of the daemons")


@contextlib.contextmanager
def echoing() -> Iterator[int]:
    """The port of an echo server in a process of its own."""
    port = free_port()
    server = f"socket.create_server(('127.0.0.1', {port}), backlog=256)"
    program = f"import socket, bench.checks; bench.checks.serve({server})"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_for_port(port)
        yield port
    finally:
        process.kill()
        process.wait()


def main() -> None:
    sources = [Path(word) for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        os.chmod(made, 0o700)
        sshd = Sshd(Path(made))
        stack.callback(sshd.close)
        server = stack.enter_context(echoing())
        clusters: list[Cluster] = []
        ways: list[Way] = [(path.name, "rayfwd", path) for path in map(Path.resolve, sources)]
        ways += [("unchecked", "bench.unchecked", None), ("now", "bench.daemon", None)]
        for number, way in enumerate(ways):
            at = Path(made) / str(number)
            at.mkdir(0o700)
            clusters.append(Cluster(number, way, sshd, server, at))
            stack.callback(clusters[-1].close)
        measure(clusters)


if __name__ == "__main__":
    main()
