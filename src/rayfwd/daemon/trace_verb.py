"""The verb `trace`: what goes over the lanes of this daemon for some seconds, a line a frame.

It is bounded in time, in lines, and with them in bytes: a line has at most `LINE_BYTES`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rayfwd import codes
from rayfwd.transport.tracing import Collector, tracing

MOST_SECONDS = 50
MOST_FRAMES = 20_000
LINE_BYTES = 300
"""Bytes of a line, at most: names are short, and of a message only its type is shown."""
AT_ONCE = 4
"""Traces at the same time."""


class TraceVerb:
    """Answers `rayfwd trace`; the daemon has one."""

    def __init__(self) -> None:
        self._running = 0

    async def __call__(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """`lines`: what went by, until `seconds` were over or there were `frames` lines; `peers`:
        who has a session now. Raises ProblemError."""
        collector = Collector(_whole(args, "frames", MOST_FRAMES), _peer(args))
        seconds = _whole(args, "seconds", MOST_SECONDS)
        if self._running >= AT_ONCE:
            raise codes.CONTROL_BUSY.error(
                f"{AT_ONCE} traces are running already", "try again later"
            )
        self._running += 1
        tracing.add(collector)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await collector.full.wait()
        finally:
            tracing.remove(collector)
            self._running -= 1
        return {"lines": collector.lines(), "peers": tracing.peers}


def _whole(args: Mapping[str, Any], name: str, most: int) -> int:
    value = args.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise codes.CONTROL_BAD_REQUEST.error(
            f"trace: {name} must be a whole number, 1 to {most}", f"send {name} so"
        )
    return value


def _peer(args: Mapping[str, Any]) -> str | None:
    value = args.get("peer")
    if value is not None and not isinstance(value, str):
        raise codes.CONTROL_BAD_REQUEST.error("trace: peer must be a name", "send text, or null")
    return value
