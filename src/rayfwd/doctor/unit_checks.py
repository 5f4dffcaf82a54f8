"""The systemd service that runs a configuration, as its unit file has it. Reads files only."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rayfwd.network.overlay_client import KEEPER as OVERLAY
from rayfwd.ray.launcher import KEEPER
from rayfwd.system.paths import DEFAULT_CONFIG

SYSTEM = Path("/etc/systemd/system")
SERVICE = "rayfwd.service"
RAY_SERVICE = "rayfwd-ray.service"
"""The one in which Ray runs, with its keeper."""
OVERLAY_SERVICE = "rayfwd-net.service"


@dataclass(frozen=True, slots=True)
class Unit:
    """Of rayfwd itself."""

    path: Path
    user: str | None
    """None: of a user's own service manager, or root."""
    has_keeper: bool
    """Ray is to run in a service of its own."""
    has_overlay: bool = False
    """The overlay has a service of its own."""

    @property
    def keeper(self) -> Path:
        """The unit of that service, there or not."""
        return self.path.with_name(RAY_SERVICE)

    @property
    def overlay(self) -> Path:
        """The unit that makes the overlay, there or not. It starts with rayfwd's own."""
        return self.path.with_name(OVERLAY_SERVICE)


def of(folder: Path, config: Path) -> Unit | None:
    """The unit in `folder`, if it runs this configuration; None: there is none, or it may not be
    read."""
    path = folder / SERVICE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    start = next((line for line in lines if line.startswith("ExecStart=")), "")
    if ("--config" in start) != (config != DEFAULT_CONFIG) or (
        config != DEFAULT_CONFIG and str(config) not in start
    ):
        return None
    user = next((line.partition("=")[2] for line in lines if line.startswith("User=")), None)
    keeper = any(line.startswith(f"Environment={KEEPER}=") for line in lines)
    overlay = any(line.startswith(f"Environment={OVERLAY}=") for line in lines)
    return Unit(path, user, keeper, overlay)


def find(config: Path, env: Mapping[str, str]) -> Unit | None:
    """The unit that runs this configuration: this user's own, or the machine's."""
    return next((unit for folder in _folders(env) if (unit := of(folder, config))), None)


def _folders(env: Mapping[str, str]) -> Iterator[Path]:
    home = Path(env.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir)
    yield home / ".config" / "systemd" / "user"
    yield SYSTEM
