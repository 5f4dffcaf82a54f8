"""What is doubtful about a configuration that is valid: it may be meant so, and seldom is."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from rayfwd.cluster.plan import PORT_CEILING
from rayfwd.config import Config, HeadConfig, HubConfig, RayConfig
from rayfwd.problems import ProblemError
from rayfwd.ray import token
from rayfwd.system import setting, sockdiag, unixsocket
from rayfwd.system.users import named, who_else_logs_in

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")

UNIT = Path("/etc/systemd/system/rayfwd.service")
MADE_BY_SYSTEMD = frozenset({Path("/run/rayfwd"), Path("/var/lib/rayfwd")})
"""The unit's RuntimeDirectory= and StateDirectory=: there before the daemon is."""


def warnings(config: Config, version: str | None = None) -> Iterator[str]:
    """One line each, with what to do. `version`: of this machine's Ray, where it is known."""
    if config.head is not None:
        yield from _key_warnings(config.head)
    if config.role == "client":
        yield from _client_warnings()
        return  # it has no ports of a plan, and no socket
    if (line := _ephemeral_warning(config)) is not None:
        yield line
    for socket in (config.control_socket, *([config.hub_socket] if config.role == "head" else [])):
        try:
            unixsocket.check_path(socket)
        except ProblemError as exc:
            yield str(exc.problem)
    if config.role == "worker":
        for key in ("port", "client_port"):
            if key in config.ray.model_fields_set:
                yield f"ray.{key} has an effect only on a head, not on a worker"
    if (line := no_token(config, version)) is not None:
        yield line
    for directory in (config.state_dir, config.runtime_dir):
        if (fault := not_writable(directory)) is not None:
            yield fault


def no_token(config: Config, version: str | None = None) -> str | None:
    """Others may log in here, and Ray asks for no token; None too where that is not known yet: on a
    head it follows from Ray's version, on a worker from what the head hands out."""
    if config.ray.auth == "token" or not (others := who_else_logs_in(os.geteuid())):
        return None
    if not _asks_nothing(config, version):
        return None
    return (
        f"{named(others)} may log in on this machine, and Ray asks for no token, so whoever "
        "reaches Ray's ports can run code as Ray's user; set ray.auth = \"token\" (--auth token) "
        "on the head (Ray 2.52 or newer)"
    )


def _asks_nothing(config: Config, version: str | None) -> bool:
    """As the file says, as it was decided, or as it would be."""
    kept = token.kept_auth(config.state_dir)
    if config.ray.auth == "off":
        return True
    if kept is not None:
        return kept.mode != "token"
    if version is None or config.role != "head":
        return False
    env = {**os.environ, **config.ray.env}
    return not token.would_ask(config.ray.auth, version, env, config.state_dir)


def _client_warnings() -> Iterator[str]:
    """Of `rayfwd connect`, whose ports are let to its own user, where the system tells of users."""
    others = who_else_logs_in(os.geteuid())
    try:
        if others:
            sockdiag.opened().close()
    except OSError:
        yield (
            f"{named(others)} may log in on this machine, and it does not say who owns a "
            "connection, so while `rayfwd connect` runs, they can use Ray's ports and run code as "
            'its user; set ray.auth = "token" (--auth token) on the head (Ray 2.52 or newer)'
        )


def _key_warnings(head: HeadConfig) -> Iterator[str]:
    if head.identity is not None:
        path = head.identity.expanduser()
        identity = setting.value("head.identity", path)
        try:
            mode = path.stat().st_mode
        except OSError as exc:
            yield f"{identity}: {exc.strerror}"
        else:
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                yield f"{identity}: other users may read it; run `chmod 600 {path}`"
            if not os.access(path, os.R_OK):
                yield f"{identity}: this user cannot read it"
    known = head.known_hosts.expanduser() if head.known_hosts is not None else None
    usual = (Path("~/.ssh/known_hosts").expanduser(), Path("/etc/ssh/ssh_known_hosts"))
    if known is not None and not known.exists():
        named = setting.value("head.known_hosts", known)
        yield f"{named}: no such file; the head's host key must be in it"
    elif known is None and head.ssh_config is None and not any(p.exists() for p in usual):
        yield (
            f"neither {usual[0]} nor {usual[1]} exists, so the head's host key is not known; "
            "connect once with ssh"
        )
    if head.ssh_config is not None and not head.ssh_config.expanduser().exists():
        yield f"{setting.value('head.ssh_config', head.ssh_config)}: no such file"


def _ephemeral_warning(config: Config) -> str | None:
    """Where an outgoing connection may take a port of Ray's, as the kernel chooses it."""
    ephemeral, reserved = _ephemeral(), _reserved()
    exposed = {port for port in _ports(config) if port in ephemeral} - reserved
    if not exposed:
        return None
    wanted = _spans(exposed | reserved)
    return (
        f"this machine uses ephemeral ports from {ephemeral.start} on ({_EPHEMERAL}), and Ray's "
        f"ports {_spans(exposed)} are among them, so an outgoing connection may take one of them; "
        f"let the range begin at {PORT_CEILING}, or reserve them: "
        f"`sysctl -w net.ipv4.ip_local_reserved_ports={wanted}` (as root, also in /etc/sysctl.d)"
    )


def _ports(config: Config) -> set[int]:
    """Ray's on this machine: the single ones, and all that may be a node's. A worker's file does
    not say where they begin; a head's usual values are taken."""
    head = config if config.role == "head" else None
    hub, ray = (HubConfig(), RayConfig()) if head is None else (head.hub, head.ray)
    single = {ray.port, ray.dashboard_port, ray.client_port}
    return single | set(range(hub.port_base, PORT_CEILING))


def _ephemeral() -> range:
    """Empty: not known."""
    try:
        low, high = map(int, _EPHEMERAL.read_text().split())
    except (OSError, ValueError):
        return range(0)
    return range(low, high + 1)


def _reserved() -> set[int]:
    """What the kernel chooses for no connection (ip-sysctl.rst): `8080,9148-9150`."""
    found: set[int] = set()
    try:
        for span in filter(None, _RESERVED.read_text().strip().split(",")):
            first, _, last = span.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        pass
    return found


def _spans(ports: set[int]) -> str:
    """As the kernel writes them."""
    spans: list[list[int]] = []
    for port in sorted(ports):
        if spans and spans[-1][1] == port - 1:
            spans[-1][1] = port
        else:
            spans.append([port, port])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def not_writable(directory: Path) -> str | None:
    """The daemon makes these directories; what matters is the first one that exists."""
    if directory in MADE_BY_SYSTEMD and not directory.exists() and UNIT.exists():
        return None
    there = next((p for p in (directory, *directory.parents) if p.exists()), Path("/"))
    if there == directory and not there.is_dir():
        return f"{directory} is not a directory"
    if not os.access(there, os.W_OK | os.X_OK):
        return (
            f"{directory}: this user may not write in {there} (the service's user may be able to)"
        )
    return None
