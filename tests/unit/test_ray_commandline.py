"""The command line and the environment of `ray start`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest

from rayfwd.cluster.plan import NodePlan, allocate, head_plan
from rayfwd.config import RayConfig
from rayfwd.ray import commandline
from rayfwd.ray.commandline import RayPlan
from rayfwd.ray.install import RayInstall, Versions

NETWORK = "127.77.0.0/16"
HEAD = head_plan("h", NETWORK, 20000, 70, {"gcs": 6379, "dashboard": 8265, "client": 10001})
WORKER = allocate([HEAD], "w", NETWORK, 20000, 70, None)


def install(version: str, *flags: str) -> RayInstall:
    return RayInstall(
        "/env/bin/ray", "/env/bin/python", Versions(version, "3.11.7"), frozenset(flags)
    )


def plan(own: NodePlan, ray: RayConfig | None = None, ride_through: float = 120.0) -> RayPlan:
    return RayPlan(own, HEAD, ray or RayConfig(), ride_through, NETWORK)


def flags(command: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").partition("=")[::2] for word in command[2:])


def test_head() -> None:
    command = commandline.start_command(plan(HEAD), install("2.60.0"))
    assert command[:3] == ["/env/bin/ray", "start", "--head"]
    assert flags(command) == {
        "head": "",
        "port": "6379",
        "dashboard-host": "127.77.0.1",
        "dashboard-port": "8265",
        "ray-client-server-port": "10001",
        "include-dashboard": "true",
        "disable-usage-stats": "",
        "node-ip-address": "127.77.0.1",
        "node-manager-port": "20000",
        "object-manager-port": "20001",
        "dashboard-agent-listen-port": "20002",
        "dashboard-agent-grpc-port": "20003",
        "metrics-export-port": "20004",
        "runtime-env-agent-port": "20005",
        "min-worker-port": "20008",
        "max-worker-port": "20077",
        "block": "",
    }


def test_worker_names_the_heads_ports_for_what_ray_counts_on_workers_too() -> None:
    command = commandline.start_command(plan(WORKER), install("2.60.0"))
    given = flags(command)
    assert given["address"] == "127.77.0.1:6379"
    assert given["node-ip-address"] == "127.77.0.2"
    assert (given["dashboard-port"], given["ray-client-server-port"]) == ("8265", "10001")
    assert given["min-worker-port"] == "20086"
    assert not given.keys() & {"head", "port", "include-dashboard", "disable-usage-stats"}


def test_an_older_head_takes_its_last_worker_port_for_the_dashboards_grpc() -> None:
    old = install("2.9.3", "--dashboard-grpc-port")
    given = flags(commandline.start_command(plan(HEAD), old))
    assert (given["dashboard-grpc-port"], given["max-worker-port"]) == ("20077", "20076")
    given = flags(commandline.start_command(plan(WORKER), old))
    assert "dashboard-grpc-port" not in given
    assert given["max-worker-port"] == str(WORKER.last_worker_port)


@pytest.mark.parametrize(
    ("version", "labels"),
    [
        ("2.9.3", '{"disk": "ssd", "zone": "a"}'),
        ("2.48.1", '{"disk": "ssd", "zone": "a"}'),
        ("2.49.0", "disk=ssd,zone=a"),
        ("2.60.0", "disk=ssd,zone=a"),
    ],
)
def test_labels_as_the_version_reads_them(version: str, labels: str) -> None:
    ray = RayConfig(labels={"zone": "a", "disk": "ssd"})
    given = flags(commandline.start_command(plan(WORKER, ray), install(version)))
    assert given["labels"] == labels


def test_what_the_node_has_and_further_arguments_come_last() -> None:
    ray = RayConfig(
        num_cpus=0,
        num_gpus=2,
        resources={"tape": 1.5},
        object_store_memory=100_000_000,
        extra_args=("--node-manager-port=1", "--verbose"),
    )
    command = commandline.start_command(plan(WORKER, ray), install("2.60.0"))
    given = flags(command[:-2])
    assert (given["num-cpus"], given["num-gpus"]) == ("0", "2")
    assert given["resources"] == '{"tape": 1.5}'
    assert given["object-store-memory"] == "100000000"
    assert command[-2:] == ["--node-manager-port=1", "--verbose"]


def test_environment_keeps_what_is_the_services_own_from_ray() -> None:
    base = {
        "PATH": "/bin",
        "NOTIFY_SOCKET": "/run/n",
        "WATCHDOG_USEC": "1",
        "LISTEN_FDS": "1",
        "INVOCATION_ID": "i",
        "RAY_ADDRESS": "elsewhere:6379",
        "RAYFWD_NODE": "another",
        "no_proxy": "example.org, 127.0.0.1",
    }
    env = commandline.start_environment(plan(HEAD, RayConfig(env={"X": "1"})), base)
    assert not env.keys() & {
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "LISTEN_FDS",
        "RAY_ADDRESS",
        "RAYFWD_NODE",
    }
    assert (env["PATH"], env["INVOCATION_ID"], env["X"]) == ("/bin", "i", "1")
    assert env["NO_PROXY"] == env["no_proxy"]
    assert env["no_proxy"] == "example.org,127.0.0.1,localhost,127.77.0.0/16,127.77.0.1"
    assert env["AUTOSCALER_METRIC_PORT"] == "20006"
    assert env["DASHBOARD_METRIC_PORT"] == "20007"
    assert env["RAY_USAGE_STATS_ENABLED"] == "0"
    assert "AUTOSCALER_METRIC_PORT" not in commandline.start_environment(plan(WORKER), base)


def test_the_head_spares_ray_clients_proxy_from_grpcs_fork_handlers() -> None:
    def set_to(own: NodePlan, ray: RayConfig, base: dict[str, str]) -> str | None:
        env = commandline.start_environment(plan(own, ray), base)
        return env.get("GRPC_ENABLE_FORK_SUPPORT")

    name = "GRPC_ENABLE_FORK_SUPPORT"
    assert set_to(HEAD, RayConfig(), {}) == "0"
    assert set_to(WORKER, RayConfig(), {}) is None
    assert set_to(HEAD, RayConfig(), {name: "1"}) == "1"
    assert set_to(HEAD, RayConfig(env={name: "1"}), {}) == "1"


def test_the_users_own_time_outs_and_wish_for_usage_statistics_win() -> None:
    ray = RayConfig(env={"RAY_health_check_failure_threshold": "7", "RAY_USAGE_STATS_ENABLED": "1"})
    env = commandline.start_environment(plan(HEAD, ray, 600), {})
    assert env["RAY_health_check_failure_threshold"] == "7"
    assert env["RAY_USAGE_STATS_ENABLED"] == "1"
    command = commandline.start_command(plan(HEAD, ray), install("2.60.0"))
    assert "--disable-usage-stats" not in command


@pytest.mark.parametrize("ride_through", [5.0, 60.0, 120.0, 600.0, 86400.0])
def test_ray_is_never_less_patient_than_the_link_or_than_by_default(ride_through: float) -> None:
    given = {name: int(value) for name, value in commandline.timeouts(ride_through).items()}
    patience = given["RAY_health_check_failure_threshold"] * commandline.PROBE_SECONDS
    assert patience >= max(ride_through + commandline.TIMEOUT_MARGIN, 65)
    assert given["RAY_gcs_rpc_server_reconnect_timeout_s"] >= max(ride_through + 30, 60)
    assert given["RAY_grpc_keepalive_timeout_ms"] >= max((ride_through + 30) * 1000, 20_000)
    assert given["RAY_grpc_client_keepalive_timeout_ms"] >= max((ride_through + 30) * 1000, 120_000)


def test_by_hand_is_a_shell_line_that_says_the_same_and_gives_no_secret_away() -> None:
    ray = RayConfig(
        env={"RAY_AUTH_TOKEN": "s3cret", "NOTE": "two words"},
        resources={"tape": 1},
        extra_args=("--redis-password=s3cret", "--redis-password", "s3cret"),
    )
    line = commandline.by_hand(plan(HEAD, ray), install("2.60.0"))
    assert "s3cret" not in line
    words = shlex.split(line)
    assert words[0] == "env"
    assert "NOTE=two words" in words
    assert "RAY_AUTH_TOKEN=$RAY_AUTH_TOKEN" in words
    started = words[words.index("/env/bin/ray") :]
    whole = commandline.start_command(plan(HEAD, ray), install("2.60.0"))
    assert started[:-3] == [w for w in whole[:-3] if w != "--block"]
    assert started[-3:] == ["--redis-password=[redacted]", "--redis-password", "[redacted]"]


def test_by_hand_without_an_installed_ray() -> None:
    line = commandline.by_hand(plan(WORKER, RayConfig(command="~/env/bin/ray")))
    assert " ~/env/bin/ray start --address=127.77.0.1:6379 " in line


def changed(**changes: Any) -> str:
    return commandline.digest(replace(plan(WORKER), **changes))


def test_digest_changes_with_what_reaches_ray_and_with_nothing_else() -> None:
    other_name = NodePlan("z", "head", HEAD.address, 1, 8, False, HEAD.head_services)
    same = changed()
    assert changed(head=other_name) == same
    assert changed(ray=RayConfig(status_interval=60)) == same
    assert changed(ride_through=121.0) != same
    assert changed(ray=RayConfig(num_cpus=1)) != same
    assert changed(ray=RayConfig(env={"A": "b"})) != same
    assert changed(own=HEAD) != same
