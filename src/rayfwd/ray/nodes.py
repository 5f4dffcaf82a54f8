"""Reads the node table from the dashboard's state API (Ray 2.9 to 2.60)."""

from __future__ import annotations

import asyncio
import http.client
import json
from dataclasses import dataclass
from typing import Any

from rayfwd import codes
from rayfwd.ray import dashboard as ray_dashboard
from rayfwd.transport.endpoints import Endpoint

MOST_NODES = 10_000
"""The most that the API gives at once (`ray.util.state.common.RAY_MAX_LIMIT_FROM_API_SERVER`)."""


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """A row of the node table."""

    node_id: str
    address: str
    is_head: bool
    state: str
    """ALIVE or DEAD."""
    resources_total: dict[str, float]
    started: float | None = None
    """Seconds since the epoch; None: not told."""
    ended: float | None = None
    """Likewise, of a node that is DEAD."""
    message: str | None = None
    """Why it is in this state (2.40 and later)."""


async def fetch(dashboard: Endpoint, token: str | None = None) -> list[NodeSeen]:
    """Ask the head's dashboard. Raises ProblemError (ray_nodes_failed).

    `token` is Ray's own.
    """
    try:
        return await asyncio.to_thread(_read, dashboard, token)
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise codes.RAY_NODES_FAILED.error(
            f"the node table at http://{dashboard} could not be read: {exc}",
            "check that the head's dashboard is up (dashboard.log in Ray's session directory); "
            "rayfwd asks again by itself",
        ) from None


async def no_answer(dashboard: Endpoint, seconds: float) -> str | None:
    """Why nobody answers HTTP there, a refusal for want of a token included; None: somebody does.

    It is waited for so many `seconds`.
    """
    try:
        await asyncio.to_thread(_ask_version, dashboard, seconds)
    except (OSError, http.client.HTTPException) as exc:
        return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    return None


def _ask_version(dashboard: Endpoint, seconds: float) -> None:
    connection = http.client.HTTPConnection(*dashboard, timeout=seconds)
    try:
        connection.request("GET", "/api/version", headers={"User-Agent": "rayfwd"})
        connection.getresponse()
    finally:
        connection.close()


def parse(answer: Any) -> list[NodeSeen]:
    """The rows of `GET /api/v0/nodes`. Raises ValueError for anything else."""
    try:
        if not answer["result"]:
            raise ValueError(f"the dashboard refused: {str(answer['msg'])[:200]}")
        rows = answer["data"]["result"]["result"]
        return [
            NodeSeen(
                node_id=str(row["node_id"]),
                address=str(row["node_ip"]),
                is_head=bool(row["is_head_node"]),
                state=str(row["state"]),
                resources_total={str(k): float(v) for k, v in row["resources_total"].items()},
                started=_seconds(row.get("start_time_ms")),
                ended=_seconds(row.get("end_time_ms")),
                message=str(row["state_message"]) if row.get("state_message") else None,
            )
            for row in rows
        ]
    except (KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise ValueError(f"not a node table: {exc!r}") from exc


def _seconds(milliseconds: Any) -> float | None:
    return milliseconds / 1000 if isinstance(milliseconds, int) and milliseconds > 0 else None


def _read(dashboard: Endpoint, token: str | None) -> list[NodeSeen]:
    path = f"/api/v0/nodes?detail=true&limit={MOST_NODES}"
    return parse(json.loads(ray_dashboard.get(dashboard, path, token)))
