"""The TOML file as pydantic models: its defaults, and errors that name the key.

A mistake in the file is reported as one line: the key, the value, what is allowed.

The text below each key, and the class's own, are what config.example.toml and rayfwd.toml(5) say of
them (`make manual`); `examples` are shown where a default is found at run time only.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import socket
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from rayfwd.cluster.plan import (
    LOOPBACK,
    PORT_CEILING,
    PRIVATE_NETWORKS,
    NodePlan,
    check_name,
    default_worker_ports,
    head_plan,
    in_loopback,
    may_be_advertised,
    name_from,
)
from rayfwd.system import capacity, setting
from rayfwd.system.paths import (
    CONTROL_SOCKET,
    DEFAULT_CONFIG,
    default_runtime_dir,
    default_state_dir,
)
from rayfwd.system.redact import names_a_secret

DEFAULT_PATH = DEFAULT_CONFIG

OWN_SSH = "own"
"""Where a head has no sshd: rayfwd answers itself."""
PAGE_PORT, PAGE_PORTS = 9480, 20
"""The first port that is tried for the page, and how many are."""

Whole = Annotated[int, Field(strict=True)]
"""A whole number, not a string that looks like one."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
YesNo = Annotated[bool, Field(strict=True)]
Port = Annotated[Whole, Field(ge=1, le=65535)]


def _local_path(value: Path) -> Path:
    path = value.expanduser()
    if not path.is_absolute():
        raise ValueError("must be an absolute path, or begin with ~/")
    return path


LocalPath = Annotated[Path, AfterValidator(_local_path)]
"""A path on this machine; `~` is the home of the user that rayfwd runs as."""


class ConfigError(Exception):
    """The file cannot be used; `problems` has one line a mistake."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__("\n".join(f"{path}: {p}" for p in problems))
        self.path = path
        self.problems = problems


def _loopback_listen(value: str) -> str:
    host, port = split_host_port(value)
    try:
        if not ipaddress.IPv4Address(host).is_loopback:
            raise ValueError
    except ValueError:
        raise ValueError("must be on an IPv4 loopback address, as in 127.0.0.1:8265") from None
    return f"{host}:{port}"


def _loopback_sshd(value: str) -> str:
    if value == OWN_SSH:
        return value
    if value.startswith("[::1]:"):
        split_host_port(value)
        return value
    return _loopback_listen(value)


def _target(value: str) -> str:
    host, port = split_host_port(value)
    try:
        return f"{check_name(host)}:{port}"
    except ValueError:
        raise ValueError("must be node:port, where node is head or a node's name") from None


def split_host_port(value: str) -> tuple[str, int]:
    """`host:port` as a pair. Raises ValueError with what is allowed."""
    host, colon, port = value.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("must be host:port with a port from 1 to 65535")
    return host, int(port)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class LogConfig(_Section):
    """The daemon's log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """the lowest severity that is written"""
    format: Literal["auto", "text", "json"] = "auto"
    """"text": key=value; "auto": text on a terminal, fields in systemd's journal, JSON elsewhere"""


def _ssh_target(value: str) -> tuple[str | None, str, int | None]:
    """User, host (or alias) and port; None where the SSH configuration decides."""
    user, at, rest = value.rpartition("@")
    host, port = rest, None
    if rest.startswith("["):  # [IPv6 address]:port
        host, _, tail = rest[1:].partition("]")
        good = not tail or tail.startswith(":")
        digits = tail[1:] if tail else None
    else:
        good = rest.count(":") != 1 or not rest.endswith(":")
        digits = rest.partition(":")[2] if rest.count(":") == 1 else None
        host = rest.partition(":")[0] if digits is not None else rest
    if digits is not None:
        good = good and digits.isdecimal() and 0 < int(digits) < 65536
        port = int(digits) if good else None
    if not good or (at and not user) or not re.fullmatch(r"[^\s/-][^\s/]*", host):
        raise ValueError(
            "must be user@host, user@host:port (a port from 1 to 65535) or an alias of ssh_config"
        )
    return user or None, host, port


def _check_ssh(value: str) -> str:
    _ssh_target(value)
    return value


def _meet_socket(value: str) -> str:
    if not value.strip() or value.endswith("/") or len(value.encode()) > 100:
        raise ValueError(
            "must be a path of at most 100 bytes (without /: in the home directory on that host)"
        )
    return value


def _remote_path(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError("must be an absolute path (on the head)")
    return value


def _not_empty(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


Command = Annotated[str, AfterValidator(_not_empty)]


@dataclass(frozen=True, slots=True)
class Destination:
    """Whom a way by SSH leads to, and the section that describes it, for what is said of both."""

    name: str
    section: str
    takes_transport: bool = True
    """That section may say by which SSH."""

    def key(self, name: str) -> str:
        """A key of that section, in a sentence."""
        return setting.key(f"head.{name}") if self == HEAD else f"{name} of {self.section}"

    def set_to(self, name: str, value: str) -> str:
        """That a key is to be this, in a sentence."""
        if self == HEAD and not setting.in_a_file():
            return setting.value(f"head.{name}", value)
        return f'{name} = "{value}" in {self.section}'

    @property
    def answerer(self) -> str:
        """Who answers at the socket there, in a sentence."""
        return "the hub" if self == HEAD else f"rayfwd on {self.name}"

    @property
    def socket_called(self) -> str:
        """The socket there, in a sentence."""
        return "the hub's socket" if self == HEAD else f"rayfwd's socket on {self.name}"


HEAD = Destination("the head", "[head]")
DIALLED_WORKER = Destination("the worker", "its [[hub.dial]]")
MEETING_PLACE = Destination("the meeting place", "its [[hub.meet]]", takes_transport=False)


def other_worker(node: str) -> Destination:
    """A worker that another one dials directly."""
    return Destination(node, f"the [[direct]] of {node}")


class HeadConfig(_Section):
    """How a worker or a client reaches the head by SSH. A head has [hub] instead."""

    ssh: Annotated[str, AfterValidator(_check_ssh)] = Field(
        default="", examples=["ray@head.example.org"]
    )
    """user@host, user@host:port, or an alias of ~/.ssh/config"""
    dialled: YesNo = False
    """for a worker; true: the head dials this machine ([[hub.dial]] there); ssh is not needed"""
    meet: Annotated[str, AfterValidator(_check_ssh)] = Field(
        default="", examples=["ray@meet.example.org"]
    )
    """a third host where the head waits ([[hub.meet]] in the head's file); default: none; ssh then
    gives the user at the head, and the name under which its host key is known; docs/ways.md"""
    meet_socket: Annotated[str, AfterValidator(_meet_socket)] = "rayfwd-head.sock"
    """where the head waits on that host: `socket` in its [[hub.meet]]"""
    identity: LocalPath | None = Field(default=None, examples=["~/.ssh/id_ed25519"])
    """the private key, also for jump hosts; default: the agent's and the SSH configuration's"""
    known_hosts: LocalPath | None = Field(default=None, examples=["~/.ssh/known_hosts"])
    """the only file in which the head's host key is looked up; default: those that ssh reads"""
    ssh_config: LocalPath | None = Field(default=None, examples=["~/.ssh/config"])
    """the only SSH configuration to read (`ssh -F`); default: ~/.ssh/config, /etc/ssh/ssh_config"""
    socket: Annotated[Path, AfterValidator(_remote_path)] = Path("/run/rayfwd/hub.sock")
    """path of the hub's socket on the head"""
    transport: Literal["asyncssh", "openssh"] = "asyncssh"
    """"openssh": use the system's `ssh`, and your ControlMaster if one runs; docs/ways.md"""
    via: Literal["socket", "exec", "auto"] = "socket"
    """"exec": run attach_command there, if the head's sshd forbids forwarding to sockets;
    "auto": try the socket, then the command"""
    attach_command: Command = "rayfwd attach"
    """the command for via = "exec"; a forced command in authorized_keys replaces it"""
    bulk_lanes: Whole = Field(default=1, ge=0, le=8)
    """SSH connections for large transfers, in addition to the one for short messages"""
    extra_lanes: Whole = Field(default=5, ge=0, le=8)
    """more such connections, opened while a transfer fills the others; for long round trips"""

    _destination: Destination = PrivateAttr(default=HEAD)

    @property
    def destination(self) -> Destination:
        """Whom this is the way to; the head, unless another section describes it."""
        return self._destination

    def leading_to(self, destination: Destination) -> Self:
        """The same way, to somebody else."""
        self._destination = destination
        return self

    def ssh_target(self) -> tuple[str | None, str, int | None]:
        """User, host (or alias) and port of `ssh`; None where the SSH configuration decides."""
        return _ssh_target(self.ssh)

    @property
    def called(self) -> str:
        """The head, in a sentence."""
        return self.ssh or "the head, which dials"


class DialConfig(_Section):
    """A worker that accepts SSH, and that this head dials; one section for each. The worker's file
    has dialled = true in [head]; docs/ways.md."""

    ssh: Annotated[str, AfterValidator(_check_ssh)] = Field(examples=["ray@gpu-1.example.org"])
    """user@host, user@host:port, or an alias of ~/.ssh/config"""
    name: Annotated[str, AfterValidator(check_name)] | None = Field(
        default=None, examples=["gpu-1"]
    )
    """the worker's name in messages; default: the host in ssh"""
    identity: LocalPath | None = Field(default=None, examples=["~/.ssh/id_ed25519"])
    """the private key, also for jump hosts; default: the agent's and the SSH configuration's"""
    known_hosts: LocalPath | None = Field(default=None, examples=["~/.ssh/known_hosts"])
    """the only file in which the worker's host key is looked up; default: those that ssh reads"""
    ssh_config: LocalPath | None = Field(default=None, examples=["~/.ssh/config"])
    """the only SSH configuration to read (`ssh -F`); default: ~/.ssh/config, /etc/ssh/ssh_config"""
    socket: Annotated[Path, AfterValidator(_remote_path)] = Path("/run/rayfwd/link.sock")
    """where the worker waits: path of link.sock in its runtime_dir"""
    transport: Literal["asyncssh", "openssh"] = "asyncssh"
    """as in [head]"""
    via: Literal["socket", "exec"] = "socket"
    """"exec": run attach_command there, if the worker's sshd forbids forwarding to sockets"""
    attach_command: Command = "rayfwd attach"
    """the command for via = "exec"; a forced command in authorized_keys replaces it"""
    bulk_lanes: Whole = Field(default=1, ge=0, le=8)
    """SSH connections for large transfers, in addition to the one for short messages"""

    @property
    def called(self) -> str:
        """The worker, in a sentence."""
        return self.name or _ssh_target(self.ssh)[1]

    def way(self) -> HeadConfig:
        """The same, as a way by SSH is described."""
        own = self.model_dump(exclude={"name", "socket"}, exclude_unset=True)
        way = HeadConfig.model_validate({**own, "socket": self.socket, "extra_lanes": 0})
        return way.leading_to(DIALLED_WORKER)


class MeetConfig(_Section):
    """A third host through which workers reach this head's sshd, if neither side can log in to the
    other. The worker's file has meet in [head]; docs/ways.md."""

    ssh: Annotated[str, AfterValidator(_check_ssh)] = Field(examples=["ray@meet.example.org"])
    """user@host, user@host:port, or an alias of ~/.ssh/config"""
    socket: Annotated[str, AfterValidator(_meet_socket)] = "rayfwd-head.sock"
    """the socket that its sshd makes for this head: a path, or a name in its home directory"""
    sshd: Annotated[str, AfterValidator(_loopback_sshd)] = "127.0.0.1:22"
    """this head's own sshd, where the workers log in; "own": it has none, and rayfwd answers"""
    identity: LocalPath | None = Field(default=None, examples=["~/.ssh/id_ed25519"])
    """the private key, also for jump hosts; default: the agent's and the SSH configuration's"""
    known_hosts: LocalPath | None = Field(default=None, examples=["~/.ssh/known_hosts"])
    """the only file in which that host's key is looked up; default: those that ssh reads"""
    ssh_config: LocalPath | None = Field(default=None, examples=["~/.ssh/config"])
    """the only SSH configuration to read (`ssh -F`); default: ~/.ssh/config, /etc/ssh/ssh_config"""

    @property
    def called(self) -> str:
        """The host, in a sentence."""
        return _ssh_target(self.ssh)[1]

    def sshd_address(self) -> tuple[str, int] | None:
        """None: there is no sshd here."""
        if self.sshd == OWN_SSH:
            return None
        host, port = split_host_port(self.sshd)
        return host.strip("[]"), port

    @property
    def sshd_called(self) -> str:
        """Where workers log in, in a sentence."""
        address = self.sshd_address()
        if address is None:
            return "rayfwd's own end of SSH"
        return f"this head's own sshd at {address[0]} port {address[1]}"

    def way(self) -> HeadConfig:
        """The same, as a way by SSH is described."""
        own = self.model_dump(exclude={"socket", "sshd"}, exclude_unset=True)
        return HeadConfig.model_validate({**own, "extra_lanes": 0}).leading_to(MEETING_PLACE)


class DirectConfig(_Section):
    """For a worker: another worker that this one can log in to. Streams between the two then go
    there directly, without the head. One section for each; docs/ways.md."""

    node: Annotated[str, AfterValidator(check_name)] = Field(examples=["gpu-2"])
    """its name in the cluster"""
    ssh: Annotated[str, AfterValidator(_check_ssh)] = Field(examples=["ray@gpu-2.example.org"])
    """user@host, user@host:port, or an alias of ~/.ssh/config"""
    identity: LocalPath | None = Field(default=None, examples=["~/.ssh/id_ed25519"])
    """the private key, also for jump hosts; default: the agent's and the SSH configuration's"""
    known_hosts: LocalPath | None = Field(default=None, examples=["~/.ssh/known_hosts"])
    """the only file in which its host key is looked up; default: those that ssh reads"""
    ssh_config: LocalPath | None = Field(default=None, examples=["~/.ssh/config"])
    """the only SSH configuration to read (`ssh -F`); default: ~/.ssh/config, /etc/ssh/ssh_config"""
    socket: Annotated[Path, AfterValidator(_remote_path)] = Path("/run/rayfwd/peers.sock")
    """the other worker's socket: peers.sock in its runtime_dir"""
    transport: Literal["asyncssh", "openssh"] = "asyncssh"
    """as in [head]"""
    via: Literal["socket", "exec", "auto"] = "exec"
    """"exec": run attach_command there; "socket": forward to the socket; "auto": try both"""
    attach_command: Command = "rayfwd attach --peer"
    """the command that via = "exec" runs; a forced command in authorized_keys replaces it"""
    bulk_lanes: Whole = Field(default=1, ge=0, le=8)
    """SSH connections for big transfers, in addition to the one for short messages"""
    extra_lanes: Whole = Field(default=5, ge=0, le=8)
    """more such connections, opened while a transfer fills the others"""

    def way(self) -> HeadConfig:
        """The same, as a way by SSH is described."""
        own = self.model_dump(exclude={"node"}, exclude_unset=True)
        defaults = {"socket": self.socket, "via": self.via, "attach_command": self.attach_command}
        way = HeadConfig.model_validate({**defaults, **own})
        return way.leading_to(other_worker(self.node))


def _plan_network(value: str) -> str:
    try:
        network = ipaddress.IPv4Network(value)
    except ValueError:
        network = ipaddress.IPv4Network("0.0.0.0/0")
    allowed = (LOOPBACK, *PRIVATE_NETWORKS)
    if not any(map(network.subnet_of, allowed)) or not 8 <= network.prefixlen <= 29:
        raise ValueError(
            "must be a network inside 127.0.0.0/8, /29 or larger, as in 127.77.0.0/16; if every "
            "node has the overlay, it may also be a private network, as in 10.77.0.0/16"
        )
    if ipaddress.IPv4Address("127.0.0.1") in network:
        raise ValueError("must not contain 127.0.0.1, which Ray replaces by another address")
    return value


class HubConfig(_Section):
    """For a head: where workers and clients connect, and which addresses and ports nodes get."""

    socket: LocalPath | None = Field(default=None, examples=["/run/rayfwd/hub.sock"])
    """where workers and clients connect; default: hub.sock in runtime_dir"""
    network: Annotated[str, AfterValidator(_plan_network)] = "127.77.0.0/16"
    """the nodes' addresses, inside 127.0.0.0/8; nothing else may use them; docs/overlay.md"""
    port_base: Whole = Field(default=20000, ge=1024, lt=PORT_CEILING)
    """the nodes' ports are from here to 32767"""
    forget_after: Number = Field(default=2592000.0, ge=60.0, le=1e9)
    """seconds until a worker that is away loses its name, address and ports (default: 30 days)"""
    users: tuple[Command, ...] = ()
    """login names that SSH connections may use, in addition to root and the daemon's user"""
    dial: tuple[DialConfig, ...] = ()
    """workers that this head dials, each a [[hub.dial]]"""
    meet: tuple[MeetConfig, ...] = ()
    """hosts through which workers reach this head, each a [[hub.meet]]"""


def _reachable_address(value: str) -> str:
    try:
        address = ipaddress.IPv4Address(value)
    except ValueError:
        raise ValueError("must be an IPv4 address, not a name") from None
    if not may_be_advertised(address):
        raise ValueError("must be an IPv4 address at which other machines reach this one")
    return value


class RayConfig(_Section):
    """Ray on this machine. For a head or a worker."""

    command: Command = "ray"
    """the `ray` command of your own environment: a name on PATH, or a path"""
    start: YesNo = True
    """false: rayfwd does not start Ray; `rayfwd plan` shows the command to run by hand"""
    num_cpus: Whole | None = Field(default=None, ge=0, examples=[8])
    """default: what Ray counts: the control group's share, within the CPU affinity"""
    num_gpus: Whole | None = Field(default=None, ge=0, examples=[1])
    """default: what Ray finds"""
    resources: dict[str, Annotated[Number, Field(ge=0)]] = {}
    """Ray's custom resources, as in { fast_disk = 1 }"""
    labels: dict[str, str] = {}
    """Ray's node labels, as in { rack = "a" }"""
    extra_args: tuple[str, ...] = ()
    """more arguments for `ray start`, as in ["--temp-dir=/scratch/ray"]"""
    env: dict[str, str] = {}
    """more environment variables for Ray, as in { OMP_NUM_THREADS = "4" }"""
    object_store_memory: Whole | None = Field(default=None, ge=78643200, examples=[1000000000])
    """bytes; default: what Ray chooses (its minimum is 75 MiB)"""
    worker_ports: Whole | None = Field(default=None, ge=8, le=10000, examples=[88])
    """ports for worker processes and drivers; default: 64 plus 3 for each CPU"""
    port: Port = 6379
    """head only: Ray's own port (GCS)"""
    dashboard_port: Port = 8265
    """on a head: the dashboard's port; on a worker: where its default [[forward]] leads"""
    client_port: Port = 10001
    """head only: Ray Client's port (ray://)"""
    advertise: Annotated[str, AfterValidator(_reachable_address)] | None = Field(
        default=None, examples=["203.0.113.7"]
    )
    """a worker's address that other machines reach directly; default: everything uses the link"""
    advertise_check: YesNo = True
    """false: start Ray even if the head cannot reach the address in `advertise`"""
    auth: Literal["auto", "token", "off"] = "auto"
    """Ray's token (Ray 2.52 or newer); "auto": use it only with Ray versions whose tools find the
    token without extra settings (2.61 or newer)"""
    status_interval: Number = Field(default=30.0, ge=5.0, le=3600.0)
    """seconds between two checks of the cluster's resources and of Ray's node table"""


class ListenersConfig(_Section):
    """Who may use the listeners on this machine, which lead to other nodes. For any machine."""

    users: tuple[Command, ...] = ()
    """login names of this machine, in addition to root and the user that runs rayfwd"""


def _interface_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9_-]{1,13}", value):
        raise ValueError("must be 1 to 13 of a-z, 0-9, '_' and '-'")
    return value


def _machines(value: str) -> str:
    try:
        return str(ipaddress.IPv4Network(value))
    except ValueError:
        raise ValueError("must be an IPv4 address or a network, as in 203.0.113.0/24") from None


MOST_APART = 2000
"""Ports that network.apart may name: a node holds most of them, by a socket each."""


def _port_range(value: str) -> str:
    low, _, high = value.partition("-")
    if not (low.isdecimal() and high.isdecimal() and 1024 <= int(low) <= int(high) <= 65535):
        raise ValueError("must be two ports from 1024 on, the lower first, as in 30000-30999")
    return value


def _few_ports(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(ports := _ports_of(value)) > MOST_APART:
        raise ValueError(f"must be {MOST_APART} ports at most, and these are {len(ports)}")
    return value


def _ports_of(ranges: Iterable[str]) -> frozenset[int]:
    ends = [text.split("-") for text in ranges]
    return frozenset(port for low, high in ends for port in range(int(low), int(high) + 1))


def _metrics_listen(value: str) -> str:
    if value.startswith(("/", "~/")):
        path = Path(value).expanduser()
        if path.is_absolute():
            return str(path)
    try:
        return _loopback_listen(value)
    except ValueError:
        raise ValueError(
            "must be a port on an IPv4 loopback address, as in 127.0.0.1:9477, or a socket's "
            "absolute path"
        ) from None


class NetworkConfig(_Section):
    """How programs on this node reach other nodes; docs/overlay.md. For a head or a worker."""

    level: Literal["auto", "overlay", "listeners"] = "auto"
    """"overlay": every port, by kernel rules; "listeners": by sockets; "auto": the best possible"""
    guard: YesNo = True
    """at the level overlay: true keeps other machines from Ray's ports unless they use rayfwd"""
    guard_from: tuple[Annotated[str, AfterValidator(_machines)], ...] = ()
    """machines that may still reach Ray's ports directly; for ray.advertise: docs/overlay.md"""
    deny: tuple[Port, ...] = ()
    """ports of this machine that other nodes may never reach"""
    apart: Annotated[
        tuple[Annotated[str, AfterValidator(_port_range)], ...], AfterValidator(_few_ports)
    ] = ()
    """ports of which each node's programs get others, as 30000-30999 for Serve; docs/overlay.md"""
    interface: Annotated[str, AfterValidator(_interface_name)] = "rayfwd0"
    """name of the interface that gets this node's address"""
    port: Port = 19977
    """the port on 127.0.0.1 to which connections to other nodes are redirected"""
    direct: Literal["told", "off"] = "told"
    """for a worker; "told": to and from workers that a [[direct]] names; "off": never"""

    def apart_ports(self) -> frozenset[int]:
        return _ports_of(self.apart)


class MetricsConfig(_Section):
    """Metrics for Prometheus; docs/metrics.md. For a head or a worker."""

    listen: Annotated[str, AfterValidator(_metrics_listen)] | None = Field(
        default=None, examples=["127.0.0.1:9477"]
    )
    """where Prometheus asks: a loopback address and port, or a socket's path; default: off"""


def _page_listen(value: str) -> str:
    if value in {"auto", "off"}:
        return value
    try:
        return _loopback_listen(value)
    except ValueError:
        raise ValueError(
            'must be "auto", "off" or a port on an IPv4 loopback address, as in 127.0.0.1:9480'
        ) from None


class PageConfig(_Section):
    """The page in the browser; docs/page.md says who may see it. For a head or a worker."""

    listen: Annotated[str, AfterValidator(_page_listen)] = "auto"
    """"auto": on a head 127.0.0.1:9480, or the next free port; "off": no page; or ADDRESS:PORT"""


class CanaryConfig(_Section):
    """A small task on each node, and 1 MB there and back; docs/canary.md says what it costs."""

    enabled: YesNo = False
    """true: send a canary every `interval` seconds; `rayfwd canary` sends one at any time"""
    interval: Number = Field(default=300.0, ge=10.0, le=86400.0)
    """seconds between two canaries"""
    timeout: Number = Field(default=60.0, ge=5.0, le=600.0)
    """seconds for each node: half for the task, a quarter for the object in each direction"""


class ClientConfig(_Section):
    """For a client: where it listens on 127.0.0.1. It also has [head] and [[forward]]."""

    dashboard_port: Port | None = Field(default=None, examples=[8265])
    """port for the head's dashboard; default: 8265, or the next free port"""
    client_port: Port | None = Field(default=None, examples=[10001])
    """port for Ray Client; default: 10001, or the next free port"""
    page_port: Port | None = Field(default=None, examples=[9480])
    """port for the head's page in the browser; default: 9480, or the next free port"""


class ForwardConfig(_Section):
    """One more port of another node, on this machine's loopback; one section for each. Without any,
    a worker has the one shown here; `forward = []` means none. A client's lead to the head."""

    listen: Annotated[str, AfterValidator(_loopback_listen)] = Field(examples=["127.0.0.1:8265"])
    """an IPv4 loopback address and a port"""
    to: Annotated[str, AfterValidator(_target)] = Field(examples=["head:8265"])
    """a node's name, or `head`, and a port that it exposes"""

    def listen_address(self) -> tuple[str, int]:
        return split_host_port(self.listen)

    def target(self) -> tuple[str, int]:
        return split_host_port(self.to)


class Config(_Section):
    """The whole file."""

    role: Literal["head", "worker", "client"] = Field(examples=["worker"])
    """"head"; "worker": dials the head by SSH; "client": a laptop that only uses the cluster"""
    name: Annotated[str, AfterValidator(check_name)] = Field(
        default_factory=lambda: name_from(socket.gethostname()) or "node",
        validate_default=True,
        examples=["gpu-1"],
    )
    """this node's name in the cluster; default: the host name without its domain"""
    cluster: Annotated[str, AfterValidator(check_name)] | None = Field(
        default=None, examples=["blue"]
    )
    """the cluster's name on this machine, for `--cluster`, if there are several; default: none"""
    state_dir: LocalPath = Field(
        default_factory=lambda: default_state_dir(os.environ), examples=["/var/lib/rayfwd"]
    )
    """directory for state; default: systemd's, or /var/lib/rayfwd, or ~/.local/state/rayfwd"""
    runtime_dir: LocalPath = Field(
        default_factory=lambda: default_runtime_dir(os.environ), examples=["/run/rayfwd"]
    )
    """directory for sockets; default: systemd's, or /run/rayfwd, or $XDG_RUNTIME_DIR/rayfwd"""
    ride_through: Number = Field(default=120.0, ge=5.0, le=86400.0)
    """seconds that a link may be down before its streams are lost; sets Ray's time-outs, too"""
    ephemeral: YesNo = False
    """true: the head frees a worker's name, address and ports as soon as it leaves"""
    stop_timeout: Number | None = Field(default=None, ge=3.0, le=86400.0, examples=[8.0])
    """seconds that a stop may take; default: 30 for Ray's tasks, and 20 more"""
    expose: tuple[Port, ...] = ()
    """ports of this machine, on 127.0.0.1, that [[forward]] of other nodes may reach"""
    log: LogConfig = LogConfig()
    head: HeadConfig | None = None
    hub: HubConfig = HubConfig()
    listeners: ListenersConfig = ListenersConfig()
    network: NetworkConfig = NetworkConfig()
    ray: RayConfig = RayConfig()
    metrics: MetricsConfig = MetricsConfig()
    page: PageConfig = PageConfig()
    canary: CanaryConfig = CanaryConfig()
    client: ClientConfig = ClientConfig()
    forward: tuple[ForwardConfig, ...] | None = None
    direct: tuple[DirectConfig, ...] = ()

    _path: Path = PrivateAttr(default=DEFAULT_PATH)

    @model_validator(mode="before")
    @classmethod
    def _own_directories(cls, data: Any) -> Any:
        """A cluster that has a name has directories of its own."""
        name = data.get("cluster") if isinstance(data, dict) else None
        try:
            check_name(name if isinstance(name, str) else "")
        except ValueError:
            return data  # none, or a mistake that is told
        places = {"state_dir": default_state_dir, "runtime_dir": default_runtime_dir}
        return {key: place(os.environ, name) for key, place in places.items()} | data

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        given = {n: v for n in self.model_fields_set if (v := getattr(self, n)) is not None}
        mistakes = [*_role_mistakes(self.role, given), *self._collisions(), *self._denied()]
        if self.role == "worker" and self.name == "head":
            mistakes.append('name = "head": must be another name on a worker')
        if self.role == "head" and self.ray.advertise is not None:
            mistakes.append('ray.advertise: belongs to a worker, and this file has role = "head"')
        if self.role != "worker" and self.ephemeral:
            mistakes.append(
                f'ephemeral: belongs to a worker, and this file has role = "{self.role}"'
            )
        if self.head is not None and not self.head.ssh and not self.head.dialled:
            mistakes.append("head.ssh: must be given")
        if self.head is not None and self.head.dialled and self.role == "client":
            mistakes.append("head.dialled: a client dials the head itself")
        if self.network.level == "listeners" and not in_loopback(self.hub.network):
            mistakes.append(
                f'hub.network = "{self.hub.network}": outside of 127.0.0.0/8 it needs the overlay, '
                'and network.level is "listeners"'
            )
        mistakes += _direct_mistakes(self.name, self.direct)
        if self.role == "client":
            mistakes += _beyond_a_client(self.forward or ())
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _denied(self) -> Iterator[str]:
        """Ports that this file both denies and offers."""
        offered = dict.fromkeys(self.expose, "is in expose, too")
        if self.role == "head":
            services = ("port", "dashboard_port", "client_port")
            offered |= {getattr(self.ray, key): f"is ray.{key}" for key in services}
        for port in self.network.deny:
            if port in offered:
                yield f"network.deny = [{port}]: must not name this port, which {offered[port]}"

    def _collisions(self) -> Iterator[str]:
        """Ports of this file that two things would listen on."""
        seen: dict[object, str] = {}
        ports = {
            "ray.port": self.ray.port,
            "ray.dashboard_port": self.ray.dashboard_port,
            "ray.client_port": self.ray.client_port,
        }
        for key, port in ports.items():
            if port in seen:
                yield f"{key} = {port}: must differ from {seen[port]}"
            seen.setdefault(port, key)
        for index, forward in enumerate(self.forward or ()):
            key = f"forward[{index}].listen"
            if forward.listen in seen:
                yield f'{key} = "{forward.listen}": must differ from {seen[forward.listen]}'
            seen.setdefault(forward.listen, key)
        if self.forward is None:
            seen |= {forward.listen: "the default [[forward]]" for forward in self.forwards}
        for key, own in (
            ("client.dashboard_port", self.client.dashboard_port),
            ("client.client_port", self.client.client_port),
            ("client.page_port", self.client.page_port),
        ):
            if own is not None and (place := f"127.0.0.1:{own}") in seen:
                yield f"{key} = {own}: must differ from {seen[place]}"
            seen.setdefault(f"127.0.0.1:{own}", key)
        for key, listen in (
            ("metrics.listen", self.metrics.listen),
            ("page.listen", self.page.listen),
        ):
            if listen in seen:
                yield f'{key} = "{listen}": must differ from {seen[listen]}'
            seen.setdefault(listen, key)

    @property
    def path(self) -> Path:
        """The file this came from."""
        return self._path

    @property
    def hub_socket(self) -> Path:
        """Of a head: where the hub listens."""
        return self.hub.socket or self.runtime_dir / "hub.sock"

    @property
    def link_socket(self) -> Path:
        """Of a worker that is dialled: where it waits."""
        return self.runtime_dir / "link.sock"

    @property
    def peers_socket(self) -> Path:
        """Of a worker: where lanes of other workers arrive."""
        return self.runtime_dir / "peers.sock"

    @property
    def page_places(self) -> tuple[str, ...]:
        """Where the page may be served, the first that is free; none: it is not."""
        if self.page.listen != "auto":
            return () if self.page.listen == "off" else (self.page.listen,)
        if self.role != "head":
            return ()
        others = {forward.listen for forward in self.forwards} | {self.metrics.listen}
        ray = {self.ray.port, self.ray.dashboard_port, self.ray.client_port, *self.expose}
        near = range(PAGE_PORT, PAGE_PORT + PAGE_PORTS)
        places = (f"127.0.0.1:{port}" for port in near if port not in ray)
        return tuple(place for place in places if place not in others)

    @property
    def control_socket(self) -> Path:
        """Where `rayfwd status` asks."""
        return self.runtime_dir / CONTROL_SOCKET

    def home_environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """`env`, with HOME for what is put into a user's home: a cluster that has a name puts
        nothing there, where another's would be."""
        return {**env, "HOME": str(self.state_dir)} if self.cluster is not None else dict(env)

    @property
    def roster_file(self) -> Path:
        """Of a head: where the plan of every node is kept."""
        return self.state_dir / "roster.json"

    @property
    def plan_file(self) -> Path:
        """Of a worker: the last plan that the hub sent."""
        return self.state_dir / "plan.json"

    @property
    def worker_ports(self) -> int:
        """How many ports this node asks for workers and drivers."""
        if self.ray.worker_ports is not None:
            return self.ray.worker_ports
        cpus = self.ray.num_cpus if self.ray.num_cpus is not None else capacity.cpus()
        return default_worker_ports(cpus)

    def own_head_plan(self) -> NodePlan:
        """Of a head: its own plan, which follows from the file alone. Raises ProblemError."""
        services = {
            "gcs": self.ray.port,
            "dashboard": self.ray.dashboard_port,
            "client": self.ray.client_port,
        }
        return head_plan(
            self.name, self.hub.network, self.hub.port_base, self.worker_ports, services
        )

    @property
    def forwards(self) -> tuple[ForwardConfig, ...]:
        """The further listeners, with the role's default."""
        if self.forward is not None:
            return self.forward
        if self.role == "worker":
            port = self.ray.dashboard_port
            return (ForwardConfig(listen=f"127.0.0.1:{port}", to=f"head:{port}"),)
        return ()


INNER: dict[str, type[BaseModel]] = {"hub.dial": DialConfig, "hub.meet": MeetConfig}
"""Lists of sections within a section."""
SECTIONS: dict[str, type[BaseModel]] = {
    "log": LogConfig,
    "head": HeadConfig,
    "hub": HubConfig,
    "listeners": ListenersConfig,
    "network": NetworkConfig,
    "ray": RayConfig,
    "metrics": MetricsConfig,
    "page": PageConfig,
    "canary": CanaryConfig,
    "client": ClientConfig,
    "forward": ForwardConfig,
    "direct": DirectConfig,
}


def load(path: Path) -> Config:
    """Read and validate the file. Raises ConfigError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            path,
            ["no such file: write one (see config.example.toml), or name another with --config"],
        ) from None
    except OSError as exc:
        raise ConfigError(path, [f"cannot be read: {exc.strerror or exc}"]) from None
    except UnicodeDecodeError as exc:
        raise ConfigError(path, [f"is not UTF-8 text: see its byte {exc.start + 1}"]) from None
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(path, [f"not TOML: {exc}"]) from None
    except RecursionError:
        raise ConfigError(path, ["not TOML: it is nested too deeply"]) from None
    return parse(data, path)


def parse(data: dict[str, Any], path: Path = DEFAULT_PATH) -> Config:
    """Validate what the file holds. Raises ConfigError."""
    try:
        config = Config.model_validate(data)
    except ValidationError as exc:
        lines = [line for error in exc.errors() for line in _lines(error)]
        # The whole is looked at only once every part is good: what can be said anyway is said.
        lines += [m for m in _role_mistakes(data.get("role"), data) if m not in lines]
        raise ConfigError(path, lines) from None
    config._path = path
    return config


_OF_OTHERS: Mapping[object, Mapping[str, str]] = {
    "head": {"head": "a worker", "client": "a client", "direct": "a worker"},
    "worker": {"hub": "a head", "client": "a client"},
    "client": {
        "hub": "a head",
        "direct": "a worker",
        "expose": "a node",
        "network": "a node",
        "ray": "a node",
        "metrics": "a node",
        "page": "a node",
        "canary": "a node",
    },
}
"""Keys that a role does not have, and whose they are."""


def _role_mistakes(role: object, given: Mapping[str, object]) -> list[str]:
    others = _OF_OTHERS.get(role, {}) if isinstance(role, str) else {}
    mistakes = [
        f'{key}: belongs to {whose}, and this file has role = "{role}"'
        for key, whose in others.items()
        if key in given
    ]
    if role in ("worker", "client") and "head" not in given:
        mistakes.append(f"head: must be given on a {role}: a [head] section with ssh in it")
    return mistakes


def _beyond_a_client(forwards: Iterable[ForwardConfig]) -> Iterator[str]:
    for index, forward in enumerate(forwards):
        if forward.target()[0] != "head":
            yield f'forward[{index}].to = "{forward.to}": a client reaches the head only: head:port'


def _direct_mistakes(own: str, directs: Iterable[DirectConfig]) -> Iterator[str]:
    seen = set()
    for index, direct in enumerate(directs):
        key = f'direct[{index}].node = "{direct.node}"'
        if direct.node in {own, "head"}:
            yield f"{key}: must be another worker"
        if direct.node in seen:
            yield f"{key}: is there twice"
        seen.add(direct.node)


_ALLOWED = {
    "int_type": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": 'must be a string, as in "…"',
    "path_type": 'must be a path, as in "/…"',
    "tuple_type": "must be a list, as in […]",
    "dict_type": "must be a table, as in {name = …}",
    "model_type": "must be a section",
    "model_attributes_type": "must be a section",
}


def _lines(error: Any) -> list[str]:
    """What one of pydantic's errors says, in this file's terms."""
    kind, context = error["type"], error.get("ctx", {})
    key = _dotted(error["loc"])
    if kind == "value_error":
        message = str(context["error"])
        if not key:
            return message.splitlines()
    elif kind == "extra_forbidden":
        return [f"{key}: unknown key{_meant(error['loc'])}"]
    elif kind == "missing":
        return [
            f"{key}: must be given" + (': "head", "worker" or "client"' if key == "role" else "")
        ]
    elif kind == "tuple_type" and key in {"forward", "direct"}:
        message = f"must be a list of sections, each written [[{key}]]"
    elif kind == "literal_error":
        message = "must be " + str(context["expected"]).replace("'", '"')
    elif kind in _BOUNDS:
        bound = context[_BOUND_NAMES[kind]]
        message = f"must be {_BOUNDS[kind]} {int(bound) if bound == int(bound) else bound}"
    else:
        message = _ALLOWED.get(kind, str(error["msg"]))
    return [f"{key} = {_shown(key, error['input'])}: {message}"]


_BOUNDS = {
    "greater_than_equal": "at least",
    "greater_than": "more than",
    "less_than_equal": "at most",
    "less_than": "less than",
}
_BOUND_NAMES = {
    "greater_than_equal": "ge",
    "greater_than": "gt",
    "less_than_equal": "le",
    "less_than": "lt",
}


def _dotted(location: tuple[int | str, ...]) -> str:
    key = ""
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
        elif part != "[key]":  # pydantic's mark for the key itself
            bare = re.fullmatch(r"[A-Za-z0-9_-]+", part) is not None
            key += ("." if key else "") + (part if bare else json.dumps(part))
    return key


def _meant(location: tuple[int | str, ...]) -> str:
    """The nearest key of the same section, and where there is none all of them."""
    section: type[BaseModel] = Config
    for part in location[:-1]:
        if isinstance(part, str):
            section = INNER.get(f"hub.{part}") or SECTIONS[part]
    names = list(section.model_fields)
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; the keys here are {', '.join(names)}"


def _shown(key: str, value: object) -> str:
    """The value as TOML writes it, in short; never a secret."""
    if names_a_secret(key):
        return "[redacted]"
    if isinstance(value, (str, bool)):
        text = json.dumps(value, ensure_ascii=not str(value).isprintable())
    elif isinstance(value, dict):
        text = "{…}"
    elif isinstance(value, (list, tuple)):
        text = "[…]" if value else "[]"
    else:
        text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"
