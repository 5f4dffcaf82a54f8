"""Validate the configuration file, and say in plain lines what it amounts to."""

from __future__ import annotations

import argparse
import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from rayfwd import unixsocket
from rayfwd.cli import OK
from rayfwd.cli.common import load_config, own_head_plan, quiet_logs, table
from rayfwd.config import Config, HeadConfig
from rayfwd.plan import PORT_CEILING, NodePlan
from rayfwd.problems import ProblemError
from rayfwd.ray import install

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but --config."""


def run(args: argparse.Namespace) -> int:
    config = load_config(args)
    quiet_logs()
    own = own_head_plan(config) if config.role == "head" else None
    print(f"{config.path}: valid")
    for line in table(list(_amounts_to(config, own)), "  "):
        print(line)
    for warning in _warnings(config):
        print(f"  warning: {warning}")
    return OK


def _amounts_to(config: Config, own: NodePlan | None) -> Iterator[tuple[str, str]]:
    yield "role", config.role
    yield "name", config.name
    yield "state", f"{config.state_dir}"
    yield "sockets", f"{config.runtime_dir}"
    if config.head is not None:
        yield "head", _dials(config.head)
    if own is not None:
        allowed = ", ".join(("root", "the daemon's own user", *config.hub.users))
        yield "hub", f"listens on {config.hub_socket}; may connect: {allowed}"
        yield "network", f"{config.hub.network}; this head is {own.address}"
        yield "ports", f"{own.base}-{own.last_worker_port} are this head's, workers' follow"
        services = own.head_services.items()
        yield "", ", ".join(f"{name} {port}" for name, port in services) + " besides"
    yield "ray", _ray(config)
    if config.ray.advertise is not None:
        yield "advertise", f"others reach this worker directly at {config.ray.advertise}"
    for forward in config.forwards:
        yield "forward", f"{forward.listen} here is {forward.to}"
    if config.expose:
        ports = ", ".join(str(port) for port in config.expose)
        yield "expose", f"other nodes' forwards may reach port {ports} of this machine"
    yield "ride through", f"streams are held for {config.ride_through:g} s while a link is down"


def _dials(head: HeadConfig) -> str:
    user, host, port = head.ssh_target()
    shown = (f"{user}@" if user else "") + host + (f", port {port}" if port else "")
    lanes = 1 + head.bulk_lanes
    more = f" (and up to {head.extra_lanes} more)" if head.bulk_lanes and head.extra_lanes else ""
    if head.via == "exec":
        way = f"running `{head.attach_command}` there"
    else:
        way = f"to the socket {head.socket} there"
    return f"{shown}, {lanes} SSH connection{'s' * (lanes > 1)}{more}, {way}"


def _ray(config: Config) -> str:
    try:
        found = asyncio.run(install.find(config.ray.command, os.environ))
    except ProblemError as exc:
        return f"{exc.problem.code}: {exc.problem}"
    does = "" if config.ray.start else "; rayfwd does not start it (ray.start = false)"
    versions = found.versions
    return f"{found.command}, Ray {versions.ray}, Python {versions.python}{does}"


def _warnings(config: Config) -> Iterator[str]:
    if config.head is not None:
        yield from _key_warnings(config.head)
    low = _ephemeral_floor()
    if low is not None and low < PORT_CEILING:
        yield (
            f"this machine takes ephemeral ports from {low} on ({_EPHEMERAL}), and Ray's ports lie "
            f"below {PORT_CEILING}: an outgoing connection may take one of them; "
            f"raise the range to begin at {PORT_CEILING}"
        )
    for socket in (config.control_socket, *([config.hub_socket] if config.role == "head" else [])):
        try:
            unixsocket.check_path(socket)
        except ProblemError as exc:
            yield str(exc.problem)
    if config.role == "worker":
        for key in ("port", "client_port"):
            if key in config.ray.model_fields_set:
                yield f"ray.{key} is a head's: on a worker it changes nothing"
    for directory in (config.state_dir, config.runtime_dir):
        if (fault := _not_writable(directory)) is not None:
            yield fault


def _key_warnings(head: HeadConfig) -> Iterator[str]:
    if head.identity is not None:
        path = head.identity.expanduser()
        try:
            mode = path.stat().st_mode
        except OSError as exc:
            yield f"head.identity = {path}: {exc.strerror}"
        else:
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                yield f"head.identity = {path}: others may read it; say `chmod 600 {path}`"
            if not os.access(path, os.R_OK):
                yield f"head.identity = {path}: this user cannot read it"
    known = head.known_hosts.expanduser() if head.known_hosts is not None else None
    usual = (Path("~/.ssh/known_hosts").expanduser(), Path("/etc/ssh/ssh_known_hosts"))
    if known is not None and not known.exists():
        yield f"head.known_hosts = {known}: no such file; the head's host key must be in it"
    elif known is None and head.ssh_config is None and not any(p.exists() for p in usual):
        yield (
            f"neither {usual[0]} nor {usual[1]} exists: the head's host key must be known before; "
            "connect once with ssh"
        )
    if head.ssh_config is not None and not head.ssh_config.expanduser().exists():
        yield f"head.ssh_config = {head.ssh_config}: no such file"


def _ephemeral_floor() -> int | None:
    try:
        return int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _not_writable(directory: Path) -> str | None:
    """The daemon makes these directories; what matters is the first one that exists."""
    there = next((p for p in (directory, *directory.parents) if p.exists()), Path("/"))
    if there == directory and not there.is_dir():
        return f"{directory} is not a directory"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{directory}: this user may not write in {there} (the service's user may)"
    return None
