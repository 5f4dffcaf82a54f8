"""How sessions and lanes look in the status."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rayfwd.mux import Mux


def mux_status(mux: Mux | None) -> list[dict[str, Any]]:
    """A session's lanes; times are wall-clock seconds, round trips milliseconds."""
    if mux is None:
        return []
    offset = time.time() - mux.now()
    rows = []
    for number, record in mux.lanes.items():
        lane = mux.session.lanes.get(number)
        if lane is None:
            continue
        rows.append(
            {
                "lane": number,
                "class": record.kind.value,
                "state": "stalled" if lane.suspect else "up",
                "rtt_ms": None if lane.rtt is None else round(lane.rtt * 1000, 3),
                "since": round(record.since + offset, 1),
                "bytes_in": lane.bytes_in,
                "bytes_out": lane.bytes_out,
            }
        )
    return rows


def streams_status(muxes: Iterable[Mux]) -> dict[str, Any]:
    """Streams and bytes of all sessions together; a stream is parked while it has no lane."""
    streams = {"open": 0, "parked": 0}
    moved = {"in": 0, "out": 0}
    for mux in muxes:
        count = max(len(mux.session.streams) - 1, 0)  # one is the control stream
        streams["open"] += count
        streams["parked"] += 0 if mux.lanes else count
        moved["in"] += mux.session.bytes_in
        moved["out"] += mux.session.bytes_out
    return {"streams": streams, "bytes": moved}
