"""Send a canary now: a small task to each node, and 1 MB there and back."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from rayfwd import codes
from rayfwd.cli import FAULT, OK
from rayfwd.cli.common import control_socket, load_as_owner, quiet_logs, table
from rayfwd.system.control import ask
from rayfwd.system.logs import escaped

ASK_INTERVAL = 0.5
"""Seconds between two questions whether it is back."""

CANARY_MARGIN = 90.0
"""Seconds besides its time-out that it may take; nodes that fail without a reason get it twice."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(args: argparse.Namespace) -> int:
    config = load_as_owner(args)
    quiet_logs()
    socket = control_socket(config)
    answer = ask(socket, "canary", {"send": True})
    deadline = time.monotonic() + 2 * (config.canary.timeout + CANARY_MARGIN)
    while answer.get("running"):
        if time.monotonic() > deadline:
            raise codes.CANARY_LOST.error(
                "the canary did not finish in time", "read the daemon's log"
            )
        time.sleep(ASK_INTERVAL)
        answer = ask(socket, "canary")
    if args.json:
        print(json.dumps(answer, indent=2))
    else:
        print("\n".join(escaped(line).rstrip() for line in lines(answer)))
    return OK if answer.get("ok") is True else FAULT


def lines(answer: Mapping[str, Any]) -> list[str]:
    """A line a node, and what is wrong below it."""
    rows = []
    for node in answer.get("nodes", []):
        stages = node.get("stages", {})
        shown = [_stage(stages, *pair) for pair in _STAGES]
        rows.append((str(node["name"]), "ok" if node["ok"] else "FAILED", *shown))
    out = table(rows)
    for node in answer.get("nodes", []):
        if not node["ok"] and not node.get("judged"):
            out.append(
                f"{node['name']}: its link or its Ray was down meanwhile; see `rayfwd status`"
            )
        if problem := node.get("problem"):
            out += [f"{problem['code']}  {node['name']}", f"  {problem['cause']}"]
            out += [f"  {problem['remedy']}"]
    if problem := answer.get("problem"):
        out += [problem["code"], f"  {problem['cause']}", f"  {problem['remedy']}"]
    return out


_STAGES = (("task", "task"), ("to", "1 MB to it"), ("from", "1 MB from it"))


def _stage(stages: Mapping[str, Any], key: str, label: str) -> str:
    stage = stages.get(key)
    if stage is None:
        return f"{label}: not tried"
    return f"{label}: {stage['seconds']:.2f} s" if stage["ok"] else f"{label}: no"
