"""Logs what was left out of a message that would have been too long, once in a daemon's life."""

from __future__ import annotations

from collections.abc import Iterable

from rayfwd.session.messages import Message
from rayfwd.system.logs import get_logger

log = get_logger(__name__)


class Cuts:
    """What was logged already."""

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()

    def log(self, message: Message, left_out: Iterable[str]) -> None:
        """Something was left out of a message, in words that stay the same; or nothing was."""
        for what in left_out:
            if (message.TYPE, what) not in self._logged:
                self._logged.add((message.TYPE, what))
                log.warning("message_cut", type=message.TYPE, left_out=what)
