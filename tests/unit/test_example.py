"""config.example.toml: it loads, it has every key, and every default it shows holds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from rayfwd.cluster.plan import default_worker_ports
from rayfwd.config import INNER, SECTIONS, Config, parse

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"

# Keys whose default is not a value that could be written: what the example shows stands for it.
# Each must be explained by the word "default" in its comment.
FOUND_AT_RUN_TIME = {
    "name",
    "cluster",
    "state_dir",
    "stop_timeout",
    "runtime_dir",
    "head.identity",
    "head.known_hosts",
    "head.ssh_config",
    "hub.socket",
    "hub.dial.name",
    "hub.dial.identity",
    "hub.dial.known_hosts",
    "hub.dial.ssh_config",
    "head.meet",
    "hub.meet.identity",
    "hub.meet.known_hosts",
    "hub.meet.ssh_config",
    "ray.num_cpus",
    "ray.num_gpus",
    "ray.object_store_memory",
    "ray.worker_ports",
    "ray.advertise",
    "metrics.listen",
    "client.dashboard_port",
    "client.client_port",
    "client.page_port",
    "direct.identity",
    "direct.known_hosts",
    "direct.ssh_config",
}
REQUIRED = {"role", "head.ssh", "hub.dial.ssh", "hub.meet.ssh", "direct.node", "direct.ssh"}


def uncommented(text: str) -> str:
    return re.sub(r"(?m)^#(?=\[|[a-z_]+ = )", "", text)


def without(text: str, *sections: str) -> str:
    for name in sections:
        text = re.sub(rf"(?ms)^\[+{re.escape(name)}\].*?(?=^\[|\Z)", "", text)
    return text


def head_variant(text: str) -> str:
    everything = uncommented(text).replace('role = "worker"', 'role = "head"')
    return re.sub(r"(?m)^advertise = .*\n", "", without(everything, "head", "client", "direct"))


def worker_variant(text: str) -> str:
    return without(uncommented(text), "hub", "hub.dial", "hub.meet", "client")


def client_variant(text: str) -> str:
    everything = uncommented(text).replace('role = "worker"', 'role = "client"')
    everything = everything.replace("127.0.0.1:8265", "127.0.0.1:8000")
    hub = ("hub", "hub.dial", "hub.meet")
    nodes = without(everything, *hub, "network", "ray", "metrics", "page", "canary", "direct")
    return re.sub(r"(?m)^expose = .*\n", "", nodes)


def keys_of(data: dict[str, Any]) -> dict[str, Any]:
    """Dotted key to value, sections taken apart."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        if key in {"forward", "direct"}:
            out |= {f"{key}.{k}": v for k, v in value[0].items()}
        elif key in SECTIONS:
            for inner in (name for name in INNER if name.startswith(f"{key}.")):
                (row,) = value.pop(inner.rpartition(".")[2])
                out |= {f"{inner}.{k}": v for k, v in row.items()}
            out |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            out[key] = value
    return out


def model_fields() -> dict[str, tuple[type[BaseModel], str]]:
    out: dict[str, tuple[type[BaseModel], str]] = {}
    for name in Config.model_fields:
        if name in SECTIONS:
            section = SECTIONS[name]
            fields = (field for field in section.model_fields if f"{name}.{field}" not in INNER)
            out |= {f"{name}.{field}": (section, field) for field in fields}
        else:
            out[name] = (Config, name)
    for inner, section in INNER.items():
        out |= {f"{inner}.{field}": (section, field) for field in section.model_fields}
    return out


def test_it_loads_as_given_for_a_worker() -> None:
    config = parse(tomllib.loads(EXAMPLE.read_text()))
    assert config.role == "worker"
    assert config.ray == type(config.ray)()


@pytest.mark.parametrize("variant", [worker_variant, head_variant, client_variant])
def test_it_loads_with_every_key_given(variant: Any) -> None:
    parse(tomllib.loads(variant(EXAMPLE.read_text())))


def test_it_has_every_key_and_no_other() -> None:
    shown = keys_of(tomllib.loads(uncommented(EXAMPLE.read_text())))
    assert shown.keys() == model_fields().keys()


@pytest.mark.parametrize("key", sorted(model_fields().keys() - REQUIRED - FOUND_AT_RUN_TIME))
def test_every_default_shown_is_the_models(key: str) -> None:
    shown = keys_of(tomllib.loads(uncommented(EXAMPLE.read_text())))[key]
    if key.startswith("forward."):  # the default of the whole list
        worker = parse({"role": "worker", "name": "w", "head": {"ssh": "h"}})
        assert shown == getattr(worker.forwards[0], key.removeprefix("forward."))
        return
    section, field = model_fields()[key]
    default = section.model_fields[field].default
    as_toml = list(default) if isinstance(default, tuple) else default
    assert shown == (str(default) if isinstance(default, Path) else as_toml)
    assert type(shown) is not bool or shown is default


def test_every_key_has_a_line_of_why() -> None:
    for line in EXAMPLE.read_text().splitlines():
        match = re.match(r"#?([a-z_]+) = (.*)$", line)
        if match:
            assert re.search(r"\s# \S.{8,}$", line), line


def test_defaults_found_at_run_time_are_explained() -> None:
    section, lines = "", {}
    for line in EXAMPLE.read_text().splitlines():
        if header := re.match(r"#?\[+([a-z.]+)\]", line):
            section = f"{header[1]}."
        if key := re.match(r"#?([a-z_]+) = ", line):
            lines[section + key[1]] = line
    for name in FOUND_AT_RUN_TIME:
        assert "default: " in lines[name], lines[name]


def test_worker_ports_shown_are_those_of_the_cpus_shown() -> None:
    shown = keys_of(tomllib.loads(uncommented(EXAMPLE.read_text())))
    assert shown["ray.worker_ports"] == default_worker_ports(shown["ray.num_cpus"])
