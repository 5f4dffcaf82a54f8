"""`make bench`: rayfwd beside what people use today, in one run: medians and ratios.

Everything goes through one sshd on this machine's loopback. The table is written to
docs/benchmarks.md. Run it as root (sshd wants it) on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import contestants, peers

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
MB = 1 << 20
REFERENCE = "ssh -L"
GCM = "aes128-gcm@openssh.com"

Way = contextlib.AbstractContextManager[tuple[int, list[int]]]
Results = dict[str, dict[str, list[float]]]

MEASURES = {
    "worker to head": ("MB/s", True),
    "head to worker": ("MB/s", True),
    "processor time": ("s/GB", False),
    "round trip, p50": ("µs", False),
    "round trip, p99": ("µs", False),
    "beside bulk up, p99": ("µs", False),
    "beside bulk down, p99": ("µs", False),
}
"""What is measured: the unit, and whether more is better."""


@contextlib.contextmanager
def direct(server: int) -> Iterator[tuple[int, list[int]]]:
    """No way at all."""
    yield server, []


def ways(sshd: contestants.Sshd, server: int) -> dict[str, Callable[[Path], Way]]:
    """Every contestant, by name."""
    return {
        "direct": lambda _: direct(server),
        REFERENCE: lambda d: contestants.openssh(sshd, sshd.port, server, d, None),
        f"ssh -L, {GCM}": lambda d: contestants.openssh(sshd, sshd.port, server, d, GCM),
        "AsyncSSH's forwarding": lambda d: contestants.asyncssh_plain(sshd, sshd.port, server, d),
        "rayfwd": lambda d: contestants.rayfwd(sshd, sshd.port, server, d),
        "rayfwd, worker to worker": lambda d: contestants.rayfwd(
            sshd, sshd.port, server, d, workers=2
        ),
    }


def measure(port: int, pids: list[int], size: int, seconds: float) -> dict[str, float]:
    """One round of one contestant."""
    peers.upload(port, 16 * MB)  # windows open, caches warm
    before = sum(map(contestants.cpu_seconds, pids))
    up, down = peers.upload(port, size), peers.download(port, size)
    spent = sum(map(contestants.cpu_seconds, pids)) - before
    idle = peers.round_trips(port, seconds)
    beside_up = peers.round_trips_beside_bulk(port, seconds, upward=True)
    beside_down = peers.round_trips_beside_bulk(port, seconds, upward=False)
    return {
        "worker to head": size / 1e6 / up,
        "head to worker": size / 1e6 / down,
        "processor time": spent / (2 * size / 1e9),
        "round trip, p50": peers.median(idle) * 1e6,
        "round trip, p99": peers.percentile(idle, 0.99) * 1e6,
        "beside bulk up, p99": peers.percentile(beside_up, 0.99) * 1e6,
        "beside bulk down, p99": peers.percentile(beside_down, 0.99) * 1e6,
    }


def table(results: Results) -> list[str]:
    """Medians, and in brackets the ratio to `ssh -L` of the same round, its median."""
    lines = ["| | " + " | ".join(f"{name} ({unit})" for name, (unit, _) in MEASURES.items()) + " |"]
    lines.append("|---" * (len(MEASURES) + 1) + "|")
    for name, measured in results.items():
        cells = []
        for key in MEASURES:
            values, reference = measured[key], results[REFERENCE][key]
            ratios = [v / r for v, r in zip(values, reference, strict=True) if r]
            ratio = f" ({peers.median(ratios):.2f} x)" if ratios else ""
            cells.append(f"{peers.median(values):,.3g}{ratio}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def describe() -> list[str]:
    """The machine, as far as it matters."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown processor",
    )
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr.strip()
    return [
        f"- {os.cpu_count()} cores, {model}, shared by all parts; Linux {platform.release()}",
        f"- {ssh}; Python {platform.python_version()}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", action="append", help="a contestant, besides ssh -L")
    options = parser.parse_args()
    results: Results = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as name:
        directory = Path(name)
        server = contestants.free_port()
        serving = subprocess.Popen([sys.executable, "-m", "bench.peers", str(server)], cwd=ROOT)
        sshd = contestants.Sshd(directory)
        try:
            contestants.wait_for_port(server)
            for number in range(options.rounds):
                for index, (way, make) in enumerate(ways(sshd, server).items()):
                    if options.only and way not in {REFERENCE, *options.only}:
                        continue
                    place = directory / f"{number}{index}"
                    place.mkdir()
                    with make(place) as (port, pids):
                        figures = measure(port, pids, options.megabytes * MB, options.seconds)
                    for key, value in figures.items():
                        results[way][key].append(value)
                    shown = ", ".join(f"{k} {v:,.3g}" for k, v in figures.items())
                    print(f"round {number + 1}, {way}: {shown}", flush=True)
        finally:
            sshd.close()
            serving.kill()
            serving.wait()
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`: medians of "
        f"{options.rounds} rounds, in brackets the ratio to `{REFERENCE}` in the same round.",
        "",
        *table(results),
        "",
        "The machine:",
        "",
        *describe(),
        "",
    ]
    print("\n".join(lines))
    if not options.only:
        PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
