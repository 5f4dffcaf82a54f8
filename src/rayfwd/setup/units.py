"""The units as they are shipped: in the wheel beside this module, in a checkout in `systemd/`."""

from __future__ import annotations

from pathlib import Path

from rayfwd.doctor.unit_checks import SERVICE

_BESIDE = Path(__file__).with_name("units")
_CHECKOUT = Path(__file__).parents[3] / "systemd"


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
