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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bench import between, contestants, daemon, page, peers, rays
from bench.page import GCM, REFERENCE, Results
from tests import setup_wheel
from tests.lab.machines import Lab

MB = 1 << 20
STEPS = 10
"""Of a training, in each round."""
CROWD, CROWD_SECONDS = 200, 60
"""Streams that do as those of DDP do, and for how long."""
Way = contextlib.AbstractContextManager[tuple[int, list[int]]]
Make = Callable[[int, Path], Way]
"""A way by the sshd at a port (its own or a relay's)."""


@contextlib.contextmanager
def direct(port: int) -> Iterator[tuple[int, list[int]]]:
    """No way at all."""
    yield port, []


class Bench:
    """An sshd, a server behind it, what was asked for, and a directory in that of the whole run."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self.directory, self.rounds = directory, options.rounds
        self.code = unpacked(options.wheel or setup_wheel.make(), directory)
        self.size, self.seconds = options.megabytes * MB, options.seconds
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

    def place(self) -> Path:
        """A directory for one contestant of one round."""
        self._places += 1
        place = self.directory / str(self._places)
        place.mkdir()
        return place

    def ways(self) -> dict[str, Make]:
        """Every contestant, by name."""
        sshd, server, code = self.sshd, self.server, self.code
        return {
            REFERENCE: lambda via, d: contestants.openssh(sshd, via, server, d, None),
            f"ssh -L, {GCM}": lambda via, d: contestants.openssh(sshd, via, server, d, GCM),
            "AsyncSSH's forwarding": lambda via, d: contestants.asyncssh_plain(
                sshd, via, server, d
            ),
            "rayfwd": lambda via, d: contestants.rayfwd(sshd, via, server, d, compiled=code),
            "rayfwd, pure Python": lambda via, d: contestants.rayfwd(sshd, via, server, d),
            "rayfwd, via socket": lambda via, d: contestants.rayfwd(
                sshd, via, server, d, reach="socket", compiled=code
            ),
            "rayfwd, worker to worker": lambda via, d: contestants.rayfwd(
                sshd, via, server, d, workers=2, compiled=code
            ),
        }

    def some(self, *names: str) -> dict[str, Make]:
        """Those of the contestants."""
        return {name: make for name, make in self.ways().items() if name in names}

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


def unpacked(wheel: Path, directory: Path) -> Path | None:
    """A compiled rayfwd, unpacked; None: the wheel is pure Python, as there is no compiler."""
    if wheel.name.endswith("-none-any.whl"):
        return None
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(directory / "compiled")
    return directory / "compiled"


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _streams(bench: Bench, port: int, pids: list[int]) -> dict[str, float]:
    """One stream each way, and what these processes take for it."""
    peers.upload(port, 16 * MB)  # windows open, caches warm
    before = sum(map(contestants.cpu_seconds, pids))
    up, down = peers.upload(port, bench.size), peers.download(port, bench.size)
    spent = sum(map(contestants.cpu_seconds, pids)) - before
    return {
        "worker to head": bench.size / 1e6 / up,
        "head to worker": bench.size / 1e6 / down,
        "processor time": spent / (2 * bench.size / 1e9),
    }


def _looked_near(bench: Bench, port: int, pids: list[int]) -> dict[str, float]:
    streams = _streams(bench, port, pids)
    idle = peers.round_trips(port, bench.seconds)
    beside_up = peers.round_trips_beside_bulk(port, bench.seconds, upward=True)
    beside_down = peers.round_trips_beside_bulk(port, bench.seconds, upward=False)
    return {
        **streams,
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


def workers(bench: Bench) -> Results:
    """Between two workers, by the hub and directly, and what the head's daemon takes for it."""
    sshd, server, code = bench.sshd, bench.server, bench.code
    ways: dict[str, Make] = bench.some(REFERENCE, "rayfwd, worker to worker")
    ways["rayfwd, worker to worker directly"] = lambda via, d: contestants.rayfwd(
        sshd, via, server, d, workers=2, compiled=code, direct=True
    )

    def look(port: int, pids: list[int]) -> dict[str, float]:
        head = pids[1:2] if len(pids) > 2 else []
        before = sum(map(contestants.cpu_seconds, head))
        streams = _streams(bench, port, pids)
        spent = sum(map(contestants.cpu_seconds, head)) - before
        idle = peers.round_trips(port, bench.seconds)
        return {
            "there": streams["worker to head"],
            "back": streams["head to worker"],
            "processor time": streams["processor time"],
            "head's processor time": spent / ((16 * MB + 2 * bench.size) / 1e9),
            "round trip, p50": peers.median(idle) * 1e6,
            "round trip, p99": peers.percentile(idle, 0.99) * 1e6,
        }

    return bench.each(ways, sshd.port, look)


def carriers(bench: Bench) -> Results:
    """The same of the carriers that a lane may have; the `ssh` of a daemon's counts as its own."""
    sshd, server, code = bench.sshd, bench.server, bench.code
    ways = bench.some(REFERENCE, "rayfwd")
    for via in ("exec", "socket"):
        ways[f"rayfwd, openssh, {via}"] = lambda port, d, via=via: contestants.rayfwd(  # type: ignore[misc]
            sshd, port, server, d, reach=via, carrier="transport = 'openssh'", compiled=code
        )
    return bench.each(ways, bench.sshd.port, lambda port, pids: _looked_near(bench, port, pids))


def compiled(bench: Bench) -> Results:
    """Pure Python and compiled, in turns: streams and round trips."""
    ways = bench.some(REFERENCE, "rayfwd, pure Python", "rayfwd")
    ways["rayfwd, compiled"] = ways.pop("rayfwd")
    return bench.each(ways, bench.sshd.port, lambda port, pids: _looked_near(bench, port, pids))


def compiled_hub(bench: Bench) -> Results:
    """The messages of a hub with 50 workers, compiled and interpreted, in turns.

    The workers are compiled both times, so that they are quicker than the hub.
    """
    results: Results = defaultdict(lambda: defaultdict(list))
    for _ in range(bench.rounds):
        for name, code in (("compiled", bench.code), ("pure Python", None)):
            port = contestants.free_port()
            with contestants.hub_alone(port, bench.place(), compiled=code) as (path, pid):
                many = bench.python("bench.many", path, port, 50, 1000, compiled=bench.code)
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
        peers.upload(port, 128 * MB)  # until the lanes stand that are made when the others are full
        up, down = peers.upload(port, bench.size), peers.download(port, bench.size)
        return {"far, up": bench.size / 1e6 / up, "far, down": bench.size / 1e6 / down}

    with away(bench, 50) as (through, plain):
        ways = bench.some(REFERENCE, f"ssh -L, {GCM}", "rayfwd")
        return bench.each({"the relay alone": lambda *_: direct(plain), **ways}, through, look)


def distances(bench: Bench) -> Results:
    """A round trip where the machines are 0.5 ms (a LAN) and 20 ms (a WAN) from each other."""
    results: Results = defaultdict(lambda: defaultdict(list))
    for name, milliseconds in (("LAN", 0.5), ("WAN", 20)):

        def look(port: int, _: list[int], name: str = name) -> dict[str, float]:
            peers.round_trips(port, 0.3)
            times = peers.round_trips(port, bench.seconds)
            return {
                f"{name}, p50": peers.median(times) * 1e6,
                f"{name}, p99": peers.percentile(times, 0.99) * 1e6,
            }

        with away(bench, milliseconds) as (through, plain):
            alone = {"the relay alone": lambda *_, plain=plain: direct(plain)}
            ways: dict[str, Make] = {**alone, **bench.some(REFERENCE, "rayfwd")}
            for way, figures in bench.each(ways, through, look).items():
                results[way].update(figures)
    return results


@contextlib.contextmanager
def away(bench: Bench, milliseconds: float) -> Iterator[tuple[int, int]]:
    """Ports of relays to the sshd and to the server, that far away there and back."""
    through, plain = contestants.free_port(), contestants.free_port()
    relays = [
        bench.python("bench.delay", through, bench.sshd.port, milliseconds),
        bench.python("bench.delay", plain, bench.server, milliseconds),
    ]
    try:
        contestants.wait_for_port(through)
        contestants.wait_for_port(plain)
        yield through, plain
    finally:
        for relay in relays:
            end(relay)


def crowd(bench: Bench) -> Results:
    """200 streams as of DDP between three nodes for a minute, and calls beside them."""
    results: Results = defaultdict(lambda: defaultdict(list))
    calls = contestants.free_port()
    serving = bench.python("bench.peers", "serve", "127.0.0.1", calls)
    contestants.wait_for_port(calls)
    try:
        for number in range(bench.rounds):
            for name, make in (
                (REFERENCE, contestants.three_by_ssh),
                ("rayfwd", contestants.three_nodes),
            ):
                with make(bench.sshd, bench.server, calls, bench.place(), bench.code) as ports:
                    figures = _looked_crowded(bench, ports)
                for key, value in figures.items():
                    results[name][key].append(value)
                print(f"round {number + 1}, {name}: {figures}", flush=True)
    finally:
        end(serving)
    return results


def _looked_crowded(bench: Bench, ports: contestants.Three) -> dict[str, float]:
    streams = bench.python("bench.crowd", CROWD, CROWD_SECONDS, *ports.bulk)
    try:
        assert streams.stdout is not None
        assert streams.stdout.readline() == "ready\n"
        times = peers.round_trips(ports.calls, CROWD_SECONDS)
        moved = [float(word) for word in streams.stdout.readline().split()]
    finally:
        end(streams)
    return {
        "call, p50": peers.median(times) * 1e6,
        "call, p99": peers.percentile(times, 0.99) * 1e6,
        "longest call": max(times) * 1e6,
        "all streams": sum(moved) / 1e6 / CROWD_SECONDS,
        "the least of a stream": 100 * min(moved) * len(moved) / sum(moved),
    }


def idle(bench: Bench) -> Results:
    """What a worker's daemon takes with two other nodes, when nothing is asked of it."""
    results: Results = defaultdict(lambda: defaultdict(list))
    for _ in range(bench.rounds):
        where = bench.sshd, bench.sshd.port, bench.server, bench.place()
        way = contestants.rayfwd(*where, workers=2, compiled=bench.code)
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
        with contestants.hub_alone(port, bench.place(), bench.code) as (path, pid):
            many = bench.python("bench.many", path, port, links, links * 20, compiled=bench.code)
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
    row["messages, for a whole core"].append(1e9 * echoes / spent)
    row["processor for a message"].append(spent / 1e3 / echoes)
    row["processor, in use"].append(spent / 5e7)
    row["memory, in use"].append(memory(pid))


def joins(bench: Bench) -> Results:
    """Many workers that join in the same moment, the hub with them at rest, and one more."""
    results: Results = defaultdict(lambda: defaultdict(list))
    pure = ", pure Python"
    for links, name in ((100, ""), (300, ""), (1000, ""), (1000, pure)):
        row, code = results[f"{links:,} workers{name}"], None if name else bench.code
        port, place = contestants.free_port(), bench.place()
        with contestants.hub_alone(port, place, code, turns=place / "turns") as (path, pid):
            _joined(bench, row, links, path, pid)
        print(f"{links} workers{name}: {dict(row)}", flush=True)
    return results


def _joined(bench: Bench, row: dict[str, list[float]], links: int, path: Path, pid: int) -> None:
    turns = path.parent.parent / "turns"
    before = contestants.nanoseconds(pid)
    many = bench.python("bench.many", path, 0, links, 0, compiled=bench.code)
    try:
        assert many.stdin is not None
        assert many.stdout is not None
        _, seconds, told = many.stdout.readline().split()
        joined = time.time()
        row["until all know all"].append(float(seconds))
        row["processor for it"].append((contestants.nanoseconds(pid) - before) / 1e9)
        row["told to the first"].append(float(told) / links)
        time.sleep(5)
        row["processor"].append(share(pid, 35))  # a report comes in it
        row["memory"].append(memory(pid))
        many.stdin.write("one more\n")
        many.stdin.flush()
        came, _, left, _ = map(float, many.stdout.readline().split())
        row["told of one that joins"].append(came)
        row["told of one that leaves"].append(left)
        row["longest turn, joining"].append(longest_turn(turns, until=joined))
        row["longest turn, then"].append(longest_turn(turns, since=joined + 5))
        row["a collection"].append(longest_turn(turns, collector=True))
    finally:
        end(many)


def longest_turn(
    turns: Path, since: float = 0.0, until: float = float("inf"), collector: bool = False
) -> float:
    """Milliseconds of the callback that kept the loop longest, or of Python's collector in one;
    below two it is not known."""
    lines = [line.split(maxsplit=2) for line in turns.read_text().splitlines()]
    return max(
        (
            float(took)
            for at, took, what in lines
            if since <= float(at) <= until and (what == daemon.COLLECTED) is collector
        ),
        default=2.0,
    )


def share(pid: int, seconds: float) -> float:
    """Percent of a core that a process takes over so many seconds."""
    before = contestants.nanoseconds(pid)
    time.sleep(seconds)
    return (contestants.nanoseconds(pid) - before) / seconds / 1e7


def memory(pid: int) -> float:
    """MB that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def between_two(bench: Bench) -> Results:
    """The same port of another machine's by each way that there is between the two."""
    return _between(bench, between.WAYS, lambda b: between.measure(b, bench.size, bench.seconds))


def ddp(bench: Bench) -> Results:
    """A step of DDP by each way that leads both ways, to ports that nobody knows before."""
    left_out = {"sshuttle", "rayfwd, listeners"}  # nothing leads back; gloo dials before it listens
    ways = {name: way for name, way in between.WAYS.items() if name not in left_out}
    return _between(bench, ways, lambda b: between.train(b, STEPS))


def _between(
    bench: Bench,
    ways: Mapping[str, between.Way],
    look: Callable[[between.Between], dict[str, float]],
) -> Results:
    results: Results = defaultdict(lambda: defaultdict(list))
    rays.install(bench.directory.parent)
    for name in ways:
        if lacking := between.missing(name):
            print(f"{name}: left out, without {' and '.join(lacking)}", flush=True)
    ways = {name: way for name, way in ways.items() if not between.missing(name)}
    for number in range(bench.rounds):
        for name, way in ways.items():
            with Lab(bench.place()) as lab, way(lab) as there:
                figures = look(there)
            for key, value in figures.items():
                results[name][key].append(value)
            print(f"round {number + 1}, {name}: {figures}", flush=True)
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
    "direct": workers,
    "openssh": carriers,
    "compiled": compiled,
    "compiled-hub": compiled_hub,
    "far": far,
    "distances": distances,
    "crowd": crowd,
    "levels": between_two,
    "ddp": ddp,
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
    parser.add_argument("--wheel", type=Path, help="the rayfwd to run; else that of this checkout")
    options = parser.parse_args()
    os.environ.setdefault("RAYFWD_COMPILE", "1")  # the machines of the lab have what users get
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as whole:
        for name in options.only or PIECES:
            if name in PIECES:
                directory = Path(whole) / name
                directory.mkdir()
                bench = Bench(directory, options)
                try:
                    results = PIECES[name](bench)
                finally:
                    bench.close()
                page.keep(name, results)
    page.write()


if __name__ == "__main__":
    main()
