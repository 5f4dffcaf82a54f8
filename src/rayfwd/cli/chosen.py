"""What a head without a file finds for itself: network, ports and a directory for Ray that no other
cluster of this machine has.

It is written down in the state directory, so that the head is the same when it is started again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from itertools import count
from pathlib import Path
from typing import Any

from rayfwd.cli.flags import put
from rayfwd.cluster.plan import PORT_CEILING
from rayfwd.config import Config, HubConfig
from rayfwd.daemon.claim import free_networks
from rayfwd.ray.procfs import listening
from rayfwd.system.files import read_regular, replace_file

RECORD = "chosen.json"

PORT_BASES = (20000, 24000, 28000, 16000, 12000)
"""Where the nodes' ports may begin; the first where nothing listens in `ROOM` ports."""
ROOM = 4000
SINGLE_PORTS = {"ray.port": 6379, "ray.dashboard_port": 8265, "ray.client_port": 10001}

USUAL_NETWORK = HubConfig().network

RAYS_OWN = Path("/tmp/ray")
"""Where Ray has its sessions unless told otherwise: of all clusters of a machine."""


def of_head(config: Config, given: dict[str, Any]) -> dict[str, Any]:
    """`given` and, where it says nothing of them, keys that fit beside other clusters."""
    kept = _read(config.state_dir / RECORD)
    chosen = kept or _choose(config)
    data: dict[str, Any] = json.loads(json.dumps(given))
    for key, value in chosen.items():
        if not _has(given, key):
            put(data, key, value)
    return data


def keep(config: Config) -> None:
    """For the next time; by the daemon's own user, whose directory it is. Raises OSError."""
    path = config.state_dir / RECORD
    if _read(path) is None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, json.dumps(_of(config)).encode() + b"\n")


def _of(config: Config) -> dict[str, Any]:
    hub, ray = config.hub, config.ray
    return {
        "hub.network": hub.network,
        "hub.port_base": hub.port_base,
        "ray.port": ray.port,
        "ray.dashboard_port": ray.dashboard_port,
        "ray.client_port": ray.client_port,
        "ray.extra_args": list(ray.extra_args),
    }


def _choose(config: Config) -> dict[str, Any]:
    taken = listening()
    network = next(free_networks(), USUAL_NETWORK)
    base = next((b for b in PORT_BASES if _is_free(b, taken)), PORT_BASES[0])
    found: dict[str, Any] = {"hub.network": network, "hub.port_base": base}
    used = set(taken)
    for key, usual in SINGLE_PORTS.items():
        found[key] = next(p for p in count(usual) if p not in used)
        used.add(found[key])
    named = config.cluster or (network.partition("/")[0] if network != USUAL_NETWORK else None)
    if (directory := temp_dir(config, named)) is not None:
        found["ray.extra_args"] = [f"--temp-dir={directory}"]
    return found


def temp_dir(config: Config, named: str | None) -> str | None:
    """A directory of its own for Ray's sessions, where the usual one may be another cluster's.

    `named`: what tells this cluster from the user's others; None: nothing need to. None where Ray
    does not run here, or the usual directory will do.
    """
    if not config.ray.start or (named is None and _is_mine(RAYS_OWN)):
        return None
    return "-".join(filter(None, [str(RAYS_OWN), str(os.geteuid()), named]))


def _is_mine(path: Path) -> bool:
    """Or is not there yet."""
    try:
        return path.stat().st_uid == os.geteuid()
    except OSError:
        return True


def _is_free(base: int, taken: Collection[int]) -> bool:
    return not any(port in taken for port in range(base, min(base + ROOM, PORT_CEILING)))


def _has(given: dict[str, Any], key: str) -> bool:
    at: Any = given
    for part in key.split("."):
        if not isinstance(at, dict) or part not in at:
            return False
        at = at[part]
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(read_regular(path))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and _keys(data) else None


def _keys(data: Iterable[str]) -> bool:
    return {"hub.network", "hub.port_base", *SINGLE_PORTS} <= set(data)
