"""The canary as the daemon has it: what it needs to know, and the verb that sends it."""

from __future__ import annotations

import asyncio
from typing import Any

from rayfwd.problems import ProblemError
from rayfwd.watch.canary_round import Round
from rayfwd.watch.canary_watch import Canary


class CanaryVerb:
    """`rayfwd canary`: sends it, and tells when it is back. Owns the task that waits for it."""

    def __init__(self, canary: Canary) -> None:
        self._canary = canary
        self._sent: asyncio.Task[Round] | None = None

    async def __call__(self, args: dict[str, Any]) -> dict[str, Any]:
        """`{"send": true}` sends it; `{"running": true}` until it is back. Raises ProblemError."""
        if args.get("send") and (self._sent is None or self._sent.done()):
            self._sent = asyncio.create_task(self._canary.send(), name="canary verb")
            # A mistake of the first moment, as that Ray is not up, is told at once.
            await asyncio.wait({self._sent}, timeout=0.05)
        sent = self._sent
        if sent is None:
            last = self._canary.last
            return {"running": False, "ok": None} if last is None else _answer(last)
        if not sent.done():
            return {"running": True}
        return _answer(sent.result())

    async def close(self) -> None:
        """Stop waiting for it."""
        if self._sent is not None:
            self._sent.cancel()
            try:
                await self._sent
            except (asyncio.CancelledError, ProblemError):
                pass


def _answer(done: Round) -> dict[str, Any]:
    return {"running": False, **done.to_wire()}
