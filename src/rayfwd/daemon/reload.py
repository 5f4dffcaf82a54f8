"""What a changed file changes in a daemon that runs (pure).

`LIVE` are the keys that take effect without a break. Every other key reaches Ray, the link or the
places where things lie: it is named, and kept as it was until the daemon is started again.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from rayfwd.config import Config

LIVE = frozenset(
    {
        "log.level",
        "log.format",
        "forward",
        "expose",
        "listeners.users",
        "ray.status_interval",
        "metrics.listen",
        "page.listen",
        "canary.enabled",
        "canary.interval",
        "canary.timeout",
    }
)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """Keys are dotted, in the order of the file's model."""

    config: Config
    """What holds from now on."""
    changed: tuple[str, ...]
    kept: tuple[str, ...]
    """What the file has otherwise, and needs a restart."""


def merge(old: Config, new: Config) -> Reloaded:
    """The old configuration with what `new` has of `LIVE`."""
    changed: list[str] = []
    kept: list[str] = []
    updates: dict[str, object] = {}
    for name in Config.model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            inside: dict[str, object] = {}
            for key in type(before).model_fields:
                if getattr(before, key) != (value := getattr(after, key)):
                    dotted = f"{name}.{key}"
                    if dotted in LIVE:
                        changed.append(dotted)
                        inside[key] = value
                    else:
                        kept.append(dotted)
            updates[name] = before.model_copy(update=inside)
        elif before != after:
            if name in LIVE:
                changed.append(name)
                updates[name] = after
            else:
                kept.append(name)
    return Reloaded(old.model_copy(update=updates), tuple(changed), tuple(kept))
