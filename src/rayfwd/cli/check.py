"""Validate the configuration file, and show in plain lines what it results in."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Iterator

from rayfwd.cli import OK
from rayfwd.cli.common import load_as_owner, own_head_plan, quiet_logs, table
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config, HeadConfig
from rayfwd.doctor.settings import warnings
from rayfwd.problems import ProblemError
from rayfwd.ray import install
from rayfwd.system import setting
from rayfwd.system.logs import escaped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but --config."""


def run(args: argparse.Namespace) -> int:
    config = load_as_owner(args)
    quiet_logs()
    own = own_head_plan(config) if config.role == "head" else None
    print(escaped(f"{config.path}: valid"))
    ray, version = _ray(config)
    for line in table(list(_amounts_to(config, own, ray)), "  "):
        print(escaped(line))
    for warning in warnings(config, version):
        print(escaped(f"  warning: {warning}"))
    return OK


def _amounts_to(config: Config, own: NodePlan | None, ray: str) -> Iterator[tuple[str, str]]:
    yield "role", config.role
    yield "name", config.name
    yield "state", f"{config.state_dir}"
    yield "sockets", f"{config.runtime_dir}"
    if config.head is not None:
        yield "head", _dials(config.head)
        if config.head.dialled:
            yield "waits", f"at {config.link_socket}, for a worker that the head dials"
    for dial in config.hub.dial:
        yield "dials", f"{dial.called}: {_dials(dial.way())}"
    for meet in config.hub.meet:
        where = "rayfwd itself" if meet.sshd_address() is None else meet.sshd
        yield "meets", f"at {meet.ssh}: the socket {meet.socket} there leads to {where} here"
    if own is not None:
        allowed = ", ".join(("root", "the daemon's own user", *config.hub.users))
        yield "hub", f"listens on {config.hub_socket}; these users may connect: {allowed}"
        yield "network", f"{config.hub.network}; this head is {own.address}"
        yield "ports", f"{own.base}-{own.last_worker_port} are this head's; the workers' follow"
        services = own.head_services.items()
        yield "", "also " + ", ".join(f"{name} {port}" for name, port in services)
    if config.role != "client":
        yield "ray", ray
    if config.ray.advertise is not None:
        yield "advertise", f"others reach this worker directly at {config.ray.advertise}"
    for forward in config.forwards:
        yield "forward", f"{forward.listen} here is {forward.to}"
    if config.expose:
        ports = ", ".join(str(port) for port in config.expose)
        yield (
            "expose",
            f"[[forward]] of other nodes may lead to these ports of this machine: {ports}",
        )
    yield "ride through", f"streams are held for {config.ride_through:g} s while a link is down"


def _dials(head: HeadConfig) -> str:
    if not head.ssh:
        return "dials this worker (dialled = true)"
    user, host, port = head.ssh_target()
    shown = (f"{user}@" if user else "") + host + (f", port {port}" if port else "")
    lanes = 1 + head.bulk_lanes
    more = f" (and up to {head.extra_lanes} more)" if head.bulk_lanes and head.extra_lanes else ""
    if head.via == "exec":
        way = f"running `{head.attach_command}` there"
    else:
        way = f"to the socket {head.socket} there"
    met = f" through the meeting place {head.meet}" if head.meet else ""
    return f"{shown}{met}, {lanes} SSH connection{'s' * (lanes > 1)}{more}, {way}"


def _ray(config: Config) -> tuple[str, str | None]:
    """Ray as it is found here, in words, and its version."""
    if config.role == "client":
        return "", None
    try:
        found = asyncio.run(install.find(config.ray.command, os.environ))
    except ProblemError as exc:
        return f"{exc.problem.code}: {exc.problem}", None
    does = (
        ""
        if config.ray.start
        else f"; rayfwd does not start it ({setting.value('ray.start', False)})"
    )
    versions = found.versions
    return f"{found.command}, Ray {versions.ray}, Python {versions.python}{does}", versions.ray
