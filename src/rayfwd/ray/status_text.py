"""Has the text that `ray status` prints, and reads it.

The text is made for people, by the monitor process on the head every 5 seconds; it can be stale,
so its time stamp is part of what is read. The dashboard gives the same text as the command, at once
and for nothing. Recorded outputs of several versions are in `tests/fixtures/ray_status/`.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from rayfwd import codes
from rayfwd.problems import ProblemError
from rayfwd.ray import dashboard as ray_dashboard
from rayfwd.system import children
from rayfwd.transport.endpoints import Endpoint

STATUS_TIMEOUT = 30.0
"""Seconds for one call, which costs about one second of CPU."""

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}

_HEADER = re.compile(r"^=+ Autoscaler status: (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?) =+$")
_USAGE = re.compile(r"^([\d.]+)([KMGTP]i?B|B)?/([\d.]+)([KMGTP]i?B|B)? (\S.*?)(?: \(.*\))?$")
_COUNT = re.compile(r"^(\d+) (\S+)")


@dataclass(frozen=True, slots=True)
class RayStatus:
    """What `ray status` said."""

    as_of: float | None
    """Seconds since the epoch; None: the monitor has not reported yet."""
    totals: dict[str, tuple[float, float]]
    """Resource to used and total; memory in bytes."""
    active: tuple[str, ...]
    """Kinds of nodes that it counts as active or idle. Without an autoscaler every node is a kind
    of its own, `node_` and its id."""
    pending: int
    failed: int


def parse(text: str) -> RayStatus:
    """Read the text of Ray 2.9 to 2.60. "No cluster status" gives a status without a time.

    Raises ValueError for anything else.
    """
    as_of: float | None = None
    totals: dict[str, tuple[float, float]] = {}
    active: list[str] = []
    counts = {"Pending": 0, "Recent failures": 0}
    section = ""
    for raw in text.splitlines():
        line = raw.strip()
        if match := _HEADER.match(line):
            as_of = datetime.fromisoformat(match[1]).timestamp()  # Ray prints local time
        elif line.endswith(":") and not raw.startswith(" "):
            section = line[:-1]
        elif section in ("Usage", "Total Usage") and (match := _USAGE.match(line)):
            used, used_unit, total, total_unit, name = match.groups()
            totals[name] = (_amount(used, used_unit), _amount(total, total_unit))
        elif section in ("Active", "Idle") and (match := _COUNT.match(line)):
            active += [match[2]] * int(match[1])
        elif section in ("Pending", "Recent failures") and line and not line.startswith("("):
            counts[section] += 1
        elif not line:
            section = ""
    if as_of is None and "No cluster status" not in text:
        raise ValueError(f"not the output of ray status: {text[:200]!r}")
    return RayStatus(as_of, totals, tuple(active), counts["Pending"], counts["Recent failures"])


async def fetch(dashboard: Endpoint, token: str | None = None) -> RayStatus | None:
    """Ask the head's dashboard. None: it does not say (yet, or with Ray's second autoscaler); `ask`
    may know more."""
    try:
        return await asyncio.to_thread(_read, dashboard, token)
    except (OSError, http.client.HTTPException, ValueError):
        return None


def _read(dashboard: Endpoint, token: str | None) -> RayStatus:
    """The text's own time is the dashboard's local one, and that Ray may have been started by hand,
    in another zone than ours."""

    def said(query: str) -> Any:
        body = ray_dashboard.get(dashboard, f"/api/cluster_status{query}", token)
        return json.loads(body)["data"]["clusterStatus"]

    try:
        as_of = float(said("")["time"])
        return replace(parse(said("?format=1")), as_of=as_of)
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"not a cluster status: {exc!r}") from exc


async def ask(command: str, gcs_address: str, env: Mapping[str, str]) -> RayStatus:
    """Run `command status`. Raises ProblemError (ray_status_failed)."""
    try:
        ran = await children.run(
            command, "status", f"--address={gcs_address}", seconds=STATUS_TIMEOUT, env=env
        )
    except TimeoutError:
        raise _failed(f"no answer from {gcs_address} in {STATUS_TIMEOUT:.0f} s") from None
    except OSError as exc:
        raise _failed(f"{command} cannot be started: {exc}") from None
    if ran.code != 0:
        raise _failed(f"exit code {ran.code}: {ran.last_line or 'no output'}")
    try:
        return parse(ran.out.decode(errors="replace"))
    except ValueError as exc:
        raise _failed(str(exc)) from None


def _failed(cause: str) -> ProblemError:
    return codes.RAY_STATUS_FAILED.error(
        f"`ray status`: {cause}",
        "check that the head's Ray is up; rayfwd asks again by itself",
    )


def _amount(number: str, unit: str | None) -> float:
    return float(number) * (_UNITS.get(unit, 1) if unit else 1)
