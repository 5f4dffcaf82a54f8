"""A program whose clock is wrong: libfaketime (Debian package faketime) shifts what it is told."""

from __future__ import annotations

from pathlib import Path

LIBRARY = "*/faketime/libfaketime.so.1"
"""Below /usr/lib; the first part is the architecture."""


def missing() -> str | None:
    """Why no clock can be shifted; None: it can."""
    if _library() is None:
        return "a clock that is wrong needs libfaketime (Debian package faketime)"
    return None


def shifted(seconds: float) -> list[str]:
    """What becomes the command after it, with the time of day so many seconds ahead.

    Inside the machine, and without `faketime` itself: that would stay as the command's parent, and
    keep signals from it. How long something takes is measured as ever.
    """
    settings = {
        "LD_PRELOAD": str(_library()),
        "FAKETIME": f"{seconds:+.1f}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    return ["env", *(f"{name}={value}" for name, value in settings.items())]


def _library() -> Path | None:
    return next(iter(sorted(Path("/usr/lib").glob(LIBRARY))), None)
