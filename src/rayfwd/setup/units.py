"""The units as they are shipped: in the wheel beside this module, in a checkout in `systemd/`."""

from __future__ import annotations

from pathlib import Path

from rayfwd.places import DEFAULT_CONFIG

_BESIDE = Path(__file__).with_name("units")
_CHECKOUT = Path(__file__).parents[3] / "systemd"

SERVICE = "rayfwd.service"


def service_user(folder: Path, config: Path) -> str | None:
    """Whom the service in `folder` runs as, if it is this configuration's; None: there is none."""
    try:
        lines = (folder / SERVICE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    start = next((line for line in lines if line.startswith("ExecStart=")), "")
    if ("--config" in start) != (config != DEFAULT_CONFIG) or (
        config != DEFAULT_CONFIG and str(config) not in start
    ):
        return None
    return next((line.partition("=")[2] for line in lines if line.startswith("User=")), None)


def shipped() -> dict[str, str]:
    """Name to text. Raises FileNotFoundError in an installation without them."""
    folder = _BESIDE if _BESIDE.is_dir() else _CHECKOUT
    found = {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(folder.glob("rayfwd*"))
        if path.suffix in {".service", ".socket"}
    }
    if SERVICE not in found:
        raise FileNotFoundError(f"{folder / SERVICE}: this installation of rayfwd has no units")
    return found
