"""Ask the running daemon how it is. Exit code 0: ready; 3: running, not ready; 1: not running."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rayfwd.cli import NOT_READY, OK
from rayfwd.cli.common import control_socket, load_config, quiet_logs, table
from rayfwd.control import ask
from rayfwd.logs import escaped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(args: argparse.Namespace) -> int:
    config = load_config(args)
    quiet_logs()
    status = ask(control_socket(config), "status")
    if args.json:
        print(json.dumps(status, indent=2))
    else:
        print("\n".join(screen(status, time.time())))
    return OK if status.get("state") == "ready" else NOT_READY


def screen(status: Mapping[str, Any], now: float) -> list[str]:
    """The status as lines of text; `now` in Unix seconds. Missing parts are left out."""
    lines = [_headline(status)]
    for title, body in (
        ("node", _node(_object(status.get("node")))),
        ("link", _link(_object(status.get("link")), now)),
        ("workers", _workers(_objects(status.get("workers")), now)),
        ("streams", _streams(status)),
        ("doors", _doors(_object(status.get("doors")))),
        ("ray", _ray(_object(status.get("ray")), now)),
        ("cluster", _cluster(_object(status.get("cluster")), now)),
        ("roster", _roster(_objects(status.get("roster")))),
        ("waiting", _problems(_objects(status.get("waiting_for")), now)),
        ("problems", _problems(_objects(status.get("problems")), now)),
    ):
        lines += [f"{title if i == 0 else '':<9} {line}" for i, line in enumerate(body)]
    # Names and causes come from other machines: nothing in them may act on the terminal.
    return [escaped(line).rstrip() for line in lines]


def _headline(status: Mapping[str, Any]) -> str:
    who = " ".join(_text(status.get(part)) for part in ("role", "name") if status.get(part))
    parts = [f"rayfwd {_text(status.get('version'))}", who, _text(status.get("state")).upper()]
    if (uptime := _number(status.get("uptime"))) is not None:
        parts.append(f"up {duration(uptime)}")
    if status.get("pid") is not None:
        parts.append(f"pid {_text(status['pid'])}")
    return "  ".join(part for part in parts if part)


def _node(node: Mapping[str, Any]) -> list[str]:
    if not node:
        return []
    text = _text(node.get("address"))
    base, workers = _number(node.get("base")), _number(node.get("worker_ports"))
    if ports := node.get("ports"):
        text += f"  ports {_text(ports)}"
    elif base is not None and workers is not None:
        text += f"  ports {base:g}-{base + 8 + workers - 1:g}"
    services = _object(node.get("head_services"))
    if services:
        text += "  " + ", ".join(f"{name} {_text(port)}" for name, port in services.items())
    return [text + ("  (others reach it directly)" if node.get("advertised") else "")]


def _link(link: Mapping[str, Any], now: float) -> list[str]:
    if not link:
        return []
    first = _text(link.get("state"))
    if link.get("head"):
        first += f"  to {_text(link['head'])}"
    return [first + _link_tail(link, now), *_lanes(link, now), *_why(link.get("problem"))]


def _workers(workers: list[Mapping[str, Any]], now: float) -> list[str]:
    lines: list[str] = []
    for worker in workers:
        first = f"{_text(worker.get('name'))}  {_text(worker.get('state'))}"
        lines += [first + _link_tail(worker, now), *_lanes(worker, now)]
        lines += _why(worker.get("problem"))
    return lines


def _link_tail(link: Mapping[str, Any], now: float) -> str:
    tail = f"  for {age}" if (age := _age(link.get("since"), now)) else ""
    if (cuts := _number(link.get("cuts"))) is not None:
        ridden = _number(link.get("ridden_through")) or 0
        tail += f"  cuts {cuts:g}, ridden through {ridden:g}"
    return tail


def _lanes(link: Mapping[str, Any], now: float) -> list[str]:
    rows = []
    for lane in _objects(link.get("lanes")):
        rtt = _number(lane.get("rtt_ms"))
        age = _age(lane.get("since"), now)
        rows.append(
            (
                f"lane {_text(lane.get('lane'))}",
                _text(lane.get("class")),
                _text(lane.get("state")),
                f"rtt {rtt:.1f} ms" if rtt is not None else "",
                f"in {size(lane.get('bytes_in'))}",
                f"out {size(lane.get('bytes_out'))}",
                f"for {age}" if age else "",
            )
        )
    return table(rows, "  ")


def _streams(status: Mapping[str, Any]) -> list[str]:
    streams, volume = _object(status.get("streams")), _object(status.get("bytes"))
    if not streams and not volume:
        return []
    text = f"{_text(streams.get('open', 0))} open, {_text(streams.get('parked', 0))} parked"
    return [f"{text}  in {size(volume.get('in'))}, out {size(volume.get('out'))}"]


def _doors(doors: Mapping[str, Any]) -> list[str]:
    if not doors:
        return []
    blocked = _objects(doors.get("blocked"))
    lines = [f"{_text(doors.get('open', 0))} open" + (f", {len(blocked)} blocked" * bool(blocked))]
    for problem in blocked:
        lines += _why(problem)
    return lines


def _ray(ray: Mapping[str, Any], now: float) -> list[str]:
    if not ray:
        return []
    parts = [_text(ray.get("phase"))]
    if ray.get("version"):
        python = f" (Python {_text(ray['python'])})" if ray.get("python") else ""
        parts.append(f"Ray {_text(ray['version'])}{python}")
    if ray.get("pid") is not None:
        parts.append(f"pid {_text(ray['pid'])}" + (" (adopted)" if ray.get("adopted") else ""))
    if age := _age(ray.get("since"), now):
        parts.append(f"for {age}")
    if restarts := _number(ray.get("restarts")):
        parts.append(f"restarts {restarts:g}")
    return ["  ".join(parts), *_why(ray.get("problem"))]


def _cluster(cluster: Mapping[str, Any], now: float) -> list[str]:
    if not cluster:
        return []
    nodes = cluster.get("nodes")
    count = len(nodes) if isinstance(nodes, (list, dict)) else nodes
    first = f"{_text(count)} {'node' if count == 1 else 'nodes'}" if count is not None else ""
    if age := _age(cluster.get("as_of"), now):
        first += f"  as of {age} ago"
    totals = []
    for name, pair in _object(cluster.get("totals")).items():
        if isinstance(pair, list) and len(pair) == 2:
            shown = [size(v) if "memory" in name else _amount(v) for v in pair]
            totals.append((name, f"{shown[0]} of {shown[1]} used"))
    return [first, *table(totals, "  ")]


def _roster(roster: list[Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            _text(node.get("name")),
            _text(node.get("role")),
            _text(node.get("address")) + (" (direct)" if node.get("advertised") else ""),
            _text(node.get("ports")),
            _text(node.get("state") or ""),
        )
        for node in roster
    ]
    return table(rows)


def _problems(problems: list[Mapping[str, Any]], now: float) -> list[str]:
    lines: list[str] = []
    for problem in problems:
        subject = f"  {_text(problem['subject'])}" if problem.get("subject") else ""
        age = _age(problem.get("since"), now)
        lines.append(f"{_text(problem.get('code'))}{subject}" + (f"  for {age}" if age else ""))
        lines += [f"  {_text(problem[part])}" for part in ("cause", "remedy") if problem.get(part)]
    return lines


def _why(problem: Any) -> list[str]:
    found = _object(problem)
    if not found:
        return []
    what = "; ".join(_text(found[part]) for part in ("cause", "remedy") if found.get(part))
    return [f"  {_text(found.get('code'))}: {what}"]


def duration(seconds: float) -> str:
    """`3 s`, `12 min`, `5 h 10 min`, `3 d 4 h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def size(value: Any) -> str:
    """Bytes in units of 1000: `999 B`, `1.2 kB`, `3.4 GB`."""
    number = _number(value)
    if number is None:
        return "?"
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(number) < 999.95 or unit == "PB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def _age(since: Any, now: float) -> str:
    """How long ago `since` was: Unix seconds, or a time in ISO form. Empty: not known."""
    if isinstance(since, str):
        try:
            since = datetime.fromisoformat(since).timestamp()
        except ValueError:
            return ""
    number = _number(since)
    return "" if number is None else duration(now - number)


def _amount(value: Any) -> str:
    number = _number(value)
    return "?" if number is None else f"{number:.2f}".rstrip("0").rstrip(".")


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _text(value: Any) -> str:
    return "?" if value is None else str(value)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
