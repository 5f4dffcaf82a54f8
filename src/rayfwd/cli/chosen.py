"""What a head without a file finds for itself: network, ports and a directory for Ray that no other
cluster of this machine has.

It is written down in the state directory, so that the head is the same when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from itertools import count
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.cli.flags import put
from rayfwd.cluster.plan import PORT_CEILING
from rayfwd.config import Config, HubConfig
from rayfwd.daemon.claim import NETWORKS, reserve
from rayfwd.ray.procfs import listening
from rayfwd.system.files import read_regular, replace_file

RECORD = "chosen.json"

PORT_BASES = (20000, 24000, 28000, 16000, 12000)
"""Where the nodes' ports may begin. Of those where nothing listens in `ROOM` ports, it is the
network's: heads that are started together have networks that follow each other."""
ROOM = 4000
SINGLE_PORTS = {"ray.port": 6379, "ray.dashboard_port": 8265, "ray.client_port": 10001}

USUAL_NETWORK = HubConfig().network

RAYS_OWN = Path("/tmp/ray")
"""Where Ray has its sessions unless told otherwise: of all clusters of a machine."""


def of_head(config: Config, given: dict[str, Any]) -> dict[str, Any]:
    """`given` and, where it says nothing of them, keys that fit beside other clusters.

    What was found is kept in the state directory, which is there. Raises ProblemError.
    """
    path = config.state_dir / RECORD
    found = _read(path)
    if found is None:
        found = _choose(config)
        try:
            replace_file(path, json.dumps(found).encode() + b"\n")
        except OSError as exc:
            raise codes.DIRECTORY_UNUSABLE.error(
                f"{path} cannot be written: {exc.strerror or exc}",
                f"make {path.parent} writable for this user, and check that its disk is not full",
            ) from exc
    return _with(given, found)


def beside(config: Config, given: dict[str, Any]) -> dict[str, Any]:
    """The same of a worker: `given` and, where it says nothing of them, what it has for itself."""
    return _with(given, apart(config, config.cluster, listening()))


def _with(given: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both; what is given wins."""
    data: dict[str, Any] = json.loads(json.dumps(given))
    for key, value in more.items():
        if not _has(given, key):
            put(data, key, value)
    return data


def _choose(config: Config) -> dict[str, Any]:
    """The network first, which is held from then on. The ports follow from it: of two heads that
    are started together neither listens yet where the other looks."""
    taken = listening()
    network = reserve() or USUAL_NETWORK
    number = _number(network)
    bases = [base for base in PORT_BASES if _is_free(base, taken)] or PORT_BASES
    base = bases[number % len(bases)]
    found: dict[str, Any] = {"hub.network": network, "hub.port_base": base}
    used = set(taken)
    for key, usual in SINGLE_PORTS.items():
        found[key] = next(p for p in count(usual + number, len(NETWORKS)) if p not in used)
        used.add(found[key])
    named = config.cluster or (network.partition("/")[0] if network != USUAL_NETWORK else None)
    return found | apart(config, named, used)


def _number(network: str) -> int:
    """Its place among those that heads without a file take."""
    return [str(each) for each in NETWORKS].index(network)


def apart(config: Config, named: str | None, used: Collection[int]) -> dict[str, Any]:
    """What a node of any role has for itself beside other clusters of the machine.

    `named`: what tells this cluster from the user's others; None: nothing need to.
    """
    found: dict[str, Any] = {}
    if (directory := temp_dir(config, named)) is not None:
        found["ray.extra_args"] = [f"--temp-dir={directory}"]
    if named is not None:
        digest = hashlib.sha256(named.encode()).hexdigest()
        found["network.interface"] = f"rayfwd-{digest[:6]}"
        found["network.port"] = next(p for p in count(config.network.port + 1) if p not in used)
    return found


def temp_dir(config: Config, named: str | None) -> str | None:
    """A directory of its own for Ray's sessions, where the usual one may be another cluster's.

    None where Ray does not run here, or the usual directory will do.
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
