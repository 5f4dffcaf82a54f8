"""The command line and the environment of `ray start`, by Ray version (pure).

Checked against `ray/scripts/scripts.py` and by starting Ray 2.9.3, 2.40.0 and 2.60.0.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from rayfwd.cluster.environment import library_environment
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import RayConfig
from rayfwd.ray.install import RayInstall, version_key
from rayfwd.ray.token import RayAuth
from rayfwd.system.redact import names_a_secret, redact_command

MARKER = "RAYFWD_NODE"
"""Environment variable by which our own Ray processes are known again; see `ray.process`."""

DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"

LABELS_AS_PAIRS = (2, 49)
"""From here on `--labels key=value,…` is documented; before, only JSON is sure to be read.
(Ray 2.60 still reads JSON, with a deprecation warning.)"""

TIMEOUT_MARGIN = 30.0
"""Seconds that Ray's patience outlasts `ride_through`: for redialling, and clocks that differ."""

PROBE_SECONDS = 13.0
"""A health check that nobody answers: 10 s of time-out and 3 s until the next (Ray's defaults)."""

FIRST_PROBE_SECONDS = 5.0
"""Seconds from a node's joining to its first health check (Ray's default)."""

_NOT_FOR_RAY = frozenset(
    {
        # A service manager's dealings with rayfwd itself.
        "NOTIFY_SOCKET",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
        "RAYFWD_KEEPER",
        "LISTEN_PID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "JOURNAL_STREAM",
        "SYSTEMD_EXEC_PID",
        "MANAGERPID",
        "MAINPID",
        "CREDENTIALS_DIRECTORY",
        "STATE_DIRECTORY",
        "RUNTIME_DIRECTORY",
        "CONFIGURATION_DIRECTORY",
        "LOGS_DIRECTORY",
        "CACHE_DIRECTORY",
        # Would send `ray start` and every driver to another cluster.
        "RAY_ADDRESS",
        MARKER,
    }
)

AUTH_NAMES = frozenset({"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"})
"""What rayfwd decides where it decides on Ray's token; the first that is set wins in Ray."""


@dataclass(frozen=True, slots=True)
class RayPlan:
    """What Ray is to be on a node: as the cluster's plan has it, and the node's configuration."""

    own: NodePlan
    head: NodePlan
    ray: RayConfig
    ride_through: float
    """Seconds that Ray's time-outs must outlast."""
    network: str
    interface: str | None = None
    """The overlay's, which has the node's address; None: the node has no overlay."""


def start_command(plan: RayPlan, install: RayInstall) -> list[str]:
    """The argument list that starts this node and stays in front (`--block`)."""
    return [install.command, *_arguments(plan, install, block=True)]


def start_environment(
    plan: RayPlan, base_env: Mapping[str, str], auth: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment for Ray: `base_env` without what is rayfwd's own, and our additions.

    `auth` is what `rayfwd.ray.token.environment` says. What the user says in `ray.env` wins over
    everything.
    """
    left_out = _NOT_FOR_RAY | (AUTH_NAMES if auth else frozenset())
    env = {name: value for name, value in base_env.items() if name not in left_out}
    libraries = library_environment(plan.own.address, plan.interface, env)
    return env | libraries | _additions(plan, base_env, auth)


def by_hand(
    plan: RayPlan, install: RayInstall | None = None, auth: Mapping[str, str] | None = None
) -> str:
    """One shell line that starts this node in the background, for whoever runs Ray by hand.

    Without `install` the flags are those of the newest Ray known. A value of `ray.env` whose name
    says that it is secret appears as a reference to the caller's own variable.
    """
    additions = library_environment(plan.own.address, plan.interface, {})
    additions |= _additions(plan, {}, auth)
    assignments = [
        f'{name}="${name}"' if names_a_secret(name) else f"{name}={shlex.quote(value)}"
        for name, value in sorted(additions.items())
    ]
    command = install.command if install else plan.ray.command
    return " ".join(
        [
            "env",
            *assignments,
            _quoted_command(command),
            *map(shlex.quote, redact_command(_arguments(plan, install, block=False))),
        ]
    )


def timeouts(ride_through: float) -> dict[str, str]:
    """Ray's time-outs for a link that may be down for `ride_through` seconds (source: Ray's
    `ray_config_def.h`; names checked in the binaries of 2.9.3, 2.40.0 and 2.60.0).

    Every node needs them, since each side of a connection decides for itself. With
    T = ride_through + 30 s:

    - the GCS declares a node dead after `health_check_failure_threshold` probes without an
      answer. While the link is down its streams are held, so a probe fails by its time-out
      (10 s) and the next follows 3 s later: T / 13 s probes, rounded up, and at least Ray's 5.
      Time-out and period stay Ray's own, so that a node that is really gone, whose port refuses
      at once, is noticed in 3 s a probe;
    - a raylet or worker that has not reached the GCS for `gcs_rpc_server_reconnect_timeout_s`
      exits: T, at least Ray's 60 s;
    - gRPC pings idle connections and closes one whose ping is not answered within
      `grpc_keepalive_timeout_ms` (server side, 20 s) and `grpc_client_keepalive_timeout_ms`
      (client side, 120 s): T. gRPC sets the same time as TCP_USER_TIMEOUT, after which the kernel
      drops a connection whose peer takes no more data.
    """
    timeout = ride_through + TIMEOUT_MARGIN
    return {
        "RAY_health_check_failure_threshold": str(_probes(ride_through)),
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(max(60, math.ceil(timeout))),
        "RAY_grpc_keepalive_timeout_ms": str(max(20_000, math.ceil(timeout * 1000))),
        "RAY_grpc_client_keepalive_timeout_ms": str(max(120_000, math.ceil(timeout * 1000))),
    }


def _probes(ride_through: float) -> int:
    """Health checks without an answer after which the GCS declares a node dead."""
    return max(5, math.ceil((ride_through + TIMEOUT_MARGIN) / PROBE_SECONDS))


def given_up_after(ride_through: float) -> float:
    """Seconds, at the most, from a node's joining until the GCS declares it dead where it does not
    reach it: every probe lasts as long as it may, as on a connection that stands and is swallowed.

    (Where no connection was ever made, all but the first fail at once: 15 s, and 3 s a probe; seen
    with 2.60.0, 29 s with a `ride_through` of 20 s, 162 s with 600 s.)
    """
    return FIRST_PROBE_SECONDS + _probes(ride_through) * PROBE_SECONDS


def digest(plan: RayPlan, auth: RayAuth | None = None) -> str:
    """Tells whether a running Ray was started from the same plan and the same configuration.

    Made of what goes in, not of the finished command, so that it can be had while `ray` itself is
    missing. What does not reach Ray (the head's name, how often its status is read) is left out.
    """
    told = plan.ray.model_dump(
        mode="json", exclude={"status_interval", "advertise", "advertise_check", "auth"}
    )
    parts = {
        # Whether there is an interface says the level.
        "own": {k: v for k, v in plan.own.to_wire().items() if k != "level"},
        "head": [plan.head.address, dict(plan.head.head_services)],
        "ray": told,
        "timeouts": timeouts(plan.ride_through),
        "network": plan.network,
    }
    if auth is not None and auth.mode == "token":
        parts["auth"] = auth.fingerprint
    if plan.interface is not None:
        parts["interface"] = plan.interface
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _arguments(plan: RayPlan, install: RayInstall | None, block: bool) -> list[str]:
    own, head, ray = plan.own, plan.head, plan.ray
    version = version_key(install.versions.ray) if install else LABELS_AS_PAIRS
    services = own.services
    last_worker_port = own.last_worker_port
    words = ["start"]
    if own.role == "head":
        words += [
            "--head",
            f"--port={services['gcs']}",
            # With its default host, workers' agents would post to themselves.
            f"--dashboard-host={own.address}",
            f"--dashboard-port={services['dashboard']}",
            f"--ray-client-server-port={services['client']}",
            "--include-dashboard=true",
        ]
        if install and "--dashboard-grpc-port" in install.flags:
            # Of older Rays: agents report events to it, on a random port unless told. The block
            # has no place of its own for it, so it takes the last worker port.
            words.append(f"--dashboard-grpc-port={last_worker_port}")
            last_worker_port -= 1
        if "RAY_USAGE_STATS_ENABLED" not in ray.env:
            words.append("--disable-usage-stats")
    else:
        words.append(f"--address={head.address}:{head.services['gcs']}")
        # Ray counts these two on workers too when it looks for ports used twice, by default as
        # 8265 and 10001, which may lie in this node's block; the head's never do.
        words += [
            f"--dashboard-port={head.services['dashboard']}",
            f"--ray-client-server-port={head.services['client']}",
        ]
    words += [
        f"--node-ip-address={own.address}",
        f"--node-manager-port={services['node_manager']}",
        f"--object-manager-port={services['object_manager']}",
        f"--dashboard-agent-listen-port={services['dashboard_agent_http']}",
        f"--dashboard-agent-grpc-port={services['dashboard_agent_grpc']}",
        f"--metrics-export-port={services['metrics_export']}",
        f"--runtime-env-agent-port={services['runtime_env_agent']}",
        f"--min-worker-port={own.first_worker_port}",
        f"--max-worker-port={last_worker_port}",
    ]
    if ray.num_cpus is not None:
        words.append(f"--num-cpus={ray.num_cpus}")
    if ray.num_gpus is not None:
        words.append(f"--num-gpus={ray.num_gpus}")
    if ray.resources:
        words.append(f"--resources={json.dumps(ray.resources, sort_keys=True)}")
    if ray.labels:
        words.append(f"--labels={_labels(ray.labels, version)}")
    if ray.object_store_memory is not None:
        words.append(f"--object-store-memory={ray.object_store_memory}")
    if block:
        words.append("--block")
    return [*words, *ray.extra_args]


def _labels(labels: Mapping[str, str], version: tuple[int, ...]) -> str:
    if version >= LABELS_AS_PAIRS:
        return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
    return json.dumps(labels, sort_keys=True)


def no_proxy(network: str, address: str, base_env: Mapping[str, str]) -> dict[str, str]:
    """Ray's HTTP clients (jobs, state, dashboard) honour http_proxy, and no proxy reaches these
    addresses. Some clients read the one spelling, some the other; only some know CIDR."""
    added = {}
    ours = ["localhost", "127.0.0.1", network, address]
    for name in ("NO_PROXY", "no_proxy"):
        given = base_env.get(name) or base_env.get(name.swapcase()) or ""
        listed = [part.strip() for part in given.split(",") if part.strip()]
        added[name] = ",".join([*listed, *(o for o in ours if o not in listed)])
    return added


def _additions(
    plan: RayPlan, base_env: Mapping[str, str], auth: Mapping[str, str] | None = None
) -> dict[str, str]:
    own = plan.own
    added = timeouts(plan.ride_through) | no_proxy(plan.network, own.address, base_env)
    if own.role == "head":
        added["AUTOSCALER_METRIC_PORT"] = str(own.services["autoscaler_metrics"])
        added["DASHBOARD_METRIC_PORT"] = str(own.services["dashboard_metrics"])
        # Ray Client's proxy forks a server for each client while its gRPC threads run; gRPC's fork
        # handlers then now and then kill the child, and `ray.init("ray://…")` fails with "Starting
        # Ray client server failed" (ray-project/ray#63202; seen in 2 of 100 without this).
        if "GRPC_ENABLE_FORK_SUPPORT" not in base_env:
            added["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    added["RAY_USAGE_STATS_ENABLED"] = "0"
    return added | dict(auth or {}) | plan.ray.env


def _quoted_command(command: str) -> str:
    """`~` must stay outside the quotes for the shell to expand it."""
    if command.startswith("~/"):
        return "~/" + shlex.quote(command[2:])
    return shlex.quote(command)
