"""Show every node's address and ports, and the exact `ray start` command of this node."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from dataclasses import dataclass
from typing import Any

from rayfwd import codes
from rayfwd.cli import FAULT, OK
from rayfwd.cli.common import control_socket, load_as_owner, own_head_plan, quiet_logs, table
from rayfwd.cluster.plan import NodePlan, bound
from rayfwd.config import Config
from rayfwd.hub.roster import read, settle
from rayfwd.problems import ProblemError
from rayfwd.ray import commandline, install, token
from rayfwd.ray.commandline import RayPlan
from rayfwd.system.control import ask
from rayfwd.system.files import read_regular
from rayfwd.system.logs import escaped


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of the cluster, and from where."""

    own: NodePlan
    head: NodePlan
    nodes: tuple[NodePlan, ...]
    network: str
    ride_through: float
    source: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but --config."""


def run(args: argparse.Namespace) -> int:
    config = load_as_owner(args)
    quiet_logs()
    plan = of_head(config) if config.role == "head" else of_worker(config)
    if plan is None:
        print(
            "This worker has no plan yet. The hub gives it its address and ports when "
            "`rayfwd run` on this"
        )
        print("machine reaches the head for the first time.")
        return FAULT
    print(escaped(f"Plan of the cluster ({plan.source}):"))
    for line in table([_row(node) for node in plan.nodes], "  "):
        print(escaped(line))
    print(f"Ports: {bound(plan.nodes, config.hub.port_base)}.")
    print("When a node's level changes (docs/overlay.md), its Ray is restarted once.")
    print()
    print("\n".join(map(escaped, _command(config, plan))))
    return OK


def of_head(config: Config) -> Plan:
    """From the file and the roster on disk, which are read only."""
    own = own_head_plan(config)
    records, _ = read(config.roster_file)
    settled = settle(records, own, config.hub.network, config.hub.port_base)
    nodes = (own, *(r.plan for r in settled.records))
    source = f"{config.path} and {config.roster_file}"
    return Plan(own, own, nodes, config.hub.network, config.ride_through, source)


def of_worker(config: Config) -> Plan | None:
    """From the running daemon, else as it was last kept. None: no hub has given one yet."""
    socket = control_socket(config)
    try:
        return _from_wire(ask(socket, "plan"), config, f"the daemon on {socket}")
    except ProblemError as exc:
        if exc.problem.code != codes.DAEMON_NOT_RUNNING:
            raise
    except ValueError:
        pass  # the daemon has no plan yet
    try:
        kept = json.loads(read_regular(config.plan_file))
        return _from_wire(kept, config, f"from {config.plan_file}, as no daemon runs")
    except (OSError, ValueError):
        return None


def _from_wire(data: Any, config: Config, source: str) -> Plan:
    """Raises ValueError where `data` has no whole plan."""
    if not isinstance(data, dict):
        raise ValueError("not a plan")
    own, head, nodes = data.get("own"), data.get("head"), data.get("nodes", [])
    if not (isinstance(own, dict) and isinstance(head, dict) and isinstance(nodes, list)):
        raise ValueError("not a plan")
    plans = tuple(NodePlan.from_wire(node) for node in nodes)
    network = str(data.get("network", config.hub.network))
    ride = float(data.get("ride_through", config.ride_through))
    return Plan(NodePlan.from_wire(own), NodePlan.from_wire(head), plans, network, ride, source)


def _row(node: NodePlan) -> tuple[str, str, str, str, str, str]:
    return (
        node.name,
        node.role,
        node.address + (" (direct)" if node.advertised else ""),
        f"{node.base}-{node.last_worker_port}",
        node.level if node.role == "worker" else "",  # the head's bounds nothing
        ", ".join(f"{name} {port}" for name, port in node.head_services.items()),
    )


def _command(config: Config, plan: Plan) -> list[str]:
    try:
        found = asyncio.run(install.find(config.ray.command, os.environ))
        unknown = []
    except ProblemError as exc:
        found = None
        unknown = [
            f"({exc.problem.cause}: the flags are those of the newest Ray that rayfwd knows.)"
        ]
    rays = RayPlan(plan.own, plan.head, config.ray, plan.ride_through, plan.network)
    auth = token.environment(token.kept_auth(config.state_dir), config.state_dir)
    line = commandline.by_hand(rays, found, auth)
    if config.ray.start:
        does = (
            "`rayfwd run` starts Ray on this node with this command and --block. By hand it "
            "would be:"
        )
    else:
        does = "Start Ray on this node while `rayfwd run` runs, with this command:"
    return [does, *unknown, "", line]
