"""The TOML file as pydantic models: its defaults, and errors that name the key.

A mistake in the file is reported as one line: the key, the value, what is allowed.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import tomllib
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

from rayfwd.places import (
    DEFAULT_CONFIG,
    default_runtime_dir,
    default_state_dir,
)
from rayfwd.plan import (
    PORT_CEILING,
    NodePlan,
    check_name,
    default_worker_ports,
    head_plan,
)

DEFAULT_PATH = DEFAULT_CONFIG

Port = Annotated[int, Field(ge=1, le=65535)]


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
        raise ValueError("must listen on an IPv4 loopback address, as in 127.0.0.1:8265") from None
    return f"{host}:{port}"


def _target(value: str) -> str:
    host, port = split_host_port(value)
    return f"{check_name(host)}:{port}"


def split_host_port(value: str) -> tuple[str, int]:
    """`host:port` as a pair. Raises ValueError with what is allowed."""
    host, colon, port = value.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("must be host:port with a port from 1 to 65535")
    return host, int(port)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class LogConfig(_Section):
    """How the daemon writes its log (standard error)."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"
    """`auto`: key=value on a terminal, JSON elsewhere."""


class HeadConfig(_Section):
    """Of a worker: how it reaches the head."""

    ssh: str
    """`user@host`, `user@host:port`, or an alias of the SSH configuration."""
    identity: Path | None = None
    known_hosts: Path | None = None
    ssh_config: Path | None = None
    socket: Path = Path("/run/rayfwd/hub.sock")
    """Where the hub listens, on the head's file system."""
    via: Literal["socket", "exec"] = "socket"
    attach_command: str = "rayfwd attach"
    """What `via = "exec"` runs on the head; a forced command there replaces it."""
    bulk_lanes: int = Field(default=1, ge=0, le=8)
    """SSH connections for bulk streams, beside the one for short messages."""

    @model_validator(mode="after")
    def _ssh_target(self) -> Self:
        self.ssh_target()
        return self

    def ssh_target(self) -> tuple[str | None, str, int | None]:
        """User, host (or alias) and port of `ssh`; None where the SSH configuration decides."""
        user, at, rest = self.ssh.rpartition("@")
        if at and not user:
            raise ValueError(f"ssh = {self.ssh!r}: the user before '@' is empty")
        host, port = rest, None
        if rest.startswith("["):
            host, _, tail = rest[1:].partition("]")
            port = _ssh_port(tail[1:]) if tail.startswith(":") else None
        elif rest.count(":") == 1:
            host, _, digits = rest.partition(":")
            port = _ssh_port(digits)
        if not host or re.search(r"[\s/]", host) or host.startswith("-"):
            raise ValueError(
                f"ssh = {self.ssh!r}: must be user@host, user@host:port or an alias of ssh_config"
            )
        return user or None, host, port


def _ssh_port(digits: str) -> int:
    if not (digits.isdigit() and 0 < int(digits) < 65536):
        raise ValueError(f"ssh: the port {digits!r} must be a number from 1 to 65535")
    return int(digits)


class HubConfig(_Section):
    """Of a head: where workers' lanes arrive, and what the plan is made of."""

    socket: Path | None = None
    """None: `hub.sock` in `runtime_dir`."""
    network: str = "127.77.0.0/16"
    port_base: int = Field(default=20000, ge=1024, lt=PORT_CEILING)
    users: tuple[str, ...] = ()
    """Login names that workers' SSH connections arrive as, beside the daemon's own and root."""

    @model_validator(mode="after")
    def _loopback_network(self) -> Self:
        try:
            network = ipaddress.IPv4Network(self.network)
        except ValueError as exc:
            raise ValueError(f"network = {self.network!r}: {exc}") from None
        if not network.subnet_of(ipaddress.IPv4Network("127.0.0.0/8")) or network.prefixlen > 29:
            raise ValueError(
                f"network = {self.network!r}: must lie in 127.0.0.0/8 and be /29 or larger"
            )
        if ipaddress.IPv4Address("127.0.0.1") in network:
            raise ValueError(
                f"network = {self.network!r}: must not contain 127.0.0.1, which Ray rewrites"
            )
        return self


class RayConfig(_Section):
    """Ray on this machine."""

    command: str = "ray"
    """The `ray` of the user's own environment: a name on PATH or a path."""
    start: bool = True
    """False: hold the forwards only, and print the command that `ray start` needs."""
    num_cpus: int | None = Field(default=None, ge=0)
    num_gpus: int | None = Field(default=None, ge=0)
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    extra_args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    object_store_memory: int | None = Field(default=None, ge=78643200)
    """Bytes; Ray's own minimum is 75 MiB."""
    worker_ports: int | None = Field(default=None, ge=8, le=10000)
    """None: 64 and three for every CPU."""
    port: Port = 6379
    dashboard_port: Port = 8265
    client_port: Port = 10001
    advertise: str | None = None
    """Of a worker that others reach directly: the IP address they use."""
    status_interval: float = Field(default=30.0, ge=5.0, le=3600.0)
    """Seconds between two looks at `ray status` (about one second of CPU each)."""

    @model_validator(mode="after")
    def _advertise_is_an_address(self) -> Self:
        if self.advertise is not None:
            try:
                address = ipaddress.IPv4Address(self.advertise)
            except ValueError:
                raise ValueError(
                    f"advertise = {self.advertise!r}: must be an IPv4 address, not a name"
                ) from None
            if address.is_loopback or address.is_unspecified or address.is_multicast:
                raise ValueError(
                    f"advertise = {self.advertise!r}: must be an address that others reach"
                )
        return self


class ForwardConfig(_Section):
    """A further door, on loopback only."""

    listen: Annotated[str, AfterValidator(_loopback_listen)]
    to: Annotated[str, AfterValidator(_target)]
    """`node:port`, where node is `head` or a node's name."""

    def listen_address(self) -> tuple[str, int]:
        return split_host_port(self.listen)

    def target(self) -> tuple[str, int]:
        return split_host_port(self.to)


class Config(_Section):
    """The whole file."""

    role: Literal["head", "worker"]
    name: Annotated[str, AfterValidator(check_name)] = Field(
        default_factory=lambda: socket.gethostname().split(".")[0]
    )
    state_dir: Path = Field(default_factory=lambda: default_state_dir(os.environ))
    runtime_dir: Path = Field(default_factory=lambda: default_runtime_dir(os.environ))
    ride_through: float = Field(default=120.0, ge=5.0, le=86400.0)
    expose: tuple[Port, ...] = ()
    """Further ports of this machine (on 127.0.0.1) that other nodes' forwards may reach."""
    log: LogConfig = LogConfig()
    head: HeadConfig | None = None
    hub: HubConfig = HubConfig()
    ray: RayConfig = RayConfig()
    forward: tuple[ForwardConfig, ...] | None = None
    """None: on a worker the dashboard at 127.0.0.1, as in the recipe; on a head nothing."""

    _path: Path = PrivateAttr(default=DEFAULT_PATH)

    @model_validator(mode="after")
    def _sections_fit_the_role(self) -> Self:
        if self.role == "worker":
            if self.head is None:
                raise ValueError('a worker needs a [head] section with ssh = "user@host" in it')
            if "hub" in self.model_fields_set:
                raise ValueError("[hub] belongs to a head; this file has role = 'worker'")
            if self.name == "head":
                raise ValueError("name = 'head': a worker cannot be called head; choose another")
        else:
            if self.head is not None:
                raise ValueError("[head] belongs to a worker; this file has role = 'head'")
            if self.ray.advertise is not None:
                raise ValueError("ray.advertise belongs to a worker; this file has role = 'head'")
        return self

    @property
    def path(self) -> Path:
        """The file this came from."""
        return self._path

    @property
    def hub_socket(self) -> Path:
        """Of a head: where the hub listens."""
        return self.hub.socket or self.runtime_dir / "hub.sock"

    @property
    def control_socket(self) -> Path:
        """Where `rayfwd status` asks."""
        return self.runtime_dir / "control.sock"

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
        cpus = self.ray.num_cpus if self.ray.num_cpus is not None else os.cpu_count() or 1
        return default_worker_ports(cpus)

    def own_head_plan(self) -> NodePlan:
        """Of a head: its own plan, which follows from the file alone. Raises PlanError."""
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
        """The further doors, with the role's default."""
        if self.forward is not None:
            return self.forward
        if self.role == "worker":
            port = self.ray.dashboard_port
            return (ForwardConfig(listen=f"127.0.0.1:{port}", to=f"head:{port}"),)
        return ()


def load(path: Path) -> Config:
    """Read and validate the file. Raises ConfigError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(path, ["no such file: write one (see config.example.toml)"]) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(path, [f"cannot be read: {exc}"]) from None
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(path, [f"not TOML: {exc}"]) from None
    return parse(data, path)


def parse(data: dict[str, Any], path: Path = DEFAULT_PATH) -> Config:
    """Validate what the file holds. Raises ConfigError."""
    try:
        config = Config.model_validate(data)
    except ValidationError as exc:
        raise ConfigError(path, [_one_line(error) for error in exc.errors()]) from None
    config._path = path
    return config


def _one_line(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if error["type"] == "missing":
        return f"{key}: must be given"
    if not key:
        return message
    if isinstance(error["input"], dict):
        return f"{key}: {message}"
    return f"{key} = {error['input']!r}: {message}"
