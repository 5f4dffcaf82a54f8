"""`make bench`: rayfwd beside what people use today, in one run: medians and ratios.

Everything goes through one sshd on this machine's loopback. Run it as root (sshd wants it) on a
machine that does nothing else. It is done in chunks (`--only PIECE`), each of a few minutes; what
was measured is kept in docs/benchmarks.json, and docs/benchmarks.md is written from that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import contestants, levels, page, peers, rays
from bench.page import GCM, REFERENCE, Results
from tests import setup_wheel
from tests.lab.machines import Lab

MB = 1 << 20
Way = contextlib.AbstractContextManager[tuple[int, list[int]]]
Make = Callable[[int, Path], Way]
"""A way by the sshd at a port (its own or a relay's)."""


@contextlib.contextmanager
def direct(port: int) -> Iterator[tuple[int, list[int]]]:
    """No way at all."""
    yield port, []


class Bench:
    """An sshd, a server behind it, what was asked for, and a directory in that of the whole run."""

    def __init__(self, directory: Path, rounds: int, megabytes: int, seconds: float) -> None:
        self.directory, self.rounds = directory, rounds
        self.size, self.seconds = megabytes * MB, seconds
        self.server = contestants.free_port()
        self._serving = self.python("bench.peers", "serve", "127.0.0.1", self.server)
        self.sshd = contestants.Sshd(directory)
        contestants.wait_for_port(self.server)
        self._places = 0

    def close(self) -> None:
        self.sshd.close()
        end(self._serving)

    def python(
        self, module: str, *args: object, compiled: Path | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, args)],
            cwd=page.ROOT,
            env=contestants.environment(compiled),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def unpacked(self) -> Path:
        """The compiled rayfwd."""
        folder = self.directory / "compiled"
        with zipfile.ZipFile(setup_wheel.make()) as wheel:
            wheel.extractall(folder)
        return folder

    def place(self) -> Path:
        """A directory for one contestant of one round."""
        self._places += 1
        place = self.directory / str(self._places)
        place.mkdir()
        return place

    def ways(self) -> dict[str, Make]:
        """Every contestant, by name."""
        sshd, server = self.sshd, self.server
        return {
            REFERENCE: lambda via, d: contestants.openssh(sshd, via, server, d, None),
            f"ssh -L, {GCM}": lambda via, d: contestants.openssh(sshd, via, server, d, GCM),
            "AsyncSSH's forwarding": lambda via, d: contestants.asyncssh_plain(
                sshd, via, server, d
            ),
            "rayfwd": lambda via, d: contestants.rayfwd(sshd, via, server, d),
            "rayfwd, via socket": lambda via, d: contestants.rayfwd(
                sshd, via, server, d, reach="socket"
            ),
            "rayfwd, worker to worker": lambda via, d: contestants.rayfwd(
                sshd, via, server, d, workers=2
            ),
        }

    def each(
        self, ways: dict[str, Make], via: int, look: Callable[..., dict[str, float]]
    ) -> Results:
        """`look` at each contestant, round after round."""
        results: Results = defaultdict(lambda: defaultdict(list))
        for number in range(self.rounds):
            for name, make in ways.items():
                with make(via, self.place()) as (port, pids):
                    figures = look(port, pids)
                for key, value in figures.items():
                    results[name][key].append(value)
                shown = ", ".join(f"{k} {v:,.3g}" for k, v in figures.items())
                print(f"round {number + 1}, {name}: {shown}", flush=True)
        return results


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _looked_near(bench: Bench, port: int, pids: list[int]) -> dict[str, float]:
    peers.upload(port, 16 * MB)  # windows open, caches warm
    before = sum(map(contestants.cpu_seconds, pids))
    up, down = peers.upload(port, bench.size), peers.download(port, bench.size)
    spent = sum(map(contestants.cpu_seconds, pids)) - before
    idle = peers.round_trips(port, bench.seconds)
    beside_up = peers.round_trips_beside_bulk(port, bench.seconds, upward=True)
    beside_down = peers.round_trips_beside_bulk(port, bench.seconds, upward=False)
    return {
        "worker to head": bench.size / 1e6 / up,
        "head to worker": bench.size / 1e6 / down,
        "processor time": spent / (2 * bench.size / 1e9),
        "round trip, p50": peers.median(idle) * 1e6,
        "round trip, p99": peers.percentile(idle, 0.99) * 1e6,
        "beside bulk up, p99": peers.percentile(beside_up, 0.99) * 1e6,
        "beside bulk down, p99": peers.percentile(beside_down, 0.99) * 1e6,
    }


def near(bench: Bench) -> Results:
    """Streams, processor time and round trips without any delay."""

    def look(port: int, pids: list[int]) -> dict[str, float]:
        return _looked_near(bench, port, pids)

    ways: dict[str, Make] = {"direct": lambda *_: direct(bench.server), **bench.ways()}
    return bench.each(ways, bench.sshd.port, look)


def carriers(bench: Bench) -> Results:
    """The same of the carriers that a lane may have; the `ssh` of a daemon's counts as its own."""
    sshd, server = bench.sshd, bench.server
    names = (REFERENCE, "rayfwd")
    ways = {name: make for name, make in bench.ways().items() if name in names}
    for via in ("exec", "socket"):
        ways[f"rayfwd, openssh, {via}"] = lambda port, d, via=via: contestants.rayfwd(  # type: ignore[misc]
            sshd, port, server, d, reach=via, carrier="transport = 'openssh'"
        )
    return bench.each(ways, bench.sshd.port, lambda port, pids: _looked_near(bench, port, pids))


def compiled(bench: Bench) -> Results:
    """Interpreted and compiled, in turns: streams and round trips, and the messages of a hub."""
    unpacked = bench.unpacked()
    sshd, server = bench.sshd, bench.server
    names = (REFERENCE, "rayfwd")
    ways = {name: make for name, make in bench.ways().items() if name in names}
    ways["rayfwd, compiled"] = lambda via, d: contestants.rayfwd(
        sshd, via, server, d, compiled=unpacked
    )
    return bench.each(ways, sshd.port, lambda port, pids: _looked_near(bench, port, pids))


def compiled_hub(bench: Bench) -> Results:
    """The messages of a hub with 50 workers, interpreted and compiled, in turns.

    The workers are compiled both times, so that they are quicker than the hub.
    """
    unpacked = bench.unpacked()
    results: Results = defaultdict(lambda: defaultdict(list))
    for _ in range(bench.rounds):
        for name, code in (("interpreted", None), ("compiled", unpacked)):
            port = contestants.free_port()
            with contestants.hub_alone(port, bench.place(), compiled=code) as (path, pid):
                many = bench.python("bench.many", path, port, 50, 1000, compiled=unpacked)
                try:
                    assert many.stdout is not None
                    assert many.stdout.readline() == "ready\n", name
                    _in_use(results[name], many, pid)
                finally:
                    end(many)
            print(f"{name}: {dict(results[name])}", flush=True)
    return results


def far(bench: Bench) -> Results:
    """One bulk stream where a round trip takes 50 ms."""

    def look(port: int, _: list[int]) -> dict[str, float]:
        peers.upload(port, 64 * MB)  # windows open, and the lanes that are made when they are full
        up, down = peers.upload(port, bench.size), peers.download(port, bench.size)
        return {"far, up": bench.size / 1e6 / up, "far, down": bench.size / 1e6 / down}

    through, plain = contestants.free_port(), contestants.free_port()
    relays = [
        bench.python("bench.delay", through, bench.sshd.port, 50),
        bench.python("bench.delay", plain, bench.server, 50),
    ]
    try:
        contestants.wait_for_port(through)
        contestants.wait_for_port(plain)
        names = (REFERENCE, f"ssh -L, {GCM}", "rayfwd")
        ways = {name: make for name, make in bench.ways().items() if name in names}
        return bench.each({"the relay alone": lambda *_: direct(plain), **ways}, through, look)
    finally:
        for relay in relays:
            end(relay)


def idle(bench: Bench) -> Results:
    """What a worker's daemon takes with two other nodes, when nothing is asked of it."""
    results: Results = defaultdict(lambda: defaultdict(list))
    for _ in range(bench.rounds):
        way = contestants.rayfwd(
            bench.sshd, bench.sshd.port, bench.server, bench.place(), workers=2
        )
        with way as (_, pids):
            time.sleep(5)  # what follows a start is over
            for name, pid in zip(("head", "worker"), pids[1:3], strict=True):
                results[f"{name}'s daemon"]["processor"].append(share(pid, 15))
                results[f"{name}'s daemon"]["memory"].append(memory(pid))
    return results


def hub(bench: Bench) -> Results:
    """The hub with ever more workers, 20 streams each: at rest, then every stream in use."""
    results: Results = defaultdict(lambda: defaultdict(list))
    for links in (1, 50, 100, 200):
        port, name = contestants.free_port(), f"{links} links, {links * 20:,} streams"
        with contestants.hub_alone(port, bench.place()) as (path, pid):
            many = bench.python("bench.many", path, port, links, links * 20)
            try:
                assert many.stdout is not None
                assert many.stdout.readline() == "ready\n", name
                time.sleep(5)
                row = results[name]
                row["processor"].append(share(pid, 15))
                row["memory"].append(memory(pid))
                _in_use(row, many, pid)
            finally:
                end(many)
        print(f"{name}: {dict(results[name])}", flush=True)
    return results


def _in_use(row: dict[str, list[float]], many: subprocess.Popen[str], pid: int) -> None:
    """Five seconds of every stream in use, at the hub's process `pid`."""
    assert many.stdin is not None
    assert many.stdout is not None
    before = contestants.nanoseconds(pid)
    many.stdin.write("5\n")
    many.stdin.flush()
    echoes = int(many.stdout.readline())
    spent = contestants.nanoseconds(pid) - before
    row["messages"].append(echoes / 5)
    row["processor for a message"].append(spent / 1e3 / echoes)
    row["processor, in use"].append(spent / 5e7)
    row["memory, in use"].append(memory(pid))


def joins(bench: Bench) -> Results:
    """Many workers that join in the same moment, and the hub with them at rest."""
    results: Results = defaultdict(lambda: defaultdict(list))
    for links in (100, 300, 1000):
        port = contestants.free_port()
        with contestants.hub_alone(port, bench.place(), port_base=12000) as (path, pid):
            before = contestants.nanoseconds(pid)
            many = bench.python("bench.many", path, port, links, 0)
            try:
                assert many.stdout is not None
                _, seconds, told = many.stdout.readline().split()
                row = results[f"{links:,} workers"]
                row["until all know all"].append(float(seconds))
                row["processor for it"].append((contestants.nanoseconds(pid) - before) / 1e9)
                row["told to the first"].append(float(told) / links)
                time.sleep(5)
                row["processor"].append(share(pid, 15))
                row["memory"].append(memory(pid))
            finally:
                end(many)
        print(f"{links} workers: {dict(row)}", flush=True)
    return results


def share(pid: int, seconds: float) -> float:
    """Percent of a core that a process takes over so many seconds."""
    before = contestants.nanoseconds(pid)
    time.sleep(seconds)
    return (contestants.nanoseconds(pid) - before) / seconds / 1e7


def memory(pid: int) -> float:
    """MB that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def levels_beside(bench: Bench) -> Results:
    """The same port of another node by the overlay and by a listener."""
    results: Results = defaultdict(lambda: defaultdict(list))
    rays.install(bench.directory.parent)
    for number in range(bench.rounds):
        for level in ("listeners", "overlay"):
            with Lab(bench.place()) as lab, levels.at_level(lab, level):
                figures = levels.measure(lab, bench.size, bench.seconds)
            for key, value in figures.items():
                results[level][key].append(value)
            print(f"round {number + 1}, {level}: {figures}", flush=True)
    return results


def ray(bench: Bench) -> Results:
    """Ray's own calls and objects, over `ssh -L`/`-R` and over rayfwd."""
    results: Results = defaultdict(lambda: defaultdict(list))
    rays.install(bench.directory.parent)
    for number in range(bench.rounds):
        for name, over in ((REFERENCE, rays.over_ssh), ("rayfwd", rays.over_rayfwd)):
            with Lab(bench.place()) as lab, over(lab):
                figures = rays.measure(lab)
            for key, value in figures.items():
                results[name][key].append(value)
            print(f"round {number + 1}, {name}: {figures}", flush=True)
    return results


def idle_ray(bench: Bench) -> Results:
    """What the daemons take with two other nodes and Ray on all three, which nobody uses."""
    results: Results = defaultdict(lambda: defaultdict(list))
    rays.install(bench.directory.parent)
    with Lab(bench.place()) as lab, rays.over_rayfwd(lab, ("w1", "w2")) as cluster:
        time.sleep(20)  # what follows a start is over
        for _ in range(bench.rounds):
            for name, node in (("head", "head"), ("worker", "w1")):
                pid = cluster.worker(node).process.pid
                results[f"{name}'s daemon"]["processor"].append(share(pid, 15))
                results[f"{name}'s daemon"]["memory"].append(memory(pid))
    return results


PIECES: dict[str, Callable[[Bench], Results]] = {
    "near": near,
    "openssh": carriers,
    "compiled": compiled,
    "compiled-hub": compiled_hub,
    "far": far,
    "levels": levels_beside,
    "ray": ray,
    "idle": idle,
    "idle-ray": idle_ray,
    "hub": hub,
    "joins": joins,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", action="append", choices=[*PIECES, "nothing"], help="a chunk")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as whole:
        for name in options.only or PIECES:
            if name in PIECES:
                directory = Path(whole) / name
                directory.mkdir()
                bench = Bench(directory, options.rounds, options.megabytes, options.seconds)
                try:
                    results = PIECES[name](bench)
                finally:
                    bench.close()
                page.keep(name, results)
    page.write()


if __name__ == "__main__":
    main()
