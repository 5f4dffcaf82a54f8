"""Keeps results in docs/benchmarks.json; makes docs/benchmarks.md and its plot from that."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfwd.system import build

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
KEPT = DOCS / "benchmarks.json"
NOTES = ROOT / "bench" / "notes.md"
"""What is to be said of the figures; it is put behind them."""
REFERENCE = "ssh -L"
GCM = "aes128-gcm@openssh.com"

Results = dict[str, dict[str, list[float]]]
"""Of each contestant, each measure's value in each round."""

UNITS = {
    "worker to head": "MB/s",
    "head to worker": "MB/s",
    "processor time": "s/GB",
    "round trip, p50": "µs",
    "round trip, p99": "µs",
    "beside bulk up, p99": "µs",
    "beside bulk down, p99": "µs",
    "a new connection and one round trip": "µs",
    "far, up": "MB/s",
    "far, down": "MB/s",
    "call, p50": "µs",
    "call, p99": "µs",
    "calls at once": "calls/s",
    "object, worker to head": "MB/s",
    "object, head to worker": "MB/s",
    "call beside bulk, p50": "µs",
    "call beside bulk, p99": "µs",
    "processor": "% of a core",
    "memory": "MB",
    "messages": "echoes/s",
    "messages, for a whole core": "echoes/s",
    "there": "MB/s",
    "back": "MB/s",
    "head's processor time": "s/GB",
    "processor for a message": "µs",
    "processor, in use": "% of a core",
    "memory, in use": "MB",
    "until all know all": "s",
    "processor for it": "s",
    "told to the first": "bytes a worker",
    "told of one that joins": "bytes",
    "told of one that leaves": "bytes",
    "longest turn, joining": "ms",
    "longest turn, then": "ms",
    "a collection": "ms",
    "LAN, p50": "µs",
    "LAN, p99": "µs",
    "WAN, p50": "µs",
    "WAN, p99": "µs",
    "longest call": "µs",
    "all streams": "MB/s",
    "the least of a stream": "% of the mean",
    "a step": "ms",
    "the longest step": "ms",
}
TITLES = {
    "near": "A head and a worker on one machine",
    "direct": "Between two workers: through the hub, and directly",
    "openssh": "Lanes carried by AsyncSSH, and by the system's ssh",
    "compiled": "Pure Python and compiled code, in turns",
    "compiled-hub": "A hub with 50 workers and 1,000 streams",
    "far": "One bulk stream, at a round-trip time of 50 ms",
    "distances": "Round trips at 0.5 ms (LAN) and 20 ms (WAN)",
    "crowd": "Calls beside 200 streams like DDP's, between three nodes",
    "levels": "Two machines of the lab: the overlay, the listeners, and other ways",
    "ddp": "A step of DDP between two machines of the lab: gloo, 100 MB of gradients",
    "ray": "Ray: a driver on the head, an actor on a worker, objects of 300 MB",
    "idle": "Idle daemons in a cluster of three nodes, without Ray",
    "idle-ray": "Idle daemons in the same cluster, with Ray",
    "hub": "A hub with many workers",
    "joins": "1,000 workers that join at the same moment, and the hub with them at rest",
}

LABELS = {
    "far, up": "worker to head",
    "far, down": "head to worker",
    "processor": "processor time",
    "processor for a message": "processor time for a message",
    "processor, in use": "processor time, busy",
    "memory, in use": "memory, busy",
    "messages, for a whole core": "messages, with a core of its own",
    "there": "to the other worker",
    "until all know all": "until every node knows all others",
    "processor for it": "processor time until then",
    "told to the first": "message to the first",
    "told of one that joins": "message when one joins",
    "told of one that leaves": "message when one leaves",
    "longest turn, joining": "longest turn of the loop, joining",
    "longest turn, then": "longest turn of the loop, later",
    "a collection": "a garbage collection",
    "the least of a stream": "the slowest stream",
}
"""What a measure is called on the page, where benchmarks.json has a shorter name."""

INTRODUCTION = """\
This page compares rayfwd with `ssh -L` and with other ways to carry the same traffic. `make bench`
measures them, and writes this page from docs/benchmarks.json.

How to read the tables:

- Each row is a way, each cell the median of its rounds. The ratio to `ssh -L` in the same round is
  in brackets.
- `direct` and "the relay alone" are connections without SSH. They show what the machine can do.
- More is better for MB/s, calls/s and echoes/s. Less is better for times, processor time and
  memory.
- The load is the machine's mean of the last five minutes of a measurement. Two cores are full at a
  load of 2.

The [notes](#how-sure-the-figures-are) say how sure the figures are, and
[what limits them](#what-limits-them).
"""
"""What stands at the top of the page."""


def keep(name: str, results: Results) -> None:
    """Keep what a chunk found, with the commit and the time; what it found before is replaced."""
    data = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    data[name] = {
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "load": round(os.getloadavg()[1], 1),
        "machine": describe(),
        "results": {
            way: {key: [float(f"{v:.4g}") for v in values] for key, values in found.items()}
            for way, found in results.items()
        },
    }
    KEPT.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def commit() -> str:
    """The code that is measured: the page itself does not count as a change of it."""
    git = ("git", "-C", str(ROOT))
    changed = _said(*git, "status", "--porcelain", "--", "src", "bench")
    return _said(*git, "rev-parse", "--short", "HEAD") + (" and changes to it" if changed else "")


def describe() -> list[str]:
    """The machine, as far as it matters."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return [
        f"{os.cpu_count()} cores, {models[0] if models else 'unknown processor'}, shared by all "
        f"parts; Linux {platform.release()}",
        f"{_said('ssh', '-V')}; Python {build.python()}; rayfwd compiled where not said otherwise",
    ]


def _said(*argv: str) -> str:
    ran = subprocess.run(argv, capture_output=True, text=True, check=True)
    return (ran.stdout + ran.stderr).strip()


def ratio(results: Results, way: str, key: str, to: str = REFERENCE) -> float | None:
    """The median of the ratios to that way's in the same round."""
    reference = results.get(to, {}).get(key)
    if reference is None:
        return None
    pairs = zip(results[way][key], reference, strict=True)
    ratios = [value / other for value, other in pairs if other]
    return statistics.median(ratios) if ratios else None


def table(results: Results) -> list[str]:
    """Medians, in brackets the ratio to `ssh -L`."""
    keys = list(next(iter(results.values())))
    lines = ["| | " + " | ".join(f"{LABELS.get(key, key)} ({UNITS[key]})" for key in keys) + " |"]
    lines.append("|---" * (len(keys) + 1) + "|")
    for way, found in results.items():
        cells = []
        for key in keys:
            times = ratio(results, way, key)
            more = "" if times is None else f" ({times:.2f} x)"
            value = statistics.median(found[key])
            cells.append(f"{value:,.0f}{more}" if value >= 99.5 else f"{value:.2g}{more}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return lines


def plot(results: Results) -> str:
    """The ratios of rayfwd and the others to `ssh -L` as bars, in SVG."""
    ways = [way for way in results if way not in {REFERENCE, "direct"}]
    keys = list(results[REFERENCE])
    colours = ("#999999", "#c8a24a", "#1f6f8b", "#9db8c2", "#4a90a4", "#7fb7c9")
    out: list[str] = []
    y = 30
    for key in keys:
        out.append(f'<text x="8" y="{y + 34}">{key}</text>')
        for way, colour in zip(ways, colours, strict=False):
            times = ratio(results, way, key)
            if times is not None:
                width = min(times, 4.0) * 110
                out.append(
                    f'<rect x="170" y="{y}" width="{width:.0f}" height="13" fill="{colour}"/>'
                )
                out.append(f'<text x="{174 + width:.0f}" y="{y + 11}">{times:.2f}</text>')
            y += 15
        y += 14
    out.append(f'<line x1="280" x2="280" y1="24" y2="{y - 8}" stroke="#c00"/>')
    out.append('<text x="252" y="18" fill="#c00">ssh -L = 1</text>')
    for way, colour in zip(ways, colours, strict=False):
        out.append(f'<rect x="170" y="{y}" width="13" height="13" fill="{colour}"/>')
        out.append(f'<text x="190" y="{y + 11}">{way}</text>')
        y += 18
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{y + 8}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(out)
        + "\n</svg>\n"
    )


def python_of(chunk: Mapping[str, Any]) -> str:
    """Which Python ran it, as its description of the machine has it."""
    lines: list[str] = chunk["machine"]
    parts = [part.strip() for line in lines for part in line.split(";")]
    return next(part for part in parts if part.startswith("Python"))


def section(name: str, chunk: Mapping[str, Any], results: Results) -> Sequence[str]:
    rounds = len(next(iter(next(iter(results.values())).values())))
    plural = "round" if rounds == 1 else "rounds"
    return [
        f"## {TITLES[name]}",
        "",
        f"Medians of {rounds} {plural}, {chunk['at']}, code {chunk['commit']}"
        + (f", load {chunk['load']}" if "load" in chunk else "")
        + f"; {python_of(chunk)}.",
        "",
        *table(results),
        "",
    ]


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that is to be reached."""

    measure: str
    piece: str
    key: str
    bound: float
    at_least: bool = False
    way: str = "rayfwd"
    to: str | None = REFERENCE
    """It is a ratio to this way's, of the same round; None: it is a figure of its own."""

    def row(self, data: Mapping[str, Any]) -> str:
        """Its line of the table."""
        results = data.get(self.piece, {}).get("results", {})
        found = self._found(results)
        if found is None:
            return f"| {self.measure} | {self._bound()} | not measured | |"
        met = found >= self.bound if self.at_least else found <= self.bound
        verdict = "met" if met else "**not met**"
        return f"| {self.measure} | {self._bound()} | {self._said(found)} | {verdict} |"

    def _found(self, results: Results) -> float | None:
        if self.key not in results.get(self.way, {}):
            return None
        if self.to is None:
            return statistics.median(results[self.way][self.key])
        return ratio(results, self.way, self.key, self.to)

    def _bound(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self._said(self.bound)}"

    def _said(self, value: float) -> str:
        if self.to is not None:
            return f"{value:.2f} x"
        shown = f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"
        return f"{shown} {UNITS[self.key]}"


MANY, BETWEEN = "1,000 workers", "rayfwd, worker to worker"
TARGETS = (
    Target("one stream, worker to head", "near", "worker to head", 1.4, True),
    Target("one stream, head to worker", "near", "head to worker", 1.1, True),
    Target(
        f"one stream, against {GCM}, up", "near", "worker to head", 1.0, True, to=f"ssh -L, {GCM}"
    ),
    Target(
        f"one stream, against {GCM}, down", "near", "head to worker", 1.0, True, to=f"ssh -L, {GCM}"
    ),
    Target("round trip, idle, p50", "near", "round trip, p50", 2.2),
    Target("round trip beside bulk up, p99", "near", "beside bulk up, p99", 0.25),
    Target(
        "round trip beside bulk down, p99",
        *("near", "beside bulk down, p99", 0.25),
    ),
    Target("processor time for a GB", "near", "processor time", 0.8),
    Target(
        "worker to worker, against worker to head: up",
        *("near", "worker to head", 0.7, True),
        way=BETWEEN,
        to="rayfwd",
    ),
    Target(
        "worker to worker, against worker to head: down",
        *("near", "head to worker", 0.7, True),
        way=BETWEEN,
        to="rayfwd",
    ),
    Target(
        "the hub, which shares two cores",
        "compiled-hub",
        "messages",
        30_000,
        True,
        way="compiled",
        to=None,
    ),
    Target(
        "the hub, with a core of its own",
        *("compiled-hub", "messages, for a whole core", 30_000, True),
        way="compiled",
        to=None,
    ),
    Target("Ray: sync call, p50", "ray", "call, p50", 1.1),
    Target("Ray: calls at once", "ray", "calls at once", 1.0, True),
    Target("Ray: object of 300 MB, worker to head", "ray", "object, worker to head", 1.0, True),
    Target("Ray: object of 300 MB, head to worker", "ray", "object, head to worker", 1.0, True),
    Target("50 ms, one bulk stream up", "far", "far, up", 4.0, True),
    Target("50 ms, one bulk stream down", "far", "far, down", 4.0, True),
    Target("calls beside 200 streams, p99", "crowd", "call, p99", 0.25),
    Target("a DDP step, gloo, 100 MB", "ddp", "a step", 1.0, way="rayfwd, overlay"),
    Target(
        "1,000 workers: every node knows all others",
        "joins",
        "until all know all",
        60.0,
        way=MANY,
        to=None,
    ),
    Target("1,000 workers: the hub at rest", "joins", "processor", 20.0, way=MANY, to=None),
    Target("1,000 workers: memory", "joins", "memory", 600.0, way=MANY, to=None),
    Target(
        "1,000 workers: longest turn of the loop",
        "joins",
        "longest turn, then",
        20.0,
        way=MANY,
        to=None,
    ),
    Target(
        "1,000 workers: message when one joins",
        "joins",
        "told of one that joins",
        999,
        way=MANY,
        to=None,
    ),
    Target(
        "1,000 workers: message when one leaves",
        "joins",
        "told of one that leaves",
        999,
        way=MANY,
        to=None,
    ),
)
"""What is aimed at, each with where it is measured."""


def against_targets(data: Mapping[str, Any]) -> list[str]:
    """The table of them."""
    return [
        "## Against the targets",
        "",
        "`x` is the ratio to `ssh -L` with its default cipher, in the same round. Where a measure "
        "names another way, it is the ratio to that way.",
        "",
        "| measure | target | measured | |",
        "|---|---|---|---|",
        *(target.row(data) for target in TARGETS),
        "",
    ]


def write() -> None:
    """Write docs/benchmarks.md and docs/benchmarks.svg from what is kept."""
    data = json.loads(KEPT.read_text())
    machines = list(dict.fromkeys(line for chunk in data.values() for line in chunk["machine"]))
    lines = ["# Benchmarks", "", INTRODUCTION]
    lines += ["It was measured on:", "", *(f"- {line}" for line in machines), ""]
    lines += against_targets(data)
    for name in TITLES:
        if name in data:
            lines += section(name, data[name], data[name]["results"])
            if name == "near":
                (DOCS / "benchmarks.svg").write_text(plot(data[name]["results"]))
                lines += ["![The ratios of this table](benchmarks.svg)", ""]
    if NOTES.exists():
        lines.append(NOTES.read_text())
    (DOCS / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n")
